"""Checks of one call of a scheduler's ``step``: that a pipeline's loop can be measured."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor

from fastsched import validate
from fastsched.denoisers.deferred_checks import DeferredChecks
from fastsched.denoisers.denoiser import Denoiser
from fastsched.denoisers.noise import NoiseProcess
from fastsched.diffusers.conventions import Convention

#: What to do about a pipeline whose loop cannot be measured.
UNMEASURABLE = "it cannot be measured by its loop; measure its network (fastsched.measure)"
INSTEAD = f"so {UNMEASURABLE}"

#: What to do about a pipeline that samples only a part of its latents, or parts of them at other levels.
FROM_NOISE = (
    "measure the pipeline of the same model that starts from noise alone (text to image or video), and apply its "
    "schedule here"
)

#: Largest relative change of an output that is computed again in the same batch, by the network's dtype. In 16 bits it
#: is less than in another batch (`measurement.checks.calls.REPEATABLE`), for which libraries use other kernels.
REPEATED = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-3, torch.bfloat16: 5e-3}

#: How far into a measurement the step is that is repeated at its end, by call: one that is early, but at which the
#: conditioning matters, or within windows of steps that no argument shows (of attention, in a processor's object).
REPEATS = (1 / 15, 0.4, 0.25, 0.75)

#: Largest relative changes between steps: of an element of the latents, and of their scale. bfloat16 rounds by 0.002.
ROUNDED, RESIZED = 1e-2, 3e-3

#: The last step at which the scale is checked, in two passes over the latents. Pipelines that rescale do so every step.
RESIZED_EARLY = 3

#: What to say about a pipeline whose output depends on the step.
UNALIKE = (
    "the pipeline's output must not depend on the step's number (guidance or control that starts or ends midway), on "
    "earlier steps (momentum of guidance, a cache), on the timestep of another step (a flow map) or on random numbers "
    "(dropout)"
)

#: A run of a flow model that begins at this time or above begins with noise alone: at most 2% of its first state would
#: be of the image, and first times of shifted schedules differ from 1 by rounding or by the levels that were trained.
PURE_NOISE = 0.98

#: What is wrong with a pipeline that adds noise to its latents.
NOISED = (
    "the pipeline adds noise to an image, at the start (image to image; with strength 1 too something of the image is "
    "left, unless the model is a flow) or at every step (inpainting with a network that does not take the mask); a "
    "measurement starts from pure noise, so measure the text-to-image pipeline of the same model, or if there is none "
    "(depth to image) its network (fastsched.measure)"
)

#: What is wrong with a pipeline that keeps a part of the latents constant, or replaces it only at some steps.
KEEPS = (
    "of the latents for itself at some steps (a first frame or a mask?), so the schedule would be chosen for values "
    f"that are not sampled; {FROM_NOISE}"
)

#: The argument of ``step`` with a timestep for each token, [B, tokens].
TOKENS = "per_token_timesteps"


def output_of_tokens(output: Any, timestep: Any, options: Mapping[str, Any], deferred: DeferredChecks) -> Any:
    """The network's output in a call of ``step``, negated if the call gives a timestep for each token.

    In such a call the class steps by ``sample + (sigma - sigma_next) output``, with the opposite of its usual sign.
    ValueError if not all tokens are at ``timestep``.
    """
    tokens = options.get(TOKENS)
    if tokens is None:
        return output

    def check(found: Tensor) -> None:
        if int(found) > 0:
            raise ValueError(
                f"the pipeline calls step with {TOKENS} of which {int(found)} of {tokens.numel()} are not the step's "
                f"own timestep (an image or frames to be kept?), {INSTEAD}"
            )

    own = torch.as_tensor(timestep).to(tokens)  # timesteps of tokens to be kept differ from it by more than rounding
    deferred.add(((tokens - own).abs() > 1e-3 * own.abs() + 1e-3).sum(), check)
    return -output


def held_at_zero(output: Tensor, x: Tensor, s: Tensor, denoiser: Denoiser, owned: Tensor) -> Tensor:
    """``output``, changed so that ``D = a x + c R`` is 0 at the elements that the pipeline owns.

    So the network's output for values that the pipeline replaces (a given first frame) enters no sum.

    Args:
        output: ``R``, [B, *shape].
        x: The network's input, of the same shape.
        s: The level, [1] or [].
        denoiser: Gives ``a`` and ``c``.
        owned: Mask of the elements that the pipeline owns, bool, broadcast over the batch.
    """
    a, c = (float(each) for each in denoiser.coefficients(s))
    return torch.where(owned, -a / c * x.float(), output.float())  # in 16 bits D would be a rounding error, not 0


def check_options(
    parameters: Mapping[str, Parameter], args: tuple[Any, ...], kwargs: dict[str, Any], otherwise: str = INSTEAD
) -> None:
    """ValueError if an argument of ``step`` after the sample may change what the step does.

    It may if it differs from its default among ``parameters``, those of the class's own ``step``: ``self``, output,
    timestep and sample, then the others. A generator changes nothing: no number is drawn from it. The message
    ends in ``otherwise``.
    """
    given = {**dict(zip([*parameters][4:], args, strict=False)), **kwargs}
    for name, value in given.items():
        default = parameters[name].default if name in parameters else 0  # DDIMPipeline gives eta=0.0 to any class
        if name == "generator" or value is None or (not isinstance(value, Tensor) and value == default):
            continue
        if name == TOKENS and name in parameters:
            continue  # see `output_of_tokens`
        shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"the pipeline calls step with {name}={shown}, which changes what a step does, {otherwise}")


def check_one_run(*, again: bool) -> None:
    """ValueError if a pipeline steps ``again`` after a run has ended in the same call.

    The error only ends the call, after all needed steps, so there is a warning as well.
    """
    if again:
        what = "the pipeline runs its loop several times in a call (sections of a video, an ensemble, FreeInit?)"
        validate.warn(f"{what}, and only the first run is measured")
        raise ValueError(what)


def noise_alone(process: NoiseProcess, first: Tensor | None, given: Sequence[Any], otherwise: str = NOISED) -> Tensor:
    """The noise among the arguments of ``scale_noise`` or ``add_noise``, where they return it without the image.

    That is at time 1 of flow models, at which FLUX Fill and others call them with strength 1. If something of the image
    would be left, this is a ValueError that says ``otherwise``.

    Args:
        process: The noise process.
        first: The sigma at which a run is about to begin; None during a run.
        given: The arguments: the image's latents, noise of their shape, and timesteps.
        otherwise: What is wrong with a pipeline that adds noise anywhere else.
    """
    found = [each for each in given[1:] if isinstance(each, Tensor) and each.shape == getattr(given[0], "shape", None)]
    if process.kind != "flow" or first is None or float(first) < PURE_NOISE or len(found) != 1:
        raise ValueError(otherwise)
    return found[0]


def check_input_scaled(scaled: bool) -> None:
    """ValueError if a pipeline to fit with decoupled levels has not let its scheduler scale the network's input."""
    if not scaled:
        raise ValueError(
            "decoupled=True needs a pipeline that calls scheduler.scale_model_input before its network, and this one "
            "does not (as DDIMPipeline and DDPMPipeline); leave decoupled out, or pass decoupled='timestep', which "
            "scales nothing"
        )


