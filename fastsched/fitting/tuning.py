"""Tune a schedule by the sampler's own error: a quasi-Newton descent that knows how the error should change.

The sampler's error at the end, ``E(theta)`` [B, d], is a smooth function of the schedule, ``theta`` the logarithms of
its inner levels. What a schedule's error is takes a run to learn; how it changes, a model of the denoiser predicts:
that of the measurement (`fastsched.costs.surrogate`), with what the runs so far found at the states they went through
(`fastsched.fitting.run_secants`). Its error is ``C(theta) v``, a combination of the increments and what the runs found,
and

    ``E(theta) ~ E_a + (C(theta) - C(theta_a)) v + sum_m c_m(theta) R_m``,
    ``R_m = E_m - E_a - (C(theta_m) - C(theta_a)) v``,

from the best run so far ``theta_a``, where earlier runs ``m`` correct what is left; ``c(theta)`` are the coefficients
of ``theta - theta_a`` in the ``theta_m - theta_a`` (least squares, damped): Broyden's method in its multisecant form
(Fang & Saad 2009), started at a model's Jacobian (space mapping: Bandler et al. 1994). The next schedule to run lowers
the power mean of the prediction, within reach of the best; reach grows with success and shrinks with failure.

All of it happens in the Gram matrix of the measurement's vectors and what the runs found.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from fastsched import validate
from fastsched.costs.fitted_weights import rollouts
from fastsched.costs.norms import Array, Norms
from fastsched.costs.prediction import squared_errors
from fastsched.costs.secants import Secants
from fastsched.costs.surrogate import Outcome, Rollouts, Surrogate
from fastsched.denoisers.denoiser import Denoiser, is_denoiser
from fastsched.fitting.auditioning import Audition
from fastsched.fitting.rollouts import Evaluations, Rollout, Run, Runner, distances, rounding_of
from fastsched.fitting.run_log import RunLog, identity, schedule_key
from fastsched.fitting.run_secants import KnownAnswers, KnownRun, residuals, with_runs
from fastsched.measurement.measuring import check_same_network
from fastsched.measurement.statistics import PathStatistics, is_statistics
from fastsched.metrics import power_mean
from fastsched.sampling.files import check_writable
from fastsched.sampling.fitted import chosen_solver
from fastsched.sampling.progress import Progress, progress_bar
from fastsched.sampling.sampler import schedule_solver
from fastsched.sampling.schedule import Schedule
from fastsched.sampling.solvers import Solver
from fastsched.selection.constraints import at_known_levels, known_levels
from fastsched.selection.descent import descend, log_gaps

#: How far a node may move at first, in fractions of the gap to its nearer neighbour in ``log s``; what a run that
#: lowers the error multiplies that by, and one that does not; the largest, and the least, at which tuning ends.
REACH, GROWTH, SHRINKAGE, MOST_REACH, LEAST_REACH = 0.5, 1.3, 0.5, 0.8, 0.02

#: Fractions of a gap that the search for the next schedule moves nodes by, down to what the least reach allows.
MOVES = (0.4, 0.2, 0.1, 0.05, 0.025, 0.0125)

#: Damping of the least squares over earlier runs, by the square and the fourth power of their distance.
DAMPING = (1e-3, 0.1)

#: Runs C schedules on the surrogate: the runs, and weights if they were fitted.
Sampled: TypeAlias = "Callable[[Array], tuple[Rollouts, Array | None]]"


@dataclass(frozen=True, eq=False)
class Tuning:
    """Result of tuning.

    Attributes:
        schedule: The best schedule, with its measured error: on the samples it was tuned on, so a little low.
        errors: ``||x0 - x0_path||^2`` of each sample under it, [B].
        trials: The schedules that were run, in order, each with its measured error; first those to start from.
        model_calls: Network evaluations, counted per sample; those of an audition to start from are its own.
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

    What the network said in every run is held on the CPU, an image for each call. An interrupt (Ctrl-C) returns what
    the finished runs gave, with a warning.

    Args:
        denoiser: The denoiser that ``stats`` was measured on.
        stats: What ``fastsched.measure(..., keep_increments=True)`` returned.
        start: A schedule, or an audition: where to start are its finalists, known already if they ran all samples.
        trials: The most runs, each of all samples, after one of ``start`` if its ends are not known.
        batch_size: Samples run at once; all when None.
        device: Where to run; where the network's parameters are when None.
        dtype: What the network computes in; that of its parameters when None.
        checks: Whether to ask first, by one call, if the denoiser is the one that was measured.
        checkpoint: A file of every finished run, one sample at a time unless ``batch_size`` says otherwise. The same
            call, also with more trials, goes on from there to the same bits.
        progress: Show a progress bar, or a function called with the model calls done and their total.

    Returns:
        The best schedule found, never worse on these samples than ``start``, and all that were tried.

    Raises:
        ValueError: If the statistics hold no increments or are of another network, the checkpoint of another call,
            ``trials`` is negative, or the network returns NaN or inf.
    """
    validate.arguments(locals(), denoiser=is_denoiser, stats=is_statistics, start=_is_start)
    first = start.winner if isinstance(start, Audition) else start
    known = start.complete(stats.samples) if isinstance(start, Audition) else []
    method = chosen_solver(first.solver)
    increments_of(stats)
    if checkpoint is not None:
        check_writable(checkpoint)
        batch_size = batch_size or 1
    asked = check_same_network(denoiser, stats, device, dtype) if checks else 0
    runner = Runner(denoiser, stats, method, batch_size, device, dtype)
    if checkpoint is not None:
        starts = [schedule_key(schedule) for schedule, _ in known] or [schedule_key(first)]
        what = identity(stats, start=starts, batch_size=batch_size, dtype=str(runner.dtype))
        runner.kept = RunLog(checkpoint, what).run
    calls = method.model_calls(first.steps)
    before = 0 if known else stats.samples * calls
    with progress_bar(before + trials * stats.samples * calls, progress, "tuning") as runner.advance:
        try:
            tuning = tuned(runner, stats, known or [(first, runner(first, 0, stats.samples))], trials, calls)
        except KeyboardInterrupt as error:
            tuning = _finished_part(error, checkpoint)
    return replace(tuning, model_calls=asked + before + tuning.model_calls)


def _finished_part(error: KeyboardInterrupt, checkpoint: object) -> Tuning:
    """What the runs before an interrupt gave, with a warning; the interrupt again if nothing or it is in a file."""
    tuning = None if checkpoint is not None else getattr(error, "tuning", None)
    if tuning is None:
        raise error
    warnings.warn(
        f"interrupted: this is the best of the {len(tuning.trials)} schedules that were run (tune(checkpoint=PATH) "
        "keeps their runs in a file, and the same call goes on from there)",
        stacklevel=3,
    )
    return tuning


def tuned(
    run: Run, stats: PathStatistics, known: Sequence[tuple[Schedule, Rollout]], trials: int, calls: int
) -> Tuning:
    """`tune` with any sampler.

    Args:
        run: Runs a schedule on some of the measured samples; None if it cannot.
        stats: Statistics with increments.
        known: Schedules to start from, and their runs.
        trials: The most runs.
        calls: Network evaluations of one sample in a run.
    """
    record = _Record(stats, chosen_solver(known[0][0].solver))
    for schedule, rollout in known:
        record.add(schedule, rollout)
    reach, tried = REACH, 0
    while tried < trials and known[0][0].steps > 1:
        anchor = record.best()
        proposal = record.proposal(anchor, reach)
        if proposal is None:
            break
        schedule = proposal.schedule(stats, record.method)
        try:
            rollout = run(schedule, 0, stats.samples)
        except KeyboardInterrupt as error:
            error.tuning = record.tuning(tried * stats.samples * calls)  # type: ignore[attr-defined]  # for `tune`
            raise
        tried += 1
        if rollout is not None:
            record.add(schedule, rollout)
        reach = min(proposal.reach * GROWTH, MOST_REACH) if record.best() != anchor else proposal.reach * SHRINKAGE
    return record.tuning(tried * stats.samples * calls)


def _is_start(name: str, value: object) -> None:
    """A schedule, or an audition."""
    if not isinstance(value, Audition):
        validate.instance(name, value, Schedule, "or what fastsched.audition returned")


def increments_of(stats: PathStatistics) -> Tensor:
    """The increments, [B, N-1, d].

    Raises:
        ValueError: If they were not kept.
    """
    if stats.increments is None:
        raise ValueError("stats must hold the increments: measure with keep_increments=True")
    return stats.increments


@dataclass(frozen=True, eq=False)
class _Proposal:
    """A schedule to run: its predicted error, its levels, the reach it was found within, and its weights if fitted."""

    predicted: float
    levels: Array
    reach: float
    weights: Array | None

    def schedule(self, stats: PathStatistics, method: Solver) -> Schedule:
        """The schedule."""
        weights = None if self.weights is None else torch.from_numpy(self.weights)
        return Schedule.from_levels(stats.process, torch.from_numpy(self.levels), method.name, weights=weights)

    def repeats(self, trial: _Trial) -> bool:
        """Whether a run was of the same levels and weights."""
        same = np.allclose(self.levels, trial.levels, rtol=1e-9, atol=0.0)
        if self.weights is None or trial.schedule.weights is None:
            return same
        return same and np.allclose(self.weights, trial.schedule.weights.numpy(), atol=1e-4)


@dataclass(frozen=True, eq=False)
class _Trial:
    """A run: its schedule and errors, and where its vectors are in the Gram matrix.

    ``s`` are the levels of its evaluations, whose residuals start at column ``first``; its error is ``column``.
    """

    schedule: Schedule
    levels: Array
    errors: Tensor
    s: Array
    first: int
    column: int

    @property
    def error(self) -> float:
        return float(power_mean(self.errors))


class _Record:
    """The runs so far, and what they say of schedules near the best."""

    def __init__(self, stats: PathStatistics, method: Solver) -> None:
        self.stats, self.method, self.surrogate = stats, method, Surrogate.of(stats)
        increments = increments_of(stats)
        self.vectors = increments if stats.responses is None else torch.cat([increments, stats.responses], dim=1)
        self.trials: list[_Trial] = []
        self._vectors: list[Tensor] = []  # each run's residuals and its error, [B, evaluations + 1, d]
        self._gram = stats.vector_gram.numpy()  # of the measurement's vectors and the runs', [B, n, n]

    def best(self) -> int:
        """The run of least error."""
        return min(range(len(self.trials)), key=lambda m: self.trials[m].error)

    def tuning(self, model_calls: int) -> Tuning:
        """What the runs so far, of so many model calls, come to."""
        best = self.trials[self.best()]
        return Tuning(best.schedule, best.errors, tuple(trial.schedule for trial in self.trials), model_calls)

    def add(self, schedule: Schedule, rollout: Rollout) -> None:
        """Learn from a run."""
        squared = distances(self.stats, rollout.ends)
        error = (rollout.ends.double() - self.stats.ends.double()).flatten(1)[:, None]
        levels = self.stats.process.level(schedule.sigmas).numpy()
        s, beyond = self._beyond(rollout.evaluations, levels)
        first = self._add_vectors(torch.cat([beyond, error.float()], dim=1))
        self.trials.append(
            _Trial(
                schedule=replace(schedule, measured_error=float(power_mean(squared))),
                levels=levels,
                errors=squared,
                s=s,
                first=first,
                column=self._gram.shape[1] - 1,
            )
        )

    def _beyond(self, found: Evaluations | None, levels: Array) -> tuple[Array, Tensor]:
        """Levels of a run's evaluations and their residuals; none if they were not kept, or not as many as expected."""
        if found is not None and len(found.s) == self._evaluations(levels):
            beyond = residuals(self.surrogate, self.stats, found)
            if bool(beyond.isfinite().all()):
                return np.array(found.s), beyond
        return np.zeros(0), self.vectors[:, :0]

    def _evaluations(self, levels: Array) -> int:
        found, _ = rollouts(self.surrogate, levels[None], self.method)
        return len(found.deviations)

    def _add_vectors(self, vectors: Tensor) -> int:
        """Vectors [B, m, d] into the Gram matrix; their first column."""
        self._vectors.append(vectors)
        rows = []
        for b, own in enumerate(vectors.double()):
            others = [self.vectors[b], *(each[b] for each in self._vectors)]
            rows.append(torch.cat([other.double() @ own.T for other in others]).numpy())
        columns, before = np.stack(rows), self._gram.shape[1]  # [B, n + m, m]
        self._gram = np.block([[self._gram, columns[:, :before]], [columns.transpose(0, 2, 1)]])
        return before

    def proposal(self, anchor: int, reach: float) -> _Proposal | None:
        """The schedule of least predicted error within reach of a run.

        Where that was run already, the least within a smaller reach; None if there is none down to the least reach.
        """
        start = self.trials[anchor].levels
        low, high = self.stats.finite_range
        gaps, (prediction, sampled) = np.minimum(*log_gaps(start, low, high)), self.prediction(anchor)
        least = rounding_of(self.stats)

        def predicted(levels: Array) -> Array:
            within = (np.abs(np.log(levels[:, 1:-1] / start[1:-1])) <= reach * gaps + 1e-9).all(axis=1)
            return np.where(within, power_mean(np.maximum(prediction(levels), least)), np.inf)

        while reach >= LEAST_REACH:
            found, value = descend(at_known_levels(self.stats.process, predicted), start, low, high, moves=MOVES)
            levels = known_levels(self.stats.process, found)
            weights = sampled(levels[None])[1]
            proposal = _Proposal(value, levels, reach, None if weights is None else weights[0])
            if not any(proposal.repeats(trial) for trial in self.trials):
                return proposal
            reach *= SHRINKAGE
        return None

    def prediction(self, anchor: int) -> tuple[Callable[[Array], Array], Sampled]:
        """Predictions for schedules near a run.

        Returns:
            ``q_b`` [C, B] of levels [C, steps + 1]: squared sizes of the predicted error, with the penalty on how
            unexplained deviations change (`fastsched.costs.prediction`); and the runs on the surrogate they come from.
        """
        norms = self.norms(anchor)
        secants = self.secants(anchor, norms)
        sampled = partial(rollouts, self.surrogate, solver=self.method, secants=secants, norms=norms)
        base = self._outcome(self.trials[anchor], secants)
        solved, corrections = self._corrections(anchor, secants, base)
        at_anchor = np.log(self.trials[anchor].levels[1:-1])

        def squared(levels: Array) -> Array:
            outcome, moved = sampled(levels)[0].outcome, np.log(levels[:, 1:-1]) - at_anchor
            error = outcome.error - base.error
            error[:, self.trials[anchor].column] += 1.0
            error += moved @ solved @ corrections
            return squared_errors(norms, Outcome(error, outcome.deviations - base.deviations))

        return squared, sampled

    def _corrections(self, anchor: int, secants: Secants, base: Outcome) -> tuple[Array, Array]:
        """``c = moved @ solved`` [steps - 1, M - 1], and ``R_m`` [M - 1, V], of all runs but the anchor."""
        logs = np.log(np.array([trial.levels[1:-1] for trial in self.trials]))
        others = [m for m in range(len(self.trials)) if m != anchor]
        apart = logs[others] - logs[anchor]  # [M - 1, steps - 1]
        square = (apart**2).sum(1)
        damped = apart @ apart.T + np.diag(DAMPING[0] * square + DAMPING[1] * square**2 + math.ulp(1.0))
        solved = np.linalg.solve(damped, apart).T if others else np.zeros((logs.shape[1], 0))
        corrections = np.zeros((len(others), self._gram.shape[1]))
        for row, m in zip(corrections, others, strict=True):
            row -= (self._outcome(self.trials[m], secants).error - base.error)[0]
            row[self.trials[m].column] += 1.0
            row[self.trials[anchor].column] -= 1.0
        return solved, corrections

    def _outcome(self, trial: _Trial, secants: Secants) -> Outcome:
        """Of a run's own schedule, with its own weights, on the surrogate."""
        return self.surrogate.run(trial.levels[None], schedule_solver(trial.schedule), secants)

    def norms(self, anchor: int) -> Norms:
        """Of all vectors, samples compared with their errors under the ``anchor``."""
        return Norms(self._gram, self.trials[anchor].errors.numpy())

    def secants(self, anchor: int, norms: Norms) -> Secants:
        """Those of the measurement and of the runs whose evaluations are known, for schedules near the ``anchor``."""
        own = self.surrogate.secants
        if own is None:
            own = Secants.none(self.surrogate.vectors)
        known = [trial for trial in self.trials if len(trial.s) > 0]
        if len(self.trials[anchor].s) == 0:
            known = []
        runs = [KnownRun(trial.s, self._deviations(trial, norms.vectors), trial.first) for trial in known]
        return with_runs(own, runs, known.index(self.trials[anchor]) if known else 0, norms.metric)

    def _deviations(self, trial: _Trial, vectors: int) -> Array:
        """Deviations of a run from the path at its evaluations, [evaluations, V]."""
        answers = KnownAnswers(trial.first, vectors)
        return self.surrogate.rollouts(trial.levels[None], schedule_solver(trial.schedule), answers).deviations[:, 0]
