"""Set up a pipeline so that its next call uses a schedule."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import torch
from torch import Tensor

from fastsched import validate
from fastsched.diffusers.conventions import (
    Convention,
    check_pipe,
    class_and_settings,
    describe,
    holders_of,
    own_scheduler,
)
from fastsched.diffusers.fitted_scheduler import BELOW_START, FittedScheduler
from fastsched.diffusers.schedulers.exporter import (
    Export,
    StepsOtherwise,
    check_range,
    plain_copy,
    prove,
    rounding_warning,
    told_timesteps,
    warn_of_solver,
)
from fastsched.diffusers.schedulers.given_lists import warn_of_list
from fastsched.diffusers.schedulers.overrides import (
    Override,
    SaveConfig,
    ScaleModelInput,
    SetBeginIndex,
    Step,
    Timesteps,
    start_by_strength,
    warn_of_lost_methods,
)
from fastsched.diffusers.schedulers.replacement import replacement
from fastsched.diffusers.schedulers.setters import WAYS, inner_twice
from fastsched.sampling.schedule import Schedule
from fastsched.sampling.stock_weights import as_fitted
from fastsched.selection.starts import even_schedule

#: Why a method that was set on a scheduler by hand is not used with an applied schedule.
APPLIED = "an applied schedule sets one of its own"


def apply(schedule: Schedule, pipe: Any) -> Export:
    """Give ``pipe`` a copy of its scheduler that uses ``schedule`` whatever number of steps a call asks for.

    Three ways are tried in this order. The first one that is verified to be exact, in the sigmas and in the timesteps
    that the network is given, is used. If none is exact, the one with the least rounding is used:

    * ``"arguments"``: the class's own ``set_timesteps(sigmas=...)`` or ``(timesteps=...)``;
    * ``"assigned"``: its ``sigmas`` and ``timesteps`` are set after ``set_timesteps``, if its ``step`` follows them;
    * ``"stepped"``: for DDIM, the stride that its ``step`` reads is set before each step.

    A schedule of the fitted solver, or with decoupled levels of the denoiser, needs a class of its own: the pipeline
    gets a `fastsched.diffusers.FittedScheduler` (way ``"fitted"``), and its calls must ask for as many steps as the
    schedule has.

    Otherwise the scheduler's class and config do not change, so the pipeline saves and loads as before, without the
    schedule. The old scheduler object is not modified: keep a reference to ``pipe.scheduler`` to restore it. Copies and
    pickles of the new one keep the schedule.

    Image-to-image and inpainting pipelines start midway, by their ``strength``. They get the rest of the schedule after
    the level at which the scheduler would have started them by itself. With ``denoising_start`` they get the schedule's
    own steps below that timestep, so that one pipeline can go on where another with the same schedule has ended.

    Args:
        schedule: The schedule.
        pipe: A pipeline with a ``scheduler``.

    Returns:
        How the schedule was applied, the sigmas that will be used and their largest relative error.

    Raises:
        TypeError: If ``schedule`` is not a `Schedule`, or ``pipe`` has no scheduler.
        ValueError: If no way works; the message gives the reason for each.

    Warns:
        UserWarning: If the scheduler takes integer timesteps and rounds the schedule by more than 1e-5, or if the
            schedule was chosen (it has an ``origin``) for another solver than the scheduler's, or if the ``step`` of
            the scheduler object was replaced by hand, before or after, or if another pipeline, which this one holds,
            keeps the scheduler.
    """
    check_pipe(pipe)
    scheduler, proof = applied(schedule, pipe.scheduler)
    if proof.way != "fitted":
        warn_of_solver(schedule, pipe.scheduler)
    warn_of_lost_methods(pipe.scheduler, APPLIED)
    if not proof.exact:
        measured = "schedules that were measured through this pipeline are not"
        validate.warn(f"{rounding_warning(scheduler, proof)}; {measured}")
    before, pipe.scheduler = pipe.scheduler, scheduler
    for name in holders_of(before, pipe):
        validate.warn(
            f"pipe.{name} keeps the scheduler that {type(pipe).__name__} has had, without the schedule; if that is "
            f"the one that steps the latents, apply the schedule to pipe.{name}"
        )
    return proof


def applied(schedule: Schedule, scheduler: Any) -> tuple[Any, Export]:
    """A copy of ``scheduler`` that uses ``schedule``, and what was verified; arguments and errors as in `apply`."""
    scheduler = own_scheduler(scheduler)
    if getattr(schedule, "weights", None) is not None or getattr(schedule, "decoupled", None) == "denoiser":
        return _fitted(schedule, scheduler)
    check_range(schedule, scheduler)
    proven, reasons = _proven(schedule, scheduler)
    if not proven:
        change = replacement(scheduler, lambda other: _proven(schedule, other)[0])
        raise ValueError(
            f"{type(scheduler).__name__} cannot be made to use this schedule; {change}. {_listed(reasons)}"
        )
    proof = min(proven, key=_rounding)
    target = plain_copy(scheduler)
    set_timesteps = SetTimesteps(target, schedule, proof.way)
    set_timesteps.put()
    if hasattr(target, "set_begin_index"):
        SetBeginIndex(target, set_timesteps).put()
    SaveConfig(target).put()
    return target, proof


def _fitted(schedule: Schedule, scheduler: Any) -> tuple[FittedScheduler, Export]:
    check_derived(scheduler)
    if schedule.weights is None:  # no class of diffusers computes D for another level than the state's
        try:
            schedule = as_fitted(schedule, describe(scheduler).process)
        except ValueError as error:
            raise ValueError(f"{error}; use decoupled='timestep' for this one") from None
    target = FittedScheduler.from_schedule(schedule, scheduler)
    return target, prove(schedule, target, lambda copied: copied.set_timesteps(), "fitted")


def check_derived(scheduler: Any) -> None:
    """ValueError if a class that derives from one of diffusers reads a network's outputs, or steps, in another way.

    Then no schedule can be applied to it that could be applied to its base, as which it is measured. There is a warning
    where its steps cannot be tried, as those of a class for latents of one shape.
    """
    scheduler = own_scheduler(scheduler)
    own, (name, _) = type(scheduler).__name__, class_and_settings(scheduler)
    if type(scheduler) is getattr(diffusers, name):
        return
    schedule = even_schedule(describe(scheduler).process, 3, "ddim")
    base = plain_copy(scheduler)
    base.__class__ = getattr(diffusers, name)
    proven, reasons = _proven(schedule, scheduler)
    if proven or not _proven(schedule, base)[0]:
        return
    if any(isinstance(reason, StepsOtherwise) for reason in reasons.values()):
        raise ValueError(
            f"{own} does not scale the network's input, read its outputs or step as {name} does, from which it "
            "derives, so a measurement, which does all this, would be wrong; change the network's inputs and outputs "
            f"in the network or the pipeline, and give the pipeline a {name}. {_listed(reasons)}"
        )
    validate.warn(
        f"{own} is measured as {name}, from which it derives; whether it steps alike could not be tried. "
        f"{_listed(reasons)}"
    )


def _listed(reasons: dict[str, ValueError]) -> str:
    return " | ".join(f"{way}: {reason}" for way, reason in reasons.items())


def _proven(schedule: Schedule, scheduler: Any) -> tuple[list[Export], dict[str, ValueError]]:
    """The verified ways up to the first exact one, and the reasons why other ways do not work."""
    proven: list[Export] = []
    reasons = {}
    for way, make in WAYS.items():
        try:
            proof = prove(schedule, scheduler, make(schedule, scheduler), way)
        except ValueError as error:
            reasons[way] = error
            continue
        proven.append(proof)
        if _rounding(proof) == (0.0, 0.0):
            break
    return proven, reasons


def _rounding(proof: Export) -> tuple[float, float]:
    """The rounding of the sigmas, and that of the timesteps where it exceeds 0.05 of a timestep."""
    timesteps = proof.timestep_error if proof.timestep_error > 0.05 else 0.0
    return (0.0 if proof.exact else proof.error, timesteps)


class SetTimesteps(Override):
    """``set_timesteps`` that sets a schedule, whatever number of steps or list it is called with.

    A run may start midway: by the class's ``strength``, by a list of flow times that starts below the schedule, or by
    a slice of the timesteps (`start_at`). Then only the rest of the schedule is verified and set.
    """

    name = "set_timesteps"

    def __init__(self, owner: Any, schedule: Schedule, way: str) -> None:
        super().__init__(owner)
        self.schedule, self.way = schedule, way
        self.asked: dict[str, Any] = {}  # the arguments of the last call
        self.started_at: int | None = None  # the index of the slice by which the run starts
        self.count = 0  # of the whole schedule's timesteps

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Called as the class's own method."""
        self.asked = dict(self.__signature__.bind(*args, **kwargs).arguments)
        self.asked |= self.asked.pop("kwargs", {})
        self.started_at = None
        self._set(self.schedule)
        self.count = len(self.owner.timesteps)
        warn_of_list(self.schedule, self.asked, self._own_timesteps, self.owner.timesteps.plain)
        if self.asked.get("strength", 1.0) < 1.0 or self._list_starts_below():  # LCM's and TCD's class, or a list
            self._use(remaining(self.schedule, describe(self.owner), self._own_timesteps()[0]))

    def _list_starts_below(self) -> bool:
        """Whether a list of flow times starts below the schedule, for latents with less noise (Stable Audio 3)."""
        if self.schedule.noise != "flow" or self.asked.get("sigmas") is None:
            return False
        convention = describe(self.owner)
        start = convention.process.sampler_sigma(convention.levels(self._own_timesteps()[:1]))
        return float(start) < BELOW_START * float(self.schedule.sigmas[0])

    def _set(self, schedule: Schedule) -> None:
        owner, device = self.owner, self.asked.get("device")
        warn_of_lost_methods(owner, APPLIED)
        Step(owner).put()
        WAYS[self.way](schedule, owner)(owner)
        timesteps = told_timesteps(owner, torch.as_tensor(owner.timesteps), **self.asked)
        if device is not None:
            on_mps = torch.device(device).type == "mps"  # which has no float64
            timesteps = (timesteps.float() if on_mps and timesteps.dtype == torch.float64 else timesteps).to(device)
        owner.timesteps = Timesteps.of(timesteps, self.start_at)
        if self.asked.get("timesteps") is not None and isinstance(getattr(owner, "sigmas", None), Tensor):
            owner.sigmas = Timesteps.of(owner.sigmas, self.sigmas_from)  # LTX slices them before its timesteps

    def start_at(self, index: int) -> Tensor:
        """Start at the level of the class's own timestep ``index``, and return the timesteps from there on.

        With ``denoising_start``, at the timestep ``index`` of the schedule.

        Raises:
            ValueError: If the scheduler cannot use the rest of the schedule.
        """
        rest = self._rest(index)
        self.started_at = index
        if rest is None:
            return self.owner.timesteps.plain[:0]
        self._use(rest)
        if rest is not self.schedule:
            self._expect_start()
        return self.owner.timesteps.plain

    def _expect_start(self) -> None:
        """The next call of ``scale_model_input`` or ``step`` must be for the first timestep (`Step.begin`)."""
        self.owner.step.start = float(self.owner.timesteps.plain[0])
        if hasattr(type(self.owner), "scale_model_input"):
            ScaleModelInput(self.owner).put()

    def sigmas_from(self, index: int) -> Tensor:
        """The sigmas that a start at ``index`` will use (`start_at`); nothing is set. During a run, a plain slice."""
        if self.owner.timesteps.begun:
            return self.owner.sigmas.plain[index:]
        rest = self._rest(index)
        if rest is None:
            return self.owner.sigmas.plain[:0]
        return inner_twice(rest.sigmas, self.owner, ends=True).to(self.owner.sigmas.plain)

    def _rest(self, index: int) -> Schedule | None:
        """The schedule of a start at ``index``; None if no step is left."""
        schedule = self.schedule
        if self.owner.timesteps.compared:
            schedule.check_coupled("denoising_start")
            sigmas = schedule.sigmas[index // getattr(self.owner, "order", 1) :]
            return Schedule(sigmas, schedule.solver, schedule.noise) if len(sigmas) > 1 else None
        own = self._own_timesteps()
        listed = self.asked.get("num_inference_steps") is None  # the pipeline counts the timesteps that it was given
        count = self.count if listed else len(own)
        index = max(index + count, 0) if index < 0 else index
        if count != len(own):
            index = start_by_strength(index, count, len(own))
        if index == 0:
            return schedule
        return remaining(schedule, describe(self.owner), own[index]) if index < len(own) else None

    def _own_timesteps(self) -> Tensor:
        """The timesteps that the class itself would use."""
        plain = plain_copy(self.owner)
        type(plain).set_timesteps(plain, **self.asked)
        return torch.as_tensor(plain.timesteps)

    def _use(self, rest: Schedule) -> None:
        """Verify the rest of the schedule, and set it."""
        try:
            if rest is not self.schedule:
                prove(rest, self.owner, WAYS[self.way](rest, self.owner), self.way)
            self._set(rest)
        except ValueError as error:
            raise ValueError(
                "this scheduler cannot start midway in the applied schedule, as strength, denoising_start or a slice "
                f"of its timesteps asks ({error}); restore its own scheduler for this call, or leave denoising_start "
                f"out and pass strength=1.0 with num_inference_steps={self.schedule.steps}"
            ) from error


def remaining(schedule: Schedule, convention: Convention, timestep: Tensor) -> Schedule:
    """``schedule`` from the level of ``timestep`` on, with that level in front.

    The schedule's next level is omitted if it is the same timestep, or much nearer to that level than to the one after.
    """
    level = convention.levels(timestep.reshape(1))
    start = convention.process.sampler_sigma(level)
    if float(start) >= float(schedule.sigmas[0]):
        return schedule
    schedule.check_coupled("a start midway")
    below = schedule.sigmas[schedule.sigmas < start]
    levels = convention.process.level(below)
    if len(below) > 1:
        gaps = torch.cat([level, levels[:-1]]).log().diff().abs()
        next_gap = float(gaps[1]) if len(gaps) > 1 else math.inf
        same = convention.process.integer_timesteps and float(convention.timesteps(levels[:1])) > float(timestep) - 0.75
        if same or (math.isfinite(next_gap) and float(gaps[0]) < 0.25 * next_gap):
            below = below[1:]
    return Schedule(torch.cat([start, below]), schedule.solver, schedule.noise)
