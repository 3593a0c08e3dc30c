"""Predicted error against the number of steps, from one measurement, and how many steps are needed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from torch import Tensor

from fastsched import validate
from fastsched.costs.norms import Array
from fastsched.costs.prediction import predict_error
from fastsched.measurement.statistics import PathStatistics
from fastsched.sampling.fitted import chosen_solver
from fastsched.sampling.progress import Progress, progress_bar
from fastsched.sampling.schedule import Schedule
from fastsched.sampling.solvers import FITTED, Solver
from fastsched.selection.optimal import Minimum, local_minima
from fastsched.selection.starts import common_sigmas

#: Names of schedules that `steps_needed` accepts as targets; uniform is for flow models.
COMMON = ("karras", "exponential", "linear", "kl_optimal", "uniform")

#: The predicted error must be below the target by this factor. Of 420 schedules, chosen for four solvers and nine
#: denoisers, nine in ten had at most 1.95 times the predicted error.
SAFETY = 2.0


@dataclass(frozen=True, eq=False)
class ErrorCurve:
    """Predicted error of the best schedules of 1 to ``max_steps`` steps.

    Attributes:
        solver: The solver.
        steps: ``1 .. max_steps``.
        model_calls: Network evaluations of each schedule, per sample.
        predicted_errors: Predicted squared distance to the converged sample (`fastsched.costs.prediction`).
        schedules: The schedules.
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
    stats: PathStatistics, solver: str | Solver = "dpmpp_2m", max_steps: int | None = None, *, progress: Progress = True
) -> ErrorCurve:
    """Predicted error against the number of steps, for the schedules of `optimal_schedule`.

    Each search also starts from the best schedule with one step less, with a level added in its widest gap. If more
    steps do not help, for example where only rounding is left, that schedule is kept, so the curve never rises.

    Args:
        stats: The result of `fastsched.measure`.
        solver: A solver's name.
        max_steps: The most steps, at most the number of levels less one; when None 32, or as many as there can be.
        progress: Show a progress bar, or a function called with the schedules found so far and their total.

    Raises:
        ValueError: If an argument is out of range or unknown.
    """
    validate.arguments(locals())
    max_steps = min(32, stats.levels - 1) if max_steps is None else max_steps
    if max_steps >= stats.levels:
        raise ValueError(f"max_steps must be at most {stats.levels - 1} on {stats.levels} levels, got {max_steps}")
    method = chosen_solver(solver)
    schedules = []
    with progress_bar(max_steps, progress, f"{method.name} curve", "schedule") as advance:
        for schedule in islice(best_schedules(stats, method), max_steps):
            schedules.append(schedule)
            advance(1)
    return ErrorCurve(
        solver=method.name,
        steps=tuple(range(1, max_steps + 1)),
        model_calls=tuple(schedule.model_calls for schedule in schedules),
        predicted_errors=tuple(float(schedule.predicted_error or 0.0) for schedule in schedules),
        schedules=tuple(schedules),
    )


def best_schedules(stats: PathStatistics, solver: Solver) -> Iterator[Schedule]:
    """Yield the best schedules of at most 1, 2, ... steps."""
    best: Minimum | None = None
    for steps in range(1, stats.levels):
        also = () if best is None or len(best.levels) != steps else (_one_more(best.levels),)
        found = local_minima(stats, steps, solver, also=also)[0]
        if best is None or found.predicted_error <= best.predicted_error:
            best = found
        yield best.schedule(stats, solver)


def _one_more(levels: Array) -> Array:
    """Levels with a node added in the middle of the widest finite gap in ``log s``, [steps + 2]."""
    if len(levels) == 2:
        return np.array([levels[0], min(levels[0], 10.0) / 10.0, 0.0])
    gaps = np.nan_to_num(-np.diff(np.log(levels[:-1])), posinf=0.0)
    n = int(gaps.argmax())
    middle = np.sqrt(levels[n] * levels[n + 1]) if np.isfinite(levels[n]) else 10.0 * levels[n + 1]
    return np.insert(levels, n + 1, middle)


def steps_needed(
    stats: PathStatistics,
    solver: str | Solver = "dpmpp_2m",
    *,
    target: float | tuple[str, int] | Schedule | Tensor,
    max_steps: int | None = None,
    progress: Progress = True,
) -> int:
    """The fewest steps whose error reaches a target.

    Predictions scatter, so the predicted error must be at most half of the target (`SAFETY`).

    Args:
        stats: The result of `fastsched.measure`.
        solver: A solver's name.
        target: A squared distance to the converged sample; or a schedule whose error with the same solver is to be
            reached: a `Schedule`, its sigmas, or a name in `COMMON` and a number of steps, as ``("karras", 20)``. For
            flow models sigmas and named schedules are in flow times; ``"uniform"`` is only for these models. With the
            fitted solver, whose weights are for one schedule, a name is that schedule with dpmpp_2m.
        max_steps: The most steps to consider; the number of levels less one when None.
        progress: Show a progress bar, or a function called with the schedules found so far and the most there may be.

    Raises:
        ValueError: If the target is not positive, has an unknown name, or is not reached within ``max_steps``.
    """
    validate.arguments(locals(), target=validate.anything)
    limit = min(max_steps or stats.levels, stats.levels - 1)
    goal = target_error(stats, solver, target)
    method, least = chosen_solver(solver), math.inf
    with progress_bar(limit, progress, f"{method.name} steps", "schedule") as advance:
        for steps, schedule in enumerate(islice(best_schedules(stats, method), limit), 1):
            advance(1)
            least = schedule.predicted_error or 0.0
            if least <= goal / SAFETY:
                return steps
    raise not_reached(method.name, limit, goal, least)


def not_reached(solver: str, steps: int, goal: float, least: float) -> ValueError:
    """The error if no schedule of up to ``steps`` steps reaches ``goal``; the least predicted error is ``least``."""
    return ValueError(
        f"target: no schedule of up to {steps} steps is predicted to reach {goal / SAFETY:.3g}, the target over "
        f"{SAFETY:g}; the best {solver} one reaches {least:.3g}; allow a larger error, more steps or a solver of "
        "higher order"
    )


def target_error(stats: PathStatistics, solver: str | Solver, target: object) -> float:
    """The error of a target as defined in `steps_needed`."""
    if isinstance(target, tuple):
        if len(target) != 2:
            raise ValueError(f"target must be a pair like ('karras', 20), got {target!r}")
        name, steps = validate.choice("target", target[0], COMMON), validate.positive_int("target steps", target[1])
        target = common_sigmas(stats.process, stats.s, name, steps)
        solver = "dpmpp_2m" if chosen_solver(solver).name == FITTED else solver
    if isinstance(target, Schedule) or (isinstance(target, Tensor) and target.ndim > 0):
        sigmas = target if isinstance(target, Schedule) else validate.descending_sigmas("target", target, to_zero=True)
        return predict_error(stats, sigmas, solver)
    try:
        return validate.positive("target", target)
    except (TypeError, ValueError) as error:
        what = "a positive error, a schedule or a pair like ('karras', 20)"
        raise type(error)(f"target must be {what}, got {validate.shown(target)}") from None
