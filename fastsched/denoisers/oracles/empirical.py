"""A data set's own exact denoiser."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsched import validate
from fastsched.denoisers.oracles.base import Oracle, as_states, flat_states, level_column

_CHUNK_ELEMENTS = 1 << 23  # at most in the [B, chunk, d] differences that Empirical computes at once


@dataclass(frozen=True, eq=False)
class Empirical(Oracle):
    """A data set's own exact denoiser: data uniform over ``n`` given points.

    It minimises the training loss on these points, and its samples at level 0 are the points themselves
    (Karras et al. 2022, appendix B.3).

    Attributes:
        data: [n, *shape].
    """

    data: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", validate.finite("data", self.data).clone())

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.data.shape[1:])

    def denoise(self, z: Tensor, s: float | Tensor) -> Tensor:
        """``D = sum_n r_n x_n``, ``r = softmax(-|z - x_n|^2 / (2 s^2))``, shaped as ``z`` [B, *shape]."""
        _, data, logits, _ = self._prepare(z, s)
        return as_states(torch.softmax(logits, 1) @ data, z)

    def score(self, z: Tensor, s: float | Tensor) -> Tensor:
        """``(D - z) / s^2``, shaped as ``z`` [B, *shape]."""
        flat, data, logits, level = self._prepare(z, s)
        return as_states((torch.softmax(logits, 1) @ data - flat) / level**2, z)

    def log_density(self, z: Tensor, s: float | Tensor) -> Tensor:
        """``log (1/n) sum_n N(z; x_n, s^2 I)``, in nats, [B]."""
        _, data, logits, level = self._prepare(z, s)
        n, d = data.shape
        constant = math.log(n) + d * (0.5 * math.log(2 * math.pi) + torch.log(level[:, 0]))
        return (torch.logsumexp(logits, 1) - constant).to(z.dtype)

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(self.data), (n,), generator=generator, device="cpu")
        return self.data[chosen.to(self.data.device)]

    def _prepare(self, z: Tensor, s: float | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The states [B, d], data [n, d], logits [B, n] and levels [B or 1, 1]."""
        flat = flat_states(z, self.shape)
        level = level_column(s, z)
        data = self.data.to(flat).flatten(1)
        # Explicit differences: in |z|^2 - 2 z.x + |x|^2 rounding errors would exceed the result at low noise.
        rows = max(1, _CHUNK_ELEMENTS // max(1, flat.numel()))
        squares = [(flat[:, None, :] - part).square().sum(-1) for part in data.split(rows)]
        return flat, data, torch.cat(squares, 1) / (-2 * level**2), level
