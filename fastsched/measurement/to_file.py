"""Measure into a file, batch by batch, so that an interruption costs one batch at most."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastsched import validate
from fastsched.denoisers.denoiser import Denoiser
from fastsched.measurement.measuring import SENSITIVITIES, Run, measured_levels, measurement_steps
from fastsched.measurement.statistics import PathStatistics
from fastsched.sampling.random_streams import sample_seeds


@torch.no_grad()
def measure_to_file(
    denoiser: Denoiser,
    shape: Sequence[int],
    path: str | os.PathLike[str],
    *,
    levels: int | Tensor = 48,
    samples: int = 8,
    sensitivity: str | None = "finite-difference",
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
        sensitivity: ``"finite-difference"``, ``"jvp"`` or None.
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
    if sensitivity is not None:
        validate.choice("sensitivity", sensitivity, SENSITIVITIES)
    s = measured_levels(denoiser, levels)
    run = Run(
        denoiser,
        s,
        denoiser.device if device is None else torch.device(device),
        denoiser.dtype if dtype is None else dtype,
        sensitivity,
    )
    seeds = sample_seeds(seed, validate.positive_int("samples", samples))
    file = Path(path)
    whole = None
    if file.exists() and resume:
        whole = PathStatistics.load(file)
        _check_settings(file, whole, run, sizes, seeds)
        seeds = seeds[~torch.isin(seeds, whole.seeds)]
    elif file.exists() and not overwrite:
        raise FileExistsError(f"{file} exists; resume it (--resume), replace it (--overwrite), or name another file")
    from tqdm import tqdm

    calls = (2 * len(s) - 1 if sensitivity else len(s)) * len(seeds)
    with tqdm(total=calls, desc="measuring", unit="call", disable=not progress) as bar:
        for batch in (seeds[n : n + size] for n in range(0, len(seeds), size)):
            part = _measured(run, batch, sizes, bar.update)
            whole = part if whole is None else whole.merge(part)
            whole.save(file)
    assert whole is not None  # samples >= 1: either the file held them or they were measured
    return whole


def _measured(run: Run, seeds: Tensor, shape: tuple[int, ...], advance: Callable[[int], object]) -> PathStatistics:
    steps = measurement_steps(run, seeds, shape)
    try:
        x, k = next(steps)
        while True:
            raw = run.raw_output(x, k)
            advance(len(x))
            x, k = steps.send(raw)
    except StopIteration as finished:
        return finished.value


def _check_settings(file: Path, found: PathStatistics, run: Run, shape: tuple[int, ...], seeds: Tensor) -> None:
    """Refuse to add to a file that was measured otherwise, before any model call is spent."""
    different = None
    if found.process != run.denoiser.process:
        different = "another noise process"
    elif not torch.equal(found.s, run.s):
        different = f"other levels ({found.levels} of them)"
    elif found.shape != shape:
        different = f"shape {found.shape}"
    elif (found.cross is None) != (run.sensitivity is None):
        different = "no sensitivity" if found.cross is None else "sensitivity"
    elif not bool(torch.isin(found.seeds, seeds).all()):
        different = f"another seed or more than {len(seeds)} samples"
    if different:
        raise ValueError(
            f"{file} was measured with {different}; resume it with the same settings, or name another file"
        )
