"""Tune a schedule by the sampler's own error: a quasi-Newton descent that knows how the error should change.

The sampler's error at the end, ``E(theta)`` [B, d], is a smooth function of the schedule, ``theta`` the logarithms of
its inner levels. What a schedule's error is takes a run to learn; how it changes, the measurement predicts
(`fastsched.surrogate`): ``sum_q (C_q(theta) - C_q(theta_a)) e_q`` from the best schedule so far, ``theta_a``. What
earlier runs ``m`` say against the prediction corrects it,

    ``E(theta) ~ E_a + sum_q (C_q(theta) - C_q(theta_a)) e_q + sum_m c_m(theta) R_m``,
    ``R_m = E_m - E_a - sum_q (C_q(theta_m) - C_q(theta_a)) e_q``,

with ``c(theta)`` the coefficients of ``theta - theta_a`` in the ``theta_m - theta_a`` (least squares, damped):
Broyden's method in its multisecant form (Fang & Saad 2009), started at the surrogate's Jacobian (space mapping:
Bandler et al. 1994). The next schedule to run lowers the typical size of the prediction, within reach of the best;
reach grows with success and shrinks with failure. All of it happens in the Gram matrix of increments and errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fastsched import validate
from fastsched.auditioning import Audition, Stage, distances
from fastsched.costs.path import Array
from fastsched.denoiser import Denoiser
from fastsched.descent import descend, log_gaps
from fastsched.path_statistics import PathStatistics
from fastsched.polish import at_known_levels, known_levels, measured_range
from fastsched.progress import progress_bar
from fastsched.schedule import Schedule
from fastsched.solvers import Solver, get_solver
from fastsched.surrogate import Outcome, Surrogate, quadratic_forms, typical

#: How far a node may move at first, in shares of the gap to its nearer neighbour in ``log s``; what a run that lowers
#: the error multiplies that by, and one that does not; where it ends.
REACH, GROWTH, SHRINKAGE, MOST_REACH, LEAST_REACH = 0.5, 1.3, 0.5, 0.8, 0.02

#: Shares of a gap that the search for the next schedule moves nodes by, down to what the least reach allows.
MOVES = (0.4, 0.2, 0.1, 0.05, 0.025, 0.0125)

#: The weight of changes in the states' deviations that are predicted to cancel (`fastsched.polish`).
DOUBT = 0.3

#: Damping of the least squares over earlier runs, by the square and the fourth power of their distance.
DAMPING = (1e-3, 0.1)

#: Samples end here when the sampler follows a schedule; None where it cannot.
Perform = Callable[[Schedule], Tensor | None]


@dataclass(frozen=True, eq=False)
class Tuning:
    """How it went.

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
        rows = [f"{'trial':>6} {'typical error':>14}"]
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
    progress: bool = True,
) -> Tuning:
    """Lower the typical error of ``start`` by running up to ``trials`` schedules from the measured noises.

    Args:
        denoiser: The denoiser that ``stats`` was measured on.
        stats: What ``fastsched.measure(..., keep_increments=True)`` returned.
        start: A schedule, or an audition: then its finalists are known already, and the best is where to start.
        trials: The most runs, each of all samples, after one of ``start`` if its ends are not known.
        batch_size: Samples run at once; all when None.
        device: Where to run; where the network's parameters are when None.
        dtype: What the network computes in; that of its parameters when None.
        progress: Show a progress bar.

    Returns:
        The best schedule found, never worse on these samples than ``start``, and all that were tried.

    Raises:
        ValueError: If the statistics hold no increments, ``trials`` is negative, or the network returns NaN or inf.
    """
    first = start.winner if isinstance(start, Audition) else start
    table = start.table if isinstance(start, Audition) else ()
    known = [(row.schedule, row.ends) for row in table if len(row.ends) == stats.samples]
    method = get_solver(first.solver)
    trials = validate.positive_int("trials", trials, minimum=0)
    increments_of(stats)
    stage = Stage(denoiser, stats, method, batch_size, device, dtype)
    each = stats.samples * method.model_calls(first.steps)
    before = 0 if known else each
    with progress_bar(before + trials * each, progress, "tuning") as advance:
        perform = partial(stage.ends, first=0, last=stats.samples, advance=advance)
        tuning = tuned(perform, stats, known or [(first, perform(first))], trials)
    return replace(tuning, model_calls=before + tuning.model_calls)


