"""Standard errors of a schedule, by leaving out each measured sample in turn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastsched import validate
from fastsched.measurement.statistics import PathStatistics
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
    validate.arguments(locals())
    if stats.samples < 2:
        raise ValueError("stats must hold at least two samples for a standard error; measure more and merge")
    found = [optimal_schedule(others, steps, solver, polish=polish) for others in without_each(stats)]
    errors = torch.tensor([schedule.predicted_error for schedule in found], dtype=torch.float64, device="cpu")
    logs = torch.stack([schedule.sigmas[1:-1].log() for schedule in found])  # the first may be infinite
    spread = torch.cat([logs.new_zeros(1), jackknife_variance(logs).sqrt()])
    return Uncertainty(float(jackknife_variance(errors).sqrt()), spread)


def without_each(stats: PathStatistics) -> list[PathStatistics]:
    """The statistics without each of their samples in turn."""
    samples = range(stats.samples)
    return [stats.select([b for b in samples if b != left_out]) for left_out in samples]


def jackknife_variance(values: Tensor) -> Tensor:
    """The variance of a result of B samples, ``(B-1)/B sum_b (theta_b - mean theta)^2``, from ``theta_b`` [B, ...]."""
    # Results without one sample differ little from each other, so their variance is multiplied by B - 1.
    return (len(values) - 1) * (values - values.mean(0)).square().mean(0)
