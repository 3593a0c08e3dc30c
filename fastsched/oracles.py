"""Denoisers known in closed form: what every estimate in this package is held to.

Each oracle is a data distribution whose variance-exploding marginals are known: a state is
``z = x0 + s * eps`` with ``x0`` from the data and ``eps`` standard normal. All share one face:

* ``shape``: the shape of one sample, without the batch dimension;
* ``denoise(z, s)``: ``D(z; s) = E[x0 | z]``, shaped as ``z`` [B, *shape];
* ``score(z, s)``: the gradient of the marginal's log density, ``(D - z) / s^2``, shaped as ``z``;
* ``log_density(z, s)``: the log density of the marginal at level ``s``, in nats, [B];
* ``sample(n, seed=...)``: clean samples [n, *shape].

``s`` is positive and finite: a float, a scalar tensor, or a tensor [B] with one level a sample. Results have
the dtype and device of ``z``; half precision is computed in float32 and rounded at the end. All methods
are differentiable in ``z``, in forward and reverse mode.

Invalid input raises ``ValueError`` or ``TypeError`` naming the argument. The values of a *tensor* of levels
are not inspected, for that would stall a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Empirical", "Gaussian", "GaussianMixture"]

_CHUNK_ELEMENTS = 1 << 23  # of the [B, chunk, d] differences that Empirical forms at a time


class _Oracle:
    """What the three share."""

    def sample(
        self, n: int, *, seed: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensor:
        """``n`` clean samples [n, *shape]; drawn on the CPU, so a seed means the same on every device."""
        return self._draw(_count(n), torch.Generator("cpu").manual_seed(seed)).to(device, dtype)

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Gaussian(_Oracle):
    """Data ``N(mean, c^2 I)``, with the closed forms that schedules on it are known by.

    The marginal at level ``s`` is ``N(mean, (c^2 + s^2) I)``. Levels given to the closed forms are floats or
    tensors of any shapes that broadcast; those results are float64 tensors of that shape.

    Attributes:
        std: ``c``, the standard deviation of every element of the data.
        shape: Shape of one sample; ``d`` is its number of elements.
        mean: A float, or a tensor of shape ``shape``.
    """

    std: float
    shape: tuple[int, ...]
    mean: float | Tensor = 0.0

    def __post_init__(self) -> None:
        _positive("std", self.std)
        object.__setattr__(self, "shape", _shape(self.shape))
        mean = torch.as_tensor(self.mean)
        if mean.ndim > 0 and tuple(mean.shape) != self.shape:
            raise ValueError(f"mean has shape {tuple(mean.shape)}; expected a float or shape={self.shape}")
        if not bool(torch.isfinite(mean).all()):
            raise ValueError("mean must be finite")

    @property
    def d(self) -> int:
        """The number of elements of one sample."""
        return math.prod(self.shape)

    def denoise(self, z: Tensor, s: float | Tensor) -> Tensor:
        """``D = mean + c^2 / (c^2 + s^2) (z - mean)``, shaped as ``z`` [B, *shape]."""
        flat, level, mean = self._prepare(z, s)
        return _like(mean + self.std**2 / (self.std**2 + level**2) * (flat - mean), z)

    def score(self, z: Tensor, s: float | Tensor) -> Tensor:
        """``(mean - z) / (c^2 + s^2)``, shaped as ``z`` [B, *shape]."""
        flat, level, mean = self._prepare(z, s)
        return _like((mean - flat) / (self.std**2 + level**2), z)

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
        noise = torch.randn(n, *self.shape, generator=generator, dtype=torch.float64)
        return torch.as_tensor(self.mean).to(noise) + self.std * noise

    def flow(self, z: Tensor, s_from: float | Tensor, s_to: float | Tensor) -> Tensor:
        """Carry states exactly along the probability-flow ODE.

        ``z_j = mean + (z_i - mean) sqrt((c^2 + s_j^2) / (c^2 + s_i^2))``, shaped as ``z`` [B, *shape].

        Args:
            z: States at ``s_from``.
            s_from: The level ``s_i`` of ``z``; float or [B].
            s_to: The level ``s_j`` to carry it to; float or [B], 0 allowed.
        """
        flat, start, mean = self._prepare(z, s_from, "s_from")
        end = _levels(s_to, z, "s_to", zero=True)
        scale = torch.sqrt((self.std**2 + end**2) / (self.std**2 + start**2))
        return _like(mean + scale * (flat - mean), z)

    def sensitivity(self, s: float | Tensor) -> Tensor:
        """How much an error at level ``s`` still weighs at level 0: ``phi = c^2 / (c^2 + s^2)``.

        That is ``|Phi|_F^2 / d`` with ``Phi = d z_end / d z_s`` the derivative of the flow from ``s`` to 0.
        """
        s = _float64(s)
        return self.std**2 / (self.std**2 + s * s)

    def optimal_ddim_schedule(self, steps: int, s_max: float) -> Tensor:
        """The best schedule of ``steps`` Euler (DDIM) steps from ``s_max`` to 0, float64 [steps + 1].

        ``s_n = c tan(theta_n)`` with ``theta`` equally spaced from ``atan(s_max / c)`` to 0 (Sabour,
        Fidler and Kreis 2024, "Align Your Steps", theorem 3.1).

        Raises:
            ValueError: If ``steps`` is below 1 or ``s_max`` is not positive and finite.
        """
        _positive("s_max", s_max)
        theta = torch.linspace(math.atan(s_max / self.std), 0.0, _count(steps, "steps") + 1, dtype=torch.float64)
        return self.std * torch.tan(theta)

    def stein_corrector(self, s_i: float | Tensor, s_j: float | Tensor) -> Tensor:
        """The corrector-optimised cost of moving from ``s_i`` to ``s_j``, without its factor ``v^2``.

        ``E_{z ~ p_i} |score_j(z) - score_i(z)|^2 = d (s_i^2 - s_j^2)^2 / [(c^2 + s_i^2)(c^2 + s_j^2)^2]``
        (Williams et al. 2024, arXiv 2412.07877).
        """
        s_i, s_j, c2 = _float64(s_i), _float64(s_j), self.std**2
        difference = (s_i - s_j) * (s_i + s_j)
        return self.d * difference**2 / ((c2 + s_i**2) * (c2 + s_j**2) ** 2)

    def stein_predictor(self, s_i: float | Tensor, s_j: float | Tensor) -> Tensor:
        """The predictor-optimised cost of an Euler step from ``s_i`` to ``s_j``, without its factor ``v^2``.

        The step turns ``p_i`` into a Gaussian of variance ``S = (c^2 + s_i s_j)^2 / (c^2 + s_i^2)``; the
        cost is the Fisher divergence ``d (c^2 + s_j^2 - S)^2 / [S (c^2 + s_j^2)^2]`` (Williams et al. 2024,
        arXiv 2412.07877). It is of fourth order in the step, for ``c^2 + s_j^2 - S`` is
        ``c^2 (s_i - s_j)^2 / (c^2 + s_i^2)``, which is how it is computed.
        """
        s_i, s_j, c2 = _float64(s_i), _float64(s_j), self.std**2
        excess = c2 * (s_i - s_j) ** 2 / (c2 + s_i**2)
        reached = (c2 + s_i * s_j) ** 2 / (c2 + s_i**2)
        return self.d * excess**2 / (reached * (c2 + s_j**2) ** 2)

    def corrector_length(self, s: float | Tensor) -> Tensor:
        """The length of the corrector-optimised metric (with ``v = s``) from level 0 to ``s``.

        ``2 sqrt(d) [asinh(s/c) - s / sqrt(c^2 + s^2)]``; the length between two levels is the difference.
        """
        ratio = _float64(s) / self.std
        return 2 * math.sqrt(self.d) * (torch.asinh(ratio) - ratio / torch.sqrt(1 + ratio**2))

    def fisher_rao_length(self, s: float | Tensor) -> Tensor:
        """The Fisher-Rao length from level 0 to ``s``: ``sqrt(d/2) log(1 + s^2 / c^2)``.

        A schedule of equal lengths is therefore uniform in ``log(c^2 + s^2)``.
        """
        return math.sqrt(self.d / 2) * torch.log1p((_float64(s) / self.std) ** 2)

    def _prepare(self, z: Tensor, s: float | Tensor, name: str = "s") -> tuple[Tensor, Tensor, Tensor]:
        flat = _flat(z, self.shape)
        return (
            flat,
            _levels(s, z, name),
            torch.as_tensor(self.mean, dtype=flat.dtype, device=flat.device).reshape(1, -1),
        )


@dataclass(frozen=True, eq=False)
class GaussianMixture(_Oracle):
    """Data ``sum_m w_m N(mu_m, Sigma_m)`` with full covariances.

    With ``Sigma_m = Q_m diag(l_m) Q_m'``, decomposed once, a call costs O(M d^2) a sample. Singular
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
            value = torch.as_tensor(getattr(self, name)).detach().to(torch.float64)
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
        _positive("spread", spread)
        _positive("std", std)
        size = (_count(components, "components"), _count(d, "d"))
        generator = torch.Generator("cpu").manual_seed(seed)
        means = spread * torch.randn(size, generator=generator, dtype=torch.float64)
        axes = torch.linalg.qr(torch.randn(*size, d, generator=generator, dtype=torch.float64))[0]
        variances = (std * 3 ** (2 * torch.rand(size, generator=generator, dtype=torch.float64) - 1)).square()
        weights = 0.5 + torch.rand(components, generator=generator, dtype=torch.float64)
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
        return _like(self._mean_denoised(post), z)

    def score(self, z: Tensor, s: float | Tensor) -> Tensor:
        """``-sum_m r_m (Sigma_m + s^2 I)^-1 (z - mu_m)``, [B, d]; no cancellation at low noise."""
        post = self._posterior(z, s)
        scaled = post.responsibility[..., None] * post.coordinate / post.variance
        return _like(-torch.einsum("bmk,mdk->bd", scaled, post.axes), z)

    def log_density(self, z: Tensor, s: float | Tensor) -> Tensor:
        """``log sum_m w_m N(z; mu_m, Sigma_m + s^2 I)``, in nats, [B]."""
        return self._posterior(z, s).log_density.to(z.dtype)

    def jacobian(self, z: Tensor, s: float | Tensor) -> Tensor:
        """``dD/dz = Cov[x0 | z] / s^2``, [B, d, d]: symmetric, positive semi-definite; O(M d^3) a sample.

        ``sum_m r_m Q_m diag(l_m / (l_m + s^2)) Q_m' + sum_m r_m (D_m - D)(D_m - D)' / s^2``.
        """
        post = self._posterior(z, s)
        weighted = post.responsibility[..., None] * post.gain
        within = torch.einsum("mdk,bmk,mek->bde", post.axes, weighted, post.axes)
        deviation = self._component_denoised(post) - self._mean_denoised(post)[:, None, :]
        deviation = deviation / post.level[..., None]
        between = torch.einsum("bm,bmd,bme->bde", post.responsibility, deviation, deviation)
        return (within + between).to(z.dtype)

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        chosen = torch.multinomial(self.weights.cpu(), n, replacement=True, generator=generator)
        noise = torch.randn(n, *self.shape, generator=generator, dtype=torch.float64)
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
        flat = _flat(z, self.shape)
        level = _levels(s, z)
        eigenvalues, axes = (part.to(flat) for part in self._decomposition)
        eigenvalues = eigenvalues.clamp(min=0)
        means = self.means.to(flat)
        variance = eigenvalues + level[..., None] ** 2
        coordinate = torch.einsum("bmd,mdk->bmk", flat[:, None, :] - means, axes)
        # The determinants relative to a common one: they differ by less than their logarithms' own size.
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

    def _component_denoised(self, post: _Posterior) -> Tensor:
        return post.means + torch.einsum("bmk,mdk->bmd", post.gain * post.coordinate, post.axes)

    def _mean_denoised(self, post: _Posterior) -> Tensor:
        shrunk = post.responsibility[..., None] * post.gain * post.coordinate
        return post.responsibility @ post.means + torch.einsum("bmk,mdk->bd", shrunk, post.axes)


