"""From a pipeline to its schedule: measure, select, audition through the pipeline itself."""

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
from fastsched.candidates import default_candidates
from fastsched.diffusers.applier import applied
from fastsched.diffusers.conventions import describe, solver_of
from fastsched.diffusers.exporter import declared_sigmas, plain_copy
from fastsched.diffusers.loop import scales
from fastsched.diffusers.pipeline import call, check_call, measure, prompt_of, scheduler_replaced
from fastsched.measurement import noise_of
from fastsched.optimal import optimal_schedule
from fastsched.path_statistics import PathStatistics
from fastsched.schedule import Schedule
from fastsched.solvers import get_solver


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
    **call_kwargs: Any,
) -> Schedule:
    """The schedule of ``steps`` steps for a pipeline as it stands: its scheduler's solver, guidance, adapters.

    Measures the pipeline (`measure`), selects a schedule under each sensitivity weight, and lets those, the schedules
    in common use and the pipeline's own audition: each samples ``steps`` steps through the pipeline from the noises of
    the measured paths, and the one that ends nearest to the paths' ends wins, by the geometric mean over samples of
    ``||x0 - x0_path||^2``. Cost: ``2 levels`` calls a sample, and ``steps + 1``
    (twice that with heun) a sample and candidate.

    Args:
        pipe: A pipeline whose scheduler can be given schedules (docs/schedulers.md).
        steps: Steps, of which the last ends at sigma 0.
        solver: The solver to choose for; that of the pipeline's scheduler when None.
        stats: An earlier measurement of this pipeline with the same ``seed``, ``prompts`` and arguments.
        levels: As in `measure`.
        samples: As in `measure`.
        prompts: As in `measure`.
        seed: As in `measure`.
        audition: Whether to hold the audition. Without it the selection under the default weight is returned.
        **call_kwargs: What the pipeline is called with.

    Returns:
        The schedule with its predicted error, and its measured one from the audition. `fastsched.diffusers.apply`
        puts it to use; the pipeline itself is left as it was.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If an argument is out of range, the scheduler cannot be given schedules or is none of fastsched's
            solvers (name one by ``solver``), or adds noise of its own and so cannot audition.
    """
    check_call(pipe, prompts, call_kwargs)
    if stats is not None and not isinstance(stats, PathStatistics):
        raise TypeError(f"stats must be PathStatistics, as fastsched.diffusers.measure returns, got {stats!r}")
    steps = validate.positive_int("steps", steps)
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
        stats = measure(pipe, levels=levels, samples=samples, prompts=prompts, seed=seed, **call_kwargs)
    best = optimal_schedule(stats, steps, name)
    applied(best, pipe.scheduler)
    if not audition:
        return best
    entrants = candidates(stats, steps, name, pipe.scheduler)
    errors = [audition_error(pipe, stats, entrant, prompts, call_kwargs) for entrant in entrants]
    lowest = min(range(len(errors)), key=errors.__getitem__)
    return replace(entrants[lowest], measured_error=errors[lowest])


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


def candidates(stats: PathStatistics, steps: int, solver: str, scheduler: Any) -> list[Schedule]:
    """What enters an audition: unlike schedules, all of which ``scheduler`` can be given, the best guess first.

    Those of `fastsched.audition`, and the schedule that the scheduler would use by itself, unless that depends on the
    resolution.
    """
    chosen = list(default_candidates(stats, steps, solver).values())
    own = own_sigmas(scheduler, steps)
    if own is not None:
        chosen.append(Schedule.from_levels(stats.process, stats.process.level(own), solver))
    kept: list[Schedule] = []
    for schedule in chosen:
        if any(torch.equal(schedule.sigmas, other.sigmas) for other in kept) or not _fits(schedule, scheduler):
            continue
        kept.append(schedule)
    return kept


def audition_error(
    pipe: Any,
    stats: PathStatistics,
    schedule: Schedule,
    prompts: str | Sequence[str] | None,
    call_kwargs: dict[str, Any],
) -> float:
    """The geometric mean over the measured samples of ``||x0 - x0_path||^2``, sampling through the pipeline.

    The pipeline is called as `fastsched.diffusers.measure` called it, with ``schedule`` applied, and made to start
    from the noises of the measured paths by one more step at the first level.
    """
    distances: list[Tensor] = []
    turn = 0
    while sum(len(part) for part in distances) < stats.samples:
        before = sum(len(part) for part in distances)
        scheduler, _ = applied(schedule, pipe.scheduler)
        last = _start_at(scheduler, stats.seeds[before:], schedule)
        with scheduler_replaced(pipe, scheduler):
            call(pipe, schedule.steps, prompt_of(prompts, turn), call_kwargs)
        ends = last[0].float().cpu()
        if ends.shape[1:] != stats.ends.shape[1:]:
            raise ValueError(
                f"stats are of samples {list(stats.ends.shape[1:])} and the pipeline's are {list(ends.shape[1:])}; "
                "stats must be measured on this pipeline with the same arguments"
            )
        expected = stats.ends[before : before + len(ends)]
        distances.append((ends[: len(expected)] - expected).square().flatten(1).sum(1).double())
        turn += 1
    smallest = torch.finfo(torch.float64).tiny
    return float(torch.cat(distances).clamp_min(smallest).log().mean().exp())


def _start_at(scheduler: Any, seeds: Tensor, schedule: Schedule) -> list[Tensor]:
    """Make ``scheduler`` (a copy) begin at the noises of ``seeds``, by a first step that only hands them out.

    Returns:
        A list that holds the last state once the pipeline has run.
    """
    kind, put = type(scheduler), scheduler.set_timesteps
    convention = describe(scheduler)
    scale = scales(convention, convention.process.level(schedule.sigmas[:1]))[1].float()
    last: list[Tensor] = []

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
            def step(self: Any, *args: Any, **kwargs: Any) -> Any:
                result = follow(*args, **kwargs)
                last[:] = [result[0] if isinstance(result, tuple) else result.prev_sample]
                return result

            self.step = types.MethodType(step, self)
            start = (scale * noise_of(seeds[: len(sample)], sample.shape[1:])).to(sample)
            return SchedulerOutput(prev_sample=start) if options.get("return_dict", True) else (start,)

        self.timesteps = torch.cat([self.timesteps[:1], self.timesteps])
        self.step = types.MethodType(hand_out, self)

    scheduler.set_timesteps = types.MethodType(set_timesteps, scheduler)
    return last


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
