"""Measure, select, audition and tune in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from fastsched import validate
from fastsched.denoisers.denoiser import Denoiser
from fastsched.fitting.auditioning import FINALISTS, Audition, audition, first_round
from fastsched.fitting.candidates import candidates_in_turn, default_weight
from fastsched.fitting.tuning import Tuning, tune
from fastsched.measurement.measuring import measure, measured_levels, with_increments
from fastsched.measurement.statistics import PathStatistics
from fastsched.sampling.schedule import Schedule
from fastsched.sampling.solvers import Solver, get_solver
from fastsched.selection.optimal import optimal_schedule

#: The most model calls that `fit` spends after the measurement, counted per sample.
MODEL_CALLS = 740

#: How many candidates the audition hears, if the first round, of few samples each, takes no more than this share of
#: the calls. What is left is for tuning: its runs lower the error more than a choice among more candidates.
ENTRANTS, FIRST_ROUND = 4, 0.25


@dataclass(frozen=True, eq=False)
class FitReport:
    """What `fit` came to.

    Attributes:
        schedule: The schedule.
        stats: The measurement, with increments if there was tuning.
        audition: The audition, if there was one.
        tuning: The tuning, if there was one.
    """

    schedule: Schedule
    stats: PathStatistics
    audition: Audition | None = None
    tuning: Tuning | None = None

    @property
    def model_calls(self) -> int:
        """Network evaluations, the measurement included, counted per sample."""
        later = (self.audition, self.tuning)
        return self.stats.model_calls + sum(part.model_calls for part in later if part is not None)


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
    progress: bool = True,
) -> Schedule:
    """The schedule of ``steps`` steps for a denoiser and solver: `measure`, `optimal_schedule`, `audition`, `tune`.

    With the defaults 760 model calls to measure, counted per sample, and at most 740 to audition and tune.

    Args:
        denoiser: What to schedule.
        shape: The shape of one sample, without the batch.
        steps: Steps, of which the last ends at sigma 0.
        solver: A solver's name.
        stats: An earlier measurement of this denoiser, used instead of a new one. If its increments were not kept, its
            paths are followed once more to tune, ``levels`` calls a sample.
        levels: As in `measure`.
        samples: As in `measure`.
        model_calls: The most to spend on audition and tuning, counted per sample. Where it does not suffice for one run
            of all samples, the schedule is that of `optimal_schedule`.
        seed: As in `measure`.
        batch_size: As in `measure`.
        device: As in `measure`.
        dtype: As in `measure`.
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
    samples: int = 8,
    model_calls: int = MODEL_CALLS,
    seed: int = 0,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> FitReport:
    """`fit`, with all that it found on the way; arguments and errors are the same."""
    steps = validate.positive_int("steps", steps)
    budget = validate.positive_int("model_calls", model_calls, minimum=0)
    method = get_solver(solver)
    count = len(measured_levels(denoiser, levels)) if stats is None else stats.levels
    if steps > count - 1:
        raise ValueError(f"steps must be at most {count - 1} on {count} levels, got {steps}; measure with more levels")
    if stats is None:
        stats = measure(
            denoiser,
            shape,
            levels=levels,
            samples=samples,
            keep_increments=True,
            seed=seed,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            progress=progress,
        )
    elif tuple(shape) != stats.shape:
        raise ValueError(f"stats are of samples of shape {stats.shape}, not of shape {tuple(shape)}")
    entrants = affordable_candidates(stats, steps, method, budget)
    if not entrants:
        return FitReport(optimal_schedule(stats, steps, method.name, weight=default_weight(stats)), stats)
    outcome = audition(
        denoiser, stats, steps, solver, entrants, batch_size=batch_size, device=device, dtype=dtype, progress=progress
    )
    trials = (budget - outcome.model_calls) // (stats.samples * method.model_calls(steps))
    if trials < 1 or steps == 1:
        return FitReport(outcome.winner, stats, outcome)
    stats = with_increments(denoiser, stats, batch_size=batch_size, device=device, dtype=dtype)
    tuning = tune(
        denoiser,
        stats,
        outcome,
        trials=trials,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        progress=progress,
    )
    return FitReport(tuning.schedule, stats, outcome, tuning)


def affordable_candidates(stats: PathStatistics, steps: int, method: Solver, model_calls: int) -> dict[str, Schedule]:
    """As many of `candidates_in_turn` as an audition can hear within ``model_calls``; none if it cannot hear one."""
    count = stats.samples
    most = affordable(method.model_calls(steps), count, first_round(count), model_calls)
    return dict(islice(candidates_in_turn(stats, steps, method), most)) if most > 0 else {}


def affordable(each: int, count: int, first: int, model_calls: int) -> int:
    """How many candidates an audition can hear within ``model_calls``, with some left to tune; 0 if not one.

    Args:
        each: Calls of one sample under one candidate.
        count: Samples of the finalists.
        first: Samples that every candidate runs.
        model_calls: The budget of audition and tuning.
    """
    if model_calls < each * count:
        return 0
    most = max(min(ENTRANTS, int(FIRST_ROUND * model_calls) // (each * first)), FINALISTS)
    while most > 1 and each * (min(most, FINALISTS) * count + max(most - FINALISTS, 0) * first) > model_calls:
        most -= 1
    return most
