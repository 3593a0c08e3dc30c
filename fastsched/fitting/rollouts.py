"""Runs of the sampler from the noises of the measured paths, and the network evaluations on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastsched import validate
from fastsched.denoisers.deferred_checks import DeferredRead
from fastsched.denoisers.denoiser import Denoiser, placement
from fastsched.measurement.batches import is_out_of_memory
from fastsched.measurement.fingerprints import largest_difference
from fastsched.measurement.statistics import PathStatistics
from fastsched.metrics import rounding_floor, squared_distances
from fastsched.sampling.random_streams import noise_of
from fastsched.sampling.sampler import sample, schedule_solver
from fastsched.sampling.schedule import Schedule
from fastsched.sampling.solvers import Solver


@dataclass(frozen=True)
class Evaluations:
    """Inputs and outputs of the network in a run of the sampler."""

    s: tuple[float, ...]  #: the level of each evaluation, in order
    states: tuple[Tensor, ...]  #: ``y = z / s`` at each evaluation, [B, *shape]
    denoised: tuple[Tensor, ...]  #: ``D`` at each evaluation, [B, *shape]

    @classmethod
    def of(cls, calls: Sequence[tuple[float, Tensor, Tensor]]) -> Evaluations:
        """The evaluations from calls ``(s, y, D)``, in order."""
        s, states, denoised = zip(*calls, strict=True)
        return cls(s, states, denoised)


@dataclass(frozen=True)
class Rollout:
    """A run of the sampler from the noises of the measured paths."""

    ends: Tensor  #: where the samples ended, [B, *shape]
    evaluations: Evaluations | None = None  #: inputs and outputs of the network on the way; None if they were not kept

    def samples(self, first: int, last: int) -> Rollout:
        """The run of samples ``first .. last - 1`` alone."""
        found = self.evaluations
        if found is not None:
            some = lambda tensors: tuple(each[first:last] for each in tensors)
            found = Evaluations(found.s, some(found.states), some(found.denoised))
        return Rollout(self.ends[first:last], found)

    @classmethod
    def joined(cls, parts: Sequence[Rollout]) -> Rollout:
        """One run from the runs of batches of samples, in order."""
        found = [part.evaluations for part in parts if part.evaluations is not None]
        ends = torch.cat([part.ends for part in parts])
        if len(found) < len(parts):
            return cls(ends)
        join = lambda batches: tuple(torch.cat(each) for each in zip(*batches, strict=True))
        states, denoised = join([each.states for each in found]), join([each.denoised for each in found])
        return cls(ends, Evaluations(found[0].s, states, denoised))


#: ``run(schedule, first, last)`` runs a schedule for the measured samples ``first .. last - 1``; None if it cannot.
Run: TypeAlias = "Callable[[Schedule, int, int], Rollout | None]"

#: ``cache(schedule, first, last, make)`` returns a run from the cache, or makes it with ``make()`` and stores it.
RunCache: TypeAlias = "Callable[[Schedule, int, int, Callable[[], Rollout | None]], Rollout | None]"


@dataclass(frozen=True)
class RecordingDenoiser(Denoiser):
    """A denoiser that keeps its inputs and outputs on the CPU."""

    own: Denoiser | None = None  #: the denoiser that is called
    calls: list[tuple[float, DeferredRead, DeferredRead]] = field(default_factory=list)  #: ``(s, y, D)`` of each call

    @classmethod
    def of(cls, denoiser: Denoiser) -> RecordingDenoiser:
        """A recording denoiser that calls ``denoiser``."""
        return cls(**{each.name: getattr(denoiser, each.name) for each in fields(Denoiser)}, own=denoiser)

    def denoise(self, y: Tensor, s: Tensor | float, **options: Any) -> Tensor:
        """As `Denoiser.denoise`, but for one level only."""
        found = (self.own or super()).denoise(y, s, **options)
        self.calls.append((float(s), DeferredRead(y), DeferredRead(found)))
        return found

    def evaluations(self) -> Evaluations:
        """All evaluations so far; waits for the device."""
        return Evaluations.of([(s, y.values(), denoised.values()) for s, y, denoised in self.calls])


class Runner:
    """Runs a denoiser's sampler from the noises of the measured paths.

    ``advance`` is called after every batch with the model calls that it made, and ``cache`` to run every batch. With
    ``checks``, a run warns if its first outputs are not those of the measurement for the same noises.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        stats: PathStatistics,
        method: Solver,
        batch_size: int | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        checks: bool = True,
    ) -> None:
        self.denoiser, self.method = denoiser, method
        self.advance: Callable[[int], object] = lambda calls: None
        self.cache: RunCache = lambda schedule, first, last, make: make()
        self.device, self.dtype = placement(denoiser, device, dtype)
        self.noise = noise_of(stats.seeds, stats.shape)
        self.batch = stats.samples if batch_size is None else validate.positive_int("batch_size", batch_size)
        self._s, self._denoised = float(stats.s[0]), None  # the first measured level, and ``D`` there if it is known
        if checks and stats.increments is not None:
            self._denoised = stats.ends - stats.increments.sum(1).view_as(stats.ends)

    def __call__(self, schedule: Schedule, first: int, last: int) -> Rollout:
        """Run samples ``first .. last - 1`` with a schedule."""
        parts = []
        for start in range(first, last, self.batch):
            stop = min(start + self.batch, last)
            made = self.cache(schedule, start, stop, partial(self._batch, schedule, start, stop))
            assert made is not None  # a denoiser that cannot be run raises an error
            parts.append(made)
            self.advance((stop - start) * self.method.model_calls(schedule.steps))
        return Rollout.joined(parts)

    def _batch(self, schedule: Schedule, first: int, last: int) -> Rollout:
        noise, recorder = self.noise[first:last].to(self.device), RecordingDenoiser.of(self.denoiser)
        try:
            ends = sample(recorder, schedule, schedule_solver(schedule, self.method), noise, dtype=self.dtype).cpu()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise MemoryError(
                f"out of memory: {last - first} samples at once; lower batch_size (now {self.batch}), or run in 16 "
                "bits (dtype=torch.bfloat16)"
            ) from error
        found = recorder.evaluations()
        own = schedule.network_sigmas
        if self._denoised is not None and (own is None or bool(own[0] == schedule.sigmas[0])):
            self._check_start(self._denoised[first:last], found)
        return Rollout(ends, found)

    def _check_start(self, expected: Tensor, found: Evaluations) -> None:
        """Warn if the first outputs of a run are not the ``expected`` ones [B, *shape]; no call."""
        if not math.isclose(found.s[0], self._s, rel_tol=1e-9):
            return
        s = torch.tensor(self._s, dtype=torch.float64, device="cpu")
        x = float(self.denoiser.process.sigma(s)) * found.states[0]
        of_output = found.denoised[0] - float(self.denoiser.coefficients(s)[0]) * x  # c R, as large as its rounding
        norms = lambda values: values.flatten(1).norm(dim=1)
        size = torch.maximum(norms(found.denoised[0]), norms(of_output))
        if bool((norms(found.denoised[0] - expected) > largest_difference(self.dtype) * size).any()):
            self._denoised = None  # one warning is enough
            validate.warn(
                "the network's first outputs in a run of the sampler are not those of the measurement for the same "
                "noises, so the errors of schedules cannot be compared: it keeps a state between its calls (a cache, a "
                "counter?), is random at times, is being trained, or was measured with another parameterisation"
            )


def distances(stats: PathStatistics, ends: Tensor) -> Tensor:
    """Squared distances of ends [<= B, *shape] to the ends of the first measured paths, [<= B] float64.

    They are at least the rounding of the ends, because a distance of 0 would make a geometric mean 0.
    """
    return squared_distances(ends, stats.ends[: len(ends)]).clamp_min(rounding_of(stats))


def rounding_of(stats: PathStatistics) -> float:
    """The squared distance that float32 rounding of the ends causes, averaged over the samples."""
    return max(float(rounding_floor(stats.ends).mean()), torch.finfo(torch.float64).tiny)
