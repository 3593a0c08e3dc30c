"""Converged samples: the reference of comparisons."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from fastsched import validate
from fastsched.denoisers.denoiser import Denoiser, placement
from fastsched.denoisers.network_state import check_evaluation_mode
from fastsched.denoisers.noise import NoiseProcess, VariancePreserving
from fastsched.measurement.batches import attach_finished
from fastsched.measurement.checks.network_warnings import warned_of_faults
from fastsched.sampling.progress import Progress, progress_bar
from fastsched.sampling.random_streams import noise_of, sample_seeds
from fastsched.sampling.sampler import sample
from fastsched.sampling.schedule import Schedule
from fastsched.sampling.solvers import Solver, get_solver

#: Steps of the reference. On a Gaussian mixture, dpmpp_2m with this many steps has a typical squared distance to the
#: limit of 3e-7, half of which is float32's rounding; the best eight-step schedule has 6e-3.
REFERENCE_STEPS, REFERENCE_SOLVER = 300, "dpmpp_2m"

#: The index of a comparison's first noise among the noises of a seed. Measurements start at 0, so schedules are not
#: compared on the noises with which they were chosen.
FIRST_SAMPLE = 2**31


@dataclass(frozen=True, eq=False)
class Reference:
    """Converged samples and their noise, for any number of comparisons of one denoiser.

    Attributes:
        noise: Standard normal, [B, *shape] float32.
        ends: The converged samples ``x0`` from that noise, [B, *shape].
        solver: The solver they were computed with.
        steps: Its number of steps, uniform in ``log s``.
        model_calls: Network evaluations of the run; a batch of B counts as B.
        fingerprint: The network's (`fastsched.measurement.fingerprints`), by one call more; None if it is not known.
    """

    noise: Tensor = field(repr=False)
    ends: Tensor = field(repr=False)
    solver: str
    steps: int
    model_calls: int
    fingerprint: Tensor | None = field(default=None, repr=False)


@torch.no_grad()
def converged_reference(
    denoiser: Denoiser,
    shape: Sequence[int],
    *,
    samples: int | range = 256,
    seed: int = 0,
    steps: int = REFERENCE_STEPS,
    solver: str | Solver = REFERENCE_SOLVER,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress = True,
) -> Reference:
    """Converged samples: many steps of ``solver``, uniform in ``log s`` over the denoiser's whole range, then 0.

    Their squared distance to the limit of infinitely many steps is of order ``steps^-4`` for a second-order solver.

    Args:
        denoiser: The denoiser to sample from.
        shape: The shape of one sample, without the batch.
        samples: The number of samples, or a range of sample indices.
        seed: The seed of the noises, which differ from those of `fastsched.measure` with any seed.
        steps: The number of steps. A network with integer timesteps gets at most one step per timestep.
        solver: A solver's name.
        batch_size: Samples per batch; all of them when None.
        device: Where to run; where the network's parameters are when None.
        dtype: The dtype that the network computes in; the dtype of its parameters when None.
        progress: Show a progress bar, or a function called with the model calls done and their total.

    Returns:
        The noises and the samples, on the CPU.

    Raises:
        ValueError: If an argument is out of range or unknown, or the network returns NaN or inf. Later errors and
            Ctrl-C carry the samples of the finished batches as ``error.partial``.
    """
    validate.arguments(locals())
    check_evaluation_mode(denoiser.network)
    method = get_solver(solver)
    noise, place = _noise_of(shape, samples, seed), placement(denoiser, device, dtype)
    fine = fine_sigmas(denoiser, validate.positive_int("steps", steps, minimum=2))
    sampled = partial(sampled_in_batches, denoiser, noise, batch_size, *place)
    with warned_of_faults(denoiser, tuple(noise.shape[1:]), batch_size or len(noise), *place) as known:
        return converged(sampled, fine, method, noise, progress, known)


def _noise_of(shape: Sequence[int], samples: int | range, seed: int) -> Tensor:
    """The noises of a comparison, on the CPU; each batch goes to the device when its turn comes."""
    seeds = sample_seeds(seed, validate.sample_range("samples", samples)) + FIRST_SAMPLE
    return noise_of(seeds, validate.sample_shape("shape", shape))


def shared_noise(shape: Sequence[int] | None, samples: int | range, seed: int, reference: Reference | None) -> Tensor:
    """The noise of a reference, which may be given; ValueError if ``shape`` is missing or is another one."""
    if reference is None:
        if shape is None:
            raise ValueError("shape must be given, such as (4, 64, 64) for one sample, unless there is a reference")
        return _noise_of(shape, samples, seed)
    if shape is not None and tuple(shape) != tuple(reference.noise.shape[1:]):
        raise ValueError(f"shape {tuple(shape)} is not that of the reference, {tuple(reference.noise.shape[1:])}")
    return reference.noise


def fine_sigmas(denoiser: Denoiser, steps: int) -> Tensor:
    """The sampler sigmas of converged samples: ``steps`` levels, or as many as there are, and 0."""
    levels = denoiser.levels(level_count(denoiser.process, steps))
    return denoiser.process.sampler_sigma(torch.cat([levels, levels.new_zeros(1)]))


def converged(
    sampled: Callable[..., Iterator[Tensor]],
    sigmas: Tensor,
    method: Solver,
    noise: Tensor,
    progress: Progress,
    known: Tensor | None,
) -> Reference:
    """Converged samples over ``sigmas``, by `sampled_in_batches` of a network whose fingerprint is ``known``.

    An exception carries those of the finished batches as ``error.partial``.
    """
    steps, found = len(sigmas) - 1, list[Tensor]()
    calls = method.model_calls(steps)
    of = lambda ends: Reference(noise[: len(ends)], ends, method.name, steps, calls * len(ends), known)
    try:
        with progress_bar(calls * len(noise), progress, "converged reference") as advance:
            found.extend(sampled(sigmas, method, advance))
    except BaseException as error:  # also Ctrl-C
        if found:
            attach_finished(error, of(torch.cat(found)))
        raise
    return of(torch.cat(found))


def sampled_in_batches(
    denoiser: Denoiser,
    noise: Tensor,
    batch_size: int | None,
    device: torch.device,
    dtype: torch.dtype,
    run: Schedule | Tensor,
    method: Solver,
    advance: Callable[[int], None],
) -> Iterator[Tensor]:
    """Samples on the CPU, batch by batch; ``advance`` gets the number of samples of every network call."""
    for part in noise.split(int(batch_size or len(noise))):
        progress = lambda calls, total, part=part: advance(len(part))
        yield sample(denoiser, run, method, part.to(device), dtype=dtype, progress=progress).cpu()


def level_count(process: NoiseProcess, steps: int) -> int:
    """``steps``, but at most the number of timesteps if the network accepts only integer timesteps."""
    if isinstance(process, VariancePreserving) and process.integer_timesteps:
        return min(steps, len(process.alphas_cumprod))
    return steps
