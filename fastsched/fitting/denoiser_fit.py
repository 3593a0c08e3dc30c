"""Measure, select and tune a denoiser's schedule in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from fastsched import validate
from fastsched.denoisers.denoiser import Denoiser
from fastsched.fitting.candidates import candidates_in_turn
from fastsched.fitting.group_runs import led_by_first
from fastsched.fitting.loop import MODEL_CALLS, FitReport, affordable, fit_by_running
from fastsched.fitting.rollouts import Runner
from fastsched.measurement.devices import measured_in_group
from fastsched.measurement.measuring import (
    batches_of,
    check_same_network,
    measured_levels,
    measurement_of,
    with_increments,
)
from fastsched.measurement.statistics import PathStatistics
from fastsched.sampling.fitted import chosen_solver
from fastsched.sampling.progress import progress_bar
from fastsched.sampling.schedule import Schedule


def fit(
    denoiser: Denoiser,
    shape: Sequence[int],
    steps: int,
    solver: str = "dpmpp_2m",
    *,
    stats: PathStatistics | None = None,
    levels: int = 48,
    samples: int | range = 8,
    model_calls: int = MODEL_CALLS,
    seed: int = 0,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    checks: bool = True,
    group: Any = None,
    progress: bool = True,
) -> Schedule:
    """The schedule of ``steps`` steps for a denoiser and solver: `measure`, `optimal_schedule`, `audition`, `tune`.

    With the defaults 759 model calls to measure, counted per sample, and at most 740 to rank candidates and tune.

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
        batch_size: As in `measure`.
        device: As in `measure`.
        dtype: As in `measure`.
        checks: As in `measure`; with ``stats``, whether to ask if the denoiser is the one that was measured.
        group: As in `measure`; its first process decides what is run, and all run a part of the samples.
        progress: Show progress bars.

    Returns:
        The schedule, with its measured error if it was run, and its predicted one if it is that of `optimal_schedule`.

    Raises:
        ValueError: As `measure`, `audition` and `tune` do, or if ``stats`` are of samples of another shape.
    """
    return fit_report(
        denoiser,
        shape,
        steps,
        solver,
        stats=stats,
        levels=levels,
        samples=samples,
        model_calls=model_calls,
        seed=seed,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        checks=checks,
        group=group,
        progress=progress,
    ).schedule


def fit_report(
    denoiser: Denoiser,
    shape: Sequence[int],
    steps: int,
    solver: str = "dpmpp_2m",
    *,
    stats: PathStatistics | None = None,
    levels: int = 48,
    samples: int | range = 8,
    model_calls: int = MODEL_CALLS,
    seed: int = 0,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    checks: bool = True,
    group: Any = None,
    progress: bool = True,
) -> FitReport:
    """`fit`, with all that it found on the way; arguments and errors are the same."""
    steps = validate.positive_int("steps", steps)
    budget = validate.positive_int("model_calls", model_calls, minimum=0)
    method = chosen_solver(solver)
    count = len(measured_levels(denoiser, levels)) if stats is None else stats.levels
    if steps > count - 1:
        raise ValueError(f"steps must be at most {count - 1} on {count} levels, got {steps}; measure with more levels")
    kept = stats is None or stats.increments is not None
    if stats is None:
        run = measurement_of(denoiser, measured_levels(denoiser, levels), device, dtype, keep_increments=True)
        # not by `measure`, which hands back fewer paths when it is interrupted
        batches = batches_of(shape, samples, seed, batch_size, checks, progress=progress)
        stats = measured_in_group(run, batches, None, group, vectors="first")
    elif tuple(shape) != stats.shape:
        raise ValueError(f"stats are of samples of shape {stats.shape}, not of shape {tuple(shape)}")
    elif checks and stats.increments is not None:
        spent = check_same_network(denoiser, stats, device, dtype)
        stats = replace(stats, model_calls=stats.model_calls + spent)
    if not kept and affordable(method.model_calls(steps), stats.samples, budget) and steps > 1:
        stats = with_increments(denoiser, stats, batch_size=batch_size, device=device, dtype=dtype, group=group)
    runner = Runner(denoiser, stats, method, batch_size, device, dtype)
    calls = method.model_calls(steps)
    made = partial(
        fit_by_running,
        stats=stats,
        steps=steps,
        solver=method.name,
        candidates=candidates_in_turn(stats, steps, method),
        calls=calls,
        model_calls=budget,
    )
    with progress_bar(budget, progress, "fitting") as runner.advance:
        return led_by_first(runner, made, group)
