"""Measure a denoiser: statistics along a few of its paths, from which schedules are chosen."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastsched import validate
from fastsched.denoisers.denoiser import Denoiser, is_denoiser, placement
from fastsched.denoisers.network_state import check_evaluation_mode, unchanged_buffers
from fastsched.denoisers.noise import NoiseProcess, check_near
from fastsched.measurement.batches import Batches, interrupted_measurement, resumed
from fastsched.measurement.checks.network import fingerprint
from fastsched.measurement.deviated_paths import deviated_paths
from fastsched.measurement.devices import check_together, measured_in_group, prepare_together
from fastsched.measurement.fingerprints import same_network
from fastsched.measurement.path_following import Measurement
from fastsched.measurement.statistics import PathStatistics
from fastsched.sampling.progress import Progress
from fastsched.sampling.random_streams import sample_seeds

#: Smallest relative distance of a given level to the one before. Next to wide steps, the path's third-order solver
#: extrapolates the rounding errors of closer levels: at 1e-4 schedules have ten times the error.
CLOSEST = 9.9e-4

#: The same for the denoiser's own levels, which are evenly spaced: at smaller distances changes are mostly rounding.
CLOSEST_EVEN = 1e-6

#: Largest difference of timesteps of one noise process, over the largest of them, beside that of rounding to integers.
SAME_TIMES = 1e-3


def measure(
    denoiser: Denoiser,
    shape: Sequence[int],
    *,
    levels: int | Tensor | Sequence[float] = 48,
    samples: int | range = 8,
    responses: bool = True,
    keep_increments: bool = False,
    seed: int = 0,
    batch_size: int | None = None,
    store: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    checks: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    group: Any = None,
    progress: Progress = True,
) -> PathStatistics:
    """Follow ``samples`` probability-flow paths over ``levels`` levels and keep what schedules are chosen from.

    **Reference path.** From ``y_0 = noise``, one call per level, by third-order UniPC, whose corrector takes no call.
    **Responses.** Two more paths from the same noise deviate as coarse samplers do, with a call at every second level.
    Their responses ``D(z') - D(z)`` show how errors are passed on (`fastsched.measurement.deviated_paths`).

    No gradients are taken, so compiled, quantised and guided models work. Cost: ``2 N - 2`` calls per sample for an
    even N, N without responses, and 7 checks, more if a network is unusual. Ctrl-C returns the finished paths, with a
    warning, but not in a group. Warns if random numbers are drawn, or if 16-bit outputs add 1% to squared increments.

    Args:
        denoiser: What to measure.
        shape: The shape of one sample, without the batch.
        levels: How many levels (32 to 64 are enough), or a list of the levels ``s``, descending by at least 0.1%.
        samples: How many paths; or which, ``range(a, b)``, to be merged with others (`PathStatistics.merge`).
        responses: Whether to measure responses. Without them, errors are taken to be passed on as for Gaussian data.
        keep_increments: Whether to keep increments and responses, ``2 N`` images per sample, for `fastsched.tune`.
        seed: The seed of the noises. Sample ``n`` is the same for any ``samples`` and ``batch_size``.
        batch_size: Paths at once, each ``2 N + 10`` float32 states; when None as many as fit, one with a checkpoint.
        store: Where ``2 N - 3`` of these are: ``"cpu"``, ``"device"``, or on the device if half of it is enough (None).
        device: Where to run; where the network's parameters are when None.
        dtype: What the network computes in; that of its parameters when None. States stay float32.
        checks: Whether to check first that the network is a denoiser (`fastsched.measurement.checks.network`).
        checkpoint: A file in which every finished batch is saved. The same call resumes from it, to the same bits.
        group: A ``torch.distributed`` group to distribute the paths over (`fastsched.measurement.devices`).
        progress: Show a progress bar, or a function called with the model calls done and their total.

    Returns:
        The statistics, on the CPU.

    Raises:
        ValueError: If an argument is out of range, the network fails the checks, or returns NaN or inf.
        MemoryError: Before the first call, if there is not enough memory; the message says what to lower.
        RuntimeError: If another process failed; ``error.partial`` holds what was finished.
    """
    check_together(locals(), denoiser=is_denoiser)
    settings = {name: value for name, value in locals().items() if name != "group"}
    run, batches, known = prepare_together(partial(prepared, **settings), group)
    try:
        return measured_in_group(run, batches, known, group)
    except KeyboardInterrupt as error:
        return interrupted_measurement(error, checkpoint, group)


def prepared(
    denoiser: Denoiser,
    shape: Sequence[int],
    levels: int | Tensor | Sequence[float],
    samples: int | range,
    *,
    responses: bool,
    seed: int,
    batch_size: int | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    checks: bool,
    checkpoint: str | os.PathLike[str] | None,
    progress: Progress,
    keep_increments: bool = True,
    store: str | None = None,
) -> tuple[Measurement, Batches, PathStatistics | None]:
    """What to measure, in which batches, and what of it the checkpoint holds; arguments as in `measure`."""
    s = measured_levels(denoiser, levels)
    paths = deviated_paths(len(s)) if responses else ()
    run = Measurement(denoiser, s, *placement(denoiser, device, dtype), paths, keep_increments, store)
    sizes, seeds = validate.sample_shape("shape", shape), sample_seeds(seed, validate.sample_range("samples", samples))
    batches = Batches.of(sizes, seeds, batch_size, checkpoint, checks=checks, progress=progress)
    return run, batches, resumed(checkpoint, run, batches, len(seeds))


@torch.no_grad()
def with_increments(
    denoiser: Denoiser,
    stats: PathStatistics,
    *,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    group: Any = None,
) -> PathStatistics:
    """These statistics with increments and responses; if they were not kept, the paths are followed once more.

    Arguments and errors are as in `measure`, but only the first process of a group gets the increments and responses.
    """
    if stats.increments is not None:
        return stats
    batches = Batches.of(stats.shape, stats.seeds, batch_size, checkpoint, checks=False, progress=False)
    run = Measurement(denoiser, stats.s, *placement(denoiser, device, dtype), stats.deviated, keep_vectors=True)
    begun = lambda: (check_same_network(denoiser, stats, device, dtype), resumed(checkpoint, run, batches))
    check_calls, found = prepare_together(begun, group)
    again = measured_in_group(run, batches, found, group, vectors="first")
    return replace(
        stats,
        increments=again.increments,
        responses=again.responses,
        model_calls=stats.model_calls + again.model_calls + check_calls,
    )


@torch.no_grad()
def check_same_network(
    denoiser: Denoiser,
    stats: PathStatistics,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> int:
    """Check by one call that the denoiser is that of ``stats``; ValueError if not, or if it is in training mode.

    Returns:
        Network evaluations spent: 1, or 0 if the statistics have no fingerprint.
    """
    check_evaluation_mode(denoiser.network)
    if stats.fingerprint is None:
        return 0
    device, dtype = placement(denoiser, device, dtype)
    with unchanged_buffers(denoiser.network):
        found = fingerprint(denoiser, stats.shape, device, dtype)
    if not same_network(stats.fingerprint, found, dtype):
        raise ValueError(
            "stats were measured on another network, or with another parameterisation or dtype: the denoiser gives "
            "different outputs for the same input"
        )
    return 1


def check_same_process(stats: PathStatistics, own: NoiseProcess) -> None:
    """ValueError unless statistics are of a model's ``own`` noise process, whatever the range of its levels.

    Without runs a schedule follows from the statistics alone, and its timesteps would be those of another table.
    """
    known, other = stats.process, None
    times, own_times = known.timestep(stats.s), own.timestep(stats.s)
    if known.kind != own.kind:
        other = f"{known.kind!r}, not {own.kind!r}"
    elif times is not None and own_times is not None:
        rounded = known.integer_timesteps or own.integer_timesteps
        apart = float((times - own_times).abs().max()) > SAME_TIMES * float(times.abs().max()) + 0.5 * rounded
        other = "with other timesteps (another table, or scale or direction of time)" if apart else None
    if other is not None:
        raise ValueError(f"stats are of another noise process than this model's: {other}; measure again")


def measured_levels(denoiser: Denoiser, levels: int | Tensor | Sequence[float]) -> Tensor:
    """The levels to measure at, float64 [N], from their number or a list of them; errors as in `measure`."""
    is_denoiser("denoiser", denoiser)
    given = validate.levels("levels", levels)
    if not isinstance(given, Tensor):
        s = denoiser.levels(given)
        if bool((s[1:] > (1 - CLOSEST_EVEN) * s[:-1]).any()):
            low, high = float(s[-1]), float(s[s.isfinite()][0])
            raise ValueError(
                f"levels must be fewer than {len(s)}: from {high!r} to {low!r}, that of the noise process, they are "
                "so close that the changes between them are mostly rounding; is this range right?"
            )
        return s
    s = denoiser.process.nearest(given)  # a network may not know others
    if not bool((s[1:] < s[:-1]).all()):
        raise ValueError("levels must be at different integer timesteps, as this network knows no others")
    close = (s[1:] > (1 - CLOSEST) * s[:-1]).nonzero()
    if len(close):
        k = int(close[0])
        raise ValueError(
            f"levels must be at least {CLOSEST:.1%} apart, but levels[{k + 1}] = {float(s[k + 1])!r} follows "
            f"{float(s[k])!r}: the change between them is mostly rounding; leave one of them out"
        )
    check_near("levels", denoiser.process, s)
    return s
