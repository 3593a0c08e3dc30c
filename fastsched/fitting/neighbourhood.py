"""Predicted errors of schedules near one that was run.

The parameters ``x`` of a schedule are the logarithms of its inner levels and, if the solver is fitted, its weights
below the diagonal, row by row. Near the anchor ``x_a``, a schedule that was run and whose error ``E_a`` is known,

    ``E(x) ~ E_a + (C(x) - C(x_a)) v + sum_m c_m(x) R_m``,   ``R_m = E_m - E_a - (C(x_m) - C(x_a)) v``,

where ``C(x) v`` is the error on the surrogate (`fastsched.costs.surrogate`): that of the measurement, with what the
runs so far found at the states they went through (`fastsched.fitting.run_secants`). What the surrogate gets wrong at
the anchor does not matter, only what it gets wrong of a change (space mapping: Bandler et al. 1994); and of that other
runs ``m`` correct what they know: ``c(x)`` are the coefficients of ``x - x_a`` in the ``x_m - x_a`` (least squares,
damped), which is Broyden's method in its multisecant form (Fang & Saad 2009).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fastsched.costs.fitted_weights import rollouts
from fastsched.costs.norms import Array, Norms
from fastsched.costs.prediction import squared_errors
from fastsched.costs.secants import Secants
from fastsched.costs.surrogate import Outcome, Surrogate
from fastsched.metrics import power_mean
from fastsched.sampling.solvers import Solver
from fastsched.selection.constraints import known_levels, separate
from fastsched.selection.descent import log_gaps

#: Damping of the least squares over other runs, by the square and the fourth power of their distance.
DAMPING = (1e-3, 0.1)


@dataclass(frozen=True, eq=False)
class Neighbourhood:
    """Schedules near the anchor.

    Attributes:
        surrogate: The denoiser as measured.
        secants: What the measurement and the runs know beyond the scalar Jacobian.
        norms: Of all known vectors, V; samples compared with their errors under the anchor.
        solver: The solver.
        levels: Of the anchor, [steps + 1].
        weights: Of the anchor if the solver is fitted, [steps, steps].
        error: Which of the vectors is the anchor's error.
        others: Parameters of the other runs, [M, P].
        errors: Which of the vectors are their errors, [M].
        least: A squared error that is rounding.
    """

    surrogate: Surrogate
    secants: Secants
    norms: Norms
    solver: Solver
    levels: Array
    weights: Array | None
    error: int
    others: Array
    errors: Sequence[int]
    least: float

    @property
    def inner(self) -> int:
        """How many parameters are levels; the others are weights."""
        return len(self.levels) - 2

    @cached_property
    def anchor(self) -> Array:
        """``x_a``, [P]."""
        return parameters(self.levels, self.weights)

    def bounds(self, reach: float, low: float, high: float) -> tuple[Array, Array]:
        """The least and largest parameters within ``reach``, in fractions of a level's gap to its nearer neighbour.

        Weights have no bounds.

        Args:
            reach: The fraction.
            low: The lowest level a node may take.
            high: The highest finite level.
        """
        most = np.full(len(self.anchor), math.inf)
        most[: self.inner] = reach * np.minimum(*log_gaps(self.levels, low, high))
        return self.anchor - most, self.anchor + most

    def schedule(self, x: Array) -> tuple[Array, Array | None]:
        """The levels [steps + 1] and the weights [steps, steps] of parameters [P]."""
        levels, weights = self._unpacked(x[None])
        return levels[0], None if weights is None else weights[0]

    def at_known_levels(self, x: Array) -> Array:
        """``x`` with the nearest levels that the network knows."""
        levels = known_levels(self.surrogate.process, self._unpacked(x[None])[0])[0]
        return np.concatenate([np.log(levels[1:-1]), x[self.inner :]])

    def outcome(self, x: Array) -> Outcome:
        """The error, and how unexplained deviations change, of C parameters [C, P]."""
        found = self._on_surrogate(x)
        error = found.error - self._base.error
        error[:, self.error] += 1.0
        error += (x - self.anchor) @ self._correction
        return Outcome(error, found.deviations - self._base.deviations)

    def squared_errors(self, outcome: Outcome) -> Array:
        """``q_b`` (`fastsched.costs.prediction`) of C outcomes, none below rounding, [C, B]."""
        return np.maximum(squared_errors(self.norms, outcome), self.least)

    def predicted(self, x: Array) -> Array:
        """The predicted errors of C parameters [C, P], [C]; ``inf`` where levels are not apart."""
        valid = separate(self.surrogate.process, self._unpacked(x)[0])
        values = np.full(len(x), np.inf)
        if valid.any():
            values[valid] = power_mean(self.squared_errors(self.outcome(x[valid])))
        return np.where(np.isnan(values), np.inf, values)

    @cached_property
    def _base(self) -> Outcome:
        return self._on_surrogate(self.anchor[None])

    @cached_property
    def _correction(self) -> Array:
        """Of the Jacobian ``dC/dx`` by the other runs, [P, V]."""
        if len(self.others) == 0:
            return np.zeros((len(self.anchor), self.norms.vectors))
        apart = self.others - self.anchor
        square = (apart**2).sum(1)
        damped = apart @ apart.T + np.diag(DAMPING[0] * square + DAMPING[1] * square**2 + math.ulp(1.0))
        unexplained = self._base.error - self._on_surrogate(self.others).error
        unexplained[range(len(apart)), self.errors] += 1.0
        unexplained[:, self.error] -= 1.0
        return apart.T @ np.linalg.solve(damped, unexplained)

    def _on_surrogate(self, x: Array) -> Outcome:
        levels, weights = self._unpacked(x)
        return rollouts(self.surrogate, levels, self.solver, self.secants, self.norms, weights)[0].outcome

    def _unpacked(self, x: Array) -> tuple[Array, Array | None]:
        levels = np.repeat(self.levels[None], len(x), axis=0)
        levels[:, 1:-1] = np.exp(x[:, : self.inner])
        if self.weights is None:
            return levels, None
        weights = np.zeros((len(x), *self.weights.shape))
        row, column = np.tril_indices(len(self.weights), -1)
        weights[:, row, column] = x[:, self.inner :]
        weights += np.eye(len(self.weights)) * (1 - weights.sum(2))[:, :, None]
        return levels, weights


def parameters(levels: Array, weights: Array | None) -> Array:
    """``x`` of levels [steps + 1], and of weights [steps, steps] if they are fitted."""
    logs = np.log(levels[1:-1])
    return logs if weights is None else np.concatenate([logs, weights[np.tril_indices(len(weights), -1)]])
