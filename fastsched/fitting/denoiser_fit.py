"""Measure, select and tune a denoiser's schedule in one call."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import torch

from fastsched import validate
from fastsched.denoisers.denoiser import Denoiser, is_denoiser
from fastsched.fitting.candidates import candidates_in_turn
from fastsched.fitting.interrupts import BestSoFar, interrupted_schedule
from fastsched.fitting.loop import MODEL_CALLS, FitReport, affordable, fit_by_running
from fastsched.fitting.rollouts import Runner
from fastsched.fitting.run_log import RunLog, identity, runs_beside
from fastsched.measurement.batches import measured, resumed
from fastsched.measurement.measuring import (
    batches_of,
    check_same_network,
    measured_levels,
    measurement_of,
    with_increments,
)
from fastsched.measurement.statistics import PathStatistics, is_statistics
from fastsched.sampling.files import check_writable
from fastsched.sampling.fitted import chosen_solver, is_solver
from fastsched.sampling.progress import Progress, progress_bar
from fastsched.sampling.schedule import Schedule


def fit(
    denoiser: Denoiser,
    shape: Sequence[int],
    steps: int,
    solver: str = "dpmpp_2m",
    *,
    stats: PathStatistics | None = None,
    levels: int = 48,
    samples: int = 8,
    model_calls: int = MODEL_CALLS,
    seed: int = 0,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    checks: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Progress = True,
) -> Schedule:
    """The schedule of ``steps`` steps for a denoiser and solver: `measure`, `optimal_schedule`, `audition`, `tune`.

    With the defaults 759 model calls to measure, counted per sample, and at most 740 to rank candidates and tune. An
    interrupt (Ctrl-C) returns the best schedule that is known by then, with a warning, unless there is a checkpoint.

    Args:
        denoiser: What to schedule.
        shape: The shape of one sample, without the batch.
        steps: Steps, of which the last ends at sigma 0.
        solver: A solver's name; ``"fitted"`` finds the weights too (`fastsched.costs.fitted_weights`).
        stats: An earlier measurement, used instead of a new one. Without increments its paths are followed once more.
        levels: As in `measure`.
        samples: As in `measure`.
        model_calls: The most to spend after the measurement, counted per sample. Where it is not enough for one run of
            all samples, the schedule is that of `optimal_schedule`.
        seed: As in `measure`.
        batch_size: Samples run at once; all when None, one with a checkpoint.
        device: As in `measure`.
        dtype: As in `measure`.
        checks: As in `measure`; with ``stats``, whether to ask if the denoiser is the one that was measured.
        checkpoint: A file of every finished path, as in `measure`; beside it ``checkpoint.runs`` holds every finished
            run of candidates and of tuning. The same call goes on from there to the same bits, after Ctrl-C, errors and
            ``kill -9``; at most one batch is run twice. The files stay: remove them when they have served.
        progress: Show progress bars, or a function called with the model calls done and their total.

    Returns:
        The schedule, with its predicted error, and its measured one if it was run.

    Raises:
        ValueError: As `measure`, `audition` and `tune` do, if ``stats`` are of samples of another shape, or if the
            checkpoint is of another network or call.
    """
    return fit_report(**locals()).schedule


def fit_report(
    denoiser: Denoiser,
    shape: Sequence[int],
    steps: int,
    solver: str = "dpmpp_2m",
    *,
    stats: PathStatistics | None = None,
    levels: int = 48,
    samples: int = 8,
    model_calls: int = MODEL_CALLS,
    seed: int = 0,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    checks: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Progress = True,
) -> FitReport:
    """`fit`, with all that it found on the way; arguments and errors are the same."""
    validate.arguments(locals(), denoiser=is_denoiser, solver=is_solver, stats=validate.optional(is_statistics))
    steps = validate.positive_int("steps", steps)
    budget = validate.positive_int("model_calls", model_calls, minimum=0)
    method = chosen_solver(solver)
    count = len(measured_levels(denoiser, levels)) if stats is None else stats.levels
    if steps > count - 1:
        raise ValueError(f"steps must be at most {count - 1} on {count} levels, got {steps}; measure with more levels")
    grain = 1 if batch_size is None and checkpoint is not None else batch_size
    if checkpoint is not None:
        check_writable(runs_beside(checkpoint))
    options = {"batch_size": grain, "device": device, "dtype": dtype}
    runs = None
    try:
        if stats is None:
            run = measurement_of(denoiser, measured_levels(denoiser, levels), device, dtype, keep_increments=True)
            # not by `measure`, which hands back fewer paths when it is interrupted
            batches = batches_of(shape, samples, seed, grain, checks, checkpoint, progress)
            stats = measured(run, batches, None if checkpoint is None else resumed(checkpoint, run, batches))
        else:
            stats = _same(denoiser, shape, stats, checks, device, dtype)
        if stats.increments is None and affordable(method.model_calls(steps), stats.samples, budget) and steps > 1:
            stats = with_increments(denoiser, stats, checkpoint=checkpoint, **options)
        runner, calls = Runner(denoiser, stats, method, **options), method.model_calls(steps)
        if checkpoint is not None:
            what = {"steps": steps, "solver": method.name, "model_calls": budget, "batch_size": grain}
            log = RunLog(runs_beside(checkpoint), identity(stats, **what, dtype=str(runner.dtype)))
            runner.kept = log.run
        runs = BestSoFar(runner, stats)
        with progress_bar(budget, progress, "fitting") as runner.advance:
            candidates = candidates_in_turn(stats, steps, method)
            return fit_by_running(runs, stats, steps, method.name, candidates, calls=calls, model_calls=budget)
    except KeyboardInterrupt as error:
        known = getattr(error, "partial", None) if stats is None else stats
        if checkpoint is not None or known is None:
            raise
        return FitReport(interrupted_schedule(known, steps, method, runs), known)


def _same(
    denoiser: Denoiser,
    shape: Sequence[int],
    stats: PathStatistics,
    checks: bool,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> PathStatistics:
    """Statistics of this denoiser and shape, with the call that checked it; ValueError if they are of others."""
    if tuple(shape) != stats.shape:
        raise ValueError(f"stats are of samples of shape {stats.shape}, not of shape {tuple(shape)}")
    if not checks or stats.increments is None:
        return stats
    return replace(stats, model_calls=stats.model_calls + check_same_network(denoiser, stats, device, dtype))
