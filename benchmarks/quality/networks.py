"""Three small networks that were trained for this benchmark (``benchmarks/train/quality.py``)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastsched.denoisers.digits import DigitsNetwork


def ddpm_table(timesteps: int = 1000) -> Tensor:
    """``abar_t`` of DDPM's linear ``beta`` from 1e-4 to 0.02, [timesteps] float64 (Ho et al. 2020)."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64), 0)


class EpsilonNetwork(nn.Module):
    """Noise prediction of digits, ``eps(x, t)``, for ``t`` in ``[0, 999]`` of `ddpm_table`.

    ``eps = sigma_t x + alpha_t F(x, t)``: the prediction for data of unit variance, plus a correction. Between integer
    timesteps the level of ``alpha_t`` and ``sigma_t`` is interpolated in ``log s``, as in `fastsched.Denoiser`.
    """

    log_levels: Tensor

    def __init__(self) -> None:
        super().__init__()
        table = ddpm_table()
        self.register_buffer("log_levels", (0.5 * torch.log((1 - table) / table)).float(), persistent=False)
        self.inner = DigitsNetwork(width=160, blocks=4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """``eps``, shaped as ``x`` [B, 1, 8, 8], at timesteps ``t`` [B], fractional ones included."""
        below = t.floor().long().clamp(0, len(self.log_levels) - 2)
        part = t.to(x.dtype) - below
        log_s = torch.lerp(self.log_levels[below], self.log_levels[below + 1], part)[:, None, None, None]
        alpha, sigma = torch.sigmoid(-2 * log_s).sqrt(), torch.sigmoid(2 * log_s).sqrt()
        return sigma * x + alpha * self.inner(x, log_s.flatten() / 4)


class PatchNetwork(nn.Module):
    """EDM's raw network ``F(c_in z, c_noise)`` for 16 x 16 colour patches: residual convolutions on an 8 x 8 grid.

    Attributes:
        sigma_data: The standard deviation of the data, stored with the weights.
        sigma_min: The lowest level it was trained for.
        sigma_max: The highest level it was trained for.
    """

    shape = (3, 16, 16)
    sigma_min = 0.002
    sigma_max = 80.0
    frequencies: Tensor

    def __init__(self, sigma_data: float = 0.5, width: int = 32, blocks: int = 5, features: int = 64) -> None:
        super().__init__()
        self.sigma_data = sigma_data
        frequencies = torch.pi * torch.logspace(-2, 2, features // 2, base=2.0)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.embed = nn.Linear(features, features)
        self.inward = nn.Conv2d(12, width, 3, padding=1)
        self.blocks = nn.ModuleList(_ConvolutionBlock(width, features) for _ in range(blocks))
        self.outward = nn.Conv2d(width, 12, 3, padding=1)
        nn.init.zeros_(self.outward.weight)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """``F``, shaped as ``x`` [B, 3, 16, 16], at ``c_noise = ln(s) / 4`` [B]."""
        angles = c_noise[:, None].to(x.dtype) * self.frequencies
        level = functional.silu(self.embed(torch.cat([angles.sin(), angles.cos()], 1)))
        h = self.inward(functional.pixel_unshuffle(x, 2))
        for block in self.blocks:
            h = block(h, level)
        return functional.pixel_shuffle(self.outward(functional.silu(h)), 2)


class _ConvolutionBlock(nn.Module):
    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width, affine=False)
        self.modulate = nn.Linear(features, 2 * width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.second.weight)

    def forward(self, h: Tensor, level: Tensor) -> Tensor:
        scale, shift = self.modulate(level)[:, :, None, None].chunk(2, 1)
        inner = self.norm(h) * (1 + scale) + shift
        return h + self.second(functional.silu(self.first(inner)))


class VelocityNetwork(nn.Module):
    """Flow-matching velocity ``eps - x0`` in the plane, from the state and the time ``t`` in [0, 1]."""

    frequencies: Tensor

    def __init__(self, width: int = 128, features: int = 16) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.pi * torch.arange(1, features // 2 + 1).float(), persistent=False)
        self.layers = nn.Sequential(
            nn.Linear(2 + features, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 2),
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The velocity [B, 2] at states ``x`` [B, 2] and times ``t`` [B]."""
        angles = t[:, None].to(x.dtype) * self.frequencies
        return self.layers(torch.cat([x, angles.sin(), angles.cos()], 1))
