"""Measure into a file, batch by batch, so that an interruption costs one batch at most."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastsched import validate
from fastsched.denoisers.denoiser import Denoiser
from fastsched.measurement.measuring import measured_levels, measurement_of
from fastsched.measurement.path_following import Measurement, measurement_steps
from fastsched.measurement.statistics import PathStatistics
from fastsched.progress import progress_bar
from fastsched.sampling.random_streams import sample_seeds


@torch.no_grad()
def measure_to_file(
    denoiser: Denoiser,
    shape: Sequence[int],
    path: str | os.PathLike[str],
    *,
    levels: int | Tensor = 48,
    samples: int = 8,
    responses: bool = True,
    seed: int = 0,
    batch_size: int = 4,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> PathStatistics:
    """As `fastsched.measure`, saving to ``path`` after every batch.

    Args:
        denoiser: What to measure; this and the other arguments as in `fastsched.measure`.
        shape: The shape of one sample, without the batch.
        path: The statistics file; always whole, whenever the measurement stops.
        levels: How many levels, or the levels ``s`` themselves.
        samples: How many paths the file is to hold in the end.
        responses: Whether to measure responses.
        seed: Of the noises and probes.
        batch_size: Paths followed at once.
        device: Where to run.
        dtype: What the network computes in.
        resume: Measure only the paths that ``path`` does not hold yet.
        overwrite: Replace ``path`` if there is one.
        progress: Show a progress bar.

    Returns:
        All that the file holds.

    Raises:
        ValueError: As `fastsched.measure`, or if ``path`` was measured with other settings.
        FileExistsError: If there is a file, and it is neither to be resumed nor overwritten.
    """
    sizes = validate.sample_shape(shape)
    size = validate.positive_int("batch_size", batch_size)
    run = measurement_of(denoiser, measured_levels(denoiser, levels), device, dtype, responses)
    seeds = sample_seeds(seed, validate.positive_int("samples", samples))
    file = Path(path)
    whole = None
    if file.exists() and resume:
        whole = PathStatistics.load(file)
        _check_settings(file, whole, run, sizes, seeds)
        seeds = seeds[~torch.isin(seeds, whole.seeds)]
    elif file.exists() and not overwrite:
        raise FileExistsError(f"{file} exists; resume it (--resume), replace it (--overwrite), or name another file")
    with progress_bar(run.calls * len(seeds), progress, "measuring") as advance:
        for batch in seeds.split(size) if len(seeds) else ():  # none: the file holds them all
            part = run.drive(measurement_steps(run, batch, sizes, advance))
            whole = part if whole is None else whole.merge(part)
            whole.save(file)
    assert whole is not None  # samples >= 1: either the file held them or they were measured
    return whole


def _check_settings(file: Path, found: PathStatistics, run: Measurement, shape: tuple[int, ...], seeds: Tensor) -> None:
    """Refuse to add to a file that was measured otherwise, before any model call is spent."""
    different = None
    if found.process != run.denoiser.process:
        different = "another noise process"
    elif not torch.equal(found.s, run.s):
        different = f"other levels ({found.levels} of them)"
    elif found.shape != shape:
        different = f"shape {found.shape}"
    elif found.deviated != run.deviated:
        different = "responses" if found.deviated else "no responses"
    elif not bool(torch.isin(found.seeds, seeds).all()):
        different = f"another seed or more than {len(seeds)} samples"
    if different:
        raise ValueError(
            f"{file} was measured with {different}; resume it with the same settings, or name another file"
        )
