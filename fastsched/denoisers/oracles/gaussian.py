"""Gaussian data, with closed forms of the ODE, of costs and of the best schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsched import validate
from fastsched.denoisers.oracles.base import (
    Oracle,
    as_float64,
    as_states,
    flat_states,
    level_column,
)


@dataclass(frozen=True, eq=False)
class Gaussian(Oracle):
    """Data ``N(mean, c^2 I)``, with closed forms of the ODE, of costs and of the best schedule.

    The marginal at level ``s`` is ``N(mean, (c^2 + s^2) I)``. Costs and lengths take levels as floats or tensors
    whose shapes broadcast, and are float64 tensors of that shape.

    Attributes:
        std: ``c``, the standard deviation of every element of the data.
        shape: Shape of one sample; ``d`` is its number of elements.
        mean: A float, or a tensor of shape ``shape``.
    """

    std: float
    shape: tuple[int, ...]
    mean: float | Tensor = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "std", validate.positive("std", self.std))
        sizes = (self.shape,) if isinstance(self.shape, int) else self.shape
        object.__setattr__(self, "shape", validate.sample_shape("shape", sizes))
        if isinstance(self.mean, Tensor):
            mean = validate.tensor("mean", self.mean).clone()
        else:
            mean = torch.tensor(validate.real("mean", self.mean), dtype=torch.float64, device="cpu")
        if mean.ndim > 0 and tuple(mean.shape) != self.shape:
            raise ValueError(f"mean has shape {tuple(mean.shape)}; expected a float or shape={self.shape}")
        if not bool(torch.isfinite(mean).all()):
            raise ValueError("mean must be finite")
        if mean.ndim > 0:
            object.__setattr__(self, "mean", mean)

    @property
    def d(self) -> int:
        """The number of elements of one sample."""
        return math.prod(self.shape)

    def denoise(self, z: Tensor, s: float | Tensor) -> Tensor:
        """``D = mean + c^2 / (c^2 + s^2) (z - mean)``, shaped as ``z`` [B, *shape]."""
        flat, level, mean = self._prepare(z, s)
        return as_states(mean + self.std**2 / (self.std**2 + level**2) * (flat - mean), z)

    def score(self, z: Tensor, s: float | Tensor) -> Tensor:
        """``(mean - z) / (c^2 + s^2)``, shaped as ``z`` [B, *shape]."""
        flat, level, mean = self._prepare(z, s)
        return as_states((mean - flat) / (self.std**2 + level**2), z)

    def log_density(self, z: Tensor, s: float | Tensor) -> Tensor:
        """``-|z - mean|^2 / (2 v) - d/2 log(2 pi v)`` with ``v = c^2 + s^2``, in nats, [B]."""
        flat, level, mean = self._prepare(z, s)
        variance = self.std**2 + level**2
        exponent = -((flat - mean).square() / (2 * variance)).sum(1)
        return (exponent - 0.5 * self.d * torch.log(2 * math.pi * variance[:, 0])).to(z.dtype)

    def jacobian(self, z: Tensor, s: float | Tensor) -> Tensor:
        """``dD/dz = c^2 / (c^2 + s^2) I``, [B, d, d]."""
        flat, level, _ = self._prepare(z, s)
        gain = (self.std**2 / (self.std**2 + level**2)).expand(flat.shape)
        return torch.diag_embed(gain).to(z.dtype)

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        noise = torch.randn(n, *self.shape, generator=generator, dtype=torch.float64, device="cpu")
        return torch.as_tensor(self.mean, dtype=noise.dtype, device="cpu") + self.std * noise

    def flow(self, z: Tensor, s_from: float | Tensor, s_to: float | Tensor) -> Tensor:
        """Carry states exactly along the probability-flow ODE.

        ``z_j = mean + (z_i - mean) sqrt((c^2 + s_j^2) / (c^2 + s_i^2))``, shaped as ``z`` [B, *shape].

        Args:
            z: States at ``s_from``.
            s_from: The level ``s_i`` of ``z``; float or [B].
            s_to: The level ``s_j`` to carry it to; float or [B], 0 allowed.
        """
        flat, start, mean = self._prepare(z, s_from, "s_from")
        end = level_column(s_to, z, "s_to", zero=True)
        scale = torch.sqrt((self.std**2 + end**2) / (self.std**2 + start**2))
        return as_states(mean + scale * (flat - mean), z)

    def optimal_ddim_schedule(self, steps: int, s_max: float) -> Tensor:
        """The best schedule of ``steps`` Euler (DDIM) steps from ``s_max`` to 0, float64 [steps + 1].

        ``s_n = c tan(theta_n)`` with ``theta`` equally spaced from ``atan(s_max / c)`` to 0 (Sabour,
        Fidler and Kreis 2024, "Align Your Steps", theorem 3.1).

        Raises:
            ValueError: If ``steps`` is below 1 or ``s_max`` is not positive and finite.
        """
        validate.arguments(locals(), s_max=validate.positive)
        theta = torch.linspace(math.atan(s_max / self.std), 0.0, steps + 1, dtype=torch.float64, device="cpu")
        return self.std * torch.tan(theta)

    def stein_corrector(self, s_i: float | Tensor, s_j: float | Tensor) -> Tensor:
        """The corrector-optimised cost of moving from ``s_i`` to ``s_j``, without its factor ``v^2``.

        ``E_{z ~ p_i} |score_j(z) - score_i(z)|^2 = d (s_i^2 - s_j^2)^2 / [(c^2 + s_i^2)(c^2 + s_j^2)^2]``
        (Williams et al. 2024, arXiv 2412.07877).
        """
        s_i, s_j, c2 = as_float64(s_i, "s_i"), as_float64(s_j, "s_j"), self.std**2
        difference = (s_i - s_j) * (s_i + s_j)
        return self.d * difference**2 / ((c2 + s_i**2) * (c2 + s_j**2) ** 2)

    def stein_predictor(self, s_i: float | Tensor, s_j: float | Tensor) -> Tensor:
        """The predictor-optimised cost of an Euler step from ``s_i`` to ``s_j``, without its factor ``v^2``.

        The step turns ``p_i`` into a Gaussian of variance ``S = (c^2 + s_i s_j)^2 / (c^2 + s_i^2)``; the
        cost is the Fisher divergence ``d (c^2 + s_j^2 - S)^2 / [S (c^2 + s_j^2)^2]`` (Williams et al. 2024,
        arXiv 2412.07877). It is of fourth order in the step: ``c^2 + s_j^2 - S`` equals
        ``c^2 (s_i - s_j)^2 / (c^2 + s_i^2)``, and is computed in this form.
        """
        s_i, s_j, c2 = as_float64(s_i, "s_i"), as_float64(s_j, "s_j"), self.std**2
        excess = c2 * (s_i - s_j) ** 2 / (c2 + s_i**2)
        reached = (c2 + s_i * s_j) ** 2 / (c2 + s_i**2)
        return self.d * excess**2 / (reached * (c2 + s_j**2) ** 2)

    def corrector_length(self, s: float | Tensor) -> Tensor:
        """The length of the corrector-optimised metric (with ``v = s``) from level 0 to ``s``.

        ``2 sqrt(d) [asinh(s/c) - s / sqrt(c^2 + s^2)]``; the length between two levels is the difference.
        """
        ratio = as_float64(s) / self.std
        return 2 * math.sqrt(self.d) * (torch.asinh(ratio) - ratio / torch.sqrt(1 + ratio**2))

    def fisher_rao_length(self, s: float | Tensor) -> Tensor:
        """The Fisher-Rao length from level 0 to ``s``: ``sqrt(d/2) log(1 + s^2 / c^2)``.

        A schedule of equal lengths is therefore uniform in ``log(c^2 + s^2)``.
        """
        return math.sqrt(self.d / 2) * torch.log1p((as_float64(s) / self.std) ** 2)

    def _prepare(self, z: Tensor, s: float | Tensor, name: str = "s") -> tuple[Tensor, Tensor, Tensor]:
        flat = flat_states(z, self.shape)
        return (
            flat,
            level_column(s, z, name),
            torch.as_tensor(self.mean, dtype=flat.dtype, device=flat.device).reshape(1, -1),
        )
