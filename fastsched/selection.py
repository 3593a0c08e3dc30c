"""Choose levels by their cost: dynamic programming, and equal arc length."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsched import ops, validate
from fastsched.costs.path import PathCost

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Selection:
    """The cheapest paths from the first level to the last, one for each number of steps.

    Attributes:
        totals: The cost of the best path of ``n`` steps at ``[n - 1]``; ``inf`` where there is none.
        paths: Its ``n + 1`` level indices at ``[n - 1]``, padded with -1, [steps, steps + 1].
    """

    totals: Array
    paths: NDArray[np.int64]

    def path(self, steps: int) -> list[int]:
        """The levels of the best path of ``steps`` steps, ``steps + 1`` indices."""
        return self.paths[steps - 1, : steps + 1].tolist()


def cheapest_paths(cost: PathCost, steps: int) -> Selection:
    """The cheapest paths of 1 to ``steps`` steps under a path cost, by dynamic programming.

    Over levels for a one-slope solver; over pairs of neighbouring levels, with the two most recent slopes, for a
    multistep one.

    Raises:
        ValueError: If ``steps`` is below 1 or above the number of levels less one.
    """
    steps = validate.positive_int("steps", steps)
    if steps > cost.levels - 1:
        raise ValueError(
            f"steps must be at most {cost.levels - 1} on {cost.levels} levels, got {steps}; measure with more levels"
        )
    if cost.solver.history == 0:
        return first_order_paths(cost.pairs, steps)
    first, triples = torch.from_numpy(cost.first), torch.from_numpy(cost.triples)
    result = ops.second_order_min_plus(first, triples, steps)
    return Selection(result.totals.numpy(), result.paths.numpy())


def first_order_paths(cost: Array, steps: int) -> Selection:
    """The cheapest paths from level 0 to the last under a cost of pairs.

    ``V_n[k] = min_{j < k} V_{n-1}[j] + cost[j, k]``, Bellman's equation; ties go to the smallest ``j``.

    Args:
        cost: ``cost[j, k]`` of a step from j to k, [M, M]; entries with ``k <= j`` are not read.
        steps: The largest number of steps.
    """
    m = len(cost)
    upper = np.where(np.tri(m, dtype=bool), np.inf, cost)
    value = np.full(m, np.inf)
    value[0] = 0.0
    totals, parents = np.full(steps, np.inf), np.zeros((steps, m), dtype=np.int64)
    for n in range(steps):
        candidates = value[:, None] + upper
        parents[n] = candidates.argmin(0)
        value = candidates.min(0)
        totals[n] = value[-1]
    paths = np.full((steps, steps + 1), -1, dtype=np.int64)
    for n in np.flatnonzero(np.isfinite(totals)):
        paths[n, n + 1] = m - 1
        for step in range(n, -1, -1):
            paths[n, step] = parents[step, paths[n, step + 1]]
    return Selection(totals, paths)


def equal_arc_length(s: Tensor, increments: Tensor, n: int) -> Tensor:
    """``n`` levels at equal spacing along a cumulative length: Algorithm 1 (UpdateSchedule) of the paper.

    ``Lambda(s_k) = sum_{i < k} increments_i``; its inverse is interpolated by a monotone cubic (Fritsch-Carlson) in
    ``log s`` and read at ``n`` equally spaced lengths, both ends included.

    Args:
        s: Levels, descending, [N], positive and finite.
        increments: Length between neighbours, [N-1], not negative; for a cost ``L`` of local order ``p`` pass
            ``L ** (1/p)``.
        n: How many levels.

    Returns:
        [n] float64, descending from ``s[0]`` to ``s[-1]``.

    Raises:
        ValueError: If shapes disagree, a length is negative or not finite, or all are 0.

    Source: Williams et al. 2024 (arXiv 2412.07877), algorithm 1.
    """
    from scipy.interpolate import PchipInterpolator

    n = validate.positive_int("n", n, minimum=2)
    levels = validate.descending_sigmas(s, name="s").numpy()
    lengths = np.asarray(increments, dtype=np.float64)
    if lengths.shape != (len(levels) - 1,):
        raise ValueError(
            f"increments must have shape [{len(levels) - 1}] for {len(levels)} levels, got {lengths.shape}"
        )
    if not np.isfinite(lengths).all() or (lengths < 0).any() or lengths.sum() <= 0:
        raise ValueError("increments must be finite, not negative, and not all 0")
    cumulative = np.concatenate([[0.0], np.cumsum(lengths)])
    rising = np.concatenate([[True], np.diff(cumulative) > 0])  # a flat piece has no inverse: keep its start
    inverse = PchipInterpolator(cumulative[rising], np.log(levels[rising]))
    chosen = np.exp(inverse(np.linspace(0.0, cumulative[-1], n)))
    chosen[0], chosen[-1] = levels[0], levels[-1]
    return torch.from_numpy(chosen)
