"""Predict the error of a whole schedule, and improve the schedule by the prediction.

With ``r_n = s_{k_n} sum_q C_{n,q} e_q`` the local error of step ``n`` (`fastsched.costs.path`), which ends at level
``k_n``, there are three estimates of ``E ||z_end - z_path||^2``:

* **local** ``sum_n a_n^2 E ||r_n||^2``: errors of different steps are taken as independent, as in the dynamic
  programme;
* **coherent** ``E ||sum_n a_n r_n||^2``: they add up, each carried to the end by its scalar sensitivity
  ``a = sqrt(weight)``;
* **dual-weighted** ``E (sum_n w_{k_n} . r_n)^2``: they add up, each carried to the end by the measured adjoint vector,
  one probe a sample (Becker & Rannacher 2001, the dual-weighted residual).

Each is blind in its own way: the first to errors that add up, the second to turning directions, the third, with few
samples, to whatever its probes miss. A schedule tuned to one of them exploits that, so `polish` lowers their sum; and
an error that cancels in two may stand in the third, so `predicted_error` is the largest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fastsched.costs.path import Array, PathCost
from fastsched.path_statistics import PathStatistics


class ErrorEstimates(NamedTuple):
    """Three estimates of the squared distance between a schedule's samples and the converged ones.

    Attributes:
        local: Errors of the steps independent of each other.
        coherent: Errors of the steps added up, with scalar sensitivities.
        dual_weighted: Errors added up, with adjoint vectors; NaN if none were measured.
    """

    local: float
    coherent: float
    dual_weighted: float

    @property
    def total(self) -> float:
        """Their sum: what `polish` lowers."""
        return float(np.nansum(self))

    @property
    def largest(self) -> float:
        """The largest: what is reported as the predicted error."""
        return float(np.nanmax(self))


def error_estimates(stats: PathStatistics, cost: PathCost, nodes: Sequence[int]) -> ErrorEstimates:
    """The three estimates for the schedule at level indices ``nodes``, the last of which is N (sigma 0)."""
    return ErrorModel(stats, cost)(nodes)


class ErrorModel:
    """`error_estimates` of many schedules; what a step contributes is computed once."""

    def __init__(self, stats: PathStatistics, cost: PathCost) -> None:
        self.cost = cost
        self._has_adjoint = stats.cross is not None
        self._cross = stats.cross.numpy() if stats.cross is not None else np.zeros((1, cost.levels, cost.levels - 1))
        self._amplitude = np.sqrt(cost.weight)
        self._scale = np.append(cost.s, 1.0)
        self._known: dict[tuple[int, ...], tuple[float, Array, Array]] = {}

    def __call__(self, nodes: Sequence[int]) -> ErrorEstimates:
        """The estimates for one schedule."""
        steps = [self._contribution(*self.cost.history_of(nodes, n)) for n in range(len(nodes) - 1)]
        whole = np.sum([vector for _, vector, _ in steps], axis=0)
        carried = np.sum([value for _, _, value in steps], axis=0)
        return ErrorEstimates(
            local=float(sum(value for value, _, _ in steps)),
            coherent=float(whole @ self.cost.gram @ whole),
            dual_weighted=float(np.mean(np.square(carried))) if self._has_adjoint else float("nan"),
        )

    def _contribution(self, nodes: tuple[int, ...], corrected: bool) -> tuple[float, Array, Array]:
        """A step's local error, its vector carried to the end, and its product with each sample's adjoint."""
        key = (*nodes, corrected)
        if key not in self._known:
            end = nodes[-1]
            vector = self._scale[end] * self.cost.error_vector(nodes, corrected=corrected)
            local = self.cost.step(nodes, corrected=corrected)
            self._known[key] = (local, self._amplitude[end] * vector, self._cross[:, end - 1] @ vector)
        return self._known[key]


def coordinate_descent(
    objective: Callable[[Sequence[int]], float], nodes: Sequence[int], *, reach: int = 3, sweeps: int = 20
) -> list[int]:
    """Move one inner node at a time, by up to ``reach`` levels, as long as ``objective`` falls.

    Args:
        objective: Of a list of ascending level indices.
        nodes: Where to start; both ends stay.
        reach: How far a node may move at once, between its neighbours.
        sweeps: The most passes over all nodes.

    Returns:
        Nodes whose objective is not above that of the start; deterministic.
    """
    best, lowest = list(nodes), objective(nodes)
    for _ in range(sweeps):
        before = lowest
        for n in range(1, len(best) - 1):
            low, high = max(best[n - 1] + 1, best[n] - reach), min(best[n + 1] - 1, best[n] + reach)
            for level in range(low, high + 1):
                moved = [*best[:n], level, *best[n + 1 :]]
                value = lowest if level == best[n] else objective(moved)
                if value < lowest:
                    best, lowest = moved, value
        if not lowest < before:
            break
    return best


def polish(stats: PathStatistics, cost: PathCost, nodes: Sequence[int]) -> list[int]:
    """Lower the sum of the three error estimates by coordinate descent from ``nodes``."""
    model = ErrorModel(stats, cost)
    return coordinate_descent(lambda candidate: model(candidate).total, nodes)
