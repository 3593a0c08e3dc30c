"""Tune a schedule by the sampler's own error: a descent that learns from every run how the error changes.

The sampler's error at the end is a smooth function of the schedule's levels and, if the solver is fitted, its weights.
The error of a schedule is measured by running it. Its changes near the best run so far are predicted
(`fastsched.fitting.neighbourhood`) from the measurement and from the network evaluations of all runs. The next schedule
to run has a lower predicted error (`fastsched.fitting.gauss_newton`) and is within reach of the best. The reach grows
after a success and shrinks after a failure.

With decoupled levels the network may be told another level than the state's. The measurement does not contain the
effect of this offset, so the first run moves all offsets a little.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastsched import validate
from fastsched.denoisers.denoiser import Denoiser
from fastsched.fitting.auditioning import Audition
from fastsched.fitting.gauss_newton import lowered
from fastsched.fitting.neighbourhood import Point
from fastsched.fitting.rollouts import Run, Runner
from fastsched.fitting.run_log import RunLog, identity, schedule_key
from fastsched.fitting.run_record import RunRecord, increments_of
from fastsched.measurement.measuring import check_same_network
from fastsched.measurement.statistics import PathStatistics
from fastsched.sampling.files import absolute_file, check_writable
from fastsched.sampling.fitted import chosen_solver
from fastsched.sampling.progress import Progress, progress_bar
from fastsched.sampling.schedule import Schedule, check_run

#: How far a node may move, as a fraction of the gap in ``log s`` to its nearer neighbour: the first reach, its factors
#: after a run that lowers the error and after one that does not, its maximum, and its minimum, below which tuning ends.
REACH, GROWTH, SHRINKAGE, MOST_REACH, LEAST_REACH = 0.5, 1.3, 0.5, 0.8, 0.02

#: If no calls are left for another run, a fitted schedule moves `LAST_SHARE` of the way to the least predicted error
#: within `LAST_REACH`. `LAST_PENALTY`, larger than elsewhere, is the weight of deviations that no secant explains. With
#: 100 calls the typical error was 0.71 and the mean error 0.85 of those of the schedule that was run (seven networks).
LAST_REACH, LAST_SHARE, LAST_PENALTY = 0.03, 0.8, 0.9

#: How far in ``log s`` the first run with decoupled levels moves the levels that the network is told, and the least
#: number of runs with which one is spent on that.
OFFSET, ENOUGH_TRIALS = 0.1, 3


@dataclass(frozen=True, eq=False)
class Tuning:
    """Result of tuning.

    Attributes:
        schedule: The best schedule, with its measured error; usually too low, as it was tuned on the same samples.
        errors: ``||x0 - x0_path||^2`` of each sample with this schedule, [B].
        trials: The schedules that were run, in order, each with its measured error; the starts come first.
        model_calls: Network evaluations (a batch of B counts as B), without those of an audition to start from.
    """

    schedule: Schedule
    errors: Tensor
    trials: tuple[Schedule, ...]
    model_calls: int

    def __str__(self) -> str:
        rows = [f"{'trial':>6} {'error':>14}"]
        rows += [f"{n + 1:6d} {trial.measured_error:14.4g}" for n, trial in enumerate(self.trials)]
        return "\n".join(rows)


def tune(
    denoiser: Denoiser,
    stats: PathStatistics,
    start: Schedule | Audition,
    *,
    trials: int = 8,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    checks: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Progress = True,
) -> Tuning:
    """Lower the error of ``start`` by running up to ``trials`` schedules from the measured noises.

    Network outputs of all runs are kept on the CPU, one image for each call. After an interrupt (Ctrl-C) the result of
    the finished runs is returned, with a warning; with a checkpoint the interrupt is raised.

    Args:
        denoiser: The denoiser that ``stats`` was measured on.
        stats: The result of ``fastsched.measure(..., keep_increments=True)``.
        start: A schedule, of which decoupled levels are tuned too; or an audition, whose finalists are not run again.
        trials: The most runs, each of all samples, after one run of ``start`` if it has not run on all samples.
        batch_size: Samples run at once; all when None, one with a checkpoint.
        device: Where to run; where the network's parameters are when None.
        dtype: What the network computes in; that of its parameters when None.
        checks: Whether to check the denoiser against ``stats``: by one call, and the first outputs of each run.
        checkpoint: A file that keeps every finished run. The same call, also with more trials, continues from there
            with bitwise the same result.
        progress: Show a progress bar, or a function called with the model calls done and their total.

    Returns:
        The best schedule found, on these samples never worse than ``start``, and all schedules that were run.

    Raises:
        ValueError: If the statistics hold no increments or are of another network, ``start`` begins where ``D`` is not
            finite, the checkpoint is of another call, ``trials`` is negative, or the network returns NaN or inf.
    """
    validate.arguments(locals(), start=_is_start)
    first, known = (start.winner, start.complete(stats.samples)) if isinstance(start, Audition) else (start, [])
    method, checkpoint = chosen_solver(first.solver), absolute_file(checkpoint)
    check_run("start", first, denoiser, stats.process)
    increments_of(stats)
    if checkpoint is not None:
        check_writable(checkpoint)
        batch_size = int(batch_size or 1)  # a NumPy integer cannot be written to the file
    check_calls = check_same_network(denoiser, stats, device, dtype) if checks else 0
    runner = Runner(denoiser, stats, method, batch_size, device, dtype, checks)
    if checkpoint is not None:
        starts = [schedule_key(schedule) for schedule, _ in known] or [schedule_key(first)]
        what = identity(stats, start=starts, batch_size=batch_size, dtype=str(runner.dtype))
        runner.cache = RunLog(checkpoint, what).run
    each = stats.samples * method.model_calls(first.steps)
    with progress_bar((trials if known else 1 + trials) * each, progress, "tuning") as runner.advance:
        record = RunRecord(stats, method, known or [(first, runner(first, 0, stats.samples))])
        try:
            run_trials(runner, record, trials)
        except KeyboardInterrupt as error:
            _end_early(error, record, checkpoint)
    return _with_origin(tuning_of(record, check_calls + (len(record.trials) - len(known)) * each), stats, start)


def _with_origin(found: Tuning, stats: PathStatistics, start: Schedule | Audition) -> Tuning:
    """The result with the origin of its schedule, whose calls are those of the whole way to it."""
    first, spent = (start.winner, start.model_calls) if isinstance(start, Audition) else (start, 0)
    before = 0 if first.origin is None else first.origin.model_calls or 0  # of an earlier fit or tuning, for example
    origin = stats.schedule_origin(max(0, before - stats.model_calls) + spent + found.model_calls)
    return found if origin is None else replace(found, schedule=replace(found.schedule, origin=origin))


def _end_early(error: KeyboardInterrupt, record: RunRecord, checkpoint: object) -> None:
    """Warn that only some runs were made before an interrupt; with a checkpoint it is raised again."""
    if checkpoint is not None:
        raise error
    validate.warn(
        f"interrupted: this is the best of the {len(record.trials)} schedules that were run (tune(checkpoint=PATH) "
        "keeps their runs in a file, and the same call goes on from there)",
    )


def run_trials(run: Run, record: RunRecord, trials: int) -> int:
    """`tune` with any sampler: at most ``trials`` runs, added to the ``record``; returns how many there were."""
    known_offsets = any(trial.schedule.network_sigmas is not None for trial in record.trials)
    explores = record.decoupled and not known_offsets and trials >= ENOUGH_TRIALS
    reach, tried = REACH, 0
    while tried < trials and record.trials[0].schedule.steps > 1:
        anchor = record.best()
        schedule = _moved_offsets(record, anchor) if explores and tried == 0 else None
        exploring = schedule is not None
        if schedule is None:
            proposal = _proposal(record, anchor, reach)
            if proposal is None:
                break
            schedule, reach = proposal
        rollout = run(schedule, 0, record.stats.samples)
        tried += 1
        if rollout is not None:
            record.add(schedule, rollout)
        if not exploring:
            reach = min(reach * GROWTH, MOST_REACH) if record.best() != anchor else reach * SHRINKAGE
    return tried


def tuning_of(record: RunRecord, model_calls: int) -> Tuning:
    """The result of the runs so far, which took ``model_calls``."""
    best = record.trials[record.best()]
    return Tuning(best.schedule, best.errors, tuple(trial.schedule for trial in record.trials), model_calls)


def _is_start(name: str, value: object) -> None:
    """A schedule, or an audition."""
    if not isinstance(value, Audition):
        validate.instance(name, value, Schedule, "or what fastsched.audition returned")


def corrected_without_run(record: RunRecord) -> Schedule:
    """A fitted solver's schedule near the best that was run, with a lower predicted error; it is not run itself."""
    near = replace(record.near(record.best()), penalty=LAST_PENALTY)
    x = lowered(near, near.anchor, *near.bounds(LAST_REACH, *record.stats.finite_range))
    point = near.point(near.at_known_levels(near.anchor + LAST_SHARE * (x - near.anchor)))
    if not point.in_order(record.stats.process):
        return record.trials[record.best()].schedule
    return point.schedule(record.stats.process, record.method.name, record.decoupled)


