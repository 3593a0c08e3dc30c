"""Ways of setting a schedule on a scheduler of diffusers: by its arguments, its attributes or its steps."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from fastsched.diffusers.conventions import class_names, describe, visited
from fastsched.diffusers.schedulers.exporter import NEGLIGIBLE, Setter, given_arguments, told_levels
from fastsched.diffusers.schedulers.overrides import HISTORIES, FirstOrderEnd, StrideStep
from fastsched.sampling.schedule import Schedule

#: Classes whose step goes to ``t - train_steps // num_inference_steps`` and reads that number at every step.
ARITHMETIC = ("DDIMScheduler", "DDIMParallelScheduler", "CogVideoXDDIMScheduler")

#: Classes whose formula is not finite at sigma 0 and inaccurate in float32 near flow time 1. They end at `NEGLIGIBLE`
#: times the last positive sigma instead of 0. UniPC is one of them with solver_type "bh1".
DELICATE = ("DEISMultistepScheduler", "SASolverScheduler")

#: The log-SNR at flow time 1 is infinite. Solvers in log-SNR start this far below 1 (as UniPC's own class does); the
#: second value is for the `DELICATE` classes.
BELOW_ONE, DELICATE_BELOW_ONE = 1e-6, 1e-3


def _by_arguments(schedule: Schedule, scheduler: Any) -> Setter:
    # Any shift works, because it is inverted and then applied again.
    shifting = _no_shift(scheduler.config)
    arguments = given_arguments(schedule, scheduler, shifting.get("mu"))
    return lambda target: type(target).set_timesteps(target, **arguments, **shifting)


def _by_assignment(schedule: Schedule, scheduler: Any) -> Setter:
    names, convention = class_names(scheduler), describe(scheduler)
    sigmas = schedule.sigmas.clone()
    delicate = names.intersection(DELICATE) or scheduler.config.get("solver_type") == "bh1"
    if scheduler.config.get("use_flow_sigmas"):
        sigmas[0] = sigmas[0].clamp(max=1 - (DELICATE_BELOW_ONE if delicate else BELOW_ONE))
    if delicate:
        sigmas[-1] = NEGLIGIBLE * sigmas[-2]
    passed = visited(scheduler, sigmas)
    timesteps = convention.timesteps(told_levels(schedule, convention, convention.process.level(passed)))

    def setter(target: Any) -> None:
        _set_steps(target, schedule.steps)
        has_history = any(hasattr(target, name) for name in HISTORIES)
        if has_history or "order" in inspect.signature(type(target).step).parameters:
            FirstOrderEnd(target).put()
        if convention.angle:
            target.betas = convention.process.sigma(sigmas).float()
            target.alphas = convention.process.alpha(sigmas).float()
            target.timesteps = timesteps.to(target.timesteps)
            return
        if getattr(target, "sigmas", None) is None:
            raise ValueError("it has no sigmas to set")
        target.sigmas = inner_twice(sigmas, target, ends=True).to(target.sigmas)
        if hasattr(target, "sigmas_interpol"):  # KDPM2's midpoints, one for each entry
            target.sigmas_interpol = torch.cat([sigmas[:1], passed[1:-1:2].repeat_interleave(2), sigmas[-1:]]).float()
        repeated = timesteps if len(passed) > len(sigmas) else inner_twice(timesteps, target, ends=False)
        target.timesteps = _like_timesteps(repeated, target.timesteps)

    return setter


def _by_steps(schedule: Schedule, scheduler: Any) -> Setter:
    if not class_names(scheduler).intersection(ARITHMETIC):
        raise ValueError("its step reads no stride to set")
    if schedule.network_sigmas is not None:
        raise ValueError("its step takes the state's level from the timestep, so the network cannot be told another")
    rounded = describe(scheduler).timesteps(schedule.sigmas[:-1]).round().to(torch.int64)
    following = dict(zip(rounded.tolist(), [*rounded[1:].tolist(), -1], strict=True))
    if len(following) < len(rounded):
        raise ValueError(f"two of the schedule's levels round to the same timestep: {rounded.tolist()}")

    def setter(target: Any) -> None:
        _set_steps(target, schedule.steps)
        target.timesteps = rounded.to(target.timesteps)
        StrideStep(target, following).put()

    return setter


#: By name: functions of a schedule and a scheduler that return what sets the one on copies of the other, or ValueError.
WAYS = {"arguments": _by_arguments, "assigned": _by_assignment, "stepped": _by_steps}


def _set_steps(target: Any, steps: int) -> None:
    """Call the class's own ``set_timesteps``, which resets its state."""
    type(target).set_timesteps(target, steps, **_no_shift(target.config))


def _no_shift(config: Any) -> dict[str, float]:
    """The argument with which a class that shifts by resolution changes nothing; {} for other classes."""
    if not config.get("use_dynamic_shifting"):
        return {}
    return {"mu": 1.0 if config.get("time_shift_type") == "linear" else 0.0}


def inner_twice(values: Tensor, scheduler: Any, *, ends: bool) -> Tensor:
    """``values`` as listed by a class: with two calls a step all but the first (with ``ends`` also the last) twice."""
    if getattr(scheduler, "order", 1) != 2:
        return values
    inner = values[1:-1] if ends else values[1:]
    return torch.cat([values[:1], inner.repeat_interleave(2), *([values[-1:]] if ends else [])])


def _like_timesteps(timesteps: Tensor, like: Tensor) -> Tensor:
    """``timesteps`` in the dtype of ``like``, or float32 if that dtype would round them."""
    if not like.is_floating_point() and bool(((timesteps - timesteps.round()).abs() < 1e-4).all()):
        return timesteps.round().to(like)
    return timesteps.to(like.device, torch.float32 if not like.is_floating_point() else like.dtype)
