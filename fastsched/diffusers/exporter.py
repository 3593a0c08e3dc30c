"""Give a schedule to a scheduler of diffusers, and prove that it will be used.

Every class reads a list of levels in its own way: some shift it, append or drop a 0, round it or rebuild it. `export`
undoes what the class does; `prove` then runs a copy of the scheduler and compares the levels it really steps through
with those asked for.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsched.denoisers.noise import FlowMatching, VariancePreserving
from fastsched.diffusers.conventions import Convention, describe, visited
from fastsched.diffusers.probe import rounding, scales, trace
from fastsched.sampling.schedule import Schedule

#: Largest relative difference of a sigma that still counts as the one asked for.
EXACT = 1e-5
#: A last sigma this small against the one before counts as 0: a float32 state does not show the noise.
NOTHING = 1e-6
#: Attributes that `fastsched.diffusers.apply` puts on a scheduler.
OVERRIDES = ("set_timesteps", "step", "step_index")

Setter = Callable[[Any], None]


@dataclass(frozen=True, eq=False)
class Export:
    """A schedule in a scheduler's own terms, proven.

    Attributes:
        arguments: Keyword arguments for the pipeline's call; empty where the scheduler takes none.
        way: ``"arguments"``, or how `fastsched.diffusers.apply` sets the scheduler: ``"assigned"`` or ``"stepped"``.
        sigmas: The sampler sigmas that the scheduler will use, [steps + 1] float64.
        error: Their largest relative difference from the schedule's; 0 at an infinite sigma that is kept.
        timestep_error: The largest difference between a timestep that the network is given and its sigma's own.
        deterministic: Whether the scheduler adds no noise of its own.
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
    """The pipeline arguments that make ``scheduler`` use ``schedule``, proven on a copy of it.

    Args:
        schedule: The schedule.
        scheduler: A scheduler of diffusers, as it sits in the pipeline; left as it is.
        mu: The shift that the pipeline will pass, where the scheduler shifts by resolution (``use_dynamic_shifting``).

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If the scheduler cannot be given the schedule by arguments; the message says why and what can.

    Warns:
        UserWarning: If the scheduler takes whole timesteps and rounds the schedule by more than 1e-5.
    """
    convention = describe(scheduler)
    check_range(schedule, convention, scheduler)
    _check_mu(mu, scheduler)
    try:
        arguments = given_arguments(schedule, scheduler, convention, mu)
        shifting = {"mu": mu} if _config(scheduler, "use_dynamic_shifting") else {}

        def setter(target: Any) -> None:
            target.set_timesteps(**arguments, **shifting)

        proof = prove(schedule, scheduler, convention, setter, "arguments", arguments)
    except ValueError as error:
        raise ValueError(f"{error}. {_alternative(convention)}") from None
    if not proof.exact:
        warnings.warn(
            f"{type(scheduler).__name__} takes whole timesteps, so the schedule is rounded: by {proof.error:.1%} in "
            f"the sigma that changes most. {_alternative(convention)}",
            stacklevel=2,
        )
    return proof


def prove(
    schedule: Schedule,
    scheduler: Any,
    convention: Convention,
    setter: Setter,
    way: str,
    arguments: dict[str, Any] | None = None,
) -> Export:
    """Run ``setter`` on a copy of ``scheduler`` and check what it will do.

    The sigmas it declares, the levels its states pass through (`fastsched.diffusers.probe.trace`) and the timesteps it
    gives the network must agree with one another; how far they are from the schedule's is reported.

    Raises:
        ValueError: If they do not agree, or the copy refuses.
    """
    target = plain_copy(scheduler)
    name = type(scheduler).__name__
    try:
        setter(target)
        used = declared_sigmas(target, convention)
        levels = convention.process.level(visited(target, used))
        run = trace(target, convention, levels[:-1])
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError, AssertionError, KeyError) as error:
        raise ValueError(f"{name} does not take this schedule: {error}") from error
    if len(used) != len(schedule.sigmas):
        raise ValueError(f"{name} would run {len(used) - 1} steps instead of {schedule.steps}")
    if float(used[-1]) != 0:
        raise ValueError(f"{name} would end at sigma {float(used[-1]):g} instead of 0")
    if not run.follows(*scales(convention, levels[1:])):
        raise ValueError(
            f"{name} does not step through the levels it was given, sigmas {_brief(used)}: its state goes through "
            f"{_brief(run.noise)} of noise"
        )
    expected = convention.timesteps(levels[:-1])
    rounded = (run.timesteps - expected).abs().max() if len(run.timesteps) == len(expected) else torch.inf
    if rounded > rounding(convention):
        raise ValueError(
            f"{name} gives the network the timesteps {_brief(run.timesteps)}, at sigmas whose timesteps are "
            f"{_brief(expected)}"
        )
    return Export(arguments or {}, way, used, relative_error(used, schedule.sigmas), float(rounded), run.deterministic)