def tuned(perform: Perform, stats: PathStatistics, known: Sequence[tuple[Schedule, Tensor]], trials: int) -> Tuning:
    """`tune`, whoever runs the sampler.

    Args:
        perform: Runs a schedule from the noises of the measured paths and returns where they end, [B, *shape].
        stats: Statistics with increments.
        known: Schedules to start from, and where their samples ended.
        trials: The most runs.

    Returns:
        As `tune`, the model calls those of ``perform``.
    """
    record = _Record(stats, get_solver(known[0][0].solver))
    for schedule, ends in known:
        record.add(schedule, ends)
    reach, tried = REACH, 0
    while tried < trials and reach >= LEAST_REACH and known[0][0].steps > 1:
        levels = record.proposal(reach)
        if levels is None:
            reach *= SHRINKAGE
            continue
        schedule = Schedule.from_levels(stats.process, torch.from_numpy(levels), record.method.name)
        before, ends = record.lowest, perform(schedule)
        tried += 1
        if ends is None:
            reach *= SHRINKAGE
            continue
        record.add(schedule, ends)
        reach = min(reach * GROWTH, MOST_REACH) if record.lowest < before else reach * SHRINKAGE
    calls = tried * stats.samples * record.method.model_calls(known[0][0].steps)
    return Tuning(record.schedules[record.best], record.errors[record.best], tuple(record.schedules), calls)


def increments_of(stats: PathStatistics) -> Tensor:
    """The increments, [B, N-1, d].

    Raises:
        ValueError: If they were not kept.
    """
    if stats.increments is None:
        raise ValueError("stats must hold the increments: measure with keep_increments=True")
    return stats.increments


class _Record:
    """The runs so far, and what they say of schedules near the best."""

    def __init__(self, stats: PathStatistics, method: Solver) -> None:
        self.stats, self.method, self.surrogate = stats, method, Surrogate.of(stats)
        self.increments = increments_of(stats)
        self.schedules: list[Schedule] = []
        self.levels: list[Array] = []
        self.errors: list[Tensor] = []
        self._outcomes: list[Outcome] = []
        self._vectors: list[Tensor] = []  # E_m [B, d] float64
        self._gram = stats.gram.numpy()  # of the increments and the E_m, [B, N-1+M, N-1+M]

    @property
    def best(self) -> int:
        """The run of least typical error."""
        return min(range(len(self.schedules)), key=lambda m: self.schedules[m].measured_error or 0.0)

    @property
    def lowest(self) -> float:
        """Its error."""
        return float(self.schedules[self.best].measured_error or 0.0)

    def add(self, schedule: Schedule, ends: Tensor) -> None:
        """Learn from a run."""
        squared = distances(self.stats, ends)
        levels = self.stats.process.level(schedule.sigmas).numpy()
        error = (ends.double() - self.stats.ends.double()).flatten(1)
        onto = (self.increments @ error.float()[..., None])[..., 0].double()  # <e_q, E>
        products = [(error * other).sum(1) for other in [*self._vectors, error]]
        column = torch.cat([onto, torch.stack(products, dim=1)], dim=1).numpy()[..., None]  # [B, N-1+M+1, 1]
        self._gram = np.block([[self._gram, column[:, :-1]], [column.transpose(0, 2, 1)]])
        self.schedules.append(replace(schedule, measured_error=float(squared.log().mean().exp())))
        self.levels.append(levels)
        self.errors.append(squared)
        self._vectors.append(error)
        self._outcomes.append(self.surrogate.run(levels[None], self.method))

    def proposal(self, reach: float) -> Array | None:
        """The levels of least predicted error within ``reach`` of the best run; None if that is where they are."""
        anchor, start = self.best, self.levels[self.best]
        low, high = measured_range(self.stats)
        bound = reach * np.minimum(*log_gaps(start, low, high)) + 1e-9
        logs = np.log(np.array([levels[1:-1] for levels in self.levels]))
        others = [m for m in range(len(self.levels)) if m != anchor]
        apart = logs[others] - logs[anchor]  # [M-1, steps-1]
        square = (apart**2).sum(1)
        damped = apart @ apart.T + np.diag(DAMPING[0] * square + DAMPING[1] * square**2 + math.ulp(1.0))
        solve = np.linalg.solve(damped, apart) if others else np.zeros((0, logs.shape[1]))

        def predicted(levels: Array) -> Array:
            moved = np.log(levels[:, 1:-1]) - logs[anchor]
            outcome = self.surrogate.run(levels, self.method)
            squared = self._squared(outcome, anchor, others, moved @ solve.T)
            return np.where((np.abs(moved) <= bound).all(axis=1), typical(squared), np.inf)

        found, _ = descend(at_known_levels(self.stats.process, predicted), start, low, high, moves=MOVES)
        found = known_levels(self.stats.process, found)
        return None if np.allclose(found, start, rtol=1e-9, atol=0.0) else found

    def _squared(self, outcome: Outcome, anchor: int, others: list[int], weights: Array) -> Array:
        """Squared size of the predicted error, and of what is in doubt, [C, B]; ``weights`` are the ``c_m``."""
        n, base = self.stats.levels - 1, self._outcomes[anchor]
        vector = np.zeros((len(weights), self._gram.shape[1]))
        vector[:, :n] = outcome.error - base.error
        vector[:, n + anchor] = 1.0 - weights.sum(1)
        for m, weight in zip(others, weights.T, strict=True):
            vector[:, n + m] = weight
            vector[:, :n] -= weight[:, None] * (self._outcomes[m].error - base.error)
        moved = DOUBT * (outcome.deviations - base.deviations)
        return quadratic_forms(self._gram, vector[:, None]) + quadratic_forms(self._gram[:, :n, :n], moved)
