"""Candidates: the schedules that the sampler is run on, made without model calls."""

from __future__ import annotations

from collections.abc import Iterator

from fastsched.measurement.statistics import PathStatistics
from fastsched.sampling.schedule import Schedule
from fastsched.sampling.solvers import Solver, get_solver
from fastsched.selection.optimal import local_minima, ranked_starts, unlike


def candidates_in_turn(stats: PathStatistics, steps: int, solver: str | Solver) -> Iterator[tuple[str, Schedule]]:
    """Names and schedules, the most promising first, each made when it is asked for.

    First the schedule of `fastsched.optimal_schedule`, then where the other descents end, then the starts themselves,
    by predicted error: dynamic programming, and the schedules in common use.
    """
    method = get_solver(solver)
    minima = local_minima(stats, steps, method)
    for n, minimum in enumerate(minima):
        yield "optimal" if n == 0 else f"from {minimum.name}", minimum.schedule(stats, method)
    for start in unlike([*minima, *ranked_starts(stats, steps, method)])[len(minima) :]:
        yield start.name, start.schedule(stats, method)
