"""What one measurement leaves behind: enough to choose a schedule for any solver and number of steps."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsched.denoisers.noise import NoiseProcess, process_from_dict
from fastsched.measurement.deviated_paths import DeviatedPath, asked_levels
from fastsched.sampling.files import write_whole

FORMAT = "fastsched.path_statistics"
VERSION = 2

#: Tensors of version 1 that are not used any more: how errors are passed on was measured otherwise.
FORMER = ("cross", "w_squared")


@dataclass(frozen=True, eq=False, repr=False)
class PathStatistics:
    """Statistics of the denoiser along the probability-flow paths of B samples, over N levels.

    Rows are kept per sample, so that weights, standard errors and refinements need no further model call.

    Attributes:
        process: The noise process the levels belong to.
        s: Levels, noisiest first, [N] float64; the path has one more, level N at ``s = 0``.
        shape: The shape of one sample; ``d`` elements.
        seeds: The seed of each path's noise, [B] int64 (`fastsched.measurement.measuring.noise_of`).
        gram: ``<e_p, e_q>`` of the increments ``e_q = D_{q+1} - D_q``, [B, N-1, N-1] float64.
        ends: Where each path ends, ``z_N = D_{N-1}``, [B, *shape] float32.
        data_std: Root mean square of the ends about their mean; an estimate of the data's deviation.
        model_calls: Network evaluations spent, counted per sample.
        deviated: The deviated paths; none if responses were not measured.
        response_cross: ``<r_i, e_q>`` of the responses ``r`` of the deviated paths, one path after the other, [B, R, N-1]
            float64; None without responses.
        response_gram: ``<r_i, r_j>``, [B, R, R] float64; None without responses.
        increments: The ``e_q`` themselves, [B, N-1, d] float32, if they were kept; not saved.
        responses: The ``r_i`` themselves, [B, R, d] float32, if they were kept; not saved.
    """

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
        return int(np.prod(self.shape))

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
        swept = "with" if self.deviated else "without"
        return (
            f"PathStatistics({self.process.kind}, {self.levels} levels, {self.samples} samples of {self.shape}, "
            f"{swept} responses, {self.model_calls} model calls)"
        )

    def select(self, samples: Sequence[int] | Tensor) -> PathStatistics:
        """The statistics of some of the samples, by index (for jackknives and convergence checks)."""
        rows = torch.as_tensor(samples, dtype=torch.long)
        return replace(
            self,
            seeds=self.seeds[rows],
            gram=self.gram[rows],
            ends=self.ends[rows],
            data_std=data_deviation(self.ends[rows]),
            increments=None if self.increments is None else self.increments[rows],
            response_cross=None if self.response_cross is None else self.response_cross[rows],
            response_gram=None if self.response_gram is None else self.response_gram[rows],
            responses=None if self.responses is None else self.responses[rows],
        )

    def merge(self, other: PathStatistics) -> PathStatistics:
        """These samples and those of another measurement of the same denoiser on the same levels.

        Raises:
            ValueError: If process, levels, shape or deviated paths differ, or a seed is in both
                (its path would count twice; measure more samples with another ``seed``).
        """
        if self.process != other.process or not torch.equal(self.s, other.s) or self.shape != other.shape:
            raise ValueError("other was measured on another noise process, other levels or another shape")
        if self.deviated != other.deviated:
            raise ValueError("other must hold responses of the same deviated paths as these statistics")
        shared = sorted(set(self.seeds.tolist()) & set(other.seeds.tolist()))
        if shared:
            raise ValueError(f"other repeats {len(shared)} of these paths; measure it with another seed")
        ends = torch.cat([self.ends, other.ends])
        return replace(
            self,
            seeds=torch.cat([self.seeds, other.seeds]),
            gram=torch.cat([self.gram, other.gram]),
            ends=ends,
            data_std=data_deviation(ends),
            model_calls=self.model_calls + other.model_calls,
            response_cross=_joined(self.response_cross, other.response_cross),
            response_gram=_joined(self.response_gram, other.response_gram),
            increments=_joined(self.increments, other.increments),
            responses=_joined(self.responses, other.responses),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file; an existing file is replaced only when the new one is whole."""
        from safetensors.torch import save

        tensors = {"s": self.s, "seeds": self.seeds, "gram": self.gram, "ends": self.ends}
        if self.response_cross is not None and self.response_gram is not None:
            tensors |= {"response_cross": self.response_cross, "response_gram": self.response_gram}
        header: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "process": self.process.to_dict(),
            "data_std": self.data_std,
            "model_calls": self.model_calls,
            "deviated": [[path.hold, path.order] for path in self.deviated],
        }
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_whole(path, save(contiguous, metadata={"fastsched": json.dumps(header)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PathStatistics:
        """Read a file written by `save`.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is truncated, holds something else, or comes from a newer version.
        """
        from safetensors import SafetensorError, safe_open

        name = os.fspath(path)
        if not os.path.exists(name):
            raise FileNotFoundError(f"no such statistics file: {name}")
        try:
            with safe_open(name, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("fastsched", "{}"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, json.JSONDecodeError, OSError) as error:
            raise ValueError(f"{name} is not a whole safetensors file ({error}); measure again") from None
        return cls._from_file(name, header, tensors)

    @classmethod
    def _from_file(cls, name: str, header: dict[str, Any], tensors: dict[str, Tensor]) -> PathStatistics:
        if header.get("format") != FORMAT:
            raise ValueError(f"{name} does not hold path statistics; fastsched measure writes them")
        if header.get("version", 0) > VERSION:
            raise ValueError(
                f"{name} has version {header['version']}, newer than {VERSION}, the newest known here; update fastsched"
            )
        try:
            statistics = cls(
                process=process_from_dict(header["process"]),
                shape=tuple(tensors["ends"].shape[1:]),
                data_std=float(header["data_std"]),
                model_calls=int(header["model_calls"]),
                deviated=tuple(DeviatedPath(int(hold), int(order)) for hold, order in header.get("deviated", [])),
                **{name: tensor for name, tensor in tensors.items() if name not in FORMER},
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{name} lacks an entry of path statistics: {error}") from None
        statistics._check_shapes(name)
        return statistics

    def _check_shapes(self, name: str) -> None:
        b, n = len(self.seeds), len(self.s)
        rows = len(self.deviated) * len(asked_levels(n))
        expected = {
            "gram": (b, n - 1, n - 1),
            "response_cross": (b, rows, n - 1),
            "response_gram": (b, rows, rows),
        }
        for field, shape in expected.items():
            value = getattr(self, field)
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(f"{name}: {field} has shape {tuple(value.shape)}, not {shape}")
        for field in expected:
            value = getattr(self, field)
            if value is not None and not bool(value.isfinite().all()):
                raise ValueError(f"{name}: {field} holds NaN or inf; measure again")
        if len(self.ends) != b:
            raise ValueError(f"{name}: ends holds {len(self.ends)} samples, not {b}")


def data_deviation(ends: Tensor) -> float:
    """Root mean square of ``ends`` [B, *shape] about the mean of all their elements."""
    return float((ends.double() - ends.double().mean()).square().mean().sqrt())


def _joined(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Rows of both, or None where one has none."""
    return None if one is None or other is None else torch.cat([one, other])
