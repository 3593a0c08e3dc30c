"""The result of every cost estimate: the cost of steps between noise levels, with its standard errors."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fastsched import validate
from fastsched.denoisers.noise import NoiseProcess
from fastsched.measurement.fingerprints import same_network
from fastsched.sampling.read_only import ReadOnlyTensors


class ModelCalls(NamedTuple):
    """Evaluations of the network, counted per sample.

    Attributes:
        forward: Plain evaluations.
        jvp: Forward-mode derivatives along one direction.
        gradient: Reverse-mode derivatives of a scalar.
    """

    forward: int
    jvp: int = 0
    gradient: int = 0


@dataclass(frozen=True, eq=False)
class CostMatrix(ReadOnlyTensors):
    """The cost of stepping between noise levels, estimated as a mean over samples.

    Attributes:
        name: The cost that was estimated.
        process: The noise process the levels belong to.
        s: Levels, noisiest first, [N] float64.
        pairs: The steps (from, to) as level indices, from < to, [P, 2] int64.
        per_sample: The cost of each of them for each sample, [B, P] float64.
        order: ``p`` in ``cost ~ delta * step^p``, for short steps.
        calls: The model calls that the estimate took.
        seeds: The seed of each sample, [B] int64 (`fastsched.sampling.random_streams`); None if not known.
        fingerprint: The network's fingerprint (`fastsched.measurement.fingerprints`); None if not known.
    """

    name: str
    process: NoiseProcess
    s: Tensor = field(repr=False)
    pairs: Tensor = field(repr=False)
    per_sample: Tensor = field(repr=False)
    order: int
    calls: ModelCalls
    seeds: Tensor | None = field(default=None, repr=False)
    fingerprint: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "s", validate.descending_sigmas("s", self.s))
        pairs, found = self.pairs, tuple(self.per_sample.shape)
        steps = pairs.dtype == torch.int64 and pairs.ndim == 2 and pairs.shape[1] == 2
        if not (steps and bool(((pairs[:, 0] >= 0) & (pairs[:, 0] < pairs[:, 1]) & (pairs[:, 1] < len(self.s))).all())):
            raise ValueError(f"pairs must be steps (from, to) between {len(self.s)} levels, [P, 2] int64, from < to")
        if len(found) != 2 or found[0] == 0 or found[1] != len(pairs):
            raise ValueError(f"per_sample must have a cost for each sample and step, [B, {len(pairs)}], got {found}")
        for name in ("pairs", "per_sample"):
            object.__setattr__(self, name, getattr(self, name))  # a copy

    @property
    def sigmas(self) -> Tensor:
        """The levels as sampler sigmas, [N] float64."""
        return self.process.sampler_sigma(self.s)

    @property
    def model_calls(self) -> int:
        """Evaluations of all kinds together; `calls` has each kind."""
        return sum(self.calls)

    @cached_property
    def matrix(self) -> Tensor:
        """Mean cost, row = from, column = to, [N, N] float64; 0 on the diagonal, NaN where not computed."""
        matrix = self._scatter(self.per_sample.mean(0))
        return matrix.fill_diagonal_(0.0)

    @cached_property
    def stderr(self) -> Tensor:
        """Standard error of `matrix`, [N, N] float64; NaN where not computed and for a single sample."""
        samples = len(self.per_sample)
        nan = torch.full_like(self.per_sample[0], torch.nan)
        spread = self.per_sample.std(0) if samples > 1 else nan  # torch.std of one sample would warn
        return self._scatter(spread / samples**0.5).fill_diagonal_(0.0)

    @property
    def adjacent(self) -> Tensor:
        """The cost of each step between neighbouring levels, [N-1] float64."""
        return self.matrix.diagonal(1)

    @property
    def lengths(self) -> Tensor:
        """``adjacent ** (1/p)``, [N-1]: the lengths that Algorithm 1 of the paper sums; negative costs count as 0."""
        return self.adjacent.clamp_min(0).pow(1 / self.order)

    def merge(self, other: CostMatrix) -> CostMatrix:
        """The cost from the samples of both estimates, in this order.

        Args:
            other: An estimate of the same cost of the same model, from other samples (``samples=range(a, b)``).

        Raises:
            TypeError: If ``other`` is no cost.
            ValueError: If ``other`` is of another cost, network, levels or steps, or repeats a sample.
        """
        is_cost("other", other)
        same = (self.name, self.process) == (other.name, other.process) and torch.equal(self.s, other.s)
        if not (same and torch.equal(self.pairs, other.pairs)):
            raise ValueError(
                f"other must be the same cost, {self.name}, of the same levels and steps, got {other.name}"
            )
        if not same_network(self.fingerprint, other.fingerprint):
            raise ValueError("other is of another network, which gave different outputs for the same input")
        seeds = None if self.seeds is None or other.seeds is None else torch.cat([self.seeds, other.seeds])
        repeated = 0 if seeds is None else len(seeds) - len(seeds.unique())
        if repeated:
            raise ValueError(f"other repeats {repeated} of these samples; estimate it from others")
        calls = ModelCalls(*(own + their for own, their in zip(self.calls, other.calls, strict=True)))
        known = self.fingerprint if self.fingerprint is not None else other.fingerprint
        samples = torch.cat([self.per_sample, other.per_sample])
        return replace(self, per_sample=samples, calls=calls, seeds=seeds, fingerprint=known)

    def _scatter(self, values: Tensor) -> Tensor:
        # NaN, not 0, where nothing was computed, so that no schedule can use such a step unnoticed.
        full = values.new_full((len(self.s), len(self.s)), torch.nan)
        full[self.pairs[:, 0], self.pairs[:, 1]] = values
        return full


def is_cost(name: str, value: object) -> CostMatrix:
    """TypeError unless the argument is a `CostMatrix`."""
    return validate.instance(name, value, CostMatrix, "fastsched.costs.klub and others return one")


def check_costs(cost: CostMatrix) -> None:
    """ValueError if no schedule follows from a cost."""
    means = cost.per_sample.mean(0)
    if not bool(means.isfinite().all()):
        start = float(cost.sigmas[cost.pairs[~means.isfinite(), 0].min()])
        raise ValueError(
            f"cost must be finite, but has NaN or inf at the step from sigma {start:g}; estimate it in float64, or "
            "without the levels there"
        )
    if not bool((means > 0).any()):
        raise ValueError("cost must be above 0 at a step, but no estimate is; take more samples")