def plain_copy(scheduler: Any) -> Any:
    """A copy of ``scheduler`` without what `fastsched.diffusers.apply` put on it."""
    target = copy.deepcopy(scheduler)
    for name in OVERRIDES:
        target.__dict__.pop(name, None)
    return target


def relative_error(used: Tensor, asked: Tensor) -> float:
    """The largest relative difference of the sigmas, the last (0) and equal ones apart."""
    inner, wanted = used[:-1].double(), asked[:-1].double()
    difference = torch.where(inner == wanted, 0.0, (inner - wanted).abs() / wanted)
    return float(difference.nan_to_num(posinf=torch.inf).max())


def check_range(schedule: Schedule, convention: Convention, scheduler: Any) -> None:
    """Check that ``schedule`` is for the scheduler's kind of noise process and within its trained levels.

    Raises:
        TypeError: If it is no schedule.
        ValueError: If it is not.
    """
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a fastsched.Schedule, got {type(schedule).__name__}")
    process, name = convention.process, type(scheduler).__name__
    if (schedule.noise == "flow") != isinstance(process, FlowMatching):
        raise ValueError(
            f"the schedule is for a {schedule.noise!r} noise process and {name} for a {process.kind!r} one; "
            "measure the pipeline itself (fastsched.diffusers.measure)"
        )
    ends = process.sampler_sigma(torch.tensor([process.s_max, process.s_min], dtype=torch.float64))
    low, high = float(ends[1]), float(ends[0])
    first, last = float(schedule.sigmas[0]), schedule.end_sigma
    if first > high * 1.001 or last < low * 0.999:
        raise ValueError(
            f"the schedule runs from sigma {first:g} to {last:g}, but the model of this {name} knows {high:g} to "
            f"{low:g}; measure the pipeline itself (fastsched.diffusers.measure)"
        )


def _check_mu(mu: float | None, scheduler: Any) -> None:
    name, shifts = type(scheduler).__name__, bool(_config(scheduler, "use_dynamic_shifting"))
    if mu is not None and not isinstance(mu, (int, float)):
        raise TypeError(f"mu must be a number, got {mu!r}")
    if shifts and mu is None:
        raise ValueError(f"{name} shifts by resolution, so mu must be given as the pipeline will pass it")
    if mu is not None and not shifts:
        raise ValueError(f"mu must be left out, for {name} does not shift by resolution, got {mu!r}")


def _alternative(convention: Convention) -> str:
    """What to do where a scheduler cannot be given a schedule by arguments."""
    better = {"vp": "EulerDiscreteScheduler", "flow": "FlowMatchEulerDiscreteScheduler", "ve": "EDMEulerScheduler"}
    return f"Try fastsched.diffusers.apply(schedule, pipe), or {change_to(better[convention.process.kind])}"


def change_to(name: str) -> str:
    """How to give a pipeline a scheduler of the class ``name``."""
    return f"change the scheduler: pipe.scheduler = {name}.from_config(pipe.scheduler.config)"


