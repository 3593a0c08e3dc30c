"""Translate a schedule into a diffusers scheduler's arguments, and verify that it will be used.

Every class treats a list of levels in its own way: some shift it, append or drop a 0, round it or rebuild it. `export`
inverts what the class does. `prove` then runs a copy of the scheduler and compares the levels it steps through with
those of the schedule.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsched import validate
from fastsched.denoisers.noise import FlowMatching, NoiseProcess, VariancePreserving
from fastsched.diffusers.attributes import deep_copy
from fastsched.diffusers.conventions import (
    Convention,
    class_names,
    describe,
    other_solver,
    own_scheduler,
    visited,
)
from fastsched.diffusers.schedulers.overrides import LOST
from fastsched.diffusers.schedulers.probe import NUDGE, amplified_rounding, scales, timestep_slack, trace
from fastsched.diffusers.schedulers.replacement import replacement
from fastsched.sampling.schedule import Schedule, is_schedule

#: Largest absolute ``mu``. Times shift by its exponential; beyond this, every time is 0 or 1 up to rounding.
MOST_MU = 50
#: What is wrong with a scheduler to which another schedule than the one to export is applied.
OTHER_APPLIED = (
    "scheduler must be the pipeline's own: this one has another schedule applied, which it uses whatever a call is "
    "given; use fastsched.diffusers.apply(schedule, pipe) once more instead"
)
#: Largest relative error of a sigma that counts as exact.
EXACT = 1e-5
#: A last sigma of this fraction of the one before counts as 0: a float32 state cannot represent the noise.
NEGLIGIBLE = 1e-6
#: Attributes that `fastsched.diffusers.apply` sets on a scheduler, or leaves out if they were set by hand.
OVERRIDES = ("set_timesteps", "set_begin_index", "step_index", *LOST)

Setter = Callable[[Any], None]


class StepsOtherwise(ValueError):
    """A scheduler made its steps, but not those from each of its sigmas to the next."""


@dataclass(frozen=True, eq=False)
class Export:
    """A schedule as a scheduler will use it, verified by running a copy of the scheduler.

    Attributes:
        arguments: Keyword arguments for the pipeline's call; empty if `apply` set the scheduler itself.
        way: ``"arguments"``, or how `fastsched.diffusers.apply` set the scheduler: ``"assigned"``, ``"stepped"`` or,
            for the fitted solver, ``"fitted"``.
        sigmas: The sampler sigmas that the scheduler will use, [steps + 1] float64.
        error: Their largest relative difference from the schedule's; 0 at an infinite sigma that is kept.
        timestep_error: The largest difference between a timestep given to the network and that of its sigma.
        deterministic: Whether the scheduler adds no noise in its steps.
    """

    arguments: dict[str, Any] = field(repr=False)
    way: str
    sigmas: Tensor
    error: float
    timestep_error: float
    deterministic: bool

    @property
    def exact(self) -> bool:
        """Whether every sigma is within 1e-5, relative, of the schedule's."""
        return self.error <= EXACT


