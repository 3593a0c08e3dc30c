"""Weights of the fitted solver, by least squares on the surrogate.

The sampler is run on the surrogate (`fastsched.costs.surrogate`). After evaluation n the denoised samples up to
``D_n`` are known, and a step to level n + 1 should end on the path. Its weights minimise

    ``|| t - sum_{m<n} b_m (D_m - D_n) ||^2 + ridge ||b - b0||^2``,
    ``t = (y_path - y_n) / (rho_{n+1} - rho_n) - D_n``,

with ``t = D_end - D_n`` for the step to sigma 0. Then ``W[n, m] = b_m`` and ``W[n, n] = 1 - sum b``. The squared norm
is the mean over samples, each relative to its own scale, so that a few large samples do not dominate. ``b0`` are the
weights of UniPC (`fastsched.sampling.stock_weights`), which remain where the samples determine nothing.
"""

from __future__ import annotations

import numpy as np
import torch

from fastsched.costs.norms import Array, Norms
from fastsched.costs.secants import Secants
from fastsched.costs.surrogate import Surrogate, SurrogateRuns
from fastsched.sampling.sampler import nodes_of
from fastsched.sampling.solvers import FITTED, Solver
from fastsched.sampling.stock_weights import NEAREST_STOCK, stock_weights

#: Ridge for a schedule of 8 steps, relative to the mean square of the differences ``D_m - D_n``. It falls with the cube
#: of the number of steps: with shorter steps deviations are smaller and the surrogate is more accurate.
RIDGE = 3e-3


def surrogate_runs(
    surrogate: Surrogate,
    levels: Array,
    solver: Solver,
    secants: Secants | None = None,
    norms: Norms | None = None,
    weights: Array | None = None,
    offsets: Array | None = None,
) -> SurrogateRuns:
    """`Surrogate.run`; for `fastsched.sampling.fitted.FITTED_SOLVER` with the best weights for each schedule.

    ``norms`` are over the vectors of ``secants``, those of the measurement when None. ``weights`` [C, steps, steps] are
    used instead of the best weights.
    """
    if solver.name != FITTED or solver.end_weights is not None:
        return surrogate.run(levels, solver, secants, offsets)
    levels, metric = np.asarray(levels, dtype=np.float64), (norms or surrogate.norms).metric
    increments, last = len(surrogate.s) - 1, levels.shape[1] - 2
    choosing = weights is None
    with np.errstate(divide="ignore", invalid="ignore"):
        if weights is None:  # at first UniPC's weights ``b0``; each row is replaced when its step is taken
            weights = stock_weights(NEAREST_STOCK, nodes_of(surrogate.process, torch.from_numpy(levels)))
        found = SurrogateRuns(surrogate, secants or surrogate.secants, levels[:, :-1], offsets)
        y, rho, differences = found.end, 1 / levels, _Differences(len(levels), last, metric)
        for n in range(last + 1):
            differences.add(found.denoise(y, levels[:, n]))
            step = (rho[:, n + 1] - rho[:, n])[:, None]
            b = weights[:, n, :n]
            if choosing:
                target = np.zeros_like(y)  # at first y_path, or D_end - D_0
                target[:, :increments] = found.on_path(levels[:, n + 1]).state if n < last else 1.0
                if n < last:
                    target = (target - y) / step
                b = differences.least_squares(target, b, RIDGE * (8 / (last + 1)) ** 3)
                weights[:, n, :n], weights[:, n, n] = b, 1 - b.sum(1)
            slope = differences.combined(b)
            y = slope if n == last else y + step * slope
    found.end, found.weights = y, weights
    return found


class _Differences:
    """The differences ``D_m - D_n`` of C runs, with ``D_n`` the latest output, and their Gram matrices.

    ``D_m - D_n`` is the sum of the changes ``D_j - D_{j+1}`` from m on. So its inner products are cumulative sums of
    theirs, and each output is multiplied by the metric only once.
    """

    def __init__(self, count: int, most: int, metric: Array) -> None:
        self.metric, self.n, self.last = metric, -1, np.empty(0)
        self._changes = np.zeros((count, most, len(metric)))
        self._products = np.zeros_like(self._changes)  # changes times the metric
        self._gram = np.zeros((count, most, most))

    def add(self, denoised: Array) -> None:
        """Add the next outputs, ``D_n`` [C, V]."""
        self.n += 1
        if self.n > 0:
            n, change = self.n, self.last - denoised
            self._changes[:, n - 1], self._products[:, n - 1] = change, change @ self.metric
            crossed = _sums_from_each(self._products[:, :n] @ change[:, :, None])
            self._gram[:, :n, :n] += crossed + crossed.transpose(0, 2, 1) - crossed[:, -1:]
        self.last = denoised

    def combined(self, b: Array) -> Array:
        """``D_n + sum_m b_m (D_m - D_n)`` [C, V] for weights [C, n]."""
        return self.last + (b.cumsum(1)[:, None] @ self._changes[:, : self.n])[:, 0]

    def least_squares(self, target: Array, theory: Array, ridge: float) -> Array:
        """The weights [C, n] whose combination is nearest ``target`` [C, V], with a ridge towards ``theory`` (b0)."""
        n = self.n
        if n == 0:
            return theory
        right = _sums_from_each(self._products[:, :n] @ (target - self.combined(theory))[:, :, None])
        system = self._gram[:, :n, :n].copy()
        diagonal = np.einsum("cmm->cm", system)
        diagonal += ridge * diagonal.mean(1, keepdims=True) + np.finfo(np.float64).tiny
        return theory + np.linalg.solve(system, right)[:, :, 0]


def _sums_from_each(values: Array) -> Array:
    """The sum of ``values`` [C, n, 1] from each entry to the last, [C, n, 1]."""
    return values[:, ::-1].cumsum(1)[:, ::-1]
