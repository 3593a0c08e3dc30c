"""From a measurement to a schedule, without model calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastsched import validate
from fastsched.costs.blas_threads import one_blas_thread
from fastsched.costs.norms import Array
from fastsched.costs.prediction import ErrorModel
from fastsched.measurement.statistics import PathStatistics
from fastsched.sampling.fitted import chosen_solver
from fastsched.sampling.schedule import Schedule
from fastsched.sampling.solvers import Solver
from fastsched.selection.constraints import APART, distinct_known_levels, known_levels
from fastsched.selection.descent import descend
from fastsched.selection.starts import DYNAMIC_PROGRAMMING, starting_levels

#: The number of descents, from the starts of least predicted error.
DESCENTS = 3

#: Two schedules count as the same if no node differs by more than this in ``log s``.
SAME = 0.03


def optimal_schedule(stats: PathStatistics, steps: int, solver: str = "dpmpp_2m", *, polish: bool = True) -> Schedule:
    """The schedule of ``steps`` steps with the least predicted error under ``solver``; no model calls.

    The starts are schedules by dynamic programming on the local errors of the steps (`fastsched.costs.step_cost`) and
    schedules in common use. From the starts of least predicted error (`fastsched.costs.prediction`), levels are moved
    off the measured grid along the gradient of the prediction (`fastsched.selection.descent`). The result is the
    schedule of least predicted error, so no start has a lower one.

    Args:
        stats: The result of `fastsched.measure`.
        steps: The number of steps, at most the number of levels less one; the last step ends at sigma 0.
        solver: A solver's name; ``"fitted"`` chooses the weights of the solver together with the levels
            (`fastsched.costs.fitted_weights`).
        polish: Whether to move levels. If False, the result is the best of the starts by dynamic programming.

    Returns:
        The schedule, with its predicted error.

    Raises:
        ValueError: If an argument is out of range or unknown.
    """
    validate.arguments(locals())
    method = chosen_solver(solver)
    found = local_minima(stats, steps, method) if polish else ranked_starts(stats, steps, method, DYNAMIC_PROGRAMMING)
    return found[0].schedule(stats, method)


@dataclass(frozen=True, eq=False)
class Minimum:
    """Levels ``s`` [steps + 1], the name of their origin, and their predicted error."""

    name: str
    levels: Array
    predicted_error: float

    def schedule(self, stats: PathStatistics, solver: Solver) -> Schedule:
        """The schedule of these levels."""
        weights = ErrorModel.of(stats, solver).weights(self.levels)
        s = torch.from_numpy(self.levels)
        error, origin = float(self.predicted_error), stats.schedule_origin()
        return Schedule.from_levels(stats.process, s, solver.name, error, weights, origin)


@one_blas_thread()
def ranked_starts(
    stats: PathStatistics, steps: int, solver: Solver, names: Iterable[str] | None = None
) -> list[Minimum]:
    """All starts, or those with ``names``, and their predicted errors, the best first."""
    starts = starting_levels(stats, validate.positive_int("steps", steps), solver)
    chosen = {name: known_levels(stats.process, starts[name]) for name in (names or starts)}
    values = ErrorModel.of(stats, solver)(np.stack(list(chosen.values())))
    found = [Minimum(name, levels, value) for (name, levels), value in zip(chosen.items(), values, strict=True)]
    return sorted(found, key=lambda minimum: minimum.predicted_error)


@one_blas_thread()
def local_minima(stats: PathStatistics, steps: int, solver: Solver, *, also: Sequence[Array] = ()) -> list[Minimum]:
    """The ends of descents from the best starts and from the levels ``also``, sorted by error, without duplicates."""
    starts = ranked_starts(stats, steps, solver)
    error = ErrorModel.of(stats, solver)
    minima = list(starts[:1])  # a descent lowers the error, but moving its end to levels the network knows may raise it
    low, high = stats.finite_range
    more = [Minimum("fewer steps", known_levels(stats.process, levels), np.inf) for levels in also]
    for start in [*more, *starts[:DESCENTS]]:
        levels = distinct_known_levels(stats.process, descend(error, start.levels, low, high, APART), low)
        minima.append(Minimum(f"from {start.name}", levels, float(error(levels[None])[0])))
    return distinct_minima(sorted(minima, key=lambda minimum: minimum.predicted_error))


def distinct_minima(minima: list[Minimum]) -> list[Minimum]:
    """The minima that differ by more than `SAME` from all that are kept before them."""
    kept: list[Minimum] = []
    for minimum in minima:
        logs = np.log(minimum.levels[1:-1])
        if all((np.abs(logs - np.log(other.levels[1:-1])) > SAME).any() for other in kept):
            kept.append(minimum)
    return kept
