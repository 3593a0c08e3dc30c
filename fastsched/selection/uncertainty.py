"""Standard errors of a schedule, by leaving out each measured sample in turn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastsched import validate
from fastsched.measurement.statistics import PathStatistics, is_statistics
from fastsched.sampling.fitted import is_solver
from fastsched.selection.optimal import optimal_schedule


@dataclass(frozen=True, eq=False)
class Uncertainty:
    """Standard errors of a schedule.

    Attributes:
        predicted_error: Standard error of the predicted error.
        log_sigmas: Standard error of the logarithm of each sigma above 0, [steps] float64. The first is 0, because all
            schedules start at the same sigma.
    """

    predicted_error: float
    log_sigmas: Tensor


def standard_errors(
    stats: PathStatistics, steps: int, solver: str = "dpmpp_2m", *, polish: bool = False
) -> Uncertainty:
    """Jackknife standard errors of `optimal_schedule` over the measured samples.

    With ``theta_b`` the result without sample b, ``se^2 = (B-1)/B sum_b (theta_b - mean theta)^2`` (Efron & Stein
    1981). A schedule on a grid moves from level to level, so an error smaller than the grid's spacing appears as 0 or
    as one spacing.

    Args:
        stats: The result of `fastsched.measure`, with at least two samples.
        steps: As in `optimal_schedule`.
        solver: As in `optimal_schedule`.
        polish: As in `optimal_schedule`, which is called once per sample; without polish, the default, that is quick.

    Raises:
        ValueError: If there is only one sample, or an argument is out of range.
    """
    validate.arguments(locals(), stats=is_statistics, solver=is_solver)
    count = stats.samples
    if count < 2:
        raise ValueError("stats must hold at least two samples for a standard error; measure more and merge")
    errors, logs = [], []
    for left_out in range(count):
        others = stats.select([b for b in range(count) if b != left_out])
        schedule = optimal_schedule(others, steps, solver, polish=polish)
        assert schedule.predicted_error is not None
        errors.append(schedule.predicted_error)
        logs.append(schedule.sigmas[1:-1].log())  # the first may be infinite
    # Schedules without one sample differ little from each other, so the jackknife multiplies their variance by B - 1.
    moved = torch.stack(logs)  # empty for a single step, of which PyTorch's var would warn
    spread = ((count - 1) * (moved - moved.mean(0)).square().mean(0)).sqrt()
    spread = torch.cat([spread.new_zeros(1), spread])
    return Uncertainty(
        predicted_error=float(
            ((count - 1) * torch.tensor(errors, dtype=torch.float64, device="cpu").var(correction=0)).sqrt()
        ),
        log_sigmas=spread,
    )
