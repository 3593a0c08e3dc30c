"""The six denoisers of the quality benchmark: two known in closed form, four trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fastsched as fs
from benchmarks.quality.networks import EpsilonNetwork, PatchNetwork, VelocityNetwork, ddpm_table
from fastsched.denoisers.digits import digits_denoiser
from fastsched.measurement.converged_samples import Reference

WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class Model:
    """A denoiser and the shape of one sample, without the batch."""

    denoiser: fs.Denoiser
    shape: tuple[int, ...]

    def converged(self, samples: int, seed: int, **options: Any) -> Reference:
        """Converged samples; the options are those of `fs.converged_reference`."""
        return fs.converged_reference(self.denoiser, self.shape, samples=samples, seed=seed, progress=False, **options)


@dataclass(frozen=True)
class LowRankMixture:
    """A Gaussian mixture with low-rank covariances plus isotropic noise, ``Sigma_m = floor^2 I + U_m diag(l) U_m'``.

    Means are ``N(0, spread^2 I)`` and weights are in proportion ``1 .. modes``. ``U_m`` has random orthonormal columns,
    and ``l_k`` falls as ``k^-2``, scaled so that an element's mean variance within a mode is 1/4 without the floor.
    """

    log_weights: Tensor  #: [M]
    means: Tensor  #: [M, d]
    axes: Tensor  #: ``U_m`` [M, d, r]
    variances: Tensor  #: ``l`` [r]
    floor: float  #: standard deviation of the isotropic part

    @classmethod
    def random(cls, d: int, modes: int, rank: int, *, seed: int, spread: float, floor: float) -> LowRankMixture:
        """A mixture drawn from a seed, float32."""
        generator = torch.Generator().manual_seed(seed)
        means = spread * torch.randn(modes, d, generator=generator, dtype=torch.float64)
        axes = torch.linalg.qr(torch.randn(modes, d, rank, generator=generator, dtype=torch.float64))[0]
        variances = torch.arange(1, rank + 1, dtype=torch.float64) ** -2
        variances *= 0.25 * d / variances.sum()
        weights = torch.arange(1, modes + 1, dtype=torch.float64)
        return cls((weights / weights.sum()).log().float(), means.float(), axes.float(), variances.float(), floor)

    def denoise(self, z: Tensor, s: Tensor) -> Tensor:
        """``D(z; s) = sum_m r_m D_m`` [B, d] float32, as in `fs.oracles.GaussianMixture`; O(M d r) for each sample."""
        noise = s.to(z.dtype)[:, None].square()  # [B, 1]
        flat = self.floor**2 + noise
        steep = flat + self.variances  # [B, r]
        away = z - self.means[:, None]  # [M, B, d]
        along = away @ self.axes  # [M, B, r]
        across = (away.square().sum(2) - along.square().sum(2)) / flat[:, 0]
        volume = steep.log().sum(1) + (z.shape[1] - len(self.variances)) * flat[:, 0].log()
        logits = self.log_weights[:, None] - 0.5 * (across + (along.square() / steep).sum(2) + volume)
        share = torch.softmax(logits, 0)[..., None]  # [M, B, 1]
        gain, further = self.floor**2 / flat, self.variances * noise / (steep * flat)
        within = gain * away + (further * along) @ self.axes.mT
        return (share * (self.means[:, None] + within)).sum(0)


def mixture_64() -> Model:
    """Five modes of rank 12 in 64 dimensions."""
    mixture = LowRankMixture.random(64, 5, 12, seed=0, spread=0.7, floor=0.05)
    return Model(fs.Denoiser.from_denoiser(mixture.denoise, 0.002, 80.0), (64,))


def mixture_768() -> Model:
    """Three modes of rank 48 in 768 dimensions."""
    mixture = LowRankMixture.random(768, 3, 48, seed=1, spread=0.3, floor=0.03)
    return Model(fs.Denoiser.from_denoiser(mixture.denoise, 0.002, 80.0), (768,))


def digits() -> Model:
    """The EDM network that fastsched ships."""
    return Model(digits_denoiser(), (1, 8, 8))


def digits_vp() -> Model:
    """A noise-prediction network of digits under DDPM's discrete process, also called at fractional timesteps."""
    network = _trained(EpsilonNetwork(), "digits_vp")
    return Model(fs.Denoiser.from_epsilon(network, ddpm_table()), (1, 8, 8))


def patches() -> Model:
    """Colour patches of photographs, a convolutional EDM network."""
    network = _trained(PatchNetwork(), "patches")
    return Model(fs.Denoiser.from_edm(network), PatchNetwork.shape)


def flow() -> Model:
    """A ring of six modes in the plane, a flow-matching network."""
    return Model(fs.Denoiser.from_velocity(_trained(VelocityNetwork(), "flow")), (2,))


MODELS: dict[str, Callable[[], Model]] = {
    "mixture_64": mixture_64,
    "mixture_768": mixture_768,
    "digits": digits,
    "digits_vp": digits_vp,
    "patches": patches,
    "flow": flow,
}


def _trained(network: nn.Module, name: str) -> nn.Module:
    """The network with the weights of that name, float32, in evaluation mode, without gradients."""
    tensors: dict[str, Tensor] = {
        key: value.float() for key, value in load_file(WEIGHTS / f"{name}.safetensors").items()
    }
    if "sigma_data" in tensors:
        network.sigma_data = float(tensors.pop("sigma_data"))  # type: ignore[assignment]  # a plain number
    network.load_state_dict(tensors)
    return network.eval().requires_grad_(False)
