"""Measure and fit inside ComfyUI, through its guider, with every patch, ControlNet and condition of the workflow.

ComfyUI's guider calls ``sampler.sample(...)`` once it has loaded the models and prepared the conditions.
`FittingSampler` takes the place of a sampler: it asks the guider for denoised images instead of sampling.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastsched import validate
from fastsched.denoisers.denoiser import Denoiser
from fastsched.denoisers.noise import FlowMatching, NoiseProcess, VarianceExploding, VariancePreserving
from fastsched.fitting.budget import measuring_calls
from fastsched.fitting.denoiser_fit import fit_report
from fastsched.fitting.loop import MODEL_CALLS, FitReport
from fastsched.measurement.statistics import PathStatistics
from fastsched.sampling.schedule import Schedule
from fastsched.sampling.solvers import FITTED

from .repeats import check_repeats, layers_watched, questions

#: Flow models are not called below this time, as in `fastsched.Denoiser.from_velocity`.
LOWEST_FLOW_TIME = 2e-3
#: A first flow time this near to 1 is pure noise.
PURE_NOISE = 1e-4


@dataclass(frozen=True)
class Settings:
    """What to fit.

    Attributes:
        solver: A solver's name.
        steps: The number of steps of the schedule.
        seed: Seed of the noises of the measured paths.
        levels: The number of levels to measure at.
        samples: The number of paths to measure.
        model_calls: The most model calls after the measurement, counted per sample.
        decoupled: Whether the model may be asked at other sigmas than the states'.
    """

    solver: str
    steps: int
    seed: int = 0
    levels: int = 48
    samples: int = 4
    model_calls: int = MODEL_CALLS
    decoupled: bool = False


def process_of(model_sampling: Any) -> NoiseProcess:
    """The noise process of ComfyUI's ``model_sampling``, found by calling it.

    Discrete models round timesteps to trained ones, so their process has only those levels. With zero terminal SNR
    they start at ComfyUI's own finite sigma.

    Raises:
        ValueError: If the model does not start from noise as ``x0 + sigma eps`` or ``(1 - sigma) x0 + sigma eps``.
    """
    if {"IMG_TO_IMG", "IMG_TO_IMG_FLOW"} & {each.__name__ for each in type(model_sampling).__mro__}:
        raise ValueError("this model turns one image into another and does not start from noise, so it has no schedule")
    half, one = torch.full((1,), 0.5), torch.ones(1, 1, 1, 1)
    signal = float(model_sampling.noise_scaling(half, torch.zeros_like(one), one.clone()).flatten()[0])
    noise = float(model_sampling.noise_scaling(half, one.clone(), torch.zeros_like(one)).flatten()[0])
    low, high = float(model_sampling.sigma_min), float(model_sampling.sigma_max)
    if not 0 <= low < high < math.inf:
        raise ValueError(
            f"the model's sigmas must be from one number up to a larger one, got {low:.5g} to {high:.5g}; look at the "
            "settings of its sampling (a ModelSampling node)"
        )
    if math.isclose(noise, 0.5, rel_tol=1e-3) and math.isclose(signal, 0.5, rel_tol=1e-3):
        return FlowMatching(max(low, LOWEST_FLOW_TIME), 1.0 if high > 1 - PURE_NOISE else high)
    if not (math.isclose(noise, 0.5, rel_tol=1e-3) and math.isclose(signal, 1.0, rel_tol=1e-3)):
        raise ValueError(
            f"the model mixes noise in a way that fastsched does not know ({type(model_sampling).__name__}: "
            f"{signal:.3g} of the image and {noise:.3g} of the noise at sigma 0.5)"
        )
    table = trained_sigmas(model_sampling)
    if table is not None:
        return VariancePreserving((1 / (1 + table.square())).tolist(), integer_timesteps=True)  # type: ignore[arg-type]  # a list
    return VarianceExploding(low, high)


def trained_sigmas(model_sampling: Any) -> Tensor | None:
    """The sigmas that the network was trained at, ascending, float64; None if it takes timesteps between them."""
    table = getattr(model_sampling, "sigmas", None)
    if table is None or len(table) < 2:
        return None
    table = table.detach().cpu().double()
    if not bool((table[1:] > table[:-1]).all() and table[0] > 0):
        return None
    widest = int((table[1:] / table[:-1]).argmax())
    between = (table[widest] * table[widest + 1]).sqrt()
    asked = torch.stack([table[widest], between, table[widest + 1]]).float()
    low, found, high = (float(value) for value in model_sampling.timestep(asked).flatten())
    return table if found in (low, high) else None


@dataclass(frozen=True)
class GuidedDenoiser(Denoiser):
    """A denoiser that asks ComfyUI's guider: ``ask(x, sigma)`` is the denoised image in ComfyUI's convention.

    In that convention the states are those of flow matching, or ``z = x / alpha`` for other processes.
    """

    ask: Callable[[Tensor, Tensor], Tensor] | None = None

    def raw_output(self, x: Tensor, s: Tensor | float, *, dtype: torch.dtype | None = None) -> Tensor:
        """``D`` at states ``x`` [B, *shape] and levels ``s``; the guider chooses the dtype that it computes in."""
        levels = torch.as_tensor(s, dtype=torch.float64).cpu().expand(len(x))
        state = x if self.process.kind == "flow" else x / _per_sample(self.process.alpha(levels), x)
        assert self.ask is not None
        found = self.ask(state, self.process.sampler_sigma(levels).to(x.dtype).to(x.device))
        if found.shape != x.shape:
            raise ValueError(
                f"the model answered with a tensor of shape {tuple(found.shape)} about one of shape {tuple(x.shape)}; "
                "look at its patches, one of which changes the shape or the number of images"
            )
        return found


def guided_denoiser(ask: Callable[[Tensor, Tensor], Tensor], process: NoiseProcess) -> GuidedDenoiser:
    """The denoiser of a guider."""
    return GuidedDenoiser(ask, process, "x0", ask=ask)


def measurement_calls(process: NoiseProcess, settings: Settings) -> int:
    """Model calls of a measurement, counted per sample."""
    return measuring_calls(_levels(process, settings), settings.samples)


def _levels(process: NoiseProcess, settings: Settings) -> int:
    trained = getattr(process, "trained_levels", None)
    return settings.levels if trained is None else min(settings.levels, len(trained))


def on_trained_levels(schedule: Schedule, process: NoiseProcess, model_sampling: Any) -> Schedule:
    """``schedule`` at the nearest trained levels, if the model has trained levels and the solver allows it.

    Its timesteps are ComfyUI's own, because those of distilled models are not the indices of their levels. A schedule
    of the fitted solver does not change, because its weights belong to its sigmas.
    """
    if not getattr(process, "integer_timesteps", False) or schedule.solver == FITTED:
        return schedule
    table = process.trained_levels  # type: ignore[attr-defined]  # of VariancePreserving
    sigmas, told = nearest_trained(schedule.sigmas, table), schedule.network_sigmas
    asked = sigmas[:-1]
    if told is not None:
        asked = told = nearest_trained(torch.cat([told, told.new_zeros(1)]), table)[:-1]
    timesteps = model_sampling.timestep(asked.float()).double()
    return replace(schedule, sigmas=sigmas, network_sigmas=told, timesteps=timesteps)


def nearest_trained(sigmas: Tensor, table: Tensor) -> Tensor:
    """``sigmas`` [steps + 1], the last 0, moved to the entries of ``table`` nearest in the logarithm, all different.

    Raises:
        ValueError: If there are more steps than trained levels.
    """
    steps, last = len(sigmas) - 1, len(table) - 1
    if steps > len(table):
        raise ValueError(f"steps must be at most {len(table)}, the model's trained levels, got {steps}")
    logs = table.double().log()
    index = [int((logs - value).abs().argmin()) for value in sigmas[:-1].double().log().clamp_max(logs[-1] + 1)]
    for n in reversed(range(steps - 1)):
        index[n] = max(index[n], index[n + 1] + 1)
    for n in range(steps):
        index[n] = min(index[n], last if n == 0 else index[n - 1] - 1)
    return torch.cat([table.double()[index], torch.zeros(1, dtype=torch.float64)])


def largest_change(before: Tensor, after: Tensor) -> float:
    """The largest relative change of a sigma that is not 0."""
    kept = (before > 0) & before.isfinite()
    return float(((after[kept] - before[kept]) / before[kept]).abs().max()) if bool(kept.any()) else 0.0


class FittingSampler:
    """Takes the place of a sampler in ComfyUI's guider; `report` is set after ``guider.sample``.

    Attributes:
        settings: What to fit.
        known: Statistics of an earlier fit of the same model, with increments; None to measure.
        advance: Called with the number of model calls made, counted per sample; may raise to interrupt.
        report: The result of the fit.
    """

    def __init__(
        self, settings: Settings, known: PathStatistics | None = None, advance: Callable[[int], object] = int
    ) -> None:
        self.settings, self.known, self.advance = settings, known, advance
        self.report: FitReport | None = None

    @torch.no_grad()
    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """Called by ComfyUI as its samplers are; the image that is returned is not a sample."""
        inner = model_wrap.inner_model
        process = process_of(inner.model_sampling)
        options, seed = extra_args["model_options"], extra_args.get("seed")

        def ask(x: Tensor, sigma: Tensor) -> Tensor:
            found = model_wrap(x, sigma, model_options=options, seed=seed).float()
            self.advance(len(x))
            return found

        with layers_watched(getattr(inner, "diffusion_model", None)):
            images = min(len(noise), self.settings.samples)
            if not check_repeats(questions(process), ask, noise.shape[1:], noise.device, options, images):
                validate.warn("the conditions differ from image to image; the schedule is fitted to the first one's")
                images = 1  # alone, every image gets the first one's conditions
            found = fitted(guided_denoiser(ask, process), self.settings, noise[:images], self.known)
        schedule = on_trained_levels(found.schedule, process, inner.model_sampling)
        self.report = replace(found, schedule=schedule)
        return torch.zeros_like(noise)


def fitted(denoiser: GuidedDenoiser, settings: Settings, noise: Tensor, known: PathStatistics | None) -> FitReport:
    """Measure and fit; ``noise`` [B, *shape] gives shape, device and batch size."""
    measuring = 0 if known is not None else measurement_calls(denoiser.process, settings)
    return fit_report(
        denoiser,
        tuple(noise.shape[1:]),
        settings.steps,
        settings.solver,
        stats=known,
        levels=_levels(denoiser.process, settings),
        samples=settings.samples,
        model_calls=measuring + settings.model_calls,
        seed=settings.seed,
        batch_size=min(len(noise), settings.samples),
        device=noise.device,
        checks=False,
        decoupled=settings.decoupled,
        progress=False,
    )


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).to(like.device).reshape(-1, *[1] * (like.ndim - 1))
