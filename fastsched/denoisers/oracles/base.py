"""Code that the oracles share: it draws samples, and checks and reshapes states and levels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastsched import validate
from fastsched.ops.backends import in_float64


class Oracle:
    """Base class of the oracles, which draws samples."""

    def sample(
        self, n: int, *, seed: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensor:
        """``n`` clean samples [n, *shape], drawn on the CPU so that a seed gives the same samples on every device."""
        validate.arguments(locals(), n=validate.positive_int)
        return self._draw(n, torch.Generator("cpu").manual_seed(seed)).to(device, dtype)

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        raise NotImplementedError


def flat_states(z: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``z`` as [B, d], in float32 at least."""
    if not isinstance(z, Tensor) or not z.is_floating_point():
        raise TypeError(f"z must be a floating-point tensor; it is {getattr(z, 'dtype', type(z).__name__)}")
    if tuple(z.shape[1:]) != shape or z.ndim != len(shape) + 1:
        raise ValueError(f"z has shape {tuple(z.shape)}; expected [B, *shape] with shape={shape}")
    return z.reshape(z.shape[0], math.prod(shape)).to(torch.promote_types(z.dtype, torch.float32))


def as_states(flat: Tensor, z: Tensor) -> Tensor:
    """``flat`` [B, d] in the shape and dtype of ``z``."""
    return flat.reshape(z.shape).to(z.dtype)


def level_column(s: float | Tensor, z: Tensor, name: str = "s", *, zero: bool = False) -> Tensor:
    """``s`` as [B or 1, 1], in the dtype that `flat_states` gives ``z``."""
    if not isinstance(s, Tensor) and not (zero and s == 0):
        validate.positive(name, s)
    level = torch.as_tensor(s, dtype=torch.promote_types(z.dtype, torch.float32), device=z.device)
    if level.ndim > 1 or (level.ndim == 1 and level.shape[0] not in (1, z.shape[0])):
        raise ValueError(f"{name} has shape {tuple(level.shape)}; expected a float or [B] with B={z.shape[0]}")
    return level.reshape(-1, 1)


def as_float64(s: float | Tensor, name: str = "s") -> Tensor:
    """Levels as a float64 tensor."""
    if isinstance(s, Tensor):
        return in_float64(s)
    return torch.tensor(validate.real(name, s), dtype=torch.float64, device="cpu")
