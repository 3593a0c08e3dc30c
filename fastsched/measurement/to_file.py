"""Measure into a file, batch by batch, so that an interruption costs one batch at most."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastsched.denoisers.denoiser import Denoiser
from fastsched.measurement.batches import measured, resumed
from fastsched.measurement.measuring import prepared
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

    Raises:
        ValueError: As `fastsched.measure`, or if ``path`` was measured with other settings.
        FileExistsError: If there is a file, and neither ``resume`` nor ``overwrite`` is set.
    """
    settings = {name: value for name, value in locals().items() if name not in ("path", "resume", "overwrite")}
    run, batches, _ = prepared(**settings, checkpoint=None, keep_increments=False)
    if os.path.exists(path) and not resume and not overwrite:
        raise FileExistsError(f"{path} exists; resume it (--resume), replace it (--overwrite), or name another file")
    known = resumed(path, run, batches, len(batches.seeds)) if resume else None
    return measured(run, replace(batches, file=path), known)
