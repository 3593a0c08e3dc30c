"""The demonstration model: a small denoiser of handwritten digits, shipped with the package.

It was trained on the 1,797 digits of scikit-learn (8 x 8 pixels, values 0 to 16 mapped to [-1, 1] by
``pixel / 8 - 1``) by ``benchmarks/train/digits.py``. The module here is the raw network ``F`` of EDM's preconditioning
(`fastsched.Denoiser.from_edm`), with ``sigma_data`` the data's own standard deviation.
"""

from __future__ import annotations

import math
from importlib import resources

import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional

from fastsched.denoisers.denoiser import Denoiser

__all__ = ["DigitsNetwork", "digits_denoiser", "load_digits_network"]


class DigitsNetwork(nn.Module):
    """The raw network ``F(c_in z, c_noise)``: residual blocks, each modulated by the noise level.

    Attributes:
        sigma_data: The standard deviation of the data, a number kept with the weights.
        sigma_min: The lowest level it was trained for.
        sigma_max: The highest level it was trained for.
    """

    shape = (1, 8, 8)
    sigma_min = 0.002
    sigma_max = 80.0
    frequencies: Tensor

    def __init__(self, sigma_data: float = 1.0, width: int = 256, blocks: int = 5, features: int = 64) -> None:
        super().__init__()
        self.sigma_data = sigma_data
        frequencies = math.pi * torch.logspace(-2, 2, features // 2, base=2.0)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.embed = nn.Linear(features, features)
        self.inward = nn.Linear(64, width)
        self.blocks = nn.ModuleList(_Block(width, features) for _ in range(blocks))
        self.outward = nn.Linear(width, 64)
        nn.init.zeros_(self.outward.weight)
        nn.init.zeros_(self.outward.bias)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """``F``, shaped as the scaled states ``x = c_in z`` [B, 1, 8, 8], at ``c_noise = ln(s) / 4`` [B]."""
        angles = c_noise[:, None].to(x.dtype) * self.frequencies
        level = functional.silu(self.embed(torch.cat([angles.sin(), angles.cos()], 1)))
        h = self.inward(x.flatten(1))
        for block in self.blocks:
            h = block(h, level)
        return self.outward(functional.silu(h)).reshape(x.shape)


class _Block(nn.Module):
    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = nn.Linear(features, 2 * width)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, h: Tensor, level: Tensor) -> Tensor:
        scale, shift = self.modulate(level).chunk(2, 1)
        inner = self.norm(h) * (1 + scale) + shift
        return h + self.second(functional.silu(self.first(inner)))


def digits_denoiser(device: torch.device | str = "cpu") -> Denoiser:
    """The denoiser of the trained network: shape (1, 8, 8), sigma from 80 to 0.002."""
    return Denoiser.from_edm(load_digits_network().to(device))


def load_digits_network() -> DigitsNetwork:
    """The trained network in float32 on the CPU, in evaluation mode, its parameters without gradients."""
    blob = (resources.files("fastsched.denoisers") / "assets" / "digits.safetensors").read_bytes()
    tensors = {name: tensor.float() for name, tensor in load(blob).items()}
    with torch.device("cpu"):
        network = DigitsNetwork(sigma_data=float(tensors.pop("sigma_data")))
    network.load_state_dict(tensors)
    return network.eval().requires_grad_(False)
