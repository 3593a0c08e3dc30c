"""A diffusers scheduler for fitted schedules, whose weights no class of diffusers can use."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from fastsched import validate
from fastsched.denoisers.deferred_checks import sent
from fastsched.denoisers.noise import NoiseProcess
from fastsched.diffusers.conventions import Convention, class_and_settings, describe, own_scheduler
from fastsched.diffusers.schedulers.exporter import (
    check_range,
    denoised_levels,
    plain_copy,
    told_levels,
    told_timesteps,
)
from fastsched.diffusers.schedulers.given_lists import warn_of_list
from fastsched.diffusers.schedulers.overrides import Timesteps
from fastsched.diffusers.schedulers.step_outputs import StepOutput, gives_denoised
from fastsched.diffusers.watching.step_checks import check_options, check_scaled, noise_alone
from fastsched.ops.eager import without_autocast
from fastsched.sampling.schedule import Schedule

MIDWAY = (
    "a fitted schedule starts from pure noise, because its later steps use the denoised samples of all steps before; "
    "for image-to-image and inpainting apply a schedule of a stock solver, or restore the pipeline's own scheduler"
)

AGAIN = (
    "this pipeline adds noise to the result of its run, and starts again from it (FreeInit?), but a fitted schedule "
    "starts from pure noise; disable that (pipe.disable_free_init()), or apply a schedule of a stock solver"
)

#: A list of flow times that starts below this fraction of the schedule's first is for a start midway.
BELOW_START = 0.98

#: A factor of the network's input this near to 1 is a rounding error.
SAME_INPUT = 1e-9

#: Entries of a `FittedScheduler`'s config; the others are those of the pipeline's own scheduler.
OWN_ENTRIES = ("sigmas", "weights", "noise", "network_sigmas", "decoupled", "scheduler_class", "scheduler_config")


class FittedScheduler(SchedulerMixin, ConfigMixin):
    """Sample by a fitted schedule in any pipeline whose own scheduler fastsched supports.

    With the denoised samples ``D_m = a_m x_m + c_m R_m`` of all network outputs ``R_0 .. R_n`` so far, step n is

        ``x_{n+1} = sigma_{n+1} [ x_n / sigma_n + (rho_{n+1} - rho_n) sum_m W[n, m] D_m ]``,   ``rho = alpha / sigma``,

    and the last one returns ``x0 = sum_m W[K-1, m] D_m`` (`fastsched.sampling.fitted`). The state is the noise
    process's own ``x = alpha x0 + sigma eps``, whatever the pipeline's own class steps. Sums are in float32 (float64
    for float64 latents), as in the multistep classes of diffusers; the result has the latents' dtype. ``step`` copies
    nothing to the host. It does not clip or threshold ``D``, as some classes of diffusers do.

    `fastsched.diffusers.apply` makes one and gives it to a pipeline. Its config has, beside its own entries, those of
    the pipeline's own scheduler, so that ``EulerDiscreteScheduler.from_config(pipe.scheduler.config)`` still works.

    Args:
        sigmas: Sampler sigmas [steps + 1], as in `Schedule`; an infinite one may be ``"inf"``, which JSON can hold.
        weights: ``W``, [steps, steps], lower triangular, rows sum to 1.
        noise: The schedule's kind of noise process.
        scheduler_class: The class of the pipeline's own scheduler, which gives noise process, prediction and timesteps.
        scheduler_config: Its config.
        network_sigmas: With decoupled levels, the sigma that the network is given at each step, [steps].
        decoupled: What these are levels of (`fastsched.Schedule`).

    Raises:
        ValueError: If the entries are not those of a fitted schedule, or the own scheduler is not supported; from
            ``set_timesteps``, ``set_begin_index``, ``add_noise`` and ``step`` if the pipeline asks for another number
            of steps, starts midway, or changes the shape of its latents.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        sigmas: Sequence[float | str],
        weights: Sequence[Sequence[float]],
        noise: str = "ve",
        scheduler_class: str = "EulerDiscreteScheduler",
        scheduler_config: dict[str, Any] | None = None,
        network_sigmas: Sequence[float | str] | None = None,
        decoupled: str | None = None,
    ) -> None:
        rows = torch.tensor(weights, dtype=torch.float64, device="cpu")
        told = None if network_sigmas is None else _numbers(network_sigmas)
        more = {"weights": rows, "network_sigmas": told, "decoupled": decoupled}
        self.schedule = Schedule(_numbers(sigmas), "fitted", noise, **more)
        settings = dict(scheduler_config or {})
        self._own = getattr(diffusers, scheduler_class).from_config(settings)
        self._prepare(describe(self._own))
        # Pipelines read entries of their scheduler's config, so this config has them too.
        self.register_to_config(**{key: value for key, value in settings.items() if not key.startswith("_")})

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From the config of a `FittedScheduler`.

        Raises:
            ValueError: If it is that of another class, which has no schedule.
        """
        if isinstance(config, dict):
            if "weights" not in config:
                raise ValueError(
                    "config has no weights, so it is not that of a FittedScheduler; use "
                    "FittedScheduler.from_schedule(schedule, pipe.scheduler)"
                )
            config = {key: value for key, value in config.items() if key in OWN_ENTRIES or key.startswith("_")}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def from_schedule(cls, schedule: Schedule, scheduler: Any) -> FittedScheduler:
        """The scheduler of ``schedule`` for a pipeline whose scheduler is ``scheduler``.

        Args:
            schedule: A schedule of the solver ``"fitted"``.
            scheduler: The pipeline's own scheduler, or a `FittedScheduler` made for it; it is not changed.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If the schedule has no weights, is for another noise process or other levels, or the scheduler
                is not supported.
        """
        own = own_scheduler(scheduler)
        check_range(schedule, own)
        if schedule.weights is None:
            raise ValueError(
                f"schedule must be for the fitted solver, got one for {schedule.solver!r}, which needs no scheduler of "
                "its own; use fastsched.diffusers.apply(schedule, pipe)"
            )
        name, settings = class_and_settings(own)
        made = cls(
            sigmas=_plain(schedule.sigmas),
            weights=schedule.weights.tolist(),
            noise=schedule.noise,
            scheduler_class=name,
            scheduler_config=settings,
            network_sigmas=None if schedule.network_sigmas is None else _plain(schedule.network_sigmas),
            decoupled=schedule.decoupled,
        )
        # Another class has defaults of its own for what was never set.
        unset = [entry for entry in own.config.get("_use_default_values", ()) if entry not in OWN_ENTRIES]
        made.register_to_config(_use_default_values=unset)
        made._own = plain_copy(own)  # its attributes may have been changed since it was made
        made._prepare(describe(own))
        return made

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            own = vars(self).get("_own")
            if name.startswith("__") or not hasattr(own, name):
                raise
            raise AttributeError(
                f"a fitted schedule has no {name}, which {type(own).__name__} has: a pipeline that reads it cannot use "
                "a fitted schedule; apply one of a stock solver, or restore the pipeline's own scheduler"
            ) from error

    def own_scheduler(self) -> Any:
        """A copy of the scheduler that this one replaced; if loaded from a file, one of its class and config."""
        return plain_copy(self._own)

    @property
    def step_index(self) -> int | None:
        """How many steps have been taken; None before `set_timesteps`."""
        return self._step_index

    @property
    def begin_index(self) -> int:
        """Always 0."""
        return 0

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        **others: Any,
    ) -> None:
        """Start a run. The levels are the schedule's; of a list only the length is used.

        ``mu`` is not needed, unless the pipeline gives both lists (`exporter.told_timesteps`).

        Raises:
            ValueError: If another number of steps than the schedule's is asked for, a list of flow times starts below
                the schedule, or ``others`` are given, such as the ``original_inference_steps`` of latent consistency
                pipelines, which also expect ``step`` to return two values.
        """
        if others:
            raise ValueError(
                f"{', '.join(others)}: a pipeline that gives this to its scheduler cannot use a fitted schedule; apply "
                "one of a stock solver"
            )
        given = sigmas if sigmas is not None else timesteps
        asked = num_inference_steps if given is None else len(given)
        steps = self.schedule.steps
        if asked is not None and asked != steps:
            raise ValueError(
                f"num_inference_steps must be {steps}, the steps that this fitted schedule's weights are for, got "
                f"{asked}; pass num_inference_steps={steps}, or apply a schedule of {asked} steps"
            )
        first = float(self.schedule.sigmas[0])
        if sigmas is not None and self.schedule.noise == "flow" and float(sigmas[0]) < BELOW_START * first:
            raise ValueError(
                f"sigmas must start at {first:g}, as the schedule does, got {float(sigmas[0]):g}: {MIDWAY}"
            )
        self.num_inference_steps = steps
        asked_for = {"timesteps": timesteps, "sigmas": sigmas}
        warn_of_list(self.schedule, asked_for, lambda: self._timesteps_of(**asked_for), self._timesteps)
        told = told_timesteps(self._own, self._timesteps, timesteps=timesteps, sigmas=sigmas, mu=mu)
        self.timesteps = Timesteps.of(told.to(device), self._start_at, self._ends_at)
        self._step_index = 0
        self._states = self._rows = torch.empty(0, device="cpu")

    def set_begin_index(self, begin_index: int = 0) -> None:
        """ValueError unless ``begin_index`` is 0."""
        if begin_index != 0:
            raise ValueError(f"begin_index must be 0, got {begin_index}: {MIDWAY}")

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The network's input at the current step: ``sample``, times ``c_in`` for EDM networks; see `check_scaled`."""
        check_scaled(sample)
        self._scaled = self._step_index
        scale = self._input_scales[min(self._step_index or 0, self.schedule.steps - 1)]
        self._input = sample if scale == 1.0 else sample * scale
        return self._input

    def unscaled(self, sample: Tensor) -> Tensor:
        """The state of a pipeline that steps what `scale_model_input` returned, as DiT's does; or ``sample`` itself."""
        scale = self._input_scales[min(self._step_index or 0, self.schedule.steps - 1)]
        return sample / scale if sample is self._input and scale != 1.0 else sample

    def add_noise(self, *args: Any, **kwargs: Any) -> Tensor:
        """The noise that a run of a flow model begins with; ValueError in any other use."""
        first = self.schedule.sigmas[0] if self._step_index == 0 else None
        ended = self._step_index == self.schedule.steps
        otherwise = AGAIN if ended else f"this pipeline adds noise to an image: {MIDWAY}"
        return noise_alone(self.convention.process, first, [*args, *kwargs.values()], otherwise)

    scale_noise = add_noise

    @torch.no_grad()
    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        *args: Any,
        eta: float = 0.0,
        generator: Any = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> StepOutput | tuple[Tensor, ...]:
        """The next state. Steps are counted; ``timestep`` is not read, which would wait for the device.

        Args:
            model_output: What the network predicts, [B, *shape]; for networks that also predict a variance
                [B, 2 C, ...].
            timestep: The current entry of ``timesteps``.
            sample: The state ``x_n``, [B, *shape].
            *args: Further arguments in the order of the own scheduler's class.
            eta: Must be 0: no step adds noise.
            generator: Not used.
            per_token_timesteps: Must be ``timestep`` for all tokens; ``model_output`` then has the other sign.
            return_dict: Whether to return a `StepOutput`, or a tuple, with ``D`` if the own scheduler's has it.
            **others: Must be at their defaults in the own scheduler's class.

        Raises:
            ValueError: If there is no step left, a shape differs from those before, an argument would change what a
                step does, or times differ.
        """
        _check_options(self._own, eta, args, others)
        n = self._step_index
        if n is None or n >= self.schedule.steps:
            raise ValueError(
                f"step was called {0 if n is None else n + 1} times in a run of {self.schedule.steps} steps; call "
                "set_timesteps before each run, and step once for each timestep"
            )
        self._check_scaled(n)
        sample, self._input = self.unscaled(sample), None
        output = self._raw_output(n, model_output, sample, per_token_timesteps)
        if n == 0:
            wide = torch.promote_types(sample.dtype, torch.float32)
            self._states = sample.new_empty(self.schedule.steps + 1, *sample.shape, dtype=wide)
            self._rows = sent(self._factors.to(wide), sample.device)
        if self._states.shape[1:] != sample.shape:
            raise ValueError(
                f"sample must keep its shape in a run, {tuple(self._states.shape[1:])}, got {tuple(sample.shape)}; "
                "call set_timesteps before another run"
            )
        known, x = self._states[: n + 2], self._states[0].copy_(sample)
        torch.mul(x, self._a[n], out=known[-1]).add_(output, alpha=self._c[n])
        with without_autocast(sample.device):
            following = (self._rows[n, : n + 2] @ known.flatten(1)).view_as(sample).to(sample.dtype)
        self._step_index = n + 1
        if not return_dict and not self._tuples_hold_denoised:
            return (following,)
        denoised = known[-1].to(sample.dtype, copy=True)  # later steps need what is kept
        return StepOutput(following, denoised, denoised) if return_dict else (following, denoised)

    def __len__(self) -> int:
        return self.convention.train_steps

    def _raw_output(self, n: int, model_output: Tensor, sample: Tensor, of_tokens: Tensor | None) -> Tensor:
        output = self.convention.raw_output(model_output, sample.shape[1])
        if of_tokens is not None:
            output = -output
            _check_tokens(n, of_tokens)
        if output.shape != sample.shape:
            raise ValueError(
                f"model_output must have the shape of sample, {tuple(sample.shape)}, got {tuple(model_output.shape)}"
            )
        return output

    def _prepare(self, convention: Convention) -> None:
        # Between steps every pipeline gets the process's own x, so none has to scale it.
        self.convention = convention = replace(convention, scaled=False)
        process = convention.process
        s = process.level(self.schedule.sigmas)
        at = denoised_levels(self.schedule, process)
        a, c = convention.denoiser.coefficients(at)
        # From the state to the network's x: the sampler's state is the same, alpha of the level is another.
        same = (process.sigma(at) / process.sigma(s[:-1])) * process.sigma_ratio(s[:-1], at)
        # Flow models share x, up to rounding, and their pipelines never call `scale_model_input`.
        same = torch.where((same - 1).abs() < SAME_INPUT, 1.0, same)
        self._a, self._c, self._input_scales = (
            each.tolist() for each in (a * same, c, convention.input_scale(at) * same)
        )
        self._factors = _factors(process, self.schedule)
        self._tuples_hold_denoised = gives_denoised(type(self._own))
        self.init_noise_sigma = float(process.sigma(s)[0])
        self.sigmas = self.schedule.sigmas.float()
        timesteps = convention.timesteps(told_levels(self.schedule, convention, s))
        whole = convention.process.integer_timesteps and bool(((timesteps - timesteps.round()).abs() < 1e-4).all())
        self._timesteps = timesteps.round().to(torch.int64) if whole else timesteps.to(torch.float32)
        self.timesteps = self._timesteps
        self.num_inference_steps: int | None = None
        self._step_index: int | None = None
        self._scaled: int | None = None  # the step before which the pipeline called `scale_model_input`
        self._input: Tensor | None = None  # and what it returned
        self._states = self._rows = torch.empty(0, device="cpu")

    def _check_scaled(self, n: int) -> None:
        """ValueError if step ``n`` needs `scale_model_input`, and the pipeline did not call it."""
        if self._input_scales[n] != 1.0 and self._scaled != n:
            decoupled = "fit one without decoupled levels, or with decoupled='timestep'"
            raise ValueError(
                "the pipeline does not call scheduler.scale_model_input before its network, which this schedule needs; "
                + (decoupled if self.schedule.decoupled else f"{type(self._own).__name__} needs it too")
            )

    def _timesteps_of(self, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None) -> Tensor:
        """The timesteps of a list that a call gives."""
        if sigmas is None:
            return torch.as_tensor(timesteps)
        levels = self.convention.process.level(torch.as_tensor(sigmas, dtype=torch.float64, device="cpu"))
        return self.convention.timesteps(levels)

    def _start_at(self, index: int) -> Tensor:
        if self._step_index or index == 0:
            return self.timesteps.as_subclass(Tensor)[index:]
        if index <= -self.schedule.steps:
            return self.timesteps[:]  # all of them, counted from the end
        raise ValueError(
            f"the pipeline starts midway, at step {index}, by a slice of scheduler.timesteps: {MIDWAY}; to look at the "
            "timesteps that follow, slice a copy, scheduler.timesteps.clone()[1:]"
        )

    def _ends_at(self, count: int) -> None:
        validate.warn(
            f"the run ends after {count} of {self.schedule.steps} steps (denoising_end?), at sigma "
            f"{float(self.schedule.sigmas[count]):.3g} and with latents alpha x0 + sigma eps, whatever the scale of "
            f"{type(self._own).__name__}'s, so a refiner with a schedule of its own does not go on from there; leave "
            "denoising_end out, or apply one schedule of a stock solver to both pipelines"
        )


