"""What one measurement leaves behind: enough to choose a schedule for any solver and number of steps."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsched import validate
from fastsched.denoisers.noise import NoiseProcess, process_from_dict

FORMAT = "fastsched.path_statistics"
VERSION = 1

#: Increments before a level that the directional sensitivity averages over.
DIRECTIONAL_WINDOW = 6


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
        cross: ``<w_k, e_q>`` at row ``k - 1``, for levels ``k = 1..N``, [B, N, N-1] float64; None without sensitivity.
        w_squared: ``||w_k||^2`` at row ``k - 1``, [B, N] float64; None without sensitivity.
        increments: The ``e_q`` themselves, [B, N-1, d] float32, if they were kept; not saved.
    """

    process: NoiseProcess
    s: Tensor
    shape: tuple[int, ...]
    seeds: Tensor
    gram: Tensor
    ends: Tensor
    data_std: float
    model_calls: int
    cross: Tensor | None = None
    w_squared: Tensor | None = None
    increments: Tensor | None = None

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
    def sigmas(self) -> Tensor:
        """The levels as sampler sigmas, with the end, 0: [N + 1] float64."""
        sigmas = self.process.sampler_sigma(self.s)
        return torch.cat([sigmas, sigmas.new_zeros(1)])

    @property
    def phi(self) -> Tensor:
        """Mean sensitivity ``phi_k = E ||w_k||^2 / d = E ||dz_N/dz_k||_F^2 / d``, [N + 1] float64.

        ``phi_N = 1``; ``phi_0`` is NaN, for no step ends at level 0 and the sweep stops short of it. A dimension
        in which the end does not depend on ``z_k`` counts 0.

        Raises:
            ValueError: If measured with ``sensitivity=None``.
        """
        _, w_squared = self._sensitivity()
        inner = w_squared[:, :-1].mean(0) / self.dimension
        return torch.cat([inner.new_full((1,), torch.nan), inner, inner.new_ones(1)])

    @property
    def psi(self) -> Tensor:
        """Sensitivity in the directions of the solver's errors, [N + 1] float64.

        ``psi_k = sum_q E <w_k, e_q>^2 / sum_q E ||e_q||^2`` over the last six increments that end at or before
        level k, divided by the same ratio at the end over all increments. That ratio is 1 in expectation
        (``w_N`` is the probe itself), so it is a control variate: where errors keep to one direction, as on
        Gaussian data, it removes the noise of the probes altogether. ``psi_N = 1`` and ``psi_0`` is NaN, as in `phi`.

        Raises:
            ValueError: If measured with ``sensitivity=None``.
        """
        cross, _ = self._sensitivity()
        squared, size = cross.square().mean(0), self.gram.diagonal(dim1=1, dim2=2).mean(0)
        at_end = float(squared[-1].sum() / size.sum()) if float(size.sum()) > 0 else 0.0
        values = [torch.nan]
        for k in range(1, self.levels):
            window = slice(max(0, k - DIRECTIONAL_WINDOW), k)
            total, share = float(size[window].sum()) * at_end, float(squared[k - 1, window].sum())
            # no increment there to tell a direction by (outputs rounded to half precision): the mean over all
            values.append(share / total if total > 0 and share > 0 else float(self.phi[k]))
        return torch.tensor([*values, 1.0], dtype=torch.float64)

    def _sensitivity(self) -> tuple[Tensor, Tensor]:
        if self.cross is None or self.w_squared is None:
            raise ValueError(
                "these statistics hold no sensitivity; measure with sensitivity='finite-difference' or 'jvp', "
                "or select with weight=None"
            )
        return self.cross, self.w_squared

    def __repr__(self) -> str:
        swept = "with" if self.cross is not None else "without"
        return (
            f"PathStatistics({self.process.kind}, {self.levels} levels, {self.samples} samples of {self.shape}, "
            f"{swept} sensitivity, {self.model_calls} model calls)"
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
            cross=None if self.cross is None else self.cross[rows],
            w_squared=None if self.w_squared is None else self.w_squared[rows],
            increments=None if self.increments is None else self.increments[rows],
        )

    def refine(self, parts: int) -> PathStatistics:
        """These statistics on a grid with every segment cut into ``parts``, equal in ``lambda``; no model calls.

        ``D`` is taken as linear in ``lambda`` within a segment, so that an increment splits into equal ones; so are the
        adjoint vectors. Increments that were kept are left out. A segment from pure noise is not cut.

        Raises:
            ValueError: If ``parts`` is below 1, or the network accepts only integer timesteps.
        """
        validate.positive_int("parts", parts)
        if getattr(self.process, "integer_timesteps", False):
            raise ValueError("parts must be 1 for a network that accepts only integer timesteps")
        lam = self.s.log()
        cuts = [1 if math.isinf(float(self.s[q])) else parts for q in range(self.levels - 1)]
        fine = [lam[q] + (lam[q + 1] - lam[q]) * m / cuts[q] for q in range(self.levels - 1) for m in range(cuts[q])]
        s = torch.stack([*fine, lam[-1]]).exp()
        s[torch.tensor([0, *np.cumsum(cuts)])] = self.s
        # split[q, q'] = 1/cuts where the fine segment q' lies in q; mix[k', k] interpolates levels 1 .. N
        split = torch.zeros(self.levels - 1, len(s) - 1, dtype=torch.float64)
        mix = torch.zeros(len(s), self.levels, dtype=torch.float64)
        position = 0
        for q, count in enumerate(cuts):
            split[q, position : position + count] = 1 / count
            for m in range(1, count + 1):
                mix[position + m - 1, max(q - 1, 0)] += 1 - m / count
                mix[position + m - 1, q] += m / count
            position += count
        mix[-1, -1] = 1.0
        return replace(
            self,
            s=s,
            gram=split.T @ self.gram @ split,
            cross=None if self.cross is None else mix @ self.cross @ split,
            w_squared=None if self.w_squared is None else self.w_squared @ mix.T,
            increments=None,
        )

    def merge(self, other: PathStatistics) -> PathStatistics:
        """These samples and those of another measurement of the same denoiser on the same levels.

        Raises:
            ValueError: If process, levels, shape or the presence of a sensitivity differ, or a seed is in both
                (its path would count twice; measure more samples with another ``seed``).
        """
        if self.process != other.process or not torch.equal(self.s, other.s) or self.shape != other.shape:
            raise ValueError("other was measured on another noise process, other levels or another shape")
        if (self.cross is None) != (other.cross is None):
            raise ValueError("other must hold a sensitivity exactly if these statistics do")
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
            cross=_joined(self.cross, other.cross),
            w_squared=_joined(self.w_squared, other.w_squared),
            increments=_joined(self.increments, other.increments),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file; an existing file is replaced only when the new one is whole."""
        from safetensors.torch import save_file

        tensors = {"s": self.s, "seeds": self.seeds, "gram": self.gram, "ends": self.ends}
        if self.cross is not None and self.w_squared is not None:
            tensors |= {"cross": self.cross, "w_squared": self.w_squared}
        header: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "process": self.process.to_dict(),
            "data_std": self.data_std,
            "model_calls": self.model_calls,
        }
        unfinished = f"{os.fspath(path)}.unfinished"
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, unfinished, metadata={"fastsched": json.dumps(header)})
        os.replace(unfinished, path)

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
                **tensors,
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{name} lacks an entry of path statistics: {error}") from None
        statistics._check_shapes(name)
        return statistics

    def _check_shapes(self, name: str) -> None:
        b, n = len(self.seeds), len(self.s)
        expected = {"gram": (b, n - 1, n - 1), "cross": (b, n, n - 1), "w_squared": (b, n)}
        for field, shape in expected.items():
            value = getattr(self, field)
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(f"{name}: {field} has shape {tuple(value.shape)}, not {shape}")
        for field in ("gram", "cross", "w_squared"):
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
