"""From a pipeline to its schedule: measure, select, audition and tune through the pipeline itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastsched import validate
from fastsched.diffusers.applier import applied
from fastsched.diffusers.attributes import in_one_thread
from fastsched.diffusers.conventions import describe, other_solver, own_scheduler, solver_of
from fastsched.diffusers.pipelines.call_identity import call_identity, check_same_call, check_same_calls
from fastsched.diffusers.pipelines.measurement import CHECKS as CHECKS_OF_MEASURE
from fastsched.diffusers.pipelines.measurement import (
    calibration_calls,
    checked_calls,
    measured_in_group,
    one_bar,
)
from fastsched.diffusers.pipelines.prompt_calls import PromptCalls, prompts_encoded_once
from fastsched.diffusers.pipelines.runner import PipelineRunner, fits
from fastsched.diffusers.schedulers.exporter import Export, declared_sigmas, plain_copy
from fastsched.diffusers.schedulers.replacement import replacement
from fastsched.diffusers.watching.caches import check_caches
from fastsched.fitting.budget import TOTAL, default_total, planned
from fastsched.fitting.candidates import candidates_in_turn
from fastsched.fitting.group_runs import check_group, led_by_first
from fastsched.fitting.interrupts import BestSoFar, interrupted_schedule
from fastsched.fitting.loop import MODEL_CALLS, FitReport, check_levels, fit_by_running
from fastsched.fitting.rollouts import Run
from fastsched.fitting.run_log import RunLog, identity, logged
from fastsched.measurement.batches import finished_part
from fastsched.measurement.devices import check_together, prepare_together, rank_and_size
from fastsched.measurement.measuring import check_same_process
from fastsched.measurement.statistics import PathStatistics, is_statistics
from fastsched.sampling.files import absolute_file, check_writable, runs_beside
from fastsched.sampling.fitted import chosen_solver
from fastsched.sampling.progress import Progress
from fastsched.sampling.schedule import Schedule, check_decoupled, decoupling
from fastsched.sampling.solvers import FITTED
from fastsched.selection.optimal import optimal_schedule
from fastsched.selection.starts import even_schedule


def fit(
    pipe: Any,
    steps: int,
    *,
    solver: str | None = None,
    stats: PathStatistics | None = None,
    levels: int | Tensor | Sequence[float] | None = None,
    samples: int | range | None = None,
    prompts: str | Sequence[str] | None = None,
    seed: int = 0,
    audition: bool = True,
    model_calls: int | None = None,
    decoupled: bool | str = False,
    prompts_per_call: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    group: Any = None,
    progress: Progress = True,
    **call_kwargs: Any,
) -> Schedule:
    """Choose a schedule for `apply`, of ``steps`` steps, for a pipeline with its present solver, guidance and adapters.

    Measures it, runs schedules and tunes the best, as `fastsched.fit`. Ctrl-C without a checkpoint returns the best.

    Args:
        pipe: A pipeline whose scheduler can be given schedules (docs/schedulers.md).
        steps: The number of steps, of which the last ends at sigma 0.
        solver: The solver; that of the pipeline's scheduler when None.
        stats: An earlier measurement of this pipeline, with the same arguments. Without increments nothing is tuned.
        levels: As in `measure`; when None chosen by the number of calls, as in `fastsched.fit`.
        samples: As ``levels``.
        prompts: As in `measure`.
        seed: As in `measure`.
        audition: Whether to run candidates and tune; if not, the result is that of `fastsched.optimal_schedule`.
        model_calls: As in `fastsched.fit`, with 100 a prompt if that is more; ``steps + 1`` a run (two stages: twice).
        decoupled: As in `fastsched.fit`; only with ``"timestep"`` the pipeline keeps the class of its scheduler.
        prompts_per_call: As in `measure`.
        checkpoint: A file for the measurement; runs are kept in ``checkpoint.runs``. The same call goes on from there.
        group: As in `measure`; its first process decides which schedules run, and all processes share the samples.
        progress: As in `measure`: one bar for the steps of the measurement, and one for those that run schedules.
        **call_kwargs: Arguments of the pipeline's call.

    Raises:
        ValueError: If an argument is out of range or of another call, or the scheduler or all samples cannot be used.
    """
    check_together(locals(), **CHECKS)
    calls = prepare_together(lambda: checked_calls(pipe, prompts, call_kwargs, prompts_per_call), group)
    name = prepare_together(lambda: checked_fit(pipe, steps, solver, checkpoint, audition, decoupled), group)
    check_group(stats, group, steps=steps, solver=name, audition=audition, decoupled=decoupled, model_calls=model_calls)
    least = calls.minimum_samples if audition else 1  # without runs, more prompts than the calls allow are no loss
    total = model_calls if model_calls is not None else MODEL_CALLS if stats is not None else default_total(least)
    plan = partial(_planned, total, steps, levels, samples, name, least, chosen=model_calls is not None)
    places = {"checkpoint": absolute_file(checkpoint), "group": group, "progress": progress}
    with in_one_thread(pipe), prompts_encoded_once(pipe):
        if stats is None:
            settings = {"prompts": prompts, "prompts_per_call": prompts_per_call, "seed": seed, **places}
            stats, whole = _measured(pipe, call_kwargs, plan, audition, decoupled, **settings)
            if not whole:
                return interrupted_schedule(stats, steps, chosen_solver(name))
            total = max(0, total - stats.model_calls)
        return _fitted(pipe, stats, steps, name, calls, call_kwargs, total * audition, decoupled, **places).schedule


def _measured(
    pipe: Any,
    call_kwargs: dict[str, Any],
    plan: Callable[[], dict[str, Any]],
    audition: bool,
    decoupled: bool | str,
    **settings: Any,
) -> tuple[PathStatistics, bool]:
    """The measurement of a fit, and whether it is whole: without a checkpoint an interrupt leaves what was finished."""
    settings |= prepare_together(plan, settings["group"]) | {"keep_increments": audition}
    settings["must_scale"] = audition and must_scale(pipe.scheduler, decoupled)
    try:
        return measured_in_group(pipe, call_kwargs, vectors="first", **settings), True
    except KeyboardInterrupt as error:
        return finished_part(error, settings["checkpoint"], settings["group"]), False


def checked_fit(
    pipe: Any, steps: int, solver: str | None, checkpoint: Any, audition: bool, decoupled: bool | str
) -> str:
    """Check that the pipeline can be fitted and files can be written; returns the solver to choose for."""
    if checkpoint is not None:
        check_writable(runs_beside(checkpoint))
    name = checked_solver(pipe.scheduler, steps, solver, audition=audition)
    apart = decoupling("decoupled", decoupled)
    if apart is not None:
        check_tells_apart(pipe.scheduler, steps, name, apart)
    check_caches(pipe)
    return name


def _planned(
    total: int,
    steps: int,
    levels: int | Tensor | Sequence[float] | None,
    samples: int | range | None,
    solver: str,
    least: int,
    *,
    chosen: bool,
) -> dict[str, Any]:
    """The levels and samples to measure (`planned`), after a check that a search over the levels is possible.

    Warns if ``total`` is above the usual because every prompt is measured, unless the caller has ``chosen`` it.
    """
    levels, samples = planned(total, steps, levels, samples, partial(calibration_calls, least=least), least=least)
    check_levels(steps, len(levels) if isinstance(levels, Tensor) else levels, chosen_solver(solver))
    if total > TOTAL and not chosen:
        validate.warn(
            f"every prompt is measured, so this fit takes up to {total:,} model calls instead of {TOTAL:,} "
            f"({least} samples at least); pass fewer prompts, or set model_calls"
        )
    return {"levels": levels, "samples": samples}


def _fitted(
    pipe: Any,
    stats: PathStatistics,
    steps: int,
    solver: str,
    prompts: PromptCalls,
    call_kwargs: dict[str, Any],
    budget: int,
    decoupled: bool | str,
    *,
    checkpoint: str | os.PathLike[str] | None,
    group: Any,
    progress: Progress,
) -> FitReport:
    """Fit to a measurement with at most ``budget`` calls. Outside a group, the runs are kept in a file."""

    def check() -> str:
        check_same_process(stats, describe(pipe.scheduler).process)
        own = call_identity(pipe, prompts.prompts, call_kwargs)
        check_same_call("stats", stats.origin, own)
        applied(optimal_schedule(stats, steps, solver), pipe.scheduler)  # raises before a call is spent
        return own

    alone, own = rank_and_size(group)[1] == 1, prepare_together(check, group)
    if not alone:
        check_same_calls(own, group)
    calls = chosen_solver(solver).model_calls(steps) + 1  # one more step starts from the noise of the measured paths
    must = must_scale(pipe.scheduler, decoupled)
    run = PipelineRunner(pipe, stats, prompts, call_kwargs, calls=calls, model_calls=budget, must_scale=must)
    tried = candidates(stats, steps, solver, pipe.scheduler)
    apart = decoupling("decoupled", decoupled)
    options = {"calls": calls, "model_calls": budget, "decoupled": apart}
    best = BestSoFar(run, stats)

    def made(run: Run) -> FitReport:
        best.run = run
        return fit_by_running(best, stats, steps, solver, tried, **options)

    runner = run
    if alone and checkpoint is not None:
        what = identity(stats, steps=steps, solver=solver, model_calls=budget, decoupled=apart)
        runner = logged(run, RunLog(runs_beside(checkpoint), what))
    try:
        with one_bar(pipe, budget, budget > 0 and progress, "fitting") as run.advance:
            return led_by_first(runner if alone else run.part, made, group)
    except KeyboardInterrupt:
        if checkpoint is not None or group is not None:
            raise
        return FitReport(interrupted_schedule(stats, steps, chosen_solver(solver), best), stats)


#: Checks of arguments that differ from the usual ones; `check_call` checks the arguments of the pipeline's call.
CHECKS: dict[str, validate.Check] = {
    **CHECKS_OF_MEASURE,
    "stats": validate.optional(is_statistics),
    "audition": validate.flag,
    **{name: validate.optional(validate.CHECKS[name]) for name in ("levels", "samples", "model_calls")},
}


def checked_solver(scheduler: Any, steps: int, solver: str | None, *, audition: bool) -> str:
    """The solver to choose for, after a check that the scheduler can use an arbitrary schedule of ``steps`` steps.

    Raises:
        ValueError: If the scheduler cannot be given schedules, adds noise, which rules out an ``audition``, or is none
            of fastsched's solvers while ``solver`` names none. The message names a scheduler that can be used.
    """
    name = chosen_solver(solver).name if solver is not None else solver_of(scheduler, steps)
    if name is not None and (other := other_solver(scheduler, name, steps)) is not None:
        validate.warn(
            f"the pipeline's scheduler samples as {other}, and the schedule is chosen for {name}; its runs, and the "
            f"measured error, are those of {other}",
        )
    proof = _proof(scheduler, steps)
    if audition and not proof.deterministic:
        change = _change(scheduler, steps)
        raise ValueError(
            f"{type(scheduler).__name__} adds noise, so its samples cannot be compared with the paths' ends; "
            f"{change}, or set audition=False" + ("" if name is not None else " and name a solver (solver='ddim')")
        )
    if name is None:
        change = _change(scheduler, steps)
        raise ValueError(
            f"{type(scheduler).__name__}, as it is set, is none of fastsched's solvers; {change}, or name the "
            "nearest solver to choose for (docs/schedulers.md): solver='ddim' for first-order ones, 'dpmpp_3m', ..."
        )
    return name


def must_scale(scheduler: Any, decoupled: bool | str) -> bool:
    """Whether decoupled levels need a pipeline that lets ``scheduler`` scale its network's input, if it is no flow."""
    return decoupling("decoupled", decoupled) == "denoiser" and describe(scheduler).process.kind != "flow"


