"""Measure a denoiser: statistics along a few of its paths, from which schedules are chosen."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastsched import validate
from fastsched.denoisers.denoiser import Denoiser, check_denoiser, placement
from fastsched.measurement.deviated_paths import deviated_paths
from fastsched.measurement.path_following import Measurement, measurement_steps
from fastsched.measurement.statistics import PathStatistics
from fastsched.progress import progress_bar
from fastsched.sampling.random_streams import sample_seeds


@torch.no_grad()
def measure(
    denoiser: Denoiser,
    shape: Sequence[int],
    *,
    levels: int | Tensor = 48,
    samples: int = 8,
    responses: bool = True,
    keep_increments: bool = False,
    seed: int = 0,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> PathStatistics:
    """Follow ``samples`` probability-flow paths over ``levels`` levels and keep what schedules are chosen from.

    **Reference path.** From ``y_0 = noise``, one call a level, by UniPC of third order, whose corrector costs none.
    **Responses.** Two more paths from the same noise deviate as coarse samplers do and ask at every second level: the
    responses ``D(z') - D(z)`` tell how errors are passed on (`fastsched.measurement.deviated_paths`).

    No gradients are taken, so compiled, quantised and guided models work. Cost: ``2 N - 2`` calls a sample for an even
    number N of levels, N without responses. Warns if the network's outputs come in 16 bits and rounding adds more than 1%
    to the squared increments (`fastsched.measurement.rounding`).

    Args:
        denoiser: What to measure.
        shape: The shape of one sample, without the batch.
        levels: How many levels (32 to 64 serve), or the levels ``s`` themselves, descending.
        samples: How many paths.
        responses: Whether to measure responses. Without them, errors are taken to be passed on as for Gaussian data.
        keep_increments: Whether the statistics hold the increments and responses themselves, ``2 N`` images a sample,
            too: what `fastsched.tune` needs. They are not saved.
        seed: Of the noises. Sample ``n`` is the same whatever ``samples`` and ``batch_size``.
        batch_size: Paths followed at once; all of them when None. About ``3 N`` states a path are held.
        device: Where to run; where the network's parameters are when None.
        dtype: What the network computes in; that of its parameters when None. States stay float32.
        progress: Show a progress bar.

    Returns:
        The statistics, on the CPU.

    Raises:
        ValueError: If an argument is out of range, the network's output has the wrong shape, or holds NaN or inf
            (the message names the level).
    """
    sizes = validate.sample_shape(shape)
    count = validate.positive_int("samples", samples)
    batch = count if batch_size is None else validate.positive_int("batch_size", batch_size)
    run = measurement_of(denoiser, measured_levels(denoiser, levels), device, dtype, responses, keep_increments)
    parts = []
    with progress_bar(run.calls * count, progress, "measuring") as advance:
        for seeds in sample_seeds(seed, count).split(batch):
            parts.append(run.drive(measurement_steps(run, seeds, sizes, advance)))
    return functools.reduce(PathStatistics.merge, parts)


def measurement_of(
    denoiser: Denoiser,
    s: Tensor,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    responses: bool = True,
    keep_increments: bool = False,
) -> Measurement:
    """A measurement at levels ``s``, with the defaults of `measure`."""
    paths = deviated_paths(len(s)) if responses else ()
    return Measurement(denoiser, s, *placement(denoiser, device, dtype), paths, keep_increments)


@torch.no_grad()
def with_increments(
    denoiser: Denoiser,
    stats: PathStatistics,
    *,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> PathStatistics:
    """These statistics with their increments, and responses, the paths followed once more if need be.

    Args:
        denoiser: The denoiser that ``stats`` was measured on.
        stats: What `measure` returned.
        batch_size: As in `measure`.
        device: As in `measure`.
        dtype: As in `measure`.

    Raises:
        ValueError: If the network returns NaN or inf.
    """
    if stats.increments is not None:
        return stats
    batch = stats.samples if batch_size is None else validate.positive_int("batch_size", batch_size)
    run = measurement_of(denoiser, stats.s, device, dtype, stats.response_gram is not None, keep_increments=True)
    parts = [run.drive(measurement_steps(run, seeds, stats.shape)) for seeds in stats.seeds.split(batch)]
    again = functools.reduce(PathStatistics.merge, parts)
    return replace(
        stats,
        increments=again.increments,
        responses=again.responses,
        model_calls=stats.model_calls + again.model_calls,
    )


def measured_levels(denoiser: Denoiser, levels: int | Tensor) -> Tensor:
    """The levels to measure at, float64 [N], from their number or a list of them; errors as in `measure`."""
    check_denoiser(denoiser)
    if not isinstance(levels, Tensor):
        return denoiser.levels(validate.positive_int("levels", levels, minimum=3))
    s = validate.descending_sigmas(levels, name="levels")
    if len(s) < 3 or float(s[-1]) <= 0:
        raise ValueError("levels must be at least three positive noise levels; sigma 0 is added as the end")
    return s