def check_scaling(convention: Convention, name: str, scaled: Tensor | None, sample: Tensor) -> None:
    """ValueError unless a pipeline scales its latents, and only these, where the class ``name`` scales the input.

    Args:
        convention: The scheduler's convention.
        name: The scheduler's class.
        scaled: What the pipeline called ``scale_model_input`` for; None if it did not.
        sample: The latents, which the pipeline may have laid out in another way since.
    """
    if not convention.scales_input:
        return
    given, own = ([*each.shape[1:]] for each in (sample if scaled is None else scaled, sample))
    longer = [n - m for n, m in zip(given, own, strict=True)] if len(given) == len(own) else [0]
    if min(longer, default=0) >= 0 and any(longer):
        raise ValueError(
            f"the pipeline calls scheduler.scale_model_input with shape {given} a sample for latents of {own}: what it "
            f"gives its network beside the latents (an image?) is scaled by the level too, because {name} scales the "
            "network's input; use a scheduler that scales nothing, as DDIMScheduler and DPMSolverMultistepScheduler"
        )
    if scaled is None:
        raise ValueError(
            f"the pipeline does not call scheduler.scale_model_input, and the states of {name} are no input of the "
            "network without it; give the pipeline the scheduler that it was written for, or one that leaves the "
            "input as it is, as DPMSolverMultistepScheduler does"
        )