@dataclass(frozen=True, eq=False)
class _Posterior:
    """What all of a mixture's methods share at one (z, s); [B or 1, ...] where it depends on ``s`` only."""

    level: Tensor  # [B or 1, 1]
    means: Tensor  # [M, d]
    axes: Tensor  # [M, d, d]
    variance: Tensor  # eigenvalues of Sigma_m + s^2 I, [B or 1, M, d]
    gain: Tensor  # eigenvalues of dD_m/dz, [B or 1, M, d]
    coordinate: Tensor  # Q_m' (z - mu_m), [B, M, d]
    responsibility: Tensor  # [B, M]
    log_density: Tensor  # [B]


@dataclass(frozen=True, eq=False)
class Empirical(_Oracle):
    """A data set's own exact denoiser: data uniform over ``n`` given points.

    Its samples at level 0 are the data themselves, so this is the optimum that training on them aims at
    (Karras et al. 2022, appendix B.3).

    Attributes:
        data: [n, *shape].
    """

    data: Tensor

    def __post_init__(self) -> None:
        data = torch.as_tensor(self.data).detach()
        if data.ndim < 2 or data.numel() == 0:
            raise ValueError(f"data has shape {tuple(data.shape)}; expected [n, *shape], not empty")
        if not data.is_floating_point():
            raise TypeError(f"data must be floating-point; it is {data.dtype}")
        if not bool(torch.isfinite(data).all()):
            raise ValueError("data must be finite")
        object.__setattr__(self, "data", data)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.data.shape[1:])

    def denoise(self, z: Tensor, s: float | Tensor) -> Tensor:
        """``D = sum_n r_n x_n``, ``r = softmax(-|z - x_n|^2 / (2 s^2))``, shaped as ``z`` [B, *shape]."""
        _, data, logits, _ = self._prepare(z, s)
        return _like(torch.softmax(logits, 1) @ data, z)

    def score(self, z: Tensor, s: float | Tensor) -> Tensor:
        """``(D - z) / s^2``, shaped as ``z`` [B, *shape]."""
        flat, data, logits, level = self._prepare(z, s)
        return _like((torch.softmax(logits, 1) @ data - flat) / level**2, z)

    def log_density(self, z: Tensor, s: float | Tensor) -> Tensor:
        """``log (1/n) sum_n N(z; x_n, s^2 I)``, in nats, [B]."""
        _, data, logits, level = self._prepare(z, s)
        n, d = data.shape
        constant = math.log(n) + d * (0.5 * math.log(2 * math.pi) + torch.log(level[:, 0]))
        return (torch.logsumexp(logits, 1) - constant).to(z.dtype)

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(self.data), (n,), generator=generator)
        return self.data[chosen.to(self.data.device)]

    def _prepare(self, z: Tensor, s: float | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The states [B, d], data [n, d], logits [B, n] and levels [B or 1, 1]."""
        flat = _flat(z, self.shape)
        level = _levels(s, z)
        data = self.data.to(flat).flatten(1)
        # Explicit differences: |z|^2 - 2 z.x + |x|^2 would lose them all at low noise.
        rows = max(1, _CHUNK_ELEMENTS // max(1, flat.numel()))
        squares = [(flat[:, None, :] - part).square().sum(-1) for part in data.split(rows)]
        return flat, data, torch.cat(squares, 1) / (-2 * level**2), level


def _flat(z: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``z`` as [B, d], in float32 at least."""
    if not isinstance(z, Tensor) or not z.is_floating_point():
        raise TypeError(f"z must be a floating-point tensor; it is {getattr(z, 'dtype', type(z).__name__)}")
    if tuple(z.shape[1:]) != shape or z.ndim != len(shape) + 1:
        raise ValueError(f"z has shape {tuple(z.shape)}; expected [B, *shape] with shape={shape}")
    return z.reshape(z.shape[0], math.prod(shape)).to(torch.promote_types(z.dtype, torch.float32))


def _like(flat: Tensor, z: Tensor) -> Tensor:
    return flat.reshape(z.shape).to(z.dtype)


def _levels(s: float | Tensor, z: Tensor, name: str = "s", *, zero: bool = False) -> Tensor:
    """``s`` as [B or 1, 1], in the dtype that :func:`_flat` gives ``z``."""
    if not isinstance(s, Tensor) and not (zero and s == 0):
        _positive(name, s)
    level = torch.as_tensor(s, dtype=torch.promote_types(z.dtype, torch.float32), device=z.device)
    if level.ndim > 1 or (level.ndim == 1 and level.shape[0] not in (1, z.shape[0])):
        raise ValueError(f"{name} has shape {tuple(level.shape)}; expected a float or [B] with B={z.shape[0]}")
    return level.reshape(-1, 1)


def _float64(s: float | Tensor) -> Tensor:
    return torch.as_tensor(s, dtype=torch.float64)


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite; it is {value}")


def _count(n: int, name: str = "n") -> int:
    if n < 1:
        raise ValueError(f"{name} must be at least 1; it is {n}")
    return n


def _shape(shape: tuple[int, ...] | int) -> tuple[int, ...]:
    sizes = (shape,) if isinstance(shape, int) else tuple(int(size) for size in shape)
    if not sizes or min(sizes) < 1:
        raise ValueError(f"shape must hold positive sizes; it is {shape}")
    return sizes