def export(schedule: Schedule, scheduler: Any, *, mu: float | None = None) -> Export:
    """The pipeline arguments that make ``scheduler`` use ``schedule``, verified on a copy of it.

    Args:
        schedule: The schedule.
        scheduler: The pipeline's scheduler, which is not modified.
        mu: The shift that the pipeline will pass, if the scheduler shifts by resolution (``use_dynamic_shifting``).

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If no arguments make the scheduler use the schedule; the message says why, and what will work.

    Warns:
        UserWarning: If the scheduler takes integer timesteps and rounds the schedule by more than 1e-5, or if the
            schedule was chosen (it has an ``origin``) for another solver than the scheduler's.
    """
    check_range(schedule, scheduler)
    if schedule.weights is not None:
        raise ValueError(
            f"schedule must be for a stock solver, because {type(scheduler).__name__} cannot use the weights of the "
            "fitted one; fastsched.diffusers.apply(schedule, pipe) gives the pipeline a scheduler that can"
        )
    if schedule.network_sigmas is not None:
        raise ValueError(
            "schedule must not have decoupled levels: pipelines take sigmas or timesteps, not both; "
            "fastsched.diffusers.apply(schedule, pipe) sets both"
        )
    mu = checked_mu(mu, scheduler)
    if "FittedScheduler" in class_names(scheduler):
        raise ValueError(OTHER_APPLIED)
    try:
        proof = _proven(schedule, scheduler, mu)
    except ValueError as error:
        raise ValueError(f"{error}. {_alternative(schedule, scheduler, mu)}") from None
    if _uses_another(scheduler, schedule, proof):
        raise ValueError(OTHER_APPLIED)
    warn_of_solver(schedule, scheduler)
    if not proof.exact:
        validate.warn(f"{rounding_warning(scheduler, proof)}. {_alternative(schedule, scheduler, mu)}")
    return proof


def warn_of_solver(schedule: Schedule, scheduler: Any) -> None:
    """Warn if ``schedule`` was chosen for another solver than that of ``scheduler``."""
    other = other_solver(scheduler, schedule.solver, schedule.steps)
    if schedule.origin is not None and other is not None:  # one made by hand may suit any solver
        validate.warn(
            f"the schedule was chosen for {schedule.solver}, and {type(own_scheduler(scheduler)).__name__} samples as "
            f"{other}, for which other levels are better; choose one for solver={other!r}, or change the scheduler",
        )


def _uses_another(scheduler: Any, schedule: Schedule, proof: Export) -> bool:
    """Whether another schedule (not a rounded form of this one) is applied, which arguments do not change."""
    if "set_timesteps" not in vars(scheduler):
        return False
    target = deep_copy(scheduler)
    target.set_timesteps(schedule.steps)
    used = declared_sigmas(target)
    same = (len(used) == len(one) and relative_error(used, one) <= EXACT for one in (schedule.sigmas, proof.sigmas))
    return not any(same)


def _proven(schedule: Schedule, scheduler: Any, mu: float | None) -> Export:
    arguments = given_arguments(schedule, scheduler, mu)
    shifting = {"mu": mu} if scheduler.config.get("use_dynamic_shifting") else {}
    setter = lambda target: target.set_timesteps(**arguments, **shifting)
    return prove(schedule, scheduler, setter, "arguments", arguments)


def prove(
    schedule: Schedule, scheduler: Any, setter: Setter, way: str, arguments: dict[str, Any] | None = None
) -> Export:
    """Run ``setter`` on a copy of ``scheduler`` and check what the copy then does.

    The sigmas that it lists, the levels of its states (`probe.trace`) and the timesteps given to
    the network must agree with one another. Their difference from the schedule is reported, not checked.

    Raises:
        ValueError: If they do not agree, or the copy raises an error.
    """
    target, convention = plain_copy(scheduler), describe(scheduler)
    name = type(scheduler).__name__
    try:
        setter(target)
        used = declared_sigmas(target)
        levels = convention.process.level(visited(target, used))
        expected = convention.timesteps(told_levels(schedule, convention, levels))
        answered = denoised_levels(schedule, convention.process) if schedule.decoupled == "denoiser" else levels[:-1]
        run = trace(target, levels[0], answered, expected)
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError, AssertionError, KeyError) as error:
        reason = str(error) or f"it ends in {type(error).__name__}"  # an assert may say nothing
        raise ValueError(f"{name} does not take this schedule: {reason}") from error
    if len(used) != len(schedule.sigmas):
        raise ValueError(f"{name} would run {len(used) - 1} steps instead of {schedule.steps}")
    if float(used[-1]) != 0:
        raise ValueError(f"{name} would end at sigma {float(used[-1]):g} instead of 0")
    reached = scales(convention, levels[1:])
    if not run.follows(*reached):
        setter(target)
        nudged = trace(target, levels[0], answered, expected, NUDGE)
        if not run.follows(*reached, rounding=amplified_rounding(run, nudged)):
            raise StepsOtherwise(
                f"{name} does not step through its sigmas {_brief(used)}: the noise levels of its states are "
                f"{_brief(run.noise)}"
            )
    rounded = (run.timesteps - expected).abs().max() if len(run.timesteps) == len(expected) else torch.inf
    if rounded > timestep_slack(convention):
        raise ValueError(
            f"{name} gives the network the timesteps {_brief(run.timesteps)}, but those of its sigmas are "
            f"{_brief(expected)}"
        )
    return Export(arguments or {}, way, used, relative_error(used, schedule.sigmas), float(rounded), run.deterministic)


