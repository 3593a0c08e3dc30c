"""Set up a pipeline so that its next call uses a schedule."""

from __future__ import annotations

import functools
import inspect
import types
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from fastsched.diffusers.conventions import ANGLE, Convention, check_pipe, describe, visited
from fastsched.diffusers.exporter import (
    NOTHING,
    Export,
    Setter,
    change_to,
    check_range,
    given_arguments,
    plain_copy,
    prove,
)
from fastsched.sampling.schedule import Schedule

#: Classes whose step goes to ``t - train_steps // num_inference_steps`` and reads that number at every step.
ARITHMETIC = ("DDIMScheduler", "DDIMParallelScheduler", "CogVideoXDDIMScheduler")

#: Classes whose formula is not finite at sigma 0 and inaccurate in float32 near flow time 1. They end at `NOTHING`
#: times the last positive sigma instead of 0. UniPC is one of them with solver_type "bh1".
DELICATE = ("DEISMultistepScheduler", "SASolverScheduler")

#: Attributes in which multistep classes keep their history, and the value of an empty history.
MEMORIES = {"lower_order_nums": lambda: 0, "ets": list}

#: The log-SNR at flow time 1 is infinite. Solvers in log-SNR start this far below 1 (as UniPC's own class does); the
#: second value is for the `DELICATE` classes.
BELOW_ONE, DELICATE_BELOW_ONE = 1e-6, 1e-3


def apply(schedule: Schedule, pipe: Any) -> Export:
    """Give ``pipe`` a copy of its scheduler that uses ``schedule`` whatever number of steps a call asks for.

    Three ways are tried in this order. The first one that is verified to be exact, in the sigmas and in the timesteps
    that the network is given, is used. If none is exact, the one with the least rounding is used:

    * ``"arguments"``: the class's own ``set_timesteps(sigmas=...)`` or ``(timesteps=...)``;
    * ``"assigned"``: its ``sigmas`` and ``timesteps`` are set after ``set_timesteps``, if its ``step`` follows them;
    * ``"stepped"``: for DDIM, the stride that its ``step`` reads is set before each step.

    The scheduler's class and config do not change, so the pipeline saves and loads as before. The old scheduler object
    is not modified: keep a reference to ``pipe.scheduler`` to restore it.

    Args:
        schedule: The schedule.
        pipe: A pipeline with a ``scheduler``.

    Returns:
        How the schedule was applied, the sigmas that will be used and their largest relative error.

    Raises:
        TypeError: If ``schedule`` is not a `Schedule`, or ``pipe`` has no scheduler.
        ValueError: If no way works; the message gives the reason for each.
    """
    check_pipe(pipe)
    scheduler, proof = applied(schedule, pipe.scheduler)
    pipe.scheduler = scheduler
    return proof


def applied(schedule: Schedule, scheduler: Any) -> tuple[Any, Export]:
    """A copy of ``scheduler`` that uses ``schedule``, and what was verified; arguments and errors as in `apply`."""
    convention = describe(scheduler)
    check_range(schedule, convention, scheduler)
    proven: list[tuple[Export, Setter]] = []
    reasons = []
    for way, make in (("arguments", _by_arguments), ("assigned", _by_assignment), ("stepped", _by_steps)):
        try:
            setter = make(schedule, scheduler, convention)
            proof = prove(schedule, scheduler, convention, setter, way)
        except ValueError as error:
            reasons.append(f"{way}: {error}")
            continue
        proven.append((proof, setter))
        if _rounding(proof) == (0.0, 0.0):
            break
    if not proven:
        name = "FlowMatchEulerDiscreteScheduler" if schedule.noise == "flow" else "DPMSolverMultistepScheduler"
        raise ValueError(
            f"{type(scheduler).__name__} cannot be made to use this schedule; {change_to(name)}. " + " | ".join(reasons)
        )
    proof, setter = min(proven, key=lambda pair: _rounding(pair[0]))
    target = plain_copy(scheduler)
    _override(target, setter)
    return target, proof


def _rounding(proof: Export) -> tuple[float, float]:
    """The rounding of the sigmas, and that of the timesteps where it exceeds 0.05 of a timestep."""
    timesteps = proof.timestep_error if proof.timestep_error > 0.05 else 0.0
    return (0.0 if proof.exact else proof.error, timesteps)


def _override(scheduler: Any, setter: Setter) -> None:
    original = type(scheduler).set_timesteps

    @functools.wraps(original)  # pipelines inspect the signature
    def set_timesteps(self: Any, num_inference_steps: Any = None, device: Any = None, *_: Any, **__: Any) -> None:
        setter(self)
        if device is not None:
            self.timesteps = self.timesteps.to(device)

    scheduler.set_timesteps = types.MethodType(set_timesteps, scheduler)


