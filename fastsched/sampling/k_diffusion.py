"""The fitted solver as a sampler with the arguments of k-diffusion's samplers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastsched import validate
from fastsched.denoisers.deferred_checks import DeferredChecks
from fastsched.denoisers.network_errors import checked_call
from fastsched.sampling.decoupled import decoupled_model
from fastsched.sampling.fitted import checked_weights
from fastsched.sampling.progress import progress_bar
from fastsched.sampling.schedule import Schedule

#: A first state of a root mean square below this part of its sigma, over at least so many elements, lacks its noise.
SMALL, ELEMENTS = 1 / 3, 8


@torch.no_grad()
def sample_fitted(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor | Schedule,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], Any] | None = None,
    disable: bool | None = None,
    *,
    weights: Tensor | Sequence[Sequence[float]] | None = None,
) -> Tensor:
    """Sample with a fitted schedule; the arguments are those of k-diffusion's samplers.

    With the denoised images ``D_m`` of all steps so far and ``r = sigma_{n+1} / sigma_n``, step n is

        ``x_{n+1} = r x_n + (1 - r) sum_m W[n, m] D_m``,

    which is the step of `fastsched.sampling.fitted` in ``x = sigma y``. It holds for variance-exploding states, which
    k-diffusion uses for variance-preserving models too. It also holds for flow times, where ``x = (1 - t) x0 + t eps``,
    ``sigma = t`` and ``rho = 1/t - 1``, because differences of ``rho`` are those of ``1/t``.

    Args:
        model: ``model(x, sigma, **extra_args)`` is the denoised image, [B, *shape]; ``sigma`` has shape [B].
        x: The first state, unit noise times ``sigmas[0]``, [B, *shape].
        sigmas: The schedule itself, also one with decoupled levels; or its sigmas [steps + 1], descending, the last 0.
        extra_args: Further arguments of ``model``.
        callback: Called before each step with a dict of ``x``, ``i``, ``sigma``, ``sigma_hat`` and ``denoised``.
        disable: Whether to hide the progress bar; shown when None or False.
        weights: ``W``, [steps, steps]: ``schedule.weights``; None with a schedule.

    Returns:
        The samples, [B, *shape].

    Warns if ``x`` holds far less noise than its sigma, as noise that is not scaled does.

    Raises:
        ValueError: If ``x`` is no batch or not finite, ``sigmas`` do not descend to 0 or start at infinity, ``weights``
            or a schedule do not fit, or ``model`` returns another shape, NaN or inf.
    """
    _check(model, x, extra_args, callback)
    model, sigmas, given = _parts(model, sigmas, weights)
    levels = validate.descending_sigmas("sigmas", sigmas).tolist()
    if levels[-1] != 0 or levels[0] == float("inf"):
        raise ValueError(f"sigmas must be finite and end in 0, got {levels}")
    rows = checked_weights(given, len(levels) - 1).tolist()
    sigmas = sigmas.to(x) if isinstance(sigmas, Tensor) else x.new_tensor(levels)
    ones, history, deferred = x.new_ones([len(x)]), [], DeferredChecks()
    _note_size(x, levels[0], deferred)
    with progress_bar(len(rows), not disable, "fitted sampling", unit="step") as advance:
        for i, row in enumerate(rows):
            call = partial(model, x.clone(), sigmas[i] * ones, **(extra_args or {}))
            denoised = _denoised(call, x, levels[i], deferred)
            if callback is not None:
                callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
            history.append(denoised)
            ratio = levels[i + 1] / levels[i]
            mean = sum(weight * known for weight, known in zip(row, history, strict=False))
            x = ratio * x + (1 - ratio) * mean
            advance(1)
    deferred.run()
    return x


def _check(model: object, x: object, extra_args: object, callback: object) -> None:
    """Raise TypeError or ValueError for arguments that would otherwise fail only during sampling."""
    validate.function("model", model)
    validate.CHECKS["noise"]("x", validate.tensor("x", x))
    by_name = isinstance(extra_args, Mapping) and all(isinstance(name, str) for name in extra_args)
    if extra_args is not None and not by_name:
        raise TypeError(f"extra_args must be a dictionary by name, or None, got {validate.shown(extra_args)}")
    if callback is not None:
        validate.function("callback", callback)


def _parts(model: Callable[..., Tensor], sigmas: Any, weights: Any) -> tuple[Callable[..., Tensor], Any, Any]:
    """The model, sigmas and weights as given; or of a whole schedule, whose levels may be decoupled."""
    if not isinstance(sigmas, Schedule):
        if weights is None:
            raise ValueError("weights must be given with sigmas; or pass the schedule itself as sigmas")
        return model, sigmas, weights
    if weights is not None:
        raise ValueError("weights must be left out with a schedule, which has its own")
    if sigmas.weights is None:
        raise ValueError(f"sigmas must be a schedule of the fitted solver, got one for {sigmas.solver!r}")
    asked = model if sigmas.decoupled is None else decoupled_model(model, sigmas)
    return asked, sigmas.sigmas, sigmas.weights


def _note_size(x: Tensor, sigma: float, deferred: DeferredChecks) -> None:
    """``deferred`` later warns if a first state is so small that it holds less noise than its sigma."""

    def check(size: Tensor) -> None:
        if float(size) < SMALL * sigma:
            validate.warn(
                f"x must be noise times sigmas[0] = {sigma:.3g}, but its root mean square is {float(size):.3g}: is the "
                "noise scaled (x = noise * sigmas[0])? The samples are likely to be wrong"
            )

    if x.numel() >= ELEMENTS:
        deferred.add(x.float().square().mean().sqrt(), check)


def _denoised(call: Callable[[], Tensor], x: Tensor, sigma: float, deferred: DeferredChecks) -> Tensor:
    """A copy of the model's output, as the model may reuse its buffer; ``deferred`` later checks that it is finite."""
    denoised = checked_call(call, x, x.new_ones(len(x)), x.dtype).clone()
    deferred.add_finite(denoised, lambda: f"the model returned NaN or inf at sigma = {sigma:g}")
    deferred.run(wait=False)
    return denoised
