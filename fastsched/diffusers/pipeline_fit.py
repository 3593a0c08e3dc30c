"""From a pipeline to its schedule: measure, select, audition and tune through the pipeline itself."""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from fastsched import validate
from fastsched.diffusers.applier import applied
from fastsched.diffusers.conventions import Convention, describe, solver_of
from fastsched.diffusers.exporter import declared_sigmas, plain_copy
from fastsched.diffusers.pipeline_measurement import call, check_call, measure, prompt_of, scheduler_replaced
from fastsched.diffusers.probe import scales
from fastsched.fitting.candidates import candidates_in_turn
from fastsched.fitting.loop import MODEL_CALLS, affordable
from fastsched.fitting.rollouts import Evaluations, distances
from fastsched.fitting.secants import Performance
from fastsched.fitting.tuning import tuned
from fastsched.measurement.statistics import PathStatistics
from fastsched.metrics import geometric_mean
from fastsched.sampling.random_streams import noise_of
from fastsched.sampling.schedule import Schedule
from fastsched.sampling.solvers import get_solver
from fastsched.selection.optimal import optimal_schedule


def fit(
    pipe: Any,
    steps: int,
    *,
    solver: str | None = None,
    stats: PathStatistics | None = None,
    levels: int = 48,
    samples: int = 4,
    prompts: str | Sequence[str] | None = None,
    seed: int = 0,
    audition: bool = True,
    model_calls: int = MODEL_CALLS,
    **call_kwargs: Any,
) -> Schedule:
    """The schedule of ``steps`` steps for a pipeline as it stands: its scheduler's solver, guidance, adapters.

    Measures the pipeline (`measure`), and holds an audition of the most promising schedules (`fastsched.audition`) and
    the pipeline's own: each samples ``steps`` steps through the pipeline from the noises of the measured paths, and the
    one that ends nearest to the paths' ends wins, by the geometric mean over samples of ``||x0 - x0_path||^2``. The
    rest of the budget goes to tuning: more schedules near the best two, run likewise (`fastsched.tune`).

    Cost, counted per sample: ``2 levels`` calls a sample to measure, 384 with the defaults, and at most ``model_calls``
    later, in runs of ``steps + 1`` calls a sample (``2 steps`` with two-stage solvers): 740 serve 20 schedules of 8
    steps, 4 of them in the audition.

    Args:
        pipe: A pipeline whose scheduler can be given schedules (docs/schedulers.md).
        steps: Steps, of which the last ends at sigma 0.
        solver: The solver to choose for; that of the pipeline's scheduler when None.
        stats: An earlier measurement of this pipeline with the same ``seed``, ``prompts`` and arguments. If its
            increments were not kept (`measure`; a file holds none), there is no tuning: only a whole new measurement
            would bring them.
        levels: As in `measure`.
        samples: As in `measure`.
        prompts: As in `measure`.
        seed: As in `measure`.
        audition: Whether to hold the audition, and tune. Without it the selection under the default weight is returned.
        model_calls: The most to spend on audition and tuning, counted per sample. Where it does not suffice for one run
            of all samples, the schedule is the selection, as without an audition.
        **call_kwargs: What the pipeline is called with.

    Returns:
        The schedule with its measured error, and its predicted one if it was not tuned. `fastsched.diffusers.apply`
        puts it to use; the pipeline itself is left as it was.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If an argument is out of range, the scheduler cannot be given schedules or is none of fastsched's
            solvers (name one by ``solver``), or adds noise of its own and so cannot audition; or no candidate's samples
            are finite.
    """
    check_call(pipe, prompts, call_kwargs)
    if stats is not None and not isinstance(stats, PathStatistics):
        raise TypeError(f"stats must be PathStatistics, as fastsched.diffusers.measure returns, got {stats!r}")
    steps = validate.positive_int("steps", steps)
    budget = validate.positive_int("model_calls", model_calls, minimum=0)
    name = get_solver(solver).name if solver is not None else solver_of(pipe.scheduler, steps)
    if name is None:
        raise ValueError(
            f"{type(pipe.scheduler).__name__}, as it is set, is none of fastsched's solvers, so solver must name the "
            "nearest one to choose for (docs/schedulers.md): 'ddim' for first-order ones, 'dpmpp_3m', ..."
        )
    check_scheduler(pipe.scheduler, steps, name, audition=audition)
    if audition and call_kwargs.get("eta"):
        raise ValueError(f"eta must be 0 in an audition, for it adds noise, got {call_kwargs['eta']!r}")
    if stats is None:
        stats = measure(
            pipe,
            levels=levels,
            samples=samples,
            prompts=prompts,
            seed=seed,
            keep_increments=audition,
            **call_kwargs,
        )
    best = optimal_schedule(stats, steps, name)
    applied(best, pipe.scheduler)
    each = get_solver(name).model_calls(steps) + 1  # the noises are handed out at one more step
    most = budget // (each * stats.samples)
    if stats.increments is not None:  # some is for tuning
        most = affordable(each, stats.samples, stats.samples, budget)
    if not audition or most == 0:
        return best

    def perform(schedule: Schedule) -> Performance | None:
        if not _fits(schedule, pipe.scheduler):
            return None
        performance = performed(pipe, stats, schedule, prompts, call_kwargs)
        return performance if bool(performance.ends.isfinite().all()) else None

    runs = [(entrant, perform(entrant)) for entrant in candidates(stats, steps, name, pipe.scheduler, most)]
    known = [(entrant, performance) for entrant, performance in runs if performance is not None]
    if not known:
        raise ValueError(f"the pipeline's samples hold NaN or inf under every one of {len(runs)} schedules")
    if stats.increments is not None:
        return tuned(perform, stats, known, budget // (each * stats.samples) - len(runs)).schedule
    heard = [
        replace(entrant, measured_error=geometric_mean(distances(stats, performance.ends)))
        for entrant, performance in known
    ]
    return min(heard, key=lambda schedule: schedule.measured_error or 0.0)


def check_scheduler(scheduler: Any, steps: int, solver: str, *, audition: bool) -> None:
    """Check on any schedule of ``steps`` steps, before a call of the network is spent, that it can be used.

    Raises:
        ValueError: If the scheduler cannot be given schedules, or adds noise and so cannot hold an ``audition``.
    """
    process = describe(scheduler).process
    levels = process.levels(max(steps, 3))[:steps]
    _, proof = applied(Schedule.from_levels(process, torch.cat([levels, levels.new_zeros(1)]), solver), scheduler)
    if audition and not proof.deterministic:
        raise ValueError(
            f"{type(scheduler).__name__} adds noise of its own, so its samples cannot be held against the paths' "
            "ends; set audition=False, or fit with a deterministic scheduler of the same model"
        )


def candidates(stats: PathStatistics, steps: int, solver: str, scheduler: Any, most: int) -> list[Schedule]:
    """What enters an audition: up to ``most`` unlike schedules, all of which ``scheduler`` can be given.

    Those of `fastsched.audition`, the best guess first, and the schedule that the scheduler would use by itself, unless
    that depends on the resolution; it is among the first two.
    """
    kept: list[Schedule] = []
    own = own_sigmas(scheduler, steps)
    for label, schedule in candidates_in_turn(stats, steps, solver):
        entrants = [schedule]
        if label == "optimal" and own is not None:
            entrants.append(Schedule.from_levels(stats.process, stats.process.level(own), solver))
        for entrant in entrants:
            if len(kept) == most:
                return kept
            if not any(torch.equal(entrant.sigmas, other.sigmas) for other in kept) and _fits(entrant, scheduler):
                kept.append(entrant)
    return kept


def performed(
    pipe: Any,
    stats: PathStatistics,
    schedule: Schedule,
    prompts: str | Sequence[str] | None,
    call_kwargs: dict[str, Any],
) -> Performance:
    """How the measured samples fare when the pipeline samples by ``schedule``, float32 on the CPU.

    The pipeline is called as `fastsched.diffusers.measure` called it, with ``schedule`` applied, and made to start
    from the noises of the measured paths by one more step at the first level.
    """
    parts: list[Performance] = []
    left = stats.samples
    while left > 0:
        scheduler, _ = applied(schedule, pipe.scheduler)
        run = _start_at(scheduler, stats.seeds[-left:], schedule)
        with scheduler_replaced(pipe, scheduler):
            call(pipe, schedule.steps, prompt_of(prompts, len(parts)), call_kwargs)
        ends = run.end.float().cpu()
        if ends.shape[1:] != stats.ends.shape[1:]:
            raise ValueError(
                f"stats are of samples {list(stats.ends.shape[1:])} and the pipeline's are {list(ends.shape[1:])}; "
                "stats must be measured on this pipeline with the same arguments"
            )
        parts.append(Performance(ends, run.evaluations()).first(left))
        left -= len(parts[-1].ends)
    return Performance.joined(parts)


class _Watch:
    """What a scheduler's steps were given and came to."""

    def __init__(self, convention: Convention) -> None:
        self.convention = convention
        self.end = torch.empty(0)
        self._steps: list[tuple[float, Tensor, Tensor]] = []  # s, y, D

    def saw(self, output: Tensor, timestep: Any, sample: Tensor, following: Tensor) -> None:
        """A step's arguments and result."""
        s = self.convention.levels(torch.as_tensor(timestep).detach().cpu().double().flatten()[:1])
        sigma, (a, c) = self.convention.process.sigma(s), self.convention.denoiser.coefficients(s)
        y = sample.float() / float(scales(self.convention, s)[1])
        raw = self.convention.raw_output(output, sample.shape[1]).float()
        self._steps.append((float(s), y.cpu(), (float(a * sigma) * y + float(c) * raw).cpu()))
        self.end = following

    def evaluations(self) -> Evaluations:
        """All steps."""
        return Evaluations.of(self._steps)


def _start_at(scheduler: Any, seeds: Tensor, schedule: Schedule) -> _Watch:
    """Make ``scheduler`` (a copy) begin at the noises of ``seeds``, by a first step that only hands them out.

    Returns:
        What watches the steps that follow, and holds the last state once the pipeline has run.
    """
    kind, put = type(scheduler), scheduler.set_timesteps
    convention = describe(scheduler)
    scale = scales(convention, convention.process.level(schedule.sigmas[:1]))[1].float()
    watch = _Watch(convention)

    @functools.wraps(kind.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        self.__dict__.pop("step", None)
        put(*args, **kwargs)

        @functools.wraps(kind.step)
        def hand_out(self: Any, output: Tensor, timestep: Any, sample: Tensor, *_: Any, **options: Any) -> Any:
            self.__dict__.pop("step")
            put(*args, **kwargs)  # as if this step had not been
            follow = self.step

            @functools.wraps(kind.step)
            def step(self: Any, output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
                result = follow(output, timestep, sample, *args, **kwargs)
                watch.saw(output, timestep, sample, result[0] if isinstance(result, tuple) else result.prev_sample)
                return result

            self.step = types.MethodType(step, self)
            start = (scale * noise_of(seeds[: len(sample)], sample.shape[1:])).to(sample)
            return SchedulerOutput(prev_sample=start) if options.get("return_dict", True) else (start,)

        self.timesteps = torch.cat([self.timesteps[:1], self.timesteps])
        self.step = types.MethodType(hand_out, self)

    scheduler.set_timesteps = types.MethodType(set_timesteps, scheduler)
    return watch


def own_sigmas(scheduler: Any, steps: int) -> Tensor | None:
    """The sigmas that ``scheduler`` would use by itself, if they are a schedule that fastsched can hold.

    That is, they end in 0 and start where the model is known; IPNDM's start at a signal of 0, which its step loses.
    """
    target, config = plain_copy(scheduler), scheduler.config
    if config.get("use_dynamic_shifting"):
        return None  # the pipeline knows by how much, and only when it is called
    target.set_timesteps(steps)
    convention = describe(scheduler)
    sigmas = declared_sigmas(target, convention)
    descending = bool((sigmas[1:] < sigmas[:-1]).all())
    known = float(convention.process.level(sigmas[:1])) <= 1.001 * convention.process.s_max
    return sigmas if descending and known and float(sigmas[-1]) == 0 and len(sigmas) == steps + 1 else None


def _fits(schedule: Schedule, scheduler: Any) -> bool:
    try:
        applied(schedule, scheduler)
    except ValueError:
        return False
    return True
