"""Candidates: the schedules with which the sampler is run, made without model calls."""

from __future__ import annotations

from collections.abc import Iterator

from fastsched.measurement.statistics import PathStatistics
from fastsched.sampling.fitted import chosen_solver
from fastsched.sampling.schedule import Schedule
from fastsched.sampling.solvers import FITTED, Solver
from fastsched.sampling.stock_weights import NEAREST_STOCK, as_fitted
from fastsched.selection.optimal import distinct_minima, local_minima, optimal_schedule, ranked_starts


def candidates_in_turn(stats: PathStatistics, steps: int, solver: str | Solver) -> Iterator[tuple[str, Schedule]]:
    """Yield names and schedules, the most promising first.

    The schedule of `fastsched.optimal_schedule` comes first, for the fitted solver that of `NEAREST_STOCK` second. The
    ends of the other descents follow, then all starts (`fastsched.selection.starts`), each group by predicted error.
    """
    method = chosen_solver(solver)
    minima = local_minima(stats, steps, method)
    yield "optimal", minima[0].schedule(stats, method)
    if method.name == FITTED:  # the fitted solver must not be worse than this stock solver
        yield NEAREST_STOCK, as_fitted(optimal_schedule(stats, steps, NEAREST_STOCK), stats.process)
    for each in distinct_minima([*minima, *ranked_starts(stats, steps, method)])[1:]:
        yield each.name, each.schedule(stats, method)
