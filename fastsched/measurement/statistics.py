"""The result of a measurement, from which a schedule can be chosen for any solver and number of steps."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastsched import validate
from fastsched.denoisers.noise import NoiseProcess
from fastsched.measurement.deviated_paths import DeviatedPath
from fastsched.measurement.fingerprints import same_network
from fastsched.measurement.statistics_checks import TENSORS, VECTORS, check_form, check_values
from fastsched.measurement.statistics_files import read_statistics, write_statistics
from fastsched.sampling import display
from fastsched.sampling.origin import Origin, call_difference
from fastsched.sampling.read_only import ReadOnlyTensors

#: Tensors with a row for each sample.
PER_SAMPLE = ("seeds", "gram", "ends", "response_cross", "response_gram", "increments", "responses")


@dataclass(frozen=True, eq=False, repr=False)
class PathStatistics(ReadOnlyTensors):
    """Statistics of the denoiser along the probability-flow paths of B samples, over N levels.

    Values are kept per sample, so that weights, standard errors and refinements need no further model call.

    Attributes:
        process: The noise process the levels belong to.
        s: Levels, noisiest first, [N] float64; the path has one more, level N at ``s = 0``.
        shape: The shape of one sample; ``d`` elements.
        seeds: The seed of each path's noise, [B] int64 (`fastsched.sampling.random_streams.noise_of`).
        gram: ``<e_p, e_q>`` of the increments ``e_q = D_{q+1} - D_q``, [B, N-1, N-1] float64.
        ends: Where each path ends, ``z_N = D_{N-1}``, [B, *shape] float32.
        data_std: Root mean square of the ends about their mean; an estimate of the data's deviation.
        model_calls: Network evaluations spent; a batch of B counts as B.
        deviated: The deviated paths; none if responses were not measured.
        response_cross: ``<r_i, e_q>`` of the responses ``r`` of the deviated paths, one path after the other,
            [B, R, N-1] float64; None without responses.
        response_gram: ``<r_i, r_j>``, [B, R, R] float64; None without responses.
        increments: The ``e_q`` themselves, [B, N-1, d] float32, if they were kept; saved only with ``vectors=True``.
        responses: The ``r_i`` themselves, [B, R, d] float32, if they were kept; saved only with ``vectors=True``.
        fingerprint: The network's fingerprint (`fastsched.measurement.fingerprints`); None if not known.
        origin: What was measured, and when; None if not known.
        changes: Pairs of neighbouring levels ``s`` between which a pipeline changes what it computes, noisiest first:
            a noise level in between starts or ends its guidance or a prompt.
    """

    uncopied = ("ends", *VECTORS)

    process: NoiseProcess
    s: Tensor
    shape: tuple[int, ...]
    seeds: Tensor
    gram: Tensor
    ends: Tensor
    data_std: float
    model_calls: int
    deviated: tuple[DeviatedPath, ...] = ()
    response_cross: Tensor | None = None
    response_gram: Tensor | None = None
    increments: Tensor | None = None
    responses: Tensor | None = None
    fingerprint: Tensor | None = None
    origin: Origin | None = None
    changes: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", validate.sample_shape("shape", self.shape))
        try:
            check_form(self)
        except (TypeError, ValueError) as error:
            raise type(error)(f"PathStatistics {error}") from None
        for name in TENSORS:
            object.__setattr__(self, name, getattr(self, name))  # a copy, unless it is large

    @property
    def vector_gram(self) -> Tensor:
        """Gram matrix of the increments and the responses together, [B, V, V] float64."""
        if self.response_cross is None or self.response_gram is None:
            return self.gram
        above = torch.cat([self.gram, self.response_cross.mT], dim=2)
        return torch.cat([above, torch.cat([self.response_cross, self.response_gram], dim=2)], dim=1)

    @property
    def levels(self) -> int:
        """N, the number of levels above sigma 0."""
        return len(self.s)

    @property
    def samples(self) -> int:
        """B, the number of paths."""
        return len(self.seeds)

    @property
    def dimension(self) -> int:
        """d, the number of elements of one sample."""
        return math.prod(self.shape)

    @property
    def finite_range(self) -> tuple[float, float]:
        """The lowest and the highest finite level: without pure noise."""
        finite = self.s[self.s.isfinite()]
        return float(finite[-1]), float(finite[0])

    @property
    def sigmas(self) -> Tensor:
        """The levels as sampler sigmas, with the end, 0: [N + 1] float64."""
        sigmas = self.process.sampler_sigma(self.s)
        return torch.cat([sigmas, sigmas.new_zeros(1)])

    def __repr__(self) -> str:
        has = "with" if self.deviated else "without"
        return (
            f"PathStatistics({self.process.kind}, {self.levels} levels, {self.samples} samples of {self.shape}, "
            f"{has} responses, {self.model_calls} model calls{'' if self.origin is None else f', of {self.origin}'})"
        )

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same measurement: the same paths of one process, with the same results."""
        if not isinstance(other, PathStatistics):
            return NotImplemented
        plain = [(one.process, one.shape, one.deviated) for one in (self, other)]
        names = ("s", "seeds", "gram", "ends", "response_cross", "response_gram")
        return plain[0] == plain[1] and all(_same(getattr(self, name), getattr(other, name)) for name in names)

    def __hash__(self) -> int:
        return hash((self.shape, self.deviated, tuple(self.s.tolist()), tuple(self.seeds.tolist())))

    def _repr_html_(self) -> str:
        rows = {
            "noise levels": f"{self.levels}, from {float(self.sigmas[0]):.4g} to {float(self.sigmas[-2]):.4g}",
            "samples": f"{self.samples} of shape {self.shape}",
            "responses": "measured" if self.deviated else "not measured",
            "model calls": self.model_calls,
            "of": self.origin,
        }
        return display.table(f"PathStatistics: {self.process.kind}", rows)

    def plot(self) -> Any:
        """A matplotlib figure of the cost density over sigma.

        Raises:
            ImportError: If matplotlib is missing.
        """
        return display.figure("plot_cost_density", self)

    def schedule_origin(self, spent: int = 0) -> Origin | None:
        """The origin of a schedule that is chosen from these statistics, with ``spent`` more model calls."""
        return None if self.origin is None else replace(self.origin, model_calls=self.model_calls + spent)

    def select(self, samples: Sequence[int] | Tensor) -> PathStatistics:
        """The statistics of some of the samples, by index (for jackknives and convergence checks).

        Raises:
            TypeError: If ``samples`` are not indices.
            ValueError: If an index is out of range.
        """
        rows = self._rows(samples)
        known = {name: value[rows] for name in PER_SAMPLE if (value := getattr(self, name)) is not None}
        return replace(self, **known, data_std=data_deviation(known["ends"]))

    def _rows(self, samples: Sequence[int] | Tensor) -> Tensor:
        try:
            rows = torch.as_tensor(samples, device="cpu")
        except (TypeError, ValueError, RuntimeError, OverflowError):
            rows = torch.empty(0, device="cpu")
        if rows.ndim != 1 or rows.numel() == 0 or rows.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"samples must be a list of indices, got {validate.shown(samples)}")
        if not bool(((rows >= -self.samples) & (rows < self.samples)).all()):
            raise ValueError(f"samples must be indices below {self.samples}, got {validate.shown(samples)}")
        return rows.long()

    def merge(self, other: PathStatistics) -> PathStatistics:
        """These samples and those of another measurement of the same denoiser on the same levels.

        Warns if it is not known whether the denoiser is the same: there is no fingerprint with ``checks=False``.

        Raises:
            ValueError: If process, levels, shape, deviated paths, network, dtype or a pipeline's call differ, or if a
                seed is in both (its path would count twice; measure more samples with another ``seed``).
        """
        is_statistics("other", other)
        found = merged(self, other)
        unknown = [each for each in (self, other) if each.fingerprint is None]
        if any(each.origin is None or each.origin.fingerprint is None for each in unknown):  # pipelines have it there
            validate.warn(
                "merged without knowing whether both statistics are of one network: those measured with checks=False "
                "hold no fingerprint of it"
            )
        return found

    def save(self, path: str | os.PathLike[str], *, vectors: bool = False) -> None:
        """Write to a safetensors file; an existing file is replaced only when the new one is complete.

        Args:
            path: The file.
            vectors: Whether to write increments and responses too.

        Raises:
            ValueError: If the file holds a schedule or the runs of a fit, which no statistics replace.
        """
        validate.arguments(locals())
        write_statistics(self, path, vectors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PathStatistics:
        """Read a file written by `save`.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is truncated, was changed, holds something else, or comes from a newer version.
        """
        validate.arguments(locals())
        return read_statistics(cls, path)


def merged(one: PathStatistics, other: PathStatistics) -> PathStatistics:
    """`PathStatistics.merge`, without its warning: for parts of one measurement."""
    if one.process != other.process or not torch.equal(one.s, other.s) or one.shape != other.shape:
        raise ValueError("other was measured on another noise process, other levels or another shape")
    ours, theirs = (each.origin or Origin() for each in (one, other))
    if None not in (ours.dtype, theirs.dtype) and ours.dtype != theirs.dtype:
        raise ValueError(f"other was measured in {theirs.dtype}, and these statistics in {ours.dtype}")
    if not same_network(one.fingerprint, other.fingerprint):
        raise ValueError("other was measured on another network, which gave different outputs for the same input")
    what = call_difference(ours.fingerprint, theirs.fingerprint, any_dtype=False)
    if what is not None:
        raise ValueError(f"other must be of {what}, as these statistics are ({ours}), but is not ({theirs})")
    if one.deviated != other.deviated:
        raise ValueError("other must hold responses of the same deviated paths as these statistics")
    shared = sorted(set(one.seeds.tolist()) & set(other.seeds.tolist()))
    if shared:
        raise ValueError(f"other repeats {len(shared)} of these paths; measure it with another seed")
    joined: dict[str, Any] = {name: _joined(getattr(one, name), getattr(other, name)) for name in PER_SAMPLE}
    return replace(
        one,
        **joined,
        data_std=data_deviation(joined["ends"]),
        model_calls=one.model_calls + other.model_calls,
        fingerprint=one.fingerprint if one.fingerprint is not None else other.fingerprint,
        origin=one.origin if one.origin is not None else other.origin,
        changes=tuple(sorted({*one.changes, *other.changes}, reverse=True)),
    )


def with_vectors(stats: PathStatistics, vectors: Tensor | None) -> PathStatistics:
    """Statistics whose increments and responses are ``vectors`` [B, V, d], in this order; or which hold none."""
    n = stats.levels - 1
    increments, responses = (None, None) if vectors is None else (vectors[:, :n], vectors[:, n:])
    return replace(stats, increments=increments, responses=responses if stats.deviated else None)


def is_statistics(name: str, value: object) -> PathStatistics:
    """TypeError unless the argument is `PathStatistics`; ValueError unless its numbers can be those of paths."""
    stats = validate.instance(name, value, PathStatistics, "fastsched.measure returns them")
    try:
        check_values(stats)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None
    return stats


validate.CHECKS["stats"] = is_statistics


def data_deviation(ends: Tensor) -> float:
    """Root mean square of ``ends`` [B, *shape] about the mean of all their elements.

    Elements that are 0 in every path are left out: a pipeline sets them
    (`fastsched.diffusers.watching.step_checks.held_at_zero`).
    """
    kept = ends.any(0)  # one mask for all paths, and no copy where it holds all elements
    if bool(kept.any()) and not bool(kept.all()):
        ends = ends[:, kept]
    return float((ends.double() - ends.double().mean()).square().mean().sqrt())


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def _joined(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Rows of both, or None where one has none; without a copy where ``other`` follows ``one`` in memory."""
    if one is None or other is None:
        return None
    rest, offset = one.shape[1:], one.storage_offset() + len(one) * one.stride(0)
    same = one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() and one.dtype == other.dtype
    if same and other.shape[1:] == rest and other.stride() == one.stride() and other.storage_offset() == offset:
        return one.as_strided((len(one) + len(other), *rest), one.stride(), one.storage_offset())
    return torch.cat([one, other])
