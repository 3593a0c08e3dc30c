"""The path of least total cost through a grid of levels, by dynamic programming."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastsched import validate
from fastsched.costs.norms import Array
from fastsched.costs.step_cost import PathCost


def cheapest_path(cost: PathCost, steps: int) -> list[int]:
    """The path of ``steps`` steps with the least cost from the first level to the last, ``steps + 1`` level indices.

    The state is the current level for a solver with one slope, and the last two levels for a multistep solver. The cost
    of a multistep solver then takes only its two most recent slopes into account.

    Raises:
        ValueError: If ``steps`` is below 1 or above the number of levels less one.
    """
    steps = validate.positive_int("steps", steps)
    check_steps(steps, cost.levels)
    if cost.solver.history == 0:
        return first_order_path(cost.pairs, steps)
    return second_order_path(cost.first, cost.triples, steps)


def check_steps(steps: int, levels: int) -> None:
    """ValueError if ``steps`` need more levels than there are."""
    if steps > levels - 1:
        raise ValueError(
            f"steps must be at most {levels - 1} on {levels} levels, got {steps}; measure with more, if the network "
            "knows more"
        )


def first_order_path(cost: Array, steps: int) -> list[int]:
    """The path of least cost from level 0 to the last, if a step's cost depends on its two ends.

    ``V_n[k] = min_{j < k} V_{n-1}[j] + cost[j, k]``, Bellman's equation; ties go to the smallest ``j``.

    Args:
        cost: ``cost[j, k]`` of a step from j to k, [M, M]; entries with ``k <= j`` are not read.
        steps: The number of steps, at most ``M - 1``.
    """
    upper = np.where(np.tri(len(cost), dtype=bool), np.inf, cost)
    value = np.full(len(cost), np.inf)
    value[0] = 0.0
    before = []  # per number of steps: the level before each level on the path to it
    for _ in range(steps):
        candidates = value[:, None] + upper
        before.append(candidates.argmin(0))
        value = candidates.min(0)
    path = [len(cost) - 1]
    for chosen in reversed(before):
        path.append(int(chosen[path[-1]]))
    return path[::-1]


def second_order_path(first: Array, cost: Array, steps: int) -> list[int]:
    """The path of least cost from level 0 to the last, if a step's cost also depends on the level before it.

    Dynamic programming over pairs of consecutive levels, O(M^3) per step: with ``F_1[0, k] = first[k]``,
    ``F_{n+1}[j, k] = min_{i < j} F_n[i, j] + cost[i, j, k]``. Ties go to the smallest ``i``.

    Args:
        first: ``first[k]`` of the first step, from level 0 to k, [M]; entry 0 is not read.
        cost: ``cost[i, j, k]`` of a step from j to k after one from i to j, [M, M, M]; only ``i < j < k`` is read.
        steps: The number of steps, at most ``M - 1``.
    """
    M = len(first)
    best = np.full((M, M), np.inf)  # [j, k]: least cost of a path that ends with the step j -> k
    best[0, 1:] = first[1:]
    before = []  # per number of steps: the level before j on that path
    # The minimum runs over i, so i comes last in memory: the inner loop then reads contiguous rows.
    by_edge = [np.ascontiguousarray(cost[:j, j, j + 1 :].T) for j in range(M)]  # [k - j - 1, i]
    for _ in range(steps - 1):
        best, argbest = _extend(best, by_edge)
        before.append(argbest)
    path = [M - 1, int(best[:, -1].argmin())]
    for argbest in reversed(before):
        path.append(int(argbest[path[-1], path[-2]]))
    return path[::-1]


def _extend(best: Array, by_edge: list[Array]) -> tuple[Array, NDArray[np.int64]]:
    """One more step: ``min_i best[i, j] + cost[i, j, k]`` and its smallest argmin, both ``[j, k]``."""
    longer, argbest = np.full_like(best, np.inf), np.zeros(best.shape, dtype=np.int64)
    for j in range(1, len(best) - 1):
        through = by_edge[j] + best[:j, j]
        chosen = through.argmin(1)
        argbest[j, j + 1 :] = chosen
        longer[j, j + 1 :] = through[np.arange(len(chosen)), chosen]
    return longer, argbest
