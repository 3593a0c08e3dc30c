"""The fit loop: from a measurement to a schedule by running the sampler.

Candidates are made without model calls, ranked by running them, and the best are tuned. The sampler is a callback, so
the same loop fits a denoiser (`fastsched.fit`) and a pipeline of diffusers (`fastsched.diffusers.fit`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice

from fastsched.costs.prediction import predict_error
from fastsched.fitting.auditioning import FINALISTS, Audition, first_round, ranked
from fastsched.fitting.rollouts import Run
from fastsched.fitting.tuning import Tuning, moved_once, tuned
from fastsched.measurement.statistics import PathStatistics
from fastsched.sampling.schedule import Schedule
from fastsched.selection.optimal import optimal_schedule

#: The most model calls after the measurement, counted per sample.
MODEL_CALLS = 740

#: How many candidates are run, if the first round, of few samples each, takes no more than this fraction of the calls.
#: What is left is for tuning: its runs lower the error more than a choice among more candidates.
#: With decoupled levels, which begin by a run that only learns, no more than the finalists: at 12 steps four
#: candidates had 1.16 times the error (13 fits).
CANDIDATES, FIRST_ROUND = 4, 0.25


@dataclass(frozen=True, eq=False)
class FitReport:
    """Result of a fit.

    Attributes:
        schedule: The schedule.
        stats: The measurement, with increments if there was tuning.
        audition: The ranking of the candidates, if they were run.
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


def fit_by_running(
    run: Run,
    stats: PathStatistics,
    steps: int,
    solver: str,
    candidates: Iterable[tuple[str, Schedule]],
    *,
    calls: int,
    model_calls: int = MODEL_CALLS,
    decoupled: bool = False,
) -> FitReport:
    """Rank candidates by running them, and tune the best, unless the statistics hold no increments.

    Candidates come with names, the most promising first; only as many are made as the calls allow. A run takes
    ``calls`` a sample. Where ``model_calls``, the most to spend, do not suffice for one run of all samples, the
    schedule is that of `fastsched.optimal_schedule`. Where they do for one alone, a fitted solver's is moved by
    what that tells, and not run again. With ``decoupled``, tuning may tell the network other levels than the states'; a
    warning says if nothing is tuned.

    Raises:
        ValueError: If no candidate could be run.
    """
    most = affordable(calls, stats.samples, model_calls)
    most = min(most, FINALISTS) if decoupled else most
    if most == 0:
        return _completed(FitReport(optimal_schedule(stats, steps, solver), stats), decoupled=decoupled)
    audition = ranked(run, stats, dict(islice(candidates, most)), calls, stats.samples)
    schedule, tuning, finalists = audition.winner, None, audition.complete(stats.samples)
    trials = (model_calls - audition.model_calls) // (stats.samples * calls)
    if steps > 1 and stats.increments is not None:
        if trials > 0:
            tuning = tuned(run, stats, finalists, trials, calls, decoupled=decoupled)
            schedule = tuning.schedule
        elif schedule.weights is not None:
            schedule = moved_once(stats, finalists)
    return _completed(FitReport(schedule, stats, audition, tuning), decoupled=decoupled)


def _completed(found: FitReport, *, decoupled: bool) -> FitReport:
    """The report, its schedule with a predicted error and an origin where they are known."""
    if decoupled and found.tuning is None:
        why = _why_not_tuned(found.stats, found.schedule.steps)
        warnings.warn(f"decoupled=True had no effect: {why}", stacklevel=3)
    schedule, origin = found.schedule, found.stats.schedule_origin()
    if schedule.predicted_error is None and schedule.network_sigmas is None:  # which the measurement does not know
        schedule = replace(schedule, predicted_error=predict_error(found.stats, schedule))
    if origin is not None:
        schedule = replace(schedule, origin=replace(origin, model_calls=found.model_calls))
    return replace(found, schedule=schedule)


def _why_not_tuned(stats: PathStatistics, steps: int) -> str:
    if steps == 1:
        return "a schedule of one step is not tuned"
    if stats.increments is None:
        return "tuning needs the increments of the measured paths, which files and measurements for audition=False lack"
    return "model_calls does not suffice to tune; allow more"


def affordable(calls: int, samples: int, model_calls: int) -> int:
    """How many candidates can be ranked within ``model_calls``, with some left to tune; 0 if not one.

    A run takes ``calls`` a sample, and finalists run on all ``samples``.
    """
    if model_calls < calls * samples:
        return 0
    first = first_round(samples)
    most = max(min(CANDIDATES, int(FIRST_ROUND * model_calls) // (calls * first)), FINALISTS)
    while most > 1 and calls * (min(most, FINALISTS) * samples + max(most - FINALISTS, 0) * first) > model_calls:
        most -= 1
    return most