def given_arguments(schedule: Schedule, scheduler: Any, convention: Convention, mu: float | None) -> dict[str, Any]:
    """Keyword arguments of ``set_timesteps``, with what the class will do to them undone.

    Raises:
        ValueError: If the class takes no list, or does what cannot be undone.
    """
    scheduler = plain_copy(scheduler)
    names = {cls.__name__ for cls in type(scheduler).__mro__}
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    wanted = schedule.sigmas
    if names & {"EulerDiscreteScheduler", "LTXEulerAncestralRFScheduler"}:
        return {"sigmas": wanted.tolist()}  # its last entry is the end and becomes no timestep
    if "EDMEulerScheduler" in names:
        return {"sigmas": _edm_ramp(wanted[:-1], scheduler.config)}
    if isinstance(convention.process, FlowMatching) and "sigmas" in accepted:
        shifted = _without_shift(wanted[:-1], scheduler, mu)
        multistep = "UniPCMultistepScheduler" in names  # which computes on it as it comes
        return {"sigmas": shifted.numpy() if multistep else shifted.tolist()}
    if "timesteps" in accepted and isinstance(convention.process, VariancePreserving):
        if "HeunDiscreteScheduler" in names:
            return {"timesteps": _linear_timesteps(wanted[:-1], convention.process)}
        whole = convention.timesteps(wanted[:-1]).round().to(torch.int64).tolist()
        if len(set(whole)) < len(whole):
            raise ValueError(
                f"{type(scheduler).__name__} takes whole timesteps, and two of the schedule's round to the same one: "
                f"{whole}; take fewer steps"
            )
        return {"timesteps": whole}
    raise ValueError(f"{type(scheduler).__name__} takes no list of levels")


def _edm_ramp(sigmas: Tensor, config: Any) -> Tensor:
    """The ramp ``u`` of ``sigma = (max^(1/rho) + u (min^(1/rho) - max^(1/rho)))^rho`` that gives ``sigmas``."""
    if config.sigma_schedule != "karras":
        raise ValueError(
            f"EDMEulerScheduler with sigma_schedule={config.sigma_schedule!r} uses only the length of a list of "
            "sigmas; set sigma_schedule='karras' in its config"
        )
    low, high = config.sigma_min ** (1 / config.rho), config.sigma_max ** (1 / config.rho)
    return (sigmas ** (1 / config.rho) - high) / (low - high)


def _without_shift(times: Tensor, scheduler: Any, mu: float | None) -> Tensor:
    """Flow times ``t`` with ``m t / (1 + (m - 1) t)`` the ``times`` asked for: ``s / (m - (m - 1) s)``."""
    name = type(scheduler).__name__
    for flag in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
        if _config(scheduler, flag):
            raise ValueError(f"{name} with {flag}=True rebuilds the interior of any list; set it to False")
    terminal = _config(scheduler, "shift_terminal")
    if terminal and abs(float(times[-1]) - terminal) > EXACT * terminal:
        raise ValueError(
            f"{name} stretches every list to end at shift_terminal={terminal:g}, and the schedule's last sigma is "
            f"{float(times[-1]):g}"
        )
    if mu is not None:
        shift = float(np.exp(mu)) if _config(scheduler, "time_shift_type") != "linear" else float(mu)
    else:
        shift = float(getattr(scheduler, "shift", None) or _config(scheduler, "flow_shift") or 1.0)
    return times / (shift - (shift - 1) * times)


def _linear_timesteps(sigmas: Tensor, process: VariancePreserving) -> list[float]:
    """Fractional timesteps between which ``sigma`` (not its logarithm) is interpolated, as Heun's class does."""
    trained = process.trained_levels.numpy()
    return np.interp(sigmas.numpy(), trained, np.arange(len(trained), dtype=np.float64)).tolist()


def declared_sigmas(scheduler: Any, convention: Convention) -> Tensor:
    """The sampler sigmas that a scheduler says it will use, [steps + 1]; read off its timesteps if it keeps none."""
    end = torch.zeros(1, dtype=torch.float64)
    if getattr(scheduler, "sigmas", None) is None:
        times = torch.as_tensor(scheduler.timesteps)
        return torch.cat([convention.process.sampler_sigma(convention.levels(times)), end])
    sigmas = torch.as_tensor(scheduler.sigmas).detach().to("cpu", torch.float64)
    keep = torch.ones(len(sigmas), dtype=torch.bool)
    keep[1:] = sigmas[1:] != sigmas[:-1]  # two-call schedulers name each inner level twice
    distinct = sigmas[keep]
    if len(distinct) > 1 and distinct[-1] <= 1.001 * NOTHING * distinct[-2]:
        distinct[-1] = 0.0
    return distinct


def _config(scheduler: Any, name: str) -> Any:
    return scheduler.config.get(name)


def _brief(values: Tensor) -> str:
    return "[" + ", ".join(f"{value:.5g}" for value in values.tolist()) + "]"
