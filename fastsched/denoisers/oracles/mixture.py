"""Mixtures of Gaussians with full covariances."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastsched import validate
from fastsched.denoisers.oracles.base import Oracle, as_states, flat_states, level_column
from fastsched.ops.backends import in_float64


@dataclass(frozen=True, eq=False)
class GaussianMixture(Oracle):
    """Data ``sum_m w_m N(mu_m, Sigma_m)`` with full covariances.

    With ``Sigma_m = Q_m diag(l_m) Q_m'``, decomposed once, a call costs O(M d^2) per sample. Singular
    covariances are allowed.

    Attributes:
        weights: [M], positive; normalised to sum to 1.
        means: [M, d].
        covariances: [M, d, d], symmetric and positive semi-definite.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor

    def __post_init__(self) -> None:
        for name in ("weights", "means", "covariances"):
            value = getattr(self, name)
            if isinstance(value, Tensor) and value.is_floating_point():  # stays on its device
                value = in_float64(validate.tensor(name, value)).clone()
            else:
                value = validate.float64(name, value)
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name} must be finite")
            object.__setattr__(self, name, value)
        if self.means.ndim != 2 or self.means.numel() == 0:
            raise ValueError(f"means has shape {tuple(self.means.shape)}; expected [M, d], not empty")
        m, d = self.means.shape
        for name, expected in (("weights", (m,)), ("covariances", (m, d, d))):
            if tuple(getattr(self, name).shape) != expected:
                raise ValueError(f"{name} has shape {tuple(getattr(self, name).shape)}; expected {expected}")
        if not bool((self.weights > 0).all()):
            raise ValueError(f"weights must be positive; the smallest is {float(self.weights.min())}")
        object.__setattr__(self, "weights", self.weights / self.weights.sum())
        if not torch.allclose(self.covariances, self.covariances.mT):
            raise ValueError("covariances must be symmetric")
        smallest = self._decomposition[0].amin()
        if smallest < -1e-6 * self.covariances.abs().amax():
            raise ValueError(f"covariances must be positive semi-definite; an eigenvalue is {float(smallest):.3g}")

    @classmethod
    def random(cls, d: int, components: int, *, seed: int, spread: float = 1.0, std: float = 0.3) -> GaussianMixture:
        """A mixture drawn at random, for tests and benchmarks.

        Means are ``N(0, spread^2 I)``; each covariance has random orthogonal axes and standard deviations
        along them log-uniform between ``std / 3`` and ``3 std``; weights are uniform in [0.5, 1.5], then
        normalised.
        """
        validate.arguments(
            locals(),
            **dict.fromkeys(("d", "components"), validate.positive_int),
            **dict.fromkeys(("spread", "std"), validate.positive),
        )
        size = (components, d)
        generator = torch.Generator("cpu").manual_seed(seed)
        means = float(spread) * torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")
        axes = torch.linalg.qr(torch.randn(*size, d, generator=generator, dtype=torch.float64, device="cpu"))[0]
        spreads = torch.rand(size, generator=generator, dtype=torch.float64, device="cpu")
        variances = (float(std) * 3 ** (2 * spreads - 1)).square()
        weights = 0.5 + torch.rand(components, generator=generator, dtype=torch.float64, device="cpu")
        for name, given, squares in (("spread", spread, means.square()), ("std", std, variances)):
            if not bool(squares.isfinite().all()):
                raise ValueError(f"{name} must have a finite square, got {given}")
        covariances = (axes * variances[:, None, :]) @ axes.mT
        return cls(weights, means, 0.5 * (covariances + covariances.mT))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample, ``(d,)``."""
        return (self.means.shape[1],)

    def denoise(self, z: Tensor, s: float | Tensor) -> Tensor:
        """The mean over components of their own denoisers, [B, d].

        ``D = sum_m r_m D_m``, ``D_m = mu_m + Q_m diag(l_m / (l_m + s^2)) Q_m' (z - mu_m)``, with ``r_m``
        the probability of component ``m`` given ``z``.
        """
        post = self._posterior(z, s)
        return as_states(self._mean_denoised(post), z)

    def score(self, z: Tensor, s: float | Tensor) -> Tensor:
        """``-sum_m r_m (Sigma_m + s^2 I)^-1 (z - mu_m)``, [B, d]; no cancellation at low noise."""
        post = self._posterior(z, s)
        scaled = post.responsibility[..., None] * post.coordinate / post.variance
        return as_states(-torch.einsum("bmk,mdk->bd", scaled, post.axes), z)

    def log_density(self, z: Tensor, s: float | Tensor) -> Tensor:
        """``log sum_m w_m N(z; mu_m, Sigma_m + s^2 I)``, in nats, [B]."""
        return self._posterior(z, s).log_density.to(z.dtype)

    def jacobian(self, z: Tensor, s: float | Tensor) -> Tensor:
        """``dD/dz = Cov[x0 | z] / s^2``, [B, d, d]: symmetric, positive semi-definite; O(M d^3) per sample.

        ``sum_m r_m Q_m diag(l_m / (l_m + s^2)) Q_m' + sum_m r_m (D_m - D)(D_m - D)' / s^2``.
        """
        post = self._posterior(z, s)
        weighted = post.responsibility[..., None] * post.gain
        within = torch.einsum("mdk,bmk,mek->bde", post.axes, weighted, post.axes)
        of_components = post.means + torch.einsum("bmk,mdk->bmd", post.gain * post.coordinate, post.axes)
        deviation = (of_components - self._mean_denoised(post)[:, None, :]) / post.level[..., None]
        between = torch.einsum("bm,bmd,bme->bde", post.responsibility, deviation, deviation)
        return (within + between).to(z.dtype)

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        chosen = torch.multinomial(self.weights.cpu(), n, replacement=True, generator=generator)
        noise = torch.randn(n, *self.shape, generator=generator, dtype=torch.float64, device="cpu")
        eigenvalues, axes = (part.cpu() for part in self._decomposition)
        drawn = self.means.cpu()[chosen]
        for m in range(len(self.weights)):
            rows = chosen == m
            drawn[rows] += (noise[rows] * eigenvalues[m].clamp(min=0).sqrt()) @ axes[m].T
        return drawn

    @cached_property
    def _decomposition(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues [M, d] and eigenvectors as columns [M, d, d], float64."""
        eigenvalues, axes = torch.linalg.eigh(self.covariances)
        return eigenvalues, axes

    def _posterior(self, z: Tensor, s: float | Tensor) -> _Posterior:
        flat = flat_states(z, self.shape)
        level = level_column(s, z)
        eigenvalues, axes = (part.to(flat) for part in self._decomposition)
        eigenvalues = eigenvalues.clamp(min=0)
        means = self.means.to(flat)
        variance = eigenvalues + level[..., None] ** 2
        coordinate = torch.einsum("bmd,mdk->bmk", flat[:, None, :] - means, axes)
        # Log-determinants relative to a common one: the differences are smaller numbers, so rounding loses less.
        common = eigenvalues.mean() + level**2
        log_volume = torch.log(variance / common[..., None]).sum(-1)
        logits = torch.log(self.weights).to(flat) - 0.5 * (log_volume + (coordinate.square() / variance).sum(-1))
        constant = 0.5 * flat.shape[1] * torch.log(2 * math.pi * common[:, 0])
        return _Posterior(
            level=level,
            means=means,
            axes=axes,
            variance=variance,
            gain=eigenvalues / variance,
            coordinate=coordinate,
            responsibility=torch.softmax(logits, 1),
            log_density=torch.logsumexp(logits, 1) - constant,
        )

    def _mean_denoised(self, post: _Posterior) -> Tensor:
        shrunk = post.responsibility[..., None] * post.gain * post.coordinate
        return post.responsibility @ post.means + torch.einsum("bmk,mdk->bd", shrunk, post.axes)


@dataclass(frozen=True, eq=False)
class _Posterior:
    """Quantities at one (z, s) that a mixture's methods share; [B or 1, ...] if they depend on ``s`` only."""

    level: Tensor  # [B or 1, 1]
    means: Tensor  # [M, d]
    axes: Tensor  # [M, d, d]
    variance: Tensor  # eigenvalues of Sigma_m + s^2 I, [B or 1, M, d]
    gain: Tensor  # eigenvalues of dD_m/dz, [B or 1, M, d]
    coordinate: Tensor  # Q_m' (z - mu_m), [B, M, d]
    responsibility: Tensor  # [B, M]
    log_density: Tensor  # [B]
