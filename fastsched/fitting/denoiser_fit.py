"""Measure, select and tune a denoiser's schedule in one call."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastsched import validate
from fastsched.denoisers.denoiser import Denoiser
from fastsched.fitting.budget import TOTAL, calls_left, planned, takes_responses
from fastsched.fitting.candidates import candidates_in_turn
from fastsched.fitting.group_runs import check_group, led_by_first
from fastsched.fitting.interrupts import BestSoFar, interrupted_schedule
from fastsched.fitting.loop import MODEL_CALLS, FitReport, affordable, check_levels, fit_by_running
from fastsched.fitting.rollouts import Run, Runner
from fastsched.fitting.run_log import RunLog, identity
from fastsched.measurement.batches import Batches, attach_finished, finished_part
from fastsched.measurement.checks.network import CHECK_CALLS
from fastsched.measurement.devices import check_together, measured_in_group, prepare_together, rank_and_size
from fastsched.measurement.measuring import check_same_network, check_same_process, prepared, with_increments
from fastsched.measurement.path_following import Measurement
from fastsched.measurement.statistics import PathStatistics, is_statistics
from fastsched.sampling.files import absolute_file, check_writable, runs_beside
from fastsched.sampling.fitted import chosen_solver
from fastsched.sampling.progress import Progress, progress_bar
from fastsched.sampling.schedule import Schedule, check_decoupled, decoupling
from fastsched.sampling.solvers import Solver


def fit(
    denoiser: Denoiser,
    shape: Sequence[int],
    steps: int,
    solver: str = "dpmpp_2m",
    *,
    stats: PathStatistics | None = None,
    levels: int | Tensor | Sequence[float] | None = None,
    samples: int | range | None = None,
    model_calls: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    checks: bool = True,
    decoupled: bool | str = False,
    checkpoint: str | os.PathLike[str] | None = None,
    group: Any = None,
    progress: Progress = True,
) -> Schedule:
    """Measure a denoiser, run a few candidate schedules, and tune the best: `measure`, `audition`, `tune`.

    `fastsched.fitting.budget` divides the calls between the measurement and the runs that rank and tune candidates.
    Samples of at most four elements (points in the plane) are measured without responses, and, if ``samples`` is None,
    twice as many of them; for stock solvers only with fewer than 1,500 calls.

    Args:
        denoiser: The denoiser to find a schedule for.
        shape: The shape of one sample, without the batch.
        steps: The number of steps; the last ends at sigma 0.
        solver: A solver's name; ``"fitted"`` finds the weights too (`fastsched.costs.fitted_weights`).
        stats: An earlier measurement to use instead of a new one. If it has no increments, its paths are run again.
        levels: As in `measure`; chosen from the number of calls when None (`fastsched.fitting.budget`).
        samples: As in `measure`; chosen from the number of calls when None.
        model_calls: The most calls to spend (a batch of B counts as B), with a new measurement: 800 when None; with
            ``stats`` 740, without those of repeated paths. At least 60 if levels and samples are None. With too few
            for a run the result is `optimal_schedule`'s; a fitted schedule that runs once is corrected, not run again.
        seed: As in `measure`.
        batch_size: Samples run at once; all when None, one with a checkpoint.
        device: As in `measure`.
        dtype: As in `measure`.
        checks: As in `measure`; and, by the first outputs of runs, whether the denoiser is the one that was measured.
        decoupled: Whether ``D`` may be computed for other levels than the states', which lowers the error, for samplers
            that know both (docs/choosing.md). With ``"timestep"`` only the network's timestep is another, as stock
            schedulers of diffusers allow. For deterministic solvers with one call per step.
        checkpoint: A file that keeps every finished path, as in `measure`. ``checkpoint.runs`` beside it keeps every
            finished run of the sampler. After Ctrl-C, an error or ``kill -9``, the same call continues from the files
            with bitwise the same result; at most one batch is run twice. Remove the files afterwards.
        group: As in `measure`. The first process chooses the runs, all share their samples. All need equal arguments.
        progress: Show progress bars, or a function called with the model calls done and their total.

    Returns:
        The schedule, with its predicted error, and with its measured error if it was run.

    Raises:
        ValueError: As in `measure`, `audition` and `tune`; if ``stats`` are of samples of another shape; if the
            checkpoint is of another network or call; or if ``levels`` and ``samples`` take more than ``model_calls``.
            Errors in the runs carry the measurement as ``error.partial``.
    """
    return fit_report(**locals()).schedule


def fit_report(
    denoiser: Denoiser,
    shape: Sequence[int],
    steps: int,
    solver: str = "dpmpp_2m",
    *,
    stats: PathStatistics | None = None,
    levels: int | Tensor | Sequence[float] | None = None,
    samples: int | range | None = None,
    model_calls: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    checks: bool = True,
    decoupled: bool | str = False,
    checkpoint: str | os.PathLike[str] | None = None,
    group: Any = None,
    progress: Progress = True,
) -> FitReport:
    """`fit`, returning the full report."""
    check_together(locals(), **CHECKS)
    method = prepare_together(partial(chosen_solver, solver), group)
    steps, model_calls, batch_size = map(_plain, (steps, model_calls, batch_size))
    apart, checkpoint = decoupling("decoupled", decoupled), absolute_file(checkpoint)
    batch = 1 if batch_size is None and checkpoint is not None else batch_size
    budget = model_calls if model_calls is not None else TOTAL if stats is None else MODEL_CALLS
    log_file = None if checkpoint is None else runs_beside(checkpoint, *rank_and_size(group))
    options = {"batch_size": batch, "device": device, "dtype": dtype}
    settings = {**options, "seed": seed, "checks": checks, "checkpoint": checkpoint, "progress": progress}
    asked = {"stats": stats, "levels": levels, "samples": samples, "decoupled": apart}
    plan = partial(prepared_fit, denoiser, shape, steps, method, budget, log_file, **asked, **settings)
    measuring = prepare_together(plan, group)  # raises before any call is made
    what = {"steps": steps, "solver": method.name, "model_calls": model_calls, "decoupled": apart}
    kept = stats is not None and stats.increments is not None
    check_group(stats, group, **what, **{"increments of stats": kept})
    best = None
    try:
        if measuring is not None:  # not `measure`: on an interrupt it returns the finished paths
            stats = measured_in_group(*measuring, group, vectors="first")
            budget = max(0, budget - stats.model_calls)
        assert stats is not None  # given, or measured now
        calls = method.model_calls(steps)
        if kept:
            same = partial(check_same_network, denoiser, stats, device, dtype)
            spent = prepare_together(same if checks else lambda: 0, group)
            stats = replace(stats, model_calls=stats.model_calls + spent) if spent else stats  # the same object if not
        elif measuring is None and steps > 1 and affordable(calls, stats.samples, budget):
            stats = with_increments(denoiser, stats, checkpoint=checkpoint, group=group, **options)
        runner = Runner(denoiser, stats, method, **options, checks=checks)
        prepare_together(partial(_keep_runs, runner, log_file, stats, **what, batch_size=batch), group)
        best = BestSoFar(runner, stats)
        work = partial(_fitted, best, steps=steps, method=method, calls=calls, budget=budget, decoupled=apart)
        with progress_bar(budget, progress, "fitting") as runner.advance:
            return led_by_first(runner, work, group)
    except KeyboardInterrupt as error:
        if stats is not None:
            attach_finished(error, stats)
        finished = finished_part(error, checkpoint, group)
        return FitReport(interrupted_schedule(finished, steps, method, best), finished)


#: Checks of the arguments of `fit`.
CHECKS: dict[str, validate.Check] = {
    "stats": validate.optional(is_statistics),
    "levels": validate.optional(validate.CHECKS["levels"]),
    "samples": validate.optional(validate.CHECKS["samples"]),
    "model_calls": validate.optional(validate.CHECKS["model_calls"]),
}


def prepared_fit(
    denoiser: Denoiser,
    shape: Sequence[int],
    steps: int,
    method: Solver,
    budget: int,
    log_file: str | None,
    *,
    stats: PathStatistics | None,
    levels: int | Tensor | Sequence[float] | None,
    samples: int | range | None,
    decoupled: str | None,
    **settings: Any,
) -> tuple[Measurement, Batches, PathStatistics | None] | None:
    """What to measure (`prepared`); None for given statistics. What cannot work raises before any call is made."""
    if decoupled is not None:
        check_decoupled(method.name)
    if log_file is not None:
        check_writable(log_file)
    if stats is not None:
        check_same_process(stats, denoiser.process)
        if tuple(shape) != stats.shape:
            raise ValueError(f"stats are of samples of shape {stats.shape}, not of shape {tuple(shape)}")
        check_levels(steps, stats.levels, method)
        return None
    responses = takes_responses(budget, math.prod(shape), method.name)
    levels, samples = planned(budget, steps, levels, samples, responses=responses)
    run, batches, known = prepared(denoiser, shape, levels, samples, responses=responses, **settings)
    calls_left(budget, run.calls * len(batches.seeds) + CHECK_CALLS * settings["checks"])
    check_levels(steps, len(run.s), method)
    return run, batches, known


def _keep_runs(runner: Runner, log_file: str | None, stats: PathStatistics, **what: Any) -> None:
    """Let a runner take the runs that a file holds from it, and add the others to it."""
    if log_file is not None:
        runner.cache = RunLog(log_file, identity(stats, **what, dtype=str(runner.dtype))).run


def _plain(number: Any) -> Any:
    """A whole number as a Python int, because NumPy integers cannot be written to JSON."""
    return None if number is None else int(number)


def _fitted(
    best: BestSoFar, run: Run, *, steps: int, method: Solver, calls: int, budget: int, decoupled: str | None
) -> FitReport:
    """The fit by ``run``, which may be shared by a group; ``best`` remembers the finished runs."""
    best.run = run
    candidates = candidates_in_turn(best.stats, steps, method)
    options = {"calls": calls, "model_calls": budget, "decoupled": decoupled}
    return fit_by_running(best, best.stats, steps, method.name, candidates, **options)
