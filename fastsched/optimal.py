"""From a measurement to a schedule."""

from __future__ import annotations

import torch

from fastsched.costs.path import path_cost
from fastsched.path_statistics import PathStatistics
from fastsched.schedule import Schedule
from fastsched.selection import cheapest_paths
from fastsched.solvers import get_solver


def optimal_schedule(
    stats: PathStatistics, steps: int, solver: str = "dpmpp_2m", *, weight: str | None = "geometric"
) -> Schedule:
    """The schedule of ``steps`` steps with the least weighted error under ``solver``; no model calls.

    Minimises ``sum_n weight_{k_n} s_{k_n}^2 C_n' G C_n`` over the levels ``k_1 < ... < k_steps = N`` of the measured
    grid (`fastsched.costs.path`), exactly for solvers that use up to two slopes; longer histories are scored by
    their two most recent slopes.

    Args:
        stats: What `fastsched.measure` returned.
        steps: Steps, of which the last ends at sigma 0; at most the number of levels less one.
        solver: A solver's name.
        weight: ``"geometric"`` (``sqrt(phi psi)``), ``"isotropic"`` (``phi``), ``"directional"`` (``psi``) or None.

    Returns:
        The schedule, with the predicted squared distance to the converged sample.

    Raises:
        ValueError: If an argument is out of range or unknown.
    """
    method = get_solver(solver)
    cost = path_cost(stats, method, weight)
    selection = cheapest_paths(cost, steps)
    nodes = selection.path(steps)
    s = torch.cat([stats.s, stats.s.new_zeros(1)])[nodes]
    return Schedule.from_levels(stats.process, s, method.name, float(cost.of(nodes).sum()))