def check_scaled(sample: Any, scaled: Tensor | None = None) -> None:
    """ValueError if a pipeline calls ``scale_model_input`` on a number, or on its own last result, ``scaled``."""
    if scaled is not None and sample is scaled:
        raise ValueError(
            "the pipeline calls scheduler.scale_model_input twice, on its own result, so its network is given latents "
            "of the wrong size; call it once a step"
        )
    if getattr(sample, "ndim", 0) == 0:
        raise ValueError(
            "the pipeline computes with scale_model_input(sigma), as StableDiffusionLatentUpscalePipeline does, so its "
            "latents must have the scale of its own scheduler's class, which they have neither in a measurement nor "
            "with a fitted schedule; measure its network (fastsched.measure) and apply a schedule of a stock solver"
        )


def check_timestep(index: int, timesteps: Tensor, timestep: Any, deferred: DeferredChecks) -> None:
    """ValueError unless step ``index`` is called with its own timestep, of the run's ``timesteps`` (on the CPU)."""
    if index >= len(timesteps):
        raise ValueError("the pipeline calls step after its last timestep; start a new run")
    given, expected = torch.as_tensor(timestep), float(timesteps[index].float())

    def check(found: Tensor) -> None:
        away = {abs(value - expected): value for value in found.tolist()}
        if not max(away) <= 1e-3 + 1e-3 * abs(expected):
            raise ValueError(
                f"step {index} was called with timestep {away[max(away)]:g} instead of {expected:g}: the pipeline "
                "rounds scheduler.timesteps, or does not call its network and scheduler once for each of them, "
                f"{INSTEAD}"
            )

    deferred.add(given if given.numel() == 1 else torch.stack(torch.aminmax(given)), check)


def check_output(output: Any, sample: Tensor) -> None:
    """ValueError unless a network's output is a floating-point tensor of the shape of the latents."""
    if not isinstance(output, Tensor) or output.shape != sample.shape or not output.is_floating_point():
        what = f"shape {tuple(output.shape)}, {output.dtype}" if isinstance(output, Tensor) else type(output).__name__
        if isinstance(output, Tensor) and output.shape != sample.shape and output.shape[1:] == sample.shape[1:]:
            raise ValueError(
                f"the pipeline calls step with an output for {len(output)} samples, but latents of {len(sample)}: pass "
                "latents for all prompts and images of a call, or leave latents out"
            )
        raise ValueError(
            f"the pipeline calls step with an output of {what} for latents of shape {tuple(sample.shape)}, {INSTEAD}"
        )


def check_unchanged(sample: Tensor, returned: Tensor, index: int, deferred: DeferredChecks) -> None:
    """ValueError if a pipeline changed elements of the latents that the step before returned, or rescaled them all.

    Rounding to 16 bits is allowed.
    """

    def check(found: Tensor) -> None:
        changed = int(found)
        if changed > 0:
            raise ValueError(
                f"the pipeline changed the latents between steps {index - 1} and {index}, {changed} of "
                f"{sample_size} elements (inpainting, or an image or frames to be kept?), {INSTEAD}"
            )

    sample_size = sample.numel()
    if sample.shape != returned.shape:
        check(torch.tensor([sample_size], device="cpu"))
    changed = differing(sample, returned, ROUNDED)
    if index <= RESIZED_EARLY:
        before, now = (latents.float().flatten() for latents in (returned, sample))
        square = before @ before
        resized = (now @ before - square).abs() > RESIZED * square
        changed = torch.where(resized & (changed == 0), sample_size, changed)
    deferred.add(changed, check)


def check_sampled(kept: Tensor, most: float, size: int, deferred: DeferredChecks) -> None:
    """ValueError if a pipeline keeps some elements of its latents for itself.

    Args:
        kept: How many elements it seems to keep, counted in one or more ways, [n]; the smallest is used.
        most: From this fraction of all elements on, there must be another reason, and it is no error.
        size: The number of elements.
        deferred: Collects the values to compare.
    """

    def check(counts: Tensor) -> None:
        count = min(counts.tolist())
        if 0 < count < most * size:
            raise ValueError(f"the pipeline keeps {count:.0f} of {size} elements {KEEPS}")

    deferred.add(kept, check)


def check_first_output(output: Tensor, deferred: DeferredChecks) -> None:
    """ValueError if a pipeline's first step is to leave elements of the first latents as they are (LTX-2).

    There the output is exactly 0, at more elements than rounding to 16 bits makes 0 by chance.
    """
    zero = (output == 0).sum()
    check_sampled(zero * (zero > 0.02 * output.numel()), 1.0, output.numel(), deferred)


def differing(values: Tensor, wanted: Tensor, slack: float) -> Tensor:
    """How many ``values`` differ from ``wanted`` by more than ``slack |wanted|`` plus 1e-3 of its root mean square."""
    wide = wanted.float()
    away = (values - wide).abs_().sub_(wide.abs(), alpha=slack)
    return (away > torch.linalg.vector_norm(wide) * (1e-3 / math.sqrt(wide.numel()))).sum()


