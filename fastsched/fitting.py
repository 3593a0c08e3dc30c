"""Measure, select and audition in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastsched.auditioning import audition
from fastsched.denoiser import Denoiser
from fastsched.measurement import measure
from fastsched.path_statistics import PathStatistics
from fastsched.schedule import Schedule


def fit(
    denoiser: Denoiser,
    shape: Sequence[int],
    steps: int,
    solver: str = "dpmpp_2m",
    *,
    stats: PathStatistics | None = None,
    levels: int = 48,
    samples: int = 8,
    seed: int = 0,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Schedule:
    """The schedule of ``steps`` steps for a denoiser and solver: `measure`, `optimal_schedule` and `audition`.

    With the defaults 760 model calls to measure, counted per sample, and at most 34 for each step to audition.

    Args:
        denoiser: What to schedule.
        shape: The shape of one sample, without the batch.
        steps: Steps, of which the last ends at sigma 0.
        solver: A solver's name.
        stats: An earlier measurement of this denoiser, used instead of a new one.
        levels: As in `measure`.
        samples: As in `measure`.
        seed: As in `measure`.
        batch_size: As in `measure`.
        device: As in `measure`.
        dtype: As in `measure`.
        progress: Show progress bars.

    Returns:
        The winner of the audition, with its predicted and measured error.

    Raises:
        ValueError: As `measure` and `audition` do.
    """
    if stats is None:
        stats = measure(
            denoiser,
            shape,
            levels=levels,
            samples=samples,
            seed=seed,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            progress=progress,
        )
    elif tuple(shape) != stats.shape:
        raise ValueError(f"stats are of samples of shape {stats.shape}, not of shape {tuple(shape)}")
    return audition(
        denoiser, stats, steps, solver, batch_size=batch_size, device=device, dtype=dtype, progress=progress
    ).winner
