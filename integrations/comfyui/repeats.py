"""Check that a guider's answer depends only on the image and the noise level; no other model can be measured.

A workflow may hold patches that depend on the step's number, on the number of steps, or on the steps before: caches
(EasyCache, TeaCache), keyframes of hooks, context windows, guidance in some of the steps. They are detected by their
effects: the same calls are made twice, in descending order and in ascending order, the second time as if the run had
other sigmas; and the layers that the network runs are counted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastsched.denoisers.noise import NoiseProcess
from fastsched.sampling.random_streams import noise_of

#: The number of levels at which the model is called twice.
QUESTIONS = 6
#: Largest relative difference of two answers to the same question; those of 16-bit networks differ by about 1e-3, which
#: guidance amplifies.
REPEATABLE = 2e-2
#: A call that runs less than this fraction of the layers that another call runs is taken to reuse earlier results.
FEWER_LAYERS = 0.8

INSTEAD = (
    "so it cannot be measured: remove it from the MODEL that is fitted (caches, step-dependent guidance, keyframes, "
    "context windows), fit, and use the schedule with it at your own judgement"
)


def questions(process: NoiseProcess) -> Tensor:
    """The largest sampler sigma, and those at which to call the model twice, descending, [1 + QUESTIONS] float64."""
    levels = process.levels(2 * QUESTIONS)
    return process.sampler_sigma(torch.cat([levels[:1], levels[1::2]]))


def check_repeats(
    sigmas: Tensor,
    ask: Callable[[Tensor, Tensor], Tensor],
    shape: torch.Size,
    device: torch.device,
    model_options: dict[str, Any],
    images: int = 1,
) -> bool:
    """Call the model on one image twice at each of ``sigmas``, in both orders and as if in two different runs.

    Args:
        sigmas: Sampler sigmas, descending: the first of a run, and those at which to call the model.
        ask: ``ask(x, sigma)`` is the denoised image.
        shape: The shape of one sample.
        device: The device of the image.
        model_options: Options of the calls; their ``transformer_options`` hold a run's sigmas.
        images: How many images will run at once; if several, as many copies of the image are asked about too.

    Returns:
        Whether all copies get one answer; not so if the conditions of a batch differ from image to image.

    Raises:
        ValueError: If an answer differs; the message names the level.
    """
    image = noise_of(torch.tensor([0]), tuple(shape)).to(device)
    transformer = model_options.setdefault("transformer_options", {})
    given = transformer.get("sample_sigmas")
    answers, alike = dict[float, Tensor](), True
    asked = sigmas[1:]
    # The first run goes past the first question in its first step, so that what acts only in that step is found too.
    shorter = torch.cat([sigmas[:1], asked[1:]])
    try:
        for order, run in ((asked, shorter), (asked.flip(0), _longer(sigmas))):
            transformer["sample_sigmas"] = torch.cat([run, run.new_zeros(1)]).float().to(device)
            for sigma in order.tolist():
                found = ask(image * sigma, torch.full((1,), sigma, device=device))
                _compare(answers.setdefault(sigma, found), found, image * sigma, sigma)
        for sigma in asked.tolist() if images > 1 else ():  # afterwards, as some caches begin anew with another batch
            level, x = torch.full((images,), sigma, device=device), image * sigma
            first, *others = ask(x.repeat(images, *[1] * (x.ndim - 1)), level).split(1)
            alike &= not any(_difference(first, other, x) > REPEATABLE for other in others)
    finally:
        if given is not None:
            transformer["sample_sigmas"] = given
    return alike


def _longer(sigmas: Tensor) -> Tensor:
    """The sigmas of a run that has the given ones at other steps: one more follows each of them."""
    below = torch.cat([(sigmas[:-1] * sigmas[1:]).sqrt(), sigmas[-1:] / 2])
    return torch.stack([sigmas, below], dim=1).flatten()


def _difference(before: Tensor, after: Tensor, image: Tensor) -> float:
    """The difference of two answers, relative to the network's part of them.

    This is their distance from the image; at low levels an answer is nearly the image.
    """
    size = max(float((before - image).norm()), 1e-6 * float(image.norm()))
    return float((after - before).norm()) / size


def _compare(before: Tensor, after: Tensor, image: Tensor, sigma: float) -> None:
    difference = _difference(before, after, image)
    if difference > REPEATABLE:
        raise ValueError(
            f"at sigma {sigma:.4g} the model gave two answers to the same question ({difference:.0%} apart), "
            f"in different orders and numbers of steps: something in it depends on the steps, or on chance, {INSTEAD}"
        )


@contextlib.contextmanager
def layers_watched(network: Any) -> Iterator[None]:
    """Count the layers that ``network`` runs in each of its calls within the block; no effect if it is no module.

    Raises:
        ValueError: If a call ran far fewer layers than another.
    """
    if not isinstance(network, torch.nn.Module):
        yield
        return
    ran, known = [0], [0, 0]

    def layer(*_: Any) -> None:
        ran[0] += 1

    def finished(*_: Any) -> None:
        count, ran[0] = ran[0], 0
        known[:] = [min(known[0] or count, count), max(known[1], count)] if known[1] else [count, count]
        if known[0] < FEWER_LAYERS * known[1]:
            raise ValueError(
                f"the network ran {known[0]} of its layers in one call and {known[1]} in another, as with a cache "
                f"(EasyCache, TeaCache, ...), {INSTEAD}"
            )

    parts = [part for part in network.modules() if part is not network and not [*part.children()]]
    compiled = any(getattr(part, "_compiled_call_impl", None) is not None for part in network.modules())
    handles = [] if compiled else [part.register_forward_hook(layer) for part in parts]
    handles.append(network.register_forward_hook(finished))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
