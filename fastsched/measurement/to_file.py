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
    """Like `fastsched.measure`, but save to ``path`` after every batch; the file is always complete.

    ``samples`` are those that the file holds in the end. The other arguments are those of `fastsched.measure`, and

    * ``resume``: measure only the paths that ``path`` does not hold yet.
    * ``overwrite``: replace ``path`` if there is one.

    Returns:
        The statistics in the file.

    Raises:
        ValueError: As `fastsched.measure`, or if ``path`` was measured with other settings.
        FileExistsError: If there is a file, and neither ``resume`` nor ``overwrite`` is set.
    """
    run = measurement_of(denoiser, measured_levels(denoiser, levels), device, dtype, responses)
    batches = batches_of(shape, samples, seed, batch_size, checks, path, progress)
    file = Path(path)
    if file.exists() and not resume and not overwrite:
        raise FileExistsError(f"{file} exists; resume it (--resume), replace it (--overwrite), or name another file")
    return measured(run, batches, resumed(file, run, batches) if resume else None)