def check_tells_apart(scheduler: Any, steps: int, solver: str, decoupled: str) -> None:
    """ValueError unless the scheduler can use decoupled levels (`fastsched.Schedule`)."""
    check_decoupled(solver)
    process = describe(scheduler).process
    even = even_schedule(process, steps, solver)
    told = process.level(even.sigmas)[:-1].clone()
    told[1:-1] = (told[1:-1] * told[2:]).sqrt()
    more = {"network_sigmas": process.sampler_sigma(told), "timesteps": process.timestep(told), "decoupled": decoupled}
    applied(replace(even, **more), scheduler)


def _change(scheduler: Any, steps: int) -> str:
    return replacement(scheduler, lambda other: _proof(other, steps).deterministic)


def _proof(scheduler: Any, steps: int) -> Export:
    return applied(even_schedule(describe(scheduler).process, steps, "ddim"), scheduler)[1]


def candidates(stats: PathStatistics, steps: int, solver: str, scheduler: Any) -> Iterator[tuple[str, Schedule]]:
    """Candidates that ``scheduler`` can use: those of `fastsched.audition`, the most promising first.

    The second is the schedule that the scheduler would use by itself, unless that depends on the resolution or the
    solver is the fitted one.
    """
    kept: list[Schedule] = []
    own = None if solver == FITTED else own_sigmas(scheduler, steps)
    for name, schedule in candidates_in_turn(stats, steps, solver):
        some = {name: schedule}
        if name == "optimal" and own is not None:
            some["scheduler's own"] = Schedule.from_levels(stats.process, stats.process.level(own), solver)
        for label, each in some.items():
            if not any(torch.equal(each.sigmas, other.sigmas) for other in kept) and fits(each, scheduler):
                kept.append(each)
                yield label, each


def own_sigmas(scheduler: Any, steps: int) -> Tensor | None:
    """The sigmas that ``scheduler`` would use by itself, if they are a schedule that fastsched can hold.

    That is, they descend, end in 0 and start at a level of the model. IPNDM's start at signal 0, which its step loses.
    With ``use_flow_sigmas`` and a second formula such as Karras's in their config, some classes start far above 1.
    """
    scheduler = own_scheduler(scheduler)
    target, config = plain_copy(scheduler), scheduler.config
    if config.get("use_dynamic_shifting"):
        return None  # only the pipeline knows the shift, when it is called
    target.set_timesteps(steps)
    process, sigmas = describe(scheduler).process, declared_sigmas(target)
    descending = bool((sigmas[1:] < sigmas[:-1]).all())
    try:
        known = float(process.level(sigmas[:1])) <= 1.001 * process.s_max
    except ValueError:
        return None
    return sigmas if descending and known and float(sigmas[-1]) == 0 and len(sigmas) == steps + 1 else None
