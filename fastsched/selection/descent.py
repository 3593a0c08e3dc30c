"""Minimise any error of a schedule along its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.optimize import minimize

from fastsched.costs.norms import Array

#: Gap in ``log s`` that replaces an infinite one, from pure noise to the next level and from the last level to sigma 0.
OPEN_GAP = 1.5

#: Length, in ``log s``, of finite differences of the logarithm of the error.
DIFFERENCE = 1e-4

#: L-BFGS ends if a step lowers the logarithm of the error by less than this, or by less than this fraction of the total
#: decrease so far. Neither depends on the unit of the data. With 1e-4 predicted errors were 0.998 times as
#: large, in 1.15 of the time; with 1e-3 they were 1.01 times, at most 1.3 times as large, in 0.84 of it (105 cells).
TOLERANCE = 3e-4

#: How often L-BFGS is started, each time where it ended: an outdated estimate of the curvature may end it early.
#: Over 72 cells the errors were 0.94 of those of one start (at best 0.05), in 1.2 of the time.
ROUNDS = 2

#: If a search does not lower the error, the next one starts this fraction of the way to even gaps. This happens at
#: levels of the grid, where the error has kinks. Where two of three searches had failed, the error of the schedule was
#: 2.5 times as large without this.
ASIDE = 0.02

#: The least gap of a start, as a fraction of the mean gap: for a smaller gap the gradient almost vanishes.
LEAST_GAP = 0.1

#: Errors are clipped to this range before their logarithm is taken.
LEAST, MOST = 1e-300, 1e300


def descend(error: Callable[[Array], Array], start: Array, low: float, high: float, apart: float) -> Array:
    """Move the inner levels along the gradient of ``log error``, and keep their order.

    The gaps in ``log s`` are ``g = apart + r softmax(u)``, with ``r`` the rest of the range from the first level to
    ``low``, so that every ``u`` gives a valid schedule. L-BFGS (Liu & Nocedal 1989) minimises over ``u``. Derivatives
    are finite differences in ``log s``, which take one more schedule per node.

    Args:
        error: The errors [C] of C schedules [C, steps + 1].
        start: The start: levels [steps + 1], descending to 0. Both ends stay.
        low: The lowest level that a node may have.
        high: The highest finite level. If the first node is at pure noise, the second stays below ten times this.
        apart: Least gap in ``log s``.

    Returns:
        Levels whose error is not above that of the start; deterministic.
    """
    top = math.log(start[0] if math.isfinite(start[0]) else 10 * high)
    inner = len(start) - 2
    room = top - math.log(low) - inner * apart
    if inner < 1 or room <= 0:
        return start

    def levels_at(u: Array) -> tuple[Array, Array]:
        """Levels [steps + 1], and the softmax [steps] of their gaps."""
        softmax = np.exp(u - u.max())
        softmax /= softmax.sum()
        levels = start.copy()
        levels[1:-1] = np.exp(top - np.cumsum(apart + room * softmax[:-1]))
        return levels, softmax

    def log_error(levels: Array) -> Array:
        return np.log(np.clip(np.nan_to_num(error(levels), nan=MOST), LEAST, MOST))

    def value_and_gradient(u: Array) -> tuple[float, Array]:
        levels, softmax = levels_at(u)
        tried = np.repeat(levels[None], inner + 1, axis=0)
        tried[range(1, inner + 1), range(1, inner + 1)] *= math.exp(DIFFERENCE)
        values = log_error(tried)
        of_levels = (values[1:] - values[0]) / DIFFERENCE
        of_gaps = np.append(-np.cumsum(of_levels[::-1])[::-1], 0.0)  # a change of a gap moves all levels below it
        return float(values[0]) - of_start, room * softmax * (of_gaps - softmax @ of_gaps)

    gaps = -np.diff(np.concatenate([[top], np.log(start[1:-1]), [math.log(low)]]))
    gaps[:-1] -= apart
    u, best, lowest = np.log(np.maximum(gaps, LEAST_GAP * room / len(gaps))), start, 0.0
    of_start = float(log_error(start[None])[0])
    for _ in range(ROUNDS):
        found = minimize(value_and_gradient, u, jac=True, method="L-BFGS-B", options={"ftol": TOLERANCE})
        u, lowered = found.x, lowest - float(found.fun)
        if lowered > 0:
            best, lowest = levels_at(u)[0], float(found.fun)
        if lowered < TOLERANCE:
            u = u - ASIDE * (u - u.mean())
    return best


def log_gaps(levels: Array, low: float, high: float) -> tuple[Array, Array]:
    """Distance in ``log s`` of each inner node to its noisier and to its cleaner neighbour, [steps - 1] each."""
    logs = np.log(levels[1:-1])
    first = math.log(levels[0]) if math.isfinite(levels[0]) else min(logs[0] + OPEN_GAP, math.log(10 * high))
    last = max(logs[-1] - OPEN_GAP, math.log(low)) if levels[-1] == 0 else math.log(levels[-1])
    around = np.concatenate([[first], logs, [last]])
    gaps = np.maximum(-np.diff(around), 0.0)
    return gaps[:-1], gaps[1:]
