"""Predicted errors of schedules near one that was run.

The parameters ``x`` of a schedule are the logarithms of its inner levels. If the solver is fitted, its weights below
the diagonal follow, row by row. With decoupled levels the offsets ``log(s' / s)`` of all steps are last, where the
network is told ``s'`` instead of the state's level ``s``. The anchor ``x_a`` is a schedule that was run, so its
error ``E_a`` is known. Near the anchor the error is predicted as

    ``E(x) ~ E_a + (C(x) - C(x_a)) v + sum_m c_m(x) R_m``,   ``R_m = E_m - E_a - (C(x_m) - C(x_a)) v``,

where ``C(x) v`` is the error on the surrogate (`fastsched.costs.surrogate`) with the secants of the runs so far
(`fastsched.fitting.run_secants`). The surrogate only predicts the change from the anchor, where its error cancels
(space mapping: Bandler et al. 1994). The other runs ``m`` correct this change: ``c(x)`` are the coefficients of
``x - x_a`` over the ``x_m - x_a`` by damped least squares (Broyden's method in multisecant form: Fang & Saad 2009).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from fastsched.costs.fitted_weights import surrogate_runs
from fastsched.costs.norms import Array, Norms
from fastsched.costs.prediction import PENALTY, squared_errors
from fastsched.costs.secants import Secants
from fastsched.costs.surrogate import Outcome, Surrogate
from fastsched.denoisers.noise import NoiseProcess
from fastsched.metrics import power_mean
from fastsched.sampling.schedule import Schedule
from fastsched.sampling.solvers import Solver
from fastsched.selection.constraints import ROUNDING, known_levels, separate
from fastsched.selection.descent import log_gaps

#: Damping of the least squares over other runs: factors of the square and the fourth power of their distance.
DAMPING = (1e-3, 0.1)

#: How far an offset may move, as a fraction of how far the state's level may: 1, 1/2 and 1/4 gave errors of 0.60, 0.60
#: and 0.63 of those of coupled levels, at worst 1.9, 1.6 and 2.5 (45 fits of three networks and solvers).
OFFSET_REACH = 0.5


@dataclass(frozen=True, eq=False)
class Point:
    """What is tuned of a schedule; or of C schedules, in arrays [C, ...]."""

    levels: Array  #: the levels, [steps + 1]
    weights: Array | None  #: the fitted solver's, [steps, steps]
    offsets: Array | None  #: ``log(s' / s)`` of each step, [steps]; None unless levels are decoupled

    @property
    def parameters(self) -> Array:
        """``x`` of one schedule, [P]."""
        below = [] if self.weights is None else [self.weights[np.tril_indices(len(self.weights), -1)]]
        return np.concatenate([np.log(self.levels[1:-1]), *below, *([] if self.offsets is None else [self.offsets])])

    @property
    def network_levels(self) -> Array:
        """The levels that the network is told, [steps]."""
        states = self.levels[..., :-1]
        return states if self.offsets is None else states * np.exp(self.offsets)

    @property
    def coupled(self) -> bool:
        """Whether the network is told the states' levels."""
        return self.offsets is None or not bool(self.offsets.any())

    def in_order(self, process: NoiseProcess) -> bool:
        """Whether the levels, and the levels that the network is told, descend and are far enough apart."""
        return all(bool(separate(process, each[None])) for each in (self.levels, self.network_levels))

    def schedule(self, process: NoiseProcess, solver: str, decoupled: str | None) -> Schedule:
        """The schedule for a solver; for ``decoupled`` see `Schedule`."""
        weights, levels = (
            None if each is None else torch.from_numpy(each)
            for each in (self.weights, None if self.coupled else self.network_levels)
        )
        more = {"weights": weights, "network_levels": levels, "decoupled": decoupled}
        return Schedule.from_levels(process, torch.from_numpy(self.levels), solver, **more)