def rounding_warning(scheduler: Any, proof: Export) -> str:
    """The warning for a scheduler that rounds the sigmas."""
    name = type(scheduler).__name__
    return f"{name} takes integer timesteps, so the schedule is rounded, by up to {proof.error:.1%} in sigma"


def told_levels(schedule: Schedule, convention: Convention, levels: Tensor) -> Tensor:
    """The level given to the network at each call: that of the state, unless the schedule has decoupled levels."""
    own = schedule.network_sigmas
    return levels[:-1] if own is None else convention.process.level(own)


def denoised_levels(schedule: Schedule, process: NoiseProcess) -> Tensor:
    """The level that ``D`` is computed for at each call: that of the state, unless `Schedule.decoupled` says others."""
    own = schedule.network_sigmas if schedule.decoupled == "denoiser" else None
    return process.level(schedule.sigmas[:-1] if own is None else own)


def plain_copy(scheduler: Any) -> Any:
    """A copy of ``scheduler`` without what `fastsched.diffusers.apply` set on it."""
    target = deep_copy(scheduler)
    for name in OVERRIDES:
        target.__dict__.pop(name, None)
    return target


def relative_error(used: Tensor, asked: Tensor) -> float:
    """The largest relative difference of the sigmas; the last, 0, is left out, and equal infinities differ by 0."""
    inner, wanted = used[:-1].double(), asked[:-1].double()
    difference = torch.where(inner == wanted, 0.0, (inner - wanted).abs() / wanted)
    return float(difference.nan_to_num(posinf=torch.inf).max())


def check_range(schedule: Schedule, scheduler: Any) -> None:
    """Check that ``schedule`` is for the scheduler's kind of noise process and within its trained levels.

    Raises:
        TypeError: If it is not a `Schedule`.
        ValueError: If it is for another kind or range of levels, or the scheduler's list is not of flow times.
    """
    is_schedule("schedule", schedule)
    process, name = describe(scheduler).process, type(scheduler).__name__
    _check_flow_times(process, scheduler)
    if (schedule.noise == "flow") != isinstance(process, FlowMatching):
        raise ValueError(
            f"schedule must be for a {process.kind!r} noise process, as {name} is, got one for a {schedule.noise!r} "
            "noise process; measure this pipeline (fastsched.diffusers.measure)"
        )
    ends = process.sampler_sigma(torch.tensor([process.s_max, process.s_min], dtype=torch.float64, device="cpu"))
    low, high = float(ends[1]), float(ends[0])
    first, last = float(schedule.sigmas[0]), schedule.end_sigma
    if first > high * 1.001 or last < low * 0.999:
        raise ValueError(
            f"schedule runs from sigma {first:g} to {last:g}, but the model of this {name} was trained from {high:g} "
            f"to {low:g}; measure this pipeline (fastsched.diffusers.measure)"
        )


