"""How certain a selection is, from the samples it was made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastsched.measurement.statistics import PathStatistics
from fastsched.selection.optimal import optimal_schedule


@dataclass(frozen=True, eq=False)
class Uncertainty:
    """Standard errors of a schedule.

    Attributes:
        predicted_error: Of the predicted error.
        log_sigmas: Of the logarithm of each sigma but the last, 0; [steps] float64. A first sigma does not vary.
    """

    predicted_error: float
    log_sigmas: Tensor


def standard_errors(
    stats: PathStatistics,
    steps: int,
    solver: str = "dpmpp_2m",
    *,
    weight: str | None = "geometric",
    polish: bool = False,
) -> Uncertainty:
    """Jackknife standard errors of a selection over the measured samples.

    With ``theta_b`` the selection without sample b, ``se^2 = (B-1)/B sum_b (theta_b - mean theta)^2`` (Efron & Stein
    1981). A schedule on a grid moves by whole levels, so errors below a cell of the grid show as 0 or a cell.

    Args:
        stats: What `fastsched.measure` returned, of at least two samples.
        steps: As in `optimal_schedule`.
        solver: As in `optimal_schedule`.
        weight: As in `optimal_schedule`.
        polish: As in `optimal_schedule`; B selections are made.

    Raises:
        ValueError: If there is only one sample, or an argument is out of range.
    """
    count = stats.samples
    if count < 2:
        raise ValueError("stats must hold at least two samples for a standard error; measure more and merge")
    errors, logs = [], []
    for left_out in range(count):
        others = stats.select([b for b in range(count) if b != left_out])
        schedule = optimal_schedule(others, steps, solver, weight=weight, polish=polish)
        assert schedule.predicted_error is not None
        errors.append(schedule.predicted_error)
        logs.append(schedule.sigmas[:-1].log())
    spread = ((count - 1) * torch.stack(logs).var(0, correction=0)).sqrt()
    return Uncertainty(
        predicted_error=float(((count - 1) * torch.tensor(errors, dtype=torch.float64).var(correction=0)).sqrt()),
        log_sigmas=spread,
    )