def _by_arguments(schedule: Schedule, scheduler: Any, convention: Convention) -> Setter:
    # Any shift works, because it is inverted and then applied again; these values are the identity.
    config = scheduler.config
    shifting = {}
    if config.get("use_dynamic_shifting"):
        shifting = {"mu": 1.0 if config.get("time_shift_type") == "linear" else 0.0}
    arguments = given_arguments(schedule, scheduler, convention, shifting.get("mu"))
    return lambda target: type(target).set_timesteps(target, **arguments, **shifting)


def _by_assignment(schedule: Schedule, scheduler: Any, convention: Convention) -> Setter:
    names = {cls.__name__ for cls in type(scheduler).__mro__}
    sigmas = schedule.sigmas.clone()
    delicate = names.intersection(DELICATE) or scheduler.config.get("solver_type") == "bh1"
    if scheduler.config.get("use_flow_sigmas"):
        sigmas[0] = sigmas[0].clamp(max=1 - (DELICATE_BELOW_ONE if delicate else BELOW_ONE))
    if delicate:
        sigmas[-1] = NOTHING * sigmas[-2]
    passed = visited(scheduler, sigmas)
    timesteps = convention.timesteps(convention.process.level(passed[:-1]))

    def setter(target: Any) -> None:
        _set_steps(target, schedule.steps)
        _end_in_first_order(target)
        if names.intersection(ANGLE):
            target.betas = convention.process.sigma(sigmas).float()
            target.alphas = convention.process.alpha(sigmas).float()
            target.timesteps = timesteps.to(target.timesteps)
            return
        if getattr(target, "sigmas", None) is None:
            raise ValueError("it has no sigmas to set")
        twice = getattr(target, "order", 1) == 2
        target.sigmas = _inner_twice(sigmas, twice, ends=True).to(target.sigmas)
        if hasattr(target, "sigmas_interpol"):  # KDPM2's midpoints, one for each entry
            target.sigmas_interpol = torch.cat([sigmas[:1], passed[1:-1:2].repeat_interleave(2), sigmas[-1:]]).float()
        repeated = timesteps if len(passed) > len(sigmas) else _inner_twice(timesteps, twice, ends=False)
        target.timesteps = _like_timesteps(repeated, target.timesteps)

    return setter


def _end_in_first_order(target: Any) -> None:
    """Make the last step, to sigma 0, one of first order: there every solver of fastsched takes ``z = D``."""
    original = type(target).step
    memories = {name: empty for name, empty in MEMORIES.items() if hasattr(target, name)}
    takes_order = "order" in inspect.signature(original).parameters
    if not memories and not takes_order:
        return

    @functools.wraps(original)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.step_index == len(self.timesteps) - 1:
            vars(self).update({name: empty() for name, empty in memories.items()})
            kwargs |= {"order": 1} if takes_order else {}
        return original(self, *args, **kwargs)

    target.step = types.MethodType(step, target)


def _by_steps(schedule: Schedule, scheduler: Any, convention: Convention) -> Setter:
    if not {cls.__name__ for cls in type(scheduler).__mro__}.intersection(ARITHMETIC):
        raise ValueError("its step reads no stride to set")
    rounded = convention.timesteps(schedule.sigmas[:-1]).round().to(torch.int64)
    following = dict(zip(rounded.tolist(), [*rounded[1:].tolist(), -1], strict=True))
    if len(following) < len(rounded):
        raise ValueError(f"two of the schedule's levels round to the same timestep: {rounded.tolist()}")
    original = type(scheduler).step

    @functools.wraps(original)
    def step(self: Any, model_output: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        stride = int(timestep) - following[int(timestep)]
        self.num_inference_steps = Fraction(self.config.num_train_timesteps, stride)
        return original(self, model_output, timestep, *args, **kwargs)

    def setter(target: Any) -> None:
        _set_steps(target, schedule.steps)
        target.timesteps = rounded.to(target.timesteps)
        target.final_alpha_cumprod = torch.ones_like(target.final_alpha_cumprod)  # the last step ends at sigma 0
        target.step = types.MethodType(step, target)

    return setter


def _set_steps(target: Any, steps: int) -> None:
    """Call the class's own ``set_timesteps``, which resets its state."""
    shifting = {"mu": 1.0} if target.config.get("use_dynamic_shifting") else {}
    type(target).set_timesteps(target, steps, **shifting)


def _inner_twice(values: Tensor, twice: bool, *, ends: bool) -> Tensor:
    """``values`` as a class with two calls a step lists them: all but the first (with ``ends``, the last) twice."""
    if not twice:
        return values
    inner = values[1:-1] if ends else values[1:]
    return torch.cat([values[:1], inner.repeat_interleave(2), *([values[-1:]] if ends else [])])


def _like_timesteps(timesteps: Tensor, like: Tensor) -> Tensor:
    """``timesteps`` in the dtype of ``like``, or float32 if that dtype would round them."""
    if not like.is_floating_point() and bool(((timesteps - timesteps.round()).abs() < 1e-4).all()):
        return timesteps.round().to(like)
    return timesteps.to(like.device, torch.float32 if not like.is_floating_point() else like.dtype)
