"""What a report shows, computed from statistics and schedules without a model call."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fastsched.costs.prediction import predict_error
from fastsched.measurement.statistics import PathStatistics
from fastsched.metrics import geometric_mean, rounding_floor
from fastsched.sampling.schedule import Schedule
from fastsched.selection.planning import SAFETY, ErrorCurve, target_error
from fastsched.selection.uncertainty import jackknife_variance, without_each

#: Predicted over measured errors of nine denoisers (`fastsched.selection.planning.SAFETY`): one standard deviation.
SCATTER = 1.3
#: The plan compares with karras at these numbers of steps.
TARGETS = (10, 20, 30)


@dataclass(frozen=True)
class Measured:
    """A measured error: name of the schedule, solver, number of steps, and the error itself."""

    name: str
    solver: str
    steps: int
    error: float


def rounding(stats: PathStatistics) -> float:
    """The error that rounding the final samples to float32 makes; smaller errors cannot be told from 0."""
    return max(geometric_mean(rounding_floor(stats.ends)), sys.float_info.min)


def shown_errors(stats: PathStatistics, curve: ErrorCurve) -> list[float]:
    """The predicted errors of a curve, none below `rounding`."""
    return [max(error, rounding(stats)) for error in curve.predicted_errors]


def band(stats: PathStatistics, curve: ErrorCurve) -> tuple[list[float], list[float]]:
    """Predicted errors one standard deviation lower and higher, on a logarithmic scale, for each number of steps.

    The variance is the sum of two parts: the scatter of predictions over denoisers (`SCATTER`), and that of the
    logarithm by the jackknife over the measured samples, with the schedules held fixed. With one sample there is only
    the scatter. Errors below `rounding` are raised to it.
    """
    floor = rounding(stats)
    spreads = [math.log(SCATTER) ** 2] * len(curve.steps)
    if stats.samples > 1:
        parts = without_each(stats)
        for n, schedule in enumerate(curve.schedules):
            errors = [max(predict_error(part, schedule, curve.solver), floor) for part in parts]
            spreads[n] += float(jackknife_variance(torch.tensor(errors, dtype=torch.float64, device="cpu").log()))
    pairs = [(error, math.exp(math.sqrt(x))) for error, x in zip(shown_errors(stats, curve), spreads, strict=True)]
    return [error / factor for error, factor in pairs], [error * factor for error, factor in pairs]


def plan(stats: PathStatistics, curve: ErrorCurve) -> list[int | None]:
    """The fewest steps that are as good as karras at each of `TARGETS`; None where the curve has too few steps.

    As in `fastsched.steps_needed`, the predicted error must be at most that of the target over `SAFETY`.
    """
    return [steps_within(curve, target_error(stats, curve.solver, ("karras", steps))) for steps in TARGETS]


def steps_within(curve: ErrorCurve, goal: float) -> int | None:
    """The fewest steps of a curve whose predicted error is at most ``goal`` over `SAFETY`; None if there are none."""
    pairs = zip(curve.steps, curve.predicted_errors, strict=True)
    return next((steps for steps, error in pairs if error <= goal / SAFETY), None)


def check_schedules(stats: PathStatistics, schedules: Mapping[str, Schedule]) -> None:
    """ValueError if the noise process of a schedule is not that of the statistics."""
    for name, schedule in schedules.items():
        if schedule.noise != stats.process.kind:
            raise ValueError(
                f"{name} is for a {schedule.noise!r} noise process and the statistics are of a "
                f"{stats.process.kind!r} one; report schedules of one model"
            )


def read_errors(path: Path) -> list[Measured]:
    """The typical errors in a table that ``fastsched compare --csv`` wrote, or ValueError."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
        found = [Measured(row["name"], row["solver"], int(row["steps"]), float(row["typical_error"])) for row in rows]
        for each in found:  # the figure would leave these out, beside their names
            if each.steps < 1 or not 0 <= each.error < math.inf:
                raise ValueError(f"{each.name} has an error of {each.error:g} in {each.steps} steps")
        return found
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        reason = f"no column {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is not a table that 'fastsched compare --csv' writes: {reason}") from None