def _check_flow_times(process: NoiseProcess, scheduler: Any) -> None:
    """ValueError if a class of flow times is set to step through the sigmas of EDM (Cosmos 2, by its ``sigma_max``)."""
    config = scheduler.config
    most = float(config.get("sigma_max") or 0.0)
    formulas = any(config.get(f"use_{kind}_sigmas") for kind in ("karras", "exponential", "beta"))
    if isinstance(process, FlowMatching) and not config.get("use_flow_sigmas") and formulas and most > 1:
        raise ValueError(
            f"{type(scheduler).__name__} steps through sigmas up to {most:g} (sigma_max), not through flow times, and "
            "its pipeline turns them into flow times by itself (Cosmos 2), so no schedule can be given to it; sample "
            "from its network instead (fastsched.measure, fastsched.sample)"
        )


def checked_mu(mu: object, scheduler: Any) -> float | None:
    """``mu`` as a number if the scheduler shifts by resolution, else None; raises if ``mu`` does not match that."""
    name, shifts = type(scheduler).__name__, bool(scheduler.config.get("use_dynamic_shifting"))
    number = None if mu is None else validate.real("mu", mu)
    if number is not None and abs(number) > MOST_MU:
        raise ValueError(f"mu must be within [-{MOST_MU}, {MOST_MU}], got {mu!r}")
    if shifts and mu is None:
        raise ValueError(
            f"{name} shifts by resolution (use_dynamic_shifting), so mu must be given as the pipeline passes it "
            "(--mu in the shell)"
        )
    if mu is not None and not shifts:
        raise ValueError(f"mu must be None because {name} does not shift by resolution, got {mu!r}")
    return number


def _alternative(schedule: Schedule, scheduler: Any, mu: float | None) -> str:
    """What to do if no arguments make a scheduler use the schedule."""
    change = replacement(scheduler, lambda other: _proven(schedule, other, mu).exact)
    return f"Try fastsched.diffusers.apply(schedule, pipe), or {change}"


def given_arguments(schedule: Schedule, scheduler: Any, mu: float | None) -> dict[str, Any]:
    """Keyword arguments of ``set_timesteps``, with what the class does to them inverted.

    Raises:
        ValueError: If the class takes no list, or changes it in a way that cannot be inverted.
    """
    if schedule.network_sigmas is not None:
        raise ValueError("its arguments are sigmas or timesteps, not both, which decoupled levels need")
    scheduler, convention = plain_copy(scheduler), describe(scheduler)
    names = class_names(scheduler)
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    wanted = schedule.sigmas
    if names & {"EulerDiscreteScheduler", "LTXEulerAncestralRFScheduler"}:
        return {"sigmas": wanted.tolist()}  # the class makes no timestep of the last entry
    if "EDMEulerScheduler" in names:
        return {"sigmas": _edm_ramp(wanted[:-1], scheduler.config)}
    if isinstance(convention.process, FlowMatching) and "sigmas" in accepted:
        shifted = _without_shift(wanted[:-1], scheduler, mu)
        multistep = "UniPCMultistepScheduler" in names  # which needs an array
        return {"sigmas": shifted.numpy() if multistep else shifted.tolist()}
    if "timesteps" in accepted and isinstance(convention.process, VariancePreserving):
        if "HeunDiscreteScheduler" in names:
            return {"timesteps": _linear_timesteps(wanted[:-1], convention.process)}
        rounded = convention.timesteps(wanted[:-1]).round().to(torch.int64).tolist()
        if len(set(rounded)) < len(rounded):
            raise ValueError(
                f"{type(scheduler).__name__} takes integer timesteps, and two of the schedule's round to the same one: "
                f"{rounded}; use fewer steps"
            )
        return {"timesteps": rounded}
    raise ValueError(f"{type(scheduler).__name__} takes no list of levels")


def _edm_ramp(sigmas: Tensor, config: Any) -> Tensor:
    """The ramp ``u`` with ``(max^(1/rho) + u (min^(1/rho) - max^(1/rho)))^rho = sigmas`` (Karras 2022, eq. 5)."""
    if config.sigma_schedule != "karras":
        raise ValueError(
            f"EDMEulerScheduler with sigma_schedule={config.sigma_schedule!r} uses only the length of a list of "
            "sigmas; set sigma_schedule='karras' in its config"
        )
    low, high = config.sigma_min ** (1 / config.rho), config.sigma_max ** (1 / config.rho)
    return (sigmas ** (1 / config.rho) - high) / (low - high)