def _numbers(values: Sequence[float | str]) -> Tensor:
    return torch.tensor([float(value) for value in values], dtype=torch.float64, device="cpu")


def _plain(sigmas: Tensor) -> list[float | str]:
    """``sigmas`` in a form that JSON can hold."""
    return ["inf" if value == float("inf") else value for value in sigmas.tolist()]


def _check_options(own: Any, eta: float, args: tuple[Any, ...], others: dict[str, Any]) -> None:
    """ValueError if an argument of ``step`` would change what a step of the ``own`` scheduler does."""
    if eta:
        raise ValueError(f"eta must be 0, because the fitted solver adds no noise, got {eta!r}")
    if args or others:
        parameters = inspect.signature(type(own).step).parameters
        check_options(parameters, args, others, "and the fitted solver has one step; leave it out")


def _check_tokens(n: int, timesteps: Tensor) -> None:
    """Check, at the first step, that all tokens are at the same timestep; waits for the device."""
    if n == 0 and bool((timesteps != timesteps.amax()).any()):
        raise ValueError(f"per_token_timesteps must be the same for all tokens: {MIDWAY}")


def _factors(process: NoiseProcess, schedule: Schedule) -> Tensor:
    """``F``, [K, K + 1]: step n goes to ``F[n, 0] x_n + sum_m F[n, 1 + m] D_m``."""
    assert schedule.weights is not None  # only fitted schedules come here
    s = process.level(schedule.sigmas)
    sigma, rho, last = process.sigma(s), 1 / s, len(s) - 2
    keep, gain = sigma[1:] / sigma[:-1], sigma[1:] * rho.diff()
    keep[last], gain[last] = 0.0, 1.0
    return torch.cat([keep[:, None], gain[:, None] * schedule.weights], dim=1)
