"""How many steps it takes: predicted error against steps, from one measurement."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsched import baselines, validate
from fastsched.costs.prediction import ErrorModel, predict_error
from fastsched.costs.step_cost import path_cost
from fastsched.measurement.statistics import PathStatistics
from fastsched.sampling.schedule import Schedule
from fastsched.sampling.solvers import Solver, get_solver
from fastsched.selection.dynamic_programming import cheapest_paths
from fastsched.selection.optimal import chosen_nodes

#: Schedules that `steps_needed` knows by name.
COMMON = {
    "karras": baselines.karras,
    "exponential": baselines.exponential,
    "linear": baselines.linear,
    "kl_optimal": baselines.kl_optimal,
}


@dataclass(frozen=True, eq=False)
class ErrorCurve:
    """Predicted error of the best schedules of 1 to ``max_steps`` steps.

    Attributes:
        solver: The solver.
        steps: ``1 .. max_steps``.
        model_calls: Network evaluations of each.
        predicted_errors: Predicted squared distance to the converged sample (`fastsched.costs.prediction`).
        schedules: The schedules themselves.
    """

    solver: str
    steps: tuple[int, ...]
    model_calls: tuple[int, ...]
    predicted_errors: tuple[float, ...]
    schedules: tuple[Schedule, ...]

    def __str__(self) -> str:
        rows = [f"{self.solver}\n{'steps':>6} {'model calls':>12} {'predicted error':>16}"]
        for row in zip(self.steps, self.model_calls, self.predicted_errors, strict=True):
            rows.append("{:6d} {:12d} {:16.4g}".format(*row))
        return "\n".join(rows)


def error_curve(
    stats: PathStatistics, solver: str | Solver = "dpmpp_2m", max_steps: int = 32, *, weight: str | None = "geometric"
) -> ErrorCurve:
    """Predicted error against the number of steps; one dynamic-programming table serves them all.

    Schedules are those of `optimal_schedule` without its polish.

    Args:
        stats: What `fastsched.measure` returned.
        solver: A solver's name.
        max_steps: The most steps, at most the number of levels less one.
        weight: As in `optimal_schedule`.

    Raises:
        ValueError: If an argument is out of range or unknown.
    """
    method = get_solver(solver)
    cost = path_cost(stats, method, weight)
    selection, model = cheapest_paths(cost, max_steps), ErrorModel(stats, cost)
    s = torch.cat([stats.s, stats.s.new_zeros(1)])
    steps = tuple(range(1, len(selection.totals) + 1))
    schedules = []
    for count in steps:
        nodes = chosen_nodes(cost, selection, count)
        schedules.append(Schedule.from_levels(stats.process, s[nodes], method.name, model(nodes).largest))
    return ErrorCurve(
        solver=method.name,
        steps=steps,
        model_calls=tuple(method.model_calls(count) for count in steps),
        predicted_errors=tuple(float(schedule.predicted_error or 0.0) for schedule in schedules),
        schedules=tuple(schedules),
    )


def steps_needed(
    stats: PathStatistics,
    solver: str | Solver = "dpmpp_2m",
    *,
    target: float | tuple[str, int] | Schedule | Tensor,
    max_steps: int | None = None,
    weight: str | None = "geometric",
) -> int:
    """The fewest steps whose predicted error reaches a target.

    Args:
        stats: What `fastsched.measure` returned.
        solver: A solver's name.
        target: A squared distance to the converged sample; or what to be as good as under the same solver: a schedule,
            its sigmas, or the name and steps of one in common use, ``("karras", 20)``.
        max_steps: The most steps to consider; the number of levels less one when None.
        weight: As in `optimal_schedule`.

    Raises:
        ValueError: If the target is not positive, its name unknown, or not reached within ``max_steps``.
    """
    limit = stats.levels - 1 if max_steps is None else max_steps
    goal = _target_error(stats, solver, target, weight)
    curve = error_curve(stats, solver, limit, weight=weight)
    for steps, error in zip(curve.steps, curve.predicted_errors, strict=True):
        if error <= goal:
            return steps
    raise ValueError(
        f"target: no schedule of up to {limit} steps is predicted to reach {goal:.3g}, the best {curve.solver} one "
        f"reaches {min(curve.predicted_errors):.3g}; allow a larger error, more steps or a solver of higher order"
    )


def _target_error(stats: PathStatistics, solver: str | Solver, target: object, weight: str | None) -> float:
    if isinstance(target, tuple):
        name, steps = target
        maker = COMMON[validate.choice("target", name, COMMON)]
        finite = stats.s[stats.s.isfinite()]
        target = stats.process.sampler_sigma(maker(steps, float(finite[-1]), float(finite[0])))
    if isinstance(target, (Schedule, Tensor)):
        return predict_error(stats, target, solver, weight=weight)
    goal = float(target)  # type: ignore[arg-type]  # a number is left
    if not (math.isfinite(goal) and goal > 0):
        raise ValueError(f"target must be a positive error, a schedule or a pair like ('karras', 20), got {target!r}")
    return goal