def _without_shift(times: Tensor, scheduler: Any, mu: float | None) -> Tensor:
    """Flow times ``t`` for which ``m t / (1 + (m - 1) t)`` is ``times``: ``s / (m - (m - 1) s)`` for shift ``m``."""
    name = type(scheduler).__name__
    for flag in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
        if scheduler.config.get(flag):
            raise ValueError(f"{name} with {flag}=True replaces the interior of any list; set it to False")
    terminal = scheduler.config.get("shift_terminal")
    if terminal and abs(float(times[-1]) - terminal) > EXACT * terminal:
        raise ValueError(
            f"{name} stretches every list to end at shift_terminal={terminal:g}, but the schedule's last sigma is "
            f"{float(times[-1]):g}"
        )
    if mu is not None:
        shift = float(np.exp(mu)) if scheduler.config.get("time_shift_type") != "linear" else float(mu)
    else:
        named = "shift" in vars(scheduler) or hasattr(type(scheduler), "shift")  # else diffusers warns of the config's
        config = scheduler.config
        shift = float((scheduler.shift if named else config.get("shift")) or config.get("flow_shift") or 1.0)
    return times / (shift - (shift - 1) * times)


def told_timesteps(scheduler: Any, flow_times: Tensor, **asked: Any) -> Tensor:
    """The timesteps that the network is given at ``flow_times``, after ``scheduler.set_timesteps(**asked)``.

    Both are multiplied by ``num_train_timesteps``. They are equal, unless the call has both ``timesteps`` and
    ``sigmas``. Then the class shifts only the sigmas, so that at flow time ``m t / (1 + (m - 1) t)`` the network is
    given ``t``, as it was in training (CogView4, GLM-Image).

    Raises:
        ValueError: If the class does more to the sigmas than to shift them.
    """
    if not gives_both_lists(**asked):
        return flow_times
    mu = asked.get("mu") if scheduler.config.get("use_dynamic_shifting") else None
    scale = int(scheduler.config.num_train_timesteps)
    return (scale * _without_shift(flow_times.double() / scale, scheduler, mu)).to(flow_times.dtype)


def gives_both_lists(timesteps: Any = None, sigmas: Any = None, **_: Any) -> bool:
    """Whether arguments of ``set_timesteps`` have timesteps for the network apart from the sigmas of the states."""
    return timesteps is not None and sigmas is not None


def _linear_timesteps(sigmas: Tensor, process: VariancePreserving) -> list[float]:
    """Fractional timesteps by linear interpolation in ``sigma`` (not its logarithm), as Heun's class does."""
    trained = process.trained_levels.numpy()
    return np.interp(sigmas.numpy(), trained, np.arange(len(trained), dtype=np.float64)).tolist()


def declared_sigmas(scheduler: Any) -> Tensor:
    """The sampler sigmas that a scheduler lists, [steps + 1]; computed from its timesteps if it lists none."""
    end = torch.zeros(1, dtype=torch.float64, device="cpu")
    if getattr(scheduler, "sigmas", None) is None:
        convention = describe(scheduler)
        levels = convention.levels(torch.as_tensor(scheduler.timesteps))
        return torch.cat([convention.process.sampler_sigma(levels), end])
    # Schedulers with two calls a step list each inner level twice.
    distinct = torch.unique_consecutive(torch.as_tensor(scheduler.sigmas).detach().to("cpu", torch.float64))
    if len(distinct) > 1 and distinct[-1] <= 1.001 * NEGLIGIBLE * distinct[-2]:
        distinct[-1] = 0.0
    return distinct


def _brief(values: Tensor) -> str:
    return "[" + ", ".join(f"{value:.5g}" for value in values.tolist()) + "]"