def doubled(sample: Tensor, returned: Tensor) -> bool:
    """Whether the pipeline replaced the second half of the batch ``returned`` to it by a copy of the first half.

    Waits for the device.
    """
    half = len(sample) // 2
    if sample.shape != returned.shape or half == 0 or len(sample) != 2 * half:
        return False
    same = [(sample[part] == returned[:half]).all() for part in (slice(half), slice(half, None))]
    return bool(torch.stack([*same, (sample != returned).any()]).all())


def warn_of_clipping(kind: type, config: Mapping[str, Any], ends: Tensor) -> None:
    """Warn if a scheduler of class ``kind`` would clip more than 1% of ``ends``; a measurement never clips."""
    taken = signature(kind.__init__).parameters  # a config of another class may have more entries
    if kind.__name__.startswith("CogVideoX"):
        return  # these classes have the setting and do not use it
    bounds = {"clip_sample": config.get("clip_sample_range") or 1.0, "thresholding": 1.0}
    for name, bound in bounds.items():
        beyond = float((ends.abs() > 1.02 * bound).double().mean())
        if name in taken and config.get(name) and beyond > 0.01:
            validate.warn(
                f"the scheduler clips the denoised sample at {bound:g} ({name}=True), and more than 1% of the paths' "
                f"ends lie beyond: the statistics are for sampling without that; set {name}=False for latent models",
            )


def repeated_queries(levels: Sequence[int], number: int) -> tuple[int, int]:
    """Two of a call's queries, of ``levels``, that its last step repeats: one at `REPEATS`, another of the same level.

    That is half a run apart. Without deviated paths there is no other, and the two are equal.
    """
    wanted, counts = REPEATS[number % len(REPEATS)] * len(levels), Counter(levels)
    several = [n for n, level in enumerate(levels) if counts[level] > 1] or range(1, len(levels))
    first = min(several, key=lambda n: abs(n - wanted))
    return first, next((n for n, level in enumerate(levels) if level == levels[first] and n != first), first)


def repeated_batch(first: Tensor, other: Tensor) -> Tensor:
    """A batch of the last half of ``first`` (the middle one included), and before it a part of ``other``.

    The rest is filled with samples of the last half. Where samples depend on others it is mostly on the first, as with
    a reference (StyleAligned, Prompt-to-Prompt).
    """
    begin, half = _repeated_rows(len(first))
    return torch.cat([first[len(first) - begin :], other[begin:half], first[half:]])


def _repeated_rows(count: int) -> tuple[int, int]:
    """Where in a batch the part of the other query begins, and where that of the first."""
    return (count + 2) // 4, count // 2


def check_repeat(outputs: Mapping[int, Tensor], output: Tensor, first: int, other: int) -> None:
    """ValueError unless a network answers latents and timestep at the last step as it did before.

    Args:
        outputs: The outputs of the two queries that were repeated.
        output: That of the batch from `repeated_batch`.
        first: Which query is in the last half of the batch.
        other: Which one is in the part before it.
    """
    begin, half = _repeated_rows(len(output))
    for query, rows in ((first, slice(half, None)), (other, slice(begin, half))):
        one, two = (each[rows].float() for each in (outputs[query], output))
        change = float((two - one).norm() / one.norm().clamp_min(1e-30))
        if change > REPEATED.get(output.dtype, 1e-3):
            beside = (
                ", beside other latents in the batch, on which it must not depend either (I2VGenXL and TextToVideoSD "
                "give the frames of a video to step as a batch: no measurement; the images of StyleAligned or "
                "Prompt-to-Prompt follow the first: prompts_per_call=1)"
            )
            raise ValueError(
                f"the same latents and timestep were answered differently (by {change:.2%}) at the end of the run than "
                f"at step {1 + query}{beside if half > 0 else ''}; {UNALIKE}"
            )


def check_copies(output: Tensor, copies: int, deferred: DeferredChecks) -> None:
    """ValueError unless the outputs for ``copies`` equal parts of the batch agree."""
    if copies == 1:
        return

    def check(found: Tensor) -> None:
        if bool((found[1:] > 1e-2 * found[0]).any()):
            raise ValueError(
                f"the pipeline doubles its batch and computes different outputs for the two halves, {INSTEAD}"
            )

    first, *others = output.float().chunk(copies)
    deferred.add(torch.stack([first.norm(), *((other - first).norm() for other in others)]), check)
