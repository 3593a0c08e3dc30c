"""Descend on any error of a schedule, a node at a time: over the levels of a grid, and off every grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence

import numpy as np

from fastsched.costs.norms import Array

#: Fraction of the gap to a neighbour that a node is moved by, in ``log s``, ever finer.
MOVES = (0.4, 0.2, 0.1, 0.05)

#: Gap in ``log s`` that stands for an infinite one: below pure noise, and above sigma 0.
OPEN_GAP = 1.5

#: The most improvements at one fraction of the gap, for each node.
IMPROVEMENTS = 3

#: On a grid: how many levels a node may move at once, between its neighbours, and the most passes over all nodes.
REACH, SWEEPS = 3, 20


def descend(
    error: Callable[[Array], Array], starts: Sequence[Array], low: float, high: float
) -> list[tuple[Array, float]]:
    """Move inner nodes towards a neighbour wherever that lowers ``error``, by ever smaller fractions of the gap.

    All moves of one node are tried at once, and then all that help together; the best of them is taken. Descents from
    several starts go side by side: ``error`` is called once for what all of them try next.

    Args:
        error: The errors [C] of C schedules [C, steps + 1]; ``inf`` forbids one.
        starts: Where to start: levels [steps + 1], descending to 0, of as many steps each. Both ends stay.
        low: The lowest level a node may take.
        high: The highest finite level; where the first node is at pure noise, the second stays below ten times this.

    Returns:
        For each start the levels and their error, not above that of the start; deterministic.
    """
    found: dict[int, tuple[Array, float]] = {}
    going = {n: _descent(np.asarray(levels, dtype=np.float64), low, high) for n, levels in enumerate(starts)}
    asked = {n: next(descent) for n, descent in going.items()}
    while asked:
        values = error(np.concatenate(list(asked.values())))
        answers = np.split(values, np.cumsum([len(each) for each in asked.values()])[:-1])
        for n, own in zip(list(asked), answers, strict=True):
            try:
                asked[n] = going[n].send(own)
            except StopIteration as finished:
                found[n] = finished.value
                del asked[n]
    return [found[n] for n in range(len(starts))]


def _descent(best: Array, low: float, high: float) -> Generator[Array, Array, tuple[Array, float]]:
    """One descent: it yields schedules [C, steps + 1], is sent their errors [C], and returns the best with its own."""
    lowest = float((yield best[None])[0])
    inner = len(best) - 2
    for share in MOVES:
        for _ in range(IMPROVEMENTS * inner):
            up, down = log_gaps(best, low, high)
            steps = np.concatenate([np.diag(share * up), np.diag(-share * down)])
            values = yield _moved(best, steps)
            better = np.minimum(values[:inner], values[inner:]) < lowest
            if not better.any():
                break
            choice = np.where(values[:inner] <= values[inner:], share * up, -share * down)
            together = _moved(best, np.where(better, choice, 0.0)[None])
            value = float((yield together)[0]) if better.sum() > 1 else math.inf
            single = int(values.argmin())
            if value <= values[single]:
                best, lowest = together[0], value
            else:
                best, lowest = _moved(best, steps[single : single + 1])[0], float(values[single])
    return best, lowest


def coordinate_descent(objective: Callable[[Sequence[int], int], float], nodes: Sequence[int]) -> list[int]:
    """Move one inner node at a time over a grid, by up to `REACH` levels, as long as the objective falls.

    Args:
        objective: ``objective(nodes, n)``: of ascending level indices, the part that node ``n`` has to do with.
        nodes: Where to start; both ends stay.

    Returns:
        Nodes whose objective is not above that of the start; deterministic.
    """
    best = list(nodes)
    for _ in range(SWEEPS):
        before = list(best)
        for n in range(1, len(best) - 1):
            low, high = max(best[n - 1] + 1, best[n] - REACH), min(best[n + 1] - 1, best[n] + REACH)
            lowest, here = objective(best, n), best[n]
            for level in range(low, high + 1):
                moved = [*best[:n], level, *best[n + 1 :]]
                if level != here and (value := objective(moved, n)) < lowest:
                    best, lowest = moved, value
        if best == before:
            break
    return best


def _moved(levels: Array, steps: Array) -> Array:
    """``levels`` with the inner nodes moved by ``steps`` [C, steps - 1] in ``log s``, [C, steps + 1]."""
    moved = np.repeat(levels[None], len(steps), axis=0)
    moved[:, 1:-1] *= np.exp(steps)
    return moved


def log_gaps(levels: Array, low: float, high: float) -> tuple[Array, Array]:
    """How far each inner node is from its noisier and its cleaner neighbour in ``log s``, [steps - 1] each."""
    logs = np.log(levels[1:-1])
    first = math.log(levels[0]) if math.isfinite(levels[0]) else min(logs[0] + OPEN_GAP, math.log(10 * high))
    last = max(logs[-1] - OPEN_GAP, math.log(low)) if levels[-1] == 0 else math.log(levels[-1])
    around = np.concatenate([[first], logs, [last]])
    gaps = np.maximum(-np.diff(around), 0.0)
    return gaps[:-1], gaps[1:]