@dataclass(frozen=True, eq=False)
class Neighbourhood:
    """Schedules near the anchor."""

    surrogate: Surrogate
    secants: Secants  #: the secants of the measurement and of the runs
    norms: Norms  #: norms over all V known vectors, relative to each sample's error under the anchor
    solver: Solver
    run: Point  #: the anchor
    column: int  #: index of the anchor's error among the vectors
    others: Array  #: parameters of the other runs, [M, P]
    columns: Sequence[int]  #: indices of the other runs' errors among the vectors, [M]
    least: float  #: the squared error that rounding causes; no prediction is lower
    penalty: float = PENALTY  #: weight of deviations that no secant explains

    @property
    def inner(self) -> int:
        """The number of parameters that are levels; weights follow, and offsets are last."""
        return len(self.run.levels) - 2

    @property
    def steps(self) -> int:
        """The number of steps of the schedules."""
        return len(self.run.levels) - 1

    @cached_property
    def anchor(self) -> Array:
        """``x_a``, [P]."""
        return self.run.parameters

    def bounds(self, reach: float, low: float, high: float) -> tuple[Array, Array]:
        """The least and largest parameters within ``reach``, a fraction of each level's gap to its nearer neighbour.

        Weights have no bounds. Offsets move `OFFSET_REACH` times as far, and keep the level that the network is told
        between ``low`` and ``high``, the highest finite level.
        """
        most = np.full(len(self.anchor), math.inf)
        most[: self.inner] = gaps = reach * np.minimum(*log_gaps(self.run.levels, low, high))
        least, largest = self.anchor - most, self.anchor + most
        offsets = self.run.offsets
        if offsets is not None:
            states, own = self.run.levels[:-1], OFFSET_REACH * np.append(gaps[:1], gaps)
            at_most = np.log(np.divide([[low], [high]], states, out=np.ones((2, self.steps)), where=states < np.inf))
            least[-self.steps :] = np.minimum(np.maximum(offsets - own, at_most[0]), offsets)
            largest[-self.steps :] = np.maximum(np.minimum(offsets + own, at_most[1]), offsets)
        return least, largest

    def point(self, x: Array) -> Point:
        """The schedule with parameters ``x`` [P]."""
        points = self._points(x[None])
        weights, offsets = (None if each is None else each[0] for each in (points.weights, points.offsets))
        return Point(points.levels[0], weights, offsets)

    def at_known_levels(self, x: Array) -> Array:
        """``x`` with each level moved to the nearest one that the network knows."""
        point, process = self.point(x), self.surrogate.process
        known, offsets = known_levels(process, point.levels), point.offsets
        if offsets is not None:
            offsets = log_ratio(known_levels(process, point.network_levels), known[:-1])
        return Point(known, point.weights, offsets).parameters

    def outcome(self, x: Array) -> Outcome:
        """The predicted errors of C schedules from ``x`` [C, P], and the change of their unexplained deviations."""
        found = self._on_surrogate(x)
        error = found.error - self._base.error
        error[:, self.column] += 1.0
        error += (x - self.anchor) @ self._correction
        return Outcome(error, found.deviations - self._base.deviations)

    def squared_errors(self, outcome: Outcome) -> Array:
        """``q_b`` (`fastsched.costs.prediction`) of C outcomes, none below rounding, [C, B]."""
        return np.maximum(squared_errors(self.norms, outcome, self.penalty), self.least)

    def predicted(self, x: Array) -> Array:
        """The predicted errors [C] of C schedules from ``x`` [C, P]; ``inf`` where levels are too close together."""
        points, process = self._points(x), self.surrogate.process
        valid = separate(process, points.levels)
        if points.offsets is not None:
            levels = points.network_levels
            highest, lowest = process.s_max * (1 + ROUNDING), process.s_min * (1 - ROUNDING)
            valid &= separate(process, levels) & (levels[:, 0] <= highest) & (levels[:, -1] >= lowest)
        values = np.full(len(x), np.inf)
        if valid.any():
            values[valid] = power_mean(self.squared_errors(self.outcome(x[valid])))
        return np.where(np.isnan(values), np.inf, values)

    @cached_property
    def _base(self) -> Outcome:
        return self._on_surrogate(self.anchor[None])

    @cached_property
    def _correction(self) -> Array:
        """The correction that the other runs add to the surrogate's Jacobian ``dC/dx``, [P, V]."""
        if len(self.others) == 0:
            return np.zeros((len(self.anchor), self.norms.vectors))
        apart = self.others - self.anchor
        square = (apart**2).sum(1)
        damped = apart @ apart.T + np.diag(DAMPING[0] * square + DAMPING[1] * square**2 + math.ulp(1.0))
        unexplained = self._base.error - self._on_surrogate(self.others).error
        unexplained[range(len(apart)), self.columns] += 1.0
        unexplained[:, self.column] -= 1.0
        return apart.T @ np.linalg.solve(damped, unexplained)

    def _on_surrogate(self, x: Array) -> Outcome:
        points = self._points(x)
        known = self.secants, self.norms, points.weights, points.offsets
        return surrogate_runs(self.surrogate, points.levels, self.solver, *known).outcome

    def _points(self, x: Array) -> Point:
        """The C schedules with parameters ``x`` [C, P]."""
        levels, weights, offsets = np.repeat(self.run.levels[None], len(x), axis=0), None, None
        levels[:, 1:-1], x = np.exp(x[:, : self.inner]), x[:, self.inner :]
        if self.run.offsets is not None:
            x, offsets = x[:, : -self.steps], x[:, -self.steps :]
        if self.run.weights is not None:
            weights = np.zeros((len(x), *self.run.weights.shape))
            row, column = np.tril_indices(self.steps, -1)
            weights[:, row, column] = x
            weights += np.eye(self.steps) * (1 - weights.sum(2))[:, :, None]
        return Point(levels, weights, offsets)


def log_ratio(network_levels: Array, levels: Array) -> Array:
    """Offsets ``log(s' / s)`` from the network's levels and the states' levels, [steps] each; 0 at pure noise."""
    return np.log(np.divide(network_levels, levels, out=np.ones_like(network_levels), where=levels < np.inf))