def _moved_offsets(record: RunRecord, anchor: int) -> Schedule | None:
    """The anchor with every offset moved by up to `OFFSET`, upwards if possible; None if the levels would cross."""
    near, process = record.near(anchor), record.stats.process
    low, high = (each[-near.steps :] for each in near.bounds(REACH, *record.stats.finite_range))
    x = near.anchor.copy()
    x[-near.steps :] = np.where(high > 0, np.minimum(high, OFFSET), np.maximum(low, -OFFSET))
    point = near.point(near.at_known_levels(x))
    if point.coupled or not point.in_order(process):
        return None
    return point.schedule(process, record.method.name, record.decoupled)


def _proposal(record: RunRecord, anchor: int, reach: float) -> tuple[Schedule, float] | None:
    """The schedule of least predicted error within reach of a run, and the reach.

    If this schedule was run already, the reach is made smaller; None if it falls below `LEAST_REACH`.
    """
    near, process = record.near(anchor), record.stats.process
    while reach >= LEAST_REACH:
        low, high = near.bounds(reach, *record.stats.finite_range)
        x = lowered(near, near.anchor, low, high)
        known = near.at_known_levels(x)
        if not np.allclose(known, x, rtol=0.0, atol=1e-9):  # fix the levels, tune only the weights
            for part in (slice(near.inner), slice(-near.steps if record.decoupled else len(x), None)):
                low[part] = high[part] = known[part]
            x = lowered(near, known, low, high)
        point = near.point(x)
        repeated = any(_repeats(point, trial.point) for trial in record.trials)
        if not repeated and point.in_order(process):
            return point.schedule(process, record.method.name, record.decoupled), reach
        reach *= SHRINKAGE
    return None


def _repeats(one: Point, other: Point) -> bool:
    """Whether two schedules have the same levels and weights up to the tolerances; smaller changes have no effect."""
    same = np.allclose(one.levels, other.levels, rtol=1e-9, atol=0.0)
    same = same and np.allclose(one.network_levels, other.network_levels, rtol=1e-4, atol=0.0)
    return same and (one.weights is None or other.weights is None or np.allclose(one.weights, other.weights, atol=1e-4))
