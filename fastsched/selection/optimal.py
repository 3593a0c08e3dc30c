"""From a measurement to a schedule, without model calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastsched import validate
from fastsched.costs.norms import Array
from fastsched.costs.prediction import ErrorModel
from fastsched.measurement.statistics import PathStatistics, is_statistics
from fastsched.sampling.fitted import chosen_solver, is_solver
from fastsched.sampling.schedule import Schedule
from fastsched.sampling.solvers import Solver
from fastsched.selection.constraints import APART, distinct_known_levels, known_levels
from fastsched.selection.descent import descend
from fastsched.selection.starts import DYNAMIC_PROGRAMMING, starting_levels

#: How many starts are descended from, those of least predicted error.
DESCENTS = 3

#: Two schedules are the same if the levels of no node differ by more than this, in ``log s``.
SAME = 0.03


def optimal_schedule(stats: PathStatistics, steps: int, solver: str = "dpmpp_2m", *, polish: bool = True) -> Schedule:
    """The schedule of ``steps`` steps with the least predicted error under ``solver``; no model calls.

    Dynamic programming on the local errors of the steps (`fastsched.costs.step_cost`) and the schedules in common use
    give starts. From the best of them, by predicted error (`fastsched.costs.prediction`), levels are moved off the
    measured grid along the gradient of the prediction (`fastsched.selection.descent`). The schedule of least predicted
    error is returned: by the same estimate none of the starts is better.

    Args:
        stats: What `fastsched.measure` returned.
        steps: Steps, of which the last ends at sigma 0; at most the number of levels less one.
        solver: A solver's name; ``"fitted"`` chooses the weights of the solver together with the levels
            (`fastsched.costs.fitted_weights`).
        polish: Whether to move levels. Without it the result is the best of the starts by dynamic programming.

    Returns:
        The schedule, with its predicted error.

    Raises:
        ValueError: If an argument is out of range or unknown.
    """
    validate.arguments(locals(), stats=is_statistics, solver=is_solver)
    method = chosen_solver(solver)
    found = local_minima(stats, steps, method) if polish else ranked_starts(stats, steps, method, DYNAMIC_PROGRAMMING)
    return found[0].schedule(stats, method)


@dataclass(frozen=True, eq=False)
class Minimum:
    """Levels ``s`` [steps + 1], what they come from, and their predicted error."""

    name: str
    levels: Array
    predicted_error: float

    def schedule(self, stats: PathStatistics, solver: Solver) -> Schedule:
        """The schedule of these levels."""
        weights = ErrorModel.of(stats, solver).weights(self.levels)
        s = torch.from_numpy(self.levels)
        error, origin = float(self.predicted_error), stats.schedule_origin()
        return Schedule.from_levels(stats.process, s, solver.name, error, weights, origin)


def ranked_starts(
    stats: PathStatistics, steps: int, solver: Solver, names: Iterable[str] | None = None
) -> list[Minimum]:
    """The starts and their predicted errors, the best first; those named, or all."""
    starts = starting_levels(stats, validate.positive_int("steps", steps), solver)
    chosen = {name: known_levels(stats.process, starts[name]) for name in (names or starts)}
    values = ErrorModel.of(stats, solver)(np.stack(list(chosen.values())))
    found = [Minimum(name, levels, value) for (name, levels), value in zip(chosen.items(), values, strict=True)]
    return sorted(found, key=lambda minimum: minimum.predicted_error)


def local_minima(stats: PathStatistics, steps: int, solver: Solver, *, also: Sequence[Array] = ()) -> list[Minimum]:
    """Where descents from the best starts and from levels ``also`` end, the least predicted error first, each once."""
    starts = ranked_starts(stats, steps, solver)
    error = ErrorModel.of(stats, solver)
    minima = list(starts[:1])  # no descent ends above it, but one may end between the levels that the network knows
    low, high = stats.finite_range
    more = [Minimum("fewer steps", known_levels(stats.process, levels), np.inf) for levels in also]
    for start in [*more, *starts[:DESCENTS]]:
        levels = distinct_known_levels(stats.process, descend(error, start.levels, low, high, APART), low)
        minima.append(Minimum(start.name, levels, float(error(levels[None])[0])))
    return unlike(sorted(minima, key=lambda minimum: minimum.predicted_error))


def unlike(minima: list[Minimum]) -> list[Minimum]:
    """Those that differ from all before them by more than `SAME`."""
    kept: list[Minimum] = []
    for minimum in minima:
        logs = np.log(minimum.levels[1:-1])
        if all((np.abs(logs - np.log(other.levels[1:-1])) > SAME).any() for other in kept):
            kept.append(minimum)
    return kept
