"""From a measurement to a schedule."""

from __future__ import annotations

import torch

from fastsched.costs.prediction import error_estimates, predict_error
from fastsched.costs.step_cost import PathCost, path_cost
from fastsched.measurement.statistics import PathStatistics
from fastsched.sampling.schedule import Schedule
from fastsched.sampling.solvers import get_solver
from fastsched.selection.descent import coordinate_descent
from fastsched.selection.dynamic_programming import Selection, cheapest_paths
from fastsched.selection.polish import polish as polished


def optimal_schedule(
    stats: PathStatistics,
    steps: int,
    solver: str = "dpmpp_2m",
    *,
    weight: str | None = "geometric",
    polish: bool = True,
) -> Schedule:
    """The schedule of ``steps`` steps with the least weighted error under ``solver``; no model calls.

    Minimises ``sum_n weight_{k_n} s_{k_n}^2 C_n' G C_n`` over the levels ``k_1 < ... < k_steps = N`` of the measured
    grid (`costs.step_cost`) by dynamic programming: exactly for solvers that use up to two slopes. For those with
    a longer history or a corrector the two most recent slopes are used, then coordinate descent on the exact cost.

    Args:
        stats: What `fastsched.measure` returned.
        steps: Steps, of which the last ends at sigma 0; at most the number of levels less one.
        solver: A solver's name.
        weight: ``"geometric"`` (``sqrt(phi psi)``), ``"isotropic"`` (``phi``), ``"directional"`` (``psi``) or None.
        polish: Whether to go on by descent, off the grid, on a prediction that knows how errors of different steps add
            up (`fastsched.selection.polish`).

    Returns:
        The schedule, with the predicted squared distance to the converged sample.

    Raises:
        ValueError: If an argument is out of range or unknown.
    """
    method = get_solver(solver)
    cost = path_cost(stats, method, weight)
    nodes = chosen_nodes(cost, cheapest_paths(cost, steps), steps)
    s = torch.cat([stats.s, stats.s.new_zeros(1)])[nodes]
    if not polish:
        return Schedule.from_levels(stats.process, s, method.name, error_estimates(stats, cost, nodes).largest)
    s = torch.from_numpy(polished(stats, s.numpy(), method))
    predicted = predict_error(stats, stats.process.sampler_sigma(s), method, weight=weight)
    return Schedule.from_levels(stats.process, s, method.name, predicted)


def chosen_nodes(cost: PathCost, selection: Selection, steps: int) -> list[int]:
    """The levels of the best schedule of ``steps`` steps, after descent on the exact cost where that differs."""
    nodes = selection.path(steps)
    if cost.solver.history <= 1 and cost.solver.corrector is None:
        return nodes
    return coordinate_descent(cost.around, nodes)
