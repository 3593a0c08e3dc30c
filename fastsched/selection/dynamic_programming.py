"""Paths of least total cost through a grid of levels, by dynamic programming."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastsched import validate
from fastsched.costs.norms import Array
from fastsched.costs.step_cost import PathCost


@dataclass(frozen=True, eq=False)
class Selection:
    """The paths of least cost from the first level to the last, one for each number of steps."""

    totals: Array  #: the least cost with ``n`` steps, at ``[n - 1]``; ``inf`` if no path has ``n`` steps
    #: The ``n + 1`` level indices of that path, at ``[n - 1]``, padded with -1, [steps, steps + 1].
    paths: NDArray[np.int64]

    def path(self, steps: int) -> list[int]:
        """The levels of the best path of ``steps`` steps, ``steps + 1`` indices."""
        return self.paths[steps - 1, : steps + 1].tolist()


def cheapest_paths(cost: PathCost, steps: int) -> Selection:
    """The paths of least cost with 1 to ``steps`` steps, by dynamic programming.

    The state is the current level for a solver with one slope, and the last two levels for a multistep solver. The cost
    of a multistep solver then takes only its two most recent slopes into account.

    Raises:
        ValueError: If ``steps`` is below 1 or above the number of levels less one.
    """
    steps = validate.positive_int("steps", steps)
    check_steps(steps, cost.levels)
    if cost.solver.history == 0:
        return first_order_paths(cost.pairs, steps)
    return second_order_paths(cost.first, cost.triples, steps)


def check_steps(steps: int, levels: int) -> None:
    """ValueError if ``steps`` need more levels than there are."""
    if steps > levels - 1:
        raise ValueError(
            f"steps must be at most {levels - 1} on {levels} levels, got {steps}; measure with more, if the network "
            "knows more"
        )


def first_order_paths(cost: Array, steps: int) -> Selection:
    """The paths of least cost from level 0 to the last, if a step's cost depends on its two ends.

    ``V_n[k] = min_{j < k} V_{n-1}[j] + cost[j, k]``, Bellman's equation; ties go to the smallest ``j``.

    Args:
        cost: ``cost[j, k]`` of a step from j to k, [M, M]; entries with ``k <= j`` are not read.
        steps: The largest number of steps.
    """
    M = len(cost)
    upper = np.where(np.tri(M, dtype=bool), np.inf, cost)
    value = np.full(M, np.inf)
    value[0] = 0.0
    totals, parents = np.full(steps, np.inf), np.zeros((steps, M), dtype=np.int64)
    for n in range(steps):
        candidates = value[:, None] + upper
        parents[n] = candidates.argmin(0)
        value = candidates.min(0)
        totals[n] = value[-1]
    paths = np.full((steps, steps + 1), -1, dtype=np.int64)
    for n in np.flatnonzero(np.isfinite(totals)):
        paths[n, n + 1] = M - 1
        for step in range(n, -1, -1):
            paths[n, step] = parents[step, paths[n, step + 1]]
    return Selection(totals, paths)


def second_order_paths(first: Array, cost: Array, steps: int) -> Selection:
    """The paths of least cost from level 0 to the last, if a step's cost also depends on the level before it.

    Dynamic programming over pairs of consecutive levels, O(M^3) per step: with ``F_1[0, k] = first[k]``,
    ``F_{n+1}[j, k] = min_{i < j} F_n[i, j] + cost[i, j, k]``. Ties go to the smallest ``i``.

    Args:
        first: ``first[k]`` of the first step, from level 0 to k, [M]; entry 0 is not read.
        cost: ``cost[i, j, k]`` of a step from j to k after one from i to j, [M, M, M]; only ``i < j < k`` is read.
        steps: The largest number of steps.
    """
    M = len(first)
    totals, paths = np.full(steps, np.inf), np.full((steps, steps + 1), -1)
    best = np.full((M, M), np.inf)  # [j, k]: least cost of a path that ends with the step j -> k
    best[0, 1:] = first[1:]
    before: list[np.ndarray] = []  # per number of steps: the level before j on that path
    # The minimum runs over i, so i comes last in memory: the inner loop then reads contiguous rows.
    by_edge = [np.ascontiguousarray(cost[:j, j, j + 1 :].T) for j in range(M)]  # [k - j - 1, i]
    for n in range(min(steps, M - 1)):
        if n > 0:
            best, argbest = _extend(best, by_edge)
            before.append(argbest)
        j = int(best[:, -1].argmin())
        totals[n] = best[j, -1]
        if np.isfinite(totals[n]):
            paths[n, : n + 2] = _backtrack(before, j, M - 1)
    return Selection(totals, paths)


def _extend(best: np.ndarray, by_edge: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """One more step: ``min_i best[i, j] + cost[i, j, k]`` and its smallest argmin, both ``[j, k]``."""
    longer, argbest = np.full_like(best, np.inf), np.zeros(best.shape, dtype=np.int64)
    for j in range(1, len(best) - 1):
        through = by_edge[j] + best[:j, j]
        chosen = through.argmin(1)
        argbest[j, j + 1 :] = chosen
        longer[j, j + 1 :] = through[np.arange(len(chosen)), chosen]
    return longer, argbest


def _backtrack(before: list[np.ndarray], j: int, k: int) -> list[int]:
    """The path that ends with the step j -> k, read backwards through the argmins of each number of steps."""
    path = [k, j]
    for argbest in reversed(before):
        path.append(int(argbest[path[-1], path[-2]]))
    return path[::-1]
