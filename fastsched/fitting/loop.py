"""The fit loop: from a measurement to a schedule by running the sampler.

Candidates are made without model calls, and ranked by running them. Then the best is tuned. The sampler is a callback,
so the same loop fits a denoiser (`fastsched.fit`) and a pipeline of diffusers (`fastsched.diffusers.fit`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice

from fastsched import validate
from fastsched.costs.prediction import predict_error
from fastsched.costs.step_cost import check_memory
from fastsched.fitting.auditioning import FINALISTS, Audition, first_round, ranked, sample_runs
from fastsched.fitting.rollouts import Run
from fastsched.fitting.run_record import RunRecord
from fastsched.fitting.tuning import Tuning, corrected_without_run, run_trials, tuning_of
from fastsched.measurement.statistics import PathStatistics
from fastsched.sampling.fitted import chosen_solver
from fastsched.sampling.schedule import Schedule
from fastsched.sampling.solvers import FITTED, Solver
from fastsched.selection.dynamic_programming import check_steps
from fastsched.selection.optimal import optimal_schedule

#: Default limit of the model calls after the measurement, counted per sample.
MODEL_CALLS = 740

#: The most candidates that are run, and the largest fraction of the model calls for their first round, in which each
#: runs few samples. The other calls are for tuning: its runs lower the error more than a choice among more candidates.
#: With decoupled levels at most `FINALISTS` are run, because tuning begins with a run that only explores: at 12 steps,
#: fits with four candidates had 1.16 times the error (13 fits).
CANDIDATES, FIRST_ROUND = 4, 0.25


@dataclass(frozen=True, eq=False)
class FitReport:
    """Result of a fit."""

    schedule: Schedule
    stats: PathStatistics  #: with increments if the schedule was tuned
    audition: Audition | None = None  #: the ranking of the candidates; None if they were not run
    tuning: Tuning | None = None  #: None if the schedule was not tuned

    @property
    def model_calls(self) -> int:
        """Network evaluations, the measurement included, counted per sample."""
        later = (self.audition, self.tuning)
        return self.stats.model_calls + sum(part.model_calls for part in later if part is not None)


def check_levels(steps: int, levels: int, method: Solver) -> None:
    """ValueError or MemoryError if there are too few levels for the steps, or too many to search."""
    check_steps(steps, levels)
    if method.history > 0 or method.name == FITTED:
        check_memory(levels)


def fit_by_running(
    run: Run,
    stats: PathStatistics,
    steps: int,
    solver: str,
    candidates: Iterable[tuple[str, Schedule]],
    *,
    calls: int,
    model_calls: int = MODEL_CALLS,
    decoupled: str | None = None,
) -> FitReport:
    """Rank candidates by running them, and tune the best. Without increments in the statistics nothing is tuned.

    ``candidates`` yields names and schedules, the most promising first; only as many are made as the calls allow. A run
    takes ``calls`` per sample, and all runs take at most ``model_calls``. If these are too few for one run of all
    samples, the schedule is that of `fastsched.optimal_schedule`. If too few calls remain for another run, the schedule
    of a fitted solver is corrected but not run again. Tuning may decouple levels (`Schedule.decoupled`); a warning says
    if nothing was tuned.

    Raises:
        ValueError: If no candidate could be run.
    """
    most = affordable(calls, stats.samples, model_calls)
    most = most if decoupled is None else min(most, FINALISTS)
    if most == 0:
        return _completed(FitReport(optimal_schedule(stats, steps, solver), stats), decoupled=decoupled)
    audition = ranked(run, stats, dict(islice(candidates, most)), calls, stats.samples)
    schedule, tuning, finalists = audition.winner, None, audition.complete(stats.samples)
    trials = (model_calls - audition.model_calls) // (stats.samples * calls)
    if not finalists:
        count = len(audition.table[0].errors)
        validate.warn(
            f"the sampler could not be run on all {stats.samples} measured samples, so the schedule is the best on "
            f"{count} of them, and is not tuned",
        )
    elif steps > 1 and stats.increments is not None:
        method = chosen_solver(schedule.solver)
        if trials > 0:
            record = RunRecord(stats, method, finalists, decoupled=decoupled)
            tuning = tuning_of(record, run_trials(run, record, trials) * stats.samples * calls)
            schedule = tuning.schedule
        elif schedule.weights is not None:
            schedule = corrected_without_run(RunRecord(stats, method, finalists))
    return _completed(FitReport(schedule, stats, audition, tuning), decoupled=decoupled)


def _completed(found: FitReport, *, decoupled: str | None) -> FitReport:
    """The report, with a predicted error and an origin added to its schedule where they are known."""
    if decoupled is not None and found.tuning is None:
        why = _why_not_tuned(found.stats, found.schedule.steps)
        validate.warn(f"decoupled={decoupled!r} had no effect: {why}")
    schedule, origin = found.schedule, found.stats.schedule_origin(found.model_calls - found.stats.model_calls)
    if schedule.predicted_error is None and schedule.network_sigmas is None:  # no prediction for decoupled levels
        schedule = replace(schedule, predicted_error=predict_error(found.stats, schedule))
    if origin is not None:
        schedule = replace(schedule, origin=origin)
    return replace(found, schedule=schedule)


def _why_not_tuned(stats: PathStatistics, steps: int) -> str:
    if steps == 1:
        return "a schedule of one step is not tuned"
    if stats.increments is None:
        return "tuning needs the increments of the measured paths, which these statistics lack (keep_increments=True)"
    return "model_calls is too small to tune; allow more"


def affordable(calls: int, samples: int, model_calls: int) -> int:
    """How many candidates to rank within ``model_calls``; 0 if the calls are too few for one.

    A run takes ``calls`` per sample, and finalists run on all ``samples``. `FIRST_ROUND` only limits candidates beyond
    `FINALISTS`, so two runs may leave no calls to tune.
    """
    if model_calls < calls * samples:
        return 0
    most = max(min(CANDIDATES, int(FIRST_ROUND * model_calls) // (calls * first_round(samples))), FINALISTS)
    while most > 1 and calls * sample_runs(most, samples) > model_calls:
        most -= 1
    return most
