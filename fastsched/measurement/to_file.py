"""Measure into a file, batch by batch, so that an interruption costs one batch at most."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastsched.denoisers.denoiser import Denoiser
from fastsched.measurement.batches import measured, resumed
from fastsched.measurement.measuring import batches_of, measured_levels, measurement_of
from fastsched.measurement.statistics import PathStatistics
from fastsched.sampling.progress import Progress


def measure_to_file(
    denoiser: Denoiser,
    shape: Sequence[int],
    path: str | os.PathLike[str],
    *,
    levels: int | Tensor = 48,
    samples: int | range = 8,
    responses: bool = True,
    seed: int = 0,
    batch_size: int = 4,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    checks: bool = True,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = True,
) -> PathStatistics:
    """As `fastsched.measure`, saving to ``path`` after every batch.

    Args:
        denoiser: What to measure; this and the other arguments as in `fastsched.measure`.
        shape: The shape of one sample, without the batch.
        path: The statistics file; always whole, whenever the measurement stops.
        levels: How many levels, or the levels ``s`` themselves.
        samples: How many paths the file is to hold in the end, or which: ``range(a, b)``.
        responses: Whether to measure responses.
        seed: The seed of the noises.
        batch_size: Paths followed at once.
        device: Where to run.
        dtype: What the network computes in.
        checks: Whether to ask first if the network is a denoiser.
        resume: Measure only the paths that ``path`` does not hold yet.
        overwrite: Replace ``path`` if there is one.
        progress: Show a progress bar, or a function called with the model calls done and their total.

    Returns:
        All that the file holds.

    Raises:
        ValueError: As `fastsched.measure`, or if ``path`` was measured with other settings.
        FileExistsError: If there is a file, and it is neither to be resumed nor overwritten.
    """
    run = measurement_of(denoiser, measured_levels(denoiser, levels), device, dtype, responses)
    batches = batches_of(shape, samples, seed, batch_size, checks, path, progress)
    file = Path(path)
    if file.exists() and not resume and not overwrite:
        raise FileExistsError(f"{file} exists; resume it (--resume), replace it (--overwrite), or name another file")
    return measured(run, batches, resumed(file, run, batches) if resume else None)
