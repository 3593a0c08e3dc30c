"""How many steps it takes: predicted error against steps, from one measurement."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from fastsched import baselines, validate
from fastsched.costs.prediction import predict_error
from fastsched.measurement.statistics import PathStatistics
from fastsched.sampling.schedule import Schedule
from fastsched.sampling.solvers import Solver, get_solver
from fastsched.selection.optimal import optimal_schedule

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


def error_curve(stats: PathStatistics, solver: str | Solver = "dpmpp_2m", max_steps: int = 32) -> ErrorCurve:
    """Predicted error against the number of steps: of the schedules of `optimal_schedule`.

    The best schedule of one step less, with a node added in the widest gap, is one more start of each descent. Where that
    does not help, as where rounding is all that is left, the curve keeps the schedule of fewer steps: it never rises.

    Args:
        stats: What `fastsched.measure` returned.
        solver: A solver's name.
        max_steps: The most steps, at most the number of levels less one.

    Raises:
        ValueError: If an argument is out of range or unknown.
    """
    method = get_solver(solver)
    schedules = [optimal_schedule(stats, steps, method.name) for steps in range(1, max_steps + 1)]
    for n in range(1, len(schedules)):
        if schedules[n].predicted_error > schedules[n - 1].predicted_error:
            schedules[n] = schedules[n - 1]
    return ErrorCurve(
        solver=method.name,
        steps=tuple(range(1, max_steps + 1)),
        model_calls=tuple(schedule.model_calls for schedule in schedules),
        predicted_errors=tuple(float(schedule.predicted_error or 0.0) for schedule in schedules),
        schedules=tuple(schedules),
    )


def steps_needed(
    stats: PathStatistics,
    solver: str | Solver = "dpmpp_2m",
    *,
    target: float | tuple[str, int] | Schedule | Tensor,
    max_steps: int | None = None,
) -> int:
    """The fewest steps whose predicted error reaches a target.

    Args:
        stats: What `fastsched.measure` returned.
        solver: A solver's name.
        target: A squared distance to the converged sample; or what to be as good as under the same solver: a schedule,
            its sigmas, or the name and steps of one in common use, ``("karras", 20)``.
        max_steps: The most steps to consider; the number of levels less one when None.

    Raises:
        ValueError: If the target is not positive, its name unknown, or not reached within ``max_steps``.
    """
    limit = stats.levels - 1 if max_steps is None else max_steps
    goal = _target_error(stats, solver, target)
    curve = error_curve(stats, solver, limit)
    for steps, error in zip(curve.steps, curve.predicted_errors, strict=True):
        if error <= goal:
            return steps
    raise ValueError(
        f"target: no schedule of up to {limit} steps is predicted to reach {goal:.3g}, the best {curve.solver} one "
        f"reaches {min(curve.predicted_errors):.3g}; allow a larger error, more steps or a solver of higher order"
    )


def _target_error(stats: PathStatistics, solver: str | Solver, target: object) -> float:
    if isinstance(target, tuple):
        name, steps = target
        maker = COMMON[validate.choice("target", name, COMMON)]
        finite = stats.s[stats.s.isfinite()]
        target = stats.process.sampler_sigma(maker(steps, float(finite[-1]), float(finite[0])))
    if isinstance(target, (Schedule, Tensor)):
        return predict_error(stats, target, solver)
    goal = float(target)  # type: ignore[arg-type]  # a number is left
    if not (math.isfinite(goal) and goal > 0):
        raise ValueError(f"target must be a positive error, a schedule or a pair like ('karras', 20), got {target!r}")
    return goal
