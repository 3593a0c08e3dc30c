"""Noise processes ``x = alpha * x0 + sigma * eps``, and the coordinates all of them share.

A process maps the noise level ``s = sigma / alpha`` to the quantities that its network and its samplers use: the
scales ``alpha`` and ``sigma``, the timestep, and the *sampler sigma*. The sampler sigma is ``s`` itself for
variance-exploding and variance-preserving models (k-diffusion's sigma) and the flow time ``t`` for flow
matching (the sigma of the flow samplers of diffusers and ComfyUI).

Source: Karras et al. 2022 (arXiv 2206.00364), section 2 and table 1; Lipman et al. 2022 (arXiv 2210.02747).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastsched import validate
from fastsched.denoisers.level_grids import checked_level_count, log_uniform, spread_indices

#: The largest ``sigma_max``, for squared distances of samples must be float32 numbers; the smallest is its inverse.
LARGEST_SIGMA = 1e15

#: The smallest level: sampler states ``x / sigma`` must be float32 numbers.
SMALLEST_LEVEL = 1e-30


#: A last entry of ``alphas_cumprod`` is 0 up to rounding if it is this fraction of the one before, or less: of 1,000
#: entries of a cosine's square whose last should be 0, it is 1e-9 in float32 and 1e-27 in float64. Betas of trained
#: networks are at most 0.999, so there the fraction is 1e-3 or more.
ZERO = 1e-7


class NoiseProcess:
    """The interface of all noise processes; levels ``s`` are float64 tensors, noisiest first.

    Attributes:
        kind: ``"ve"``, ``"vp"`` or ``"flow"``.
        integer_timesteps: Whether the network accepts only the integer timesteps that it was trained on.
    """

    kind: ClassVar[str]
    integer_timesteps: bool = False

    @property
    def s_min(self) -> float:
        """The smallest noise level that the network was trained for."""
        raise NotImplementedError

    @property
    def s_max(self) -> float:
        """The largest noise level; ``inf`` if the process starts from pure noise."""
        raise NotImplementedError

    def alpha(self, s: Tensor) -> Tensor:
        """Signal scale at levels ``s``."""
        raise NotImplementedError

    def sigma(self, s: Tensor) -> Tensor:
        """Noise scale at levels ``s``."""
        raise NotImplementedError

    def sampler_sigma(self, s: Tensor) -> Tensor:
        """The noise level in the convention of this process's samplers."""
        return s

    def level(self, sampler_sigma: Tensor) -> Tensor:
        """The inverse of `sampler_sigma`."""
        return sampler_sigma

    def sigma_ratio(self, s: Tensor, at: Tensor) -> Tensor:
        """``tau_s / tau_at``: the factor from ``y`` at ``s`` to ``y`` of the same state ``tau y`` at other levels."""
        ratio = self.sampler_sigma(s) / self.sampler_sigma(at)
        return torch.where(torch.isinf(s) & torch.isinf(at), 1.0, ratio)

    def timestep(self, s: Tensor) -> Tensor | None:
        """The timestep that the network is given at levels ``s``; None if the network is given sigma."""
        return None

    def levels(self, n: int) -> Tensor:
        """A grid of ``n`` levels from ``s_max`` to ``s_min``, uniform in ``lambda = -log s``."""
        return log_uniform(self.s_max, self.s_min, checked_level_count(n))

    def nearest(self, s: Tensor) -> Tensor:
        """The nearest levels at which the network can be called; 0 stays 0."""
        return s

    def to_dict(self) -> dict[str, Any]:
        """The entries that `process_from_dict` needs, in JSON types."""
        return {"kind": self.kind, **{name: value for name, value in vars(self).items() if not name.startswith("_")}}


@dataclass(frozen=True)
class VarianceExploding(NoiseProcess):
    """``x = x0 + s * eps`` for ``s`` in ``[sigma_min, sigma_max]`` (EDM, k-diffusion)."""

    sigma_min: float
    sigma_max: float
    kind: ClassVar[str] = "ve"

    def __post_init__(self) -> None:
        for name in ("sigma_min", "sigma_max"):
            object.__setattr__(self, name, validate.positive(name, getattr(self, name)))
        low, high = self.sigma_min, self.sigma_max
        if low >= high:
            raise ValueError(f"sigma_min must be below sigma_max, got sigma_min={low:g} and sigma_max={high:g}")
        if not 1 / LARGEST_SIGMA <= high <= LARGEST_SIGMA:
            raise ValueError(
                f"sigma_max must be within {1 / LARGEST_SIGMA:g} and {LARGEST_SIGMA:g}, as squares of samples are "
                f"computed in float32, got {high:g}; scale the data and the levels"
            )
        _check_lowest("sigma_min", self)

    @property
    def s_min(self) -> float:
        return self.sigma_min

    @property
    def s_max(self) -> float:
        return self.sigma_max

    def alpha(self, s: Tensor) -> Tensor:
        return torch.ones_like(s)

    def sigma(self, s: Tensor) -> Tensor:
        return s


@dataclass(frozen=True)
class VariancePreserving(NoiseProcess):
    """A discrete process ``alpha_t = sqrt(abar_t)``, ``sigma_t = sqrt(1 - abar_t)`` (DDPM, Stable Diffusion).

    Levels between two timesteps get a fractional timestep, interpolated linearly in ``log s`` (as in k-diffusion
    and diffusers). With ``integer_timesteps`` the network is called only at the timesteps it was trained on.

    Attributes:
        alphas_cumprod: ``abar_t`` for ``t = 0 .. T-1``, descending within ``[0, 1)``; a last value of 0 is
            zero terminal SNR.
        integer_timesteps: Whether the network accepts only integer timesteps.
    """

    alphas_cumprod: tuple[float, ...] = field(repr=False)
    integer_timesteps: bool = False
    _levels: Tensor = field(init=False, repr=False, compare=False)
    _logs: Tensor = field(init=False, repr=False, compare=False)
    kind: ClassVar[str] = "vp"

    def __post_init__(self) -> None:
        values = validate.float64("alphas_cumprod", self.alphas_cumprod)
        if getattr(getattr(self.alphas_cumprod, "dtype", None), "itemsize", 8) < 4:
            raise ValueError(
                "alphas_cumprod must be in float32 or float64: 16 bits round those near 1, so that the lowest level of "
                "Stable Diffusion is 7% too high; compute them anew from the betas"
            )
        if values.ndim != 1 or len(values) < 2:
            raise ValueError(f"alphas_cumprod must be a list of at least two values, got shape {tuple(values.shape)}")
        inside = (values[:-1] > 0).all() and values[-1] >= 0 and values[0] < 1
        if not bool(inside and (values[1:] < values[:-1]).all()):
            raise ValueError(
                "alphas_cumprod must descend strictly from below 1 to above 0 (or 0 at the last timestep); "
                "pass the cumulative products, in order of timestep, not the betas; got "
                f"{float(values[0]):g} to {float(values[-1]):g}"
            )
        if 0 < float(values[-1]) < ZERO * float(values[-2]):
            raise ValueError(
                f"alphas_cumprod ends in {float(values[-1]):.3g}, which is 0 up to rounding: make it 0 (zero terminal "
                "SNR, for from_v), or leave the last entry out"
            )
        levels = ((1 - values) / values).sqrt()
        object.__setattr__(self, "integer_timesteps", validate.flag("integer_timesteps", self.integer_timesteps))
        found = {"alphas_cumprod": tuple(values.tolist()), "_levels": levels, "_logs": levels.log()}
        for name, value in found.items():  # computed once: every network call needs the logarithms
            object.__setattr__(self, name, value)

    @property
    def trained_levels(self) -> Tensor:
        """``s_t = sqrt((1 - abar_t) / abar_t)`` for ``t = 0 .. T-1``, ascending, [T] float64."""
        return self._levels.clone()

    @property
    def s_min(self) -> float:
        return float(self._levels[0])

    @property
    def s_max(self) -> float:
        return float(self._levels[-1])

    def alpha(self, s: Tensor) -> Tensor:
        return (1 + s.square()).rsqrt()

    def sigma(self, s: Tensor) -> Tensor:
        return (1 + s.pow(-2)).rsqrt()

    def timestep(self, s: Tensor) -> Tensor:
        # torch operations only: inside torch.func.jvp a tensor cannot become a NumPy array
        logs = self._logs.to(s.device)
        position = s.detach().to(torch.float64).log().clamp_min(logs[0])
        last = int(logs.isfinite().sum()) - 1
        above = torch.searchsorted(logs[: last + 1].contiguous(), position.contiguous()).clamp(1, max(last, 1))
        fraction = (position - logs[above - 1]) / (logs[above] - logs[above - 1])
        t = (above - 1 + fraction).clamp_max(last)
        t = torch.where(position == math.inf, torch.full_like(t, len(logs) - 1), t)
        return t.round() if self.integer_timesteps else t

    def nearest(self, s: Tensor) -> Tensor:
        if not self.integer_timesteps:
            return s
        return torch.where(s > 0, self.trained_levels[self.timestep(s).long()], s)

    def levels(self, n: int) -> Tensor:
        n = checked_level_count(n)
        trained = self.trained_levels
        if not self.integer_timesteps:
            start = [] if math.isfinite(self.s_max) else [math.inf]
            top = float(trained[-1] if not start else trained[-2])
            values = [*start, *log_uniform(top, self.s_min, n - len(start)).tolist()]
            return torch.tensor(values, dtype=torch.float64, device="cpu")
        if n > len(trained):
            most = f"{len(trained)}, the network's number of timesteps"
            raise ValueError(f"levels must be at most {most}, got {n}; pass levels={len(trained)}")
        return trained[spread_indices(trained, n)].flip(0)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "alphas_cumprod": list(self.alphas_cumprod)}


@dataclass(frozen=True)
class FlowMatching(NoiseProcess):
    """``x = (1 - t) * x0 + t * eps``: rectified flow; ``s = t / (1 - t)``, timestep and sampler sigma are ``t``.

    Attributes:
        t_min: The smallest time at which the network is called.
        t_max: The time of pure noise; 1 is ``s = inf``.
        data_at: The network's own time of clean data. If it is 1, the network is given ``1 - t``.
    """

    t_min: float = 2e-3
    t_max: float = 1.0
    data_at: int = 0
    kind: ClassVar[str] = "flow"
    #: The second level of the grid when the first is pure noise. Above this level a network sees almost only noise.
    first_finite_s: ClassVar[float] = 100.0

    def __post_init__(self) -> None:
        for name in ("t_min", "t_max"):
            object.__setattr__(self, name, validate.real(name, getattr(self, name)))
        if not 0 < self.t_min < self.t_max <= 1:
            raise ValueError(
                f"t_min and t_max must satisfy 0 < t_min < t_max <= 1, got {self.t_min!r} and {self.t_max!r}"
            )
        if not isinstance(self.data_at, int) or self.data_at not in (0, 1):
            raise ValueError(
                f"data_at must be 0 or 1, the network's time of clean data, got {validate.shown(self.data_at)}"
            )
        _check_lowest("t_min", self)

    @property
    def s_min(self) -> float:
        return self.t_min / (1 - self.t_min)

    @property
    def s_max(self) -> float:
        return self.t_max / (1 - self.t_max) if self.t_max < 1 else math.inf

    def alpha(self, s: Tensor) -> Tensor:
        return 1 / (1 + s)

    def sigma(self, s: Tensor) -> Tensor:
        return 1 / (1 + 1 / s)

    def sampler_sigma(self, s: Tensor) -> Tensor:
        return self.sigma(s)

    def level(self, sampler_sigma: Tensor) -> Tensor:
        if bool((sampler_sigma > 1).any()):
            raise ValueError(f"sigmas of a flow model are times within [0, 1], got {float(sampler_sigma.max()):g}")
        return sampler_sigma / (1 - sampler_sigma)

    def timestep(self, s: Tensor) -> Tensor:
        return self.alpha(s) if self.data_at else self.sigma(s)

    def levels(self, n: int) -> Tensor:
        if math.isfinite(self.s_max):
            return super().levels(n)
        finite = log_uniform(
            max(self.first_finite_s, 2 * self.s_min),
            self.s_min,
            checked_level_count(n, minimum=3) - 1,
        )
        return torch.cat([torch.tensor([math.inf], dtype=torch.float64, device="cpu"), finite])

    def to_dict(self) -> dict[str, Any]:
        entries = super().to_dict()
        return entries if self.data_at else {key: value for key, value in entries.items() if key != "data_at"}


@dataclass(frozen=True)
class ContinuousVP(NoiseProcess):
    """The VP or sub-VP SDE in continuous time (Song et al. 2021, arXiv 2011.13456).

    ``alpha = exp(-t^2 (beta_max - beta_min) / 4 - t beta_min / 2)``; ``sigma^2 = 1 - alpha^2``, so that
    ``s = sqrt(1 / alpha^2 - 1)``, or for the sub-VP SDE ``sigma = 1 - alpha^2``, ``s = 1 / alpha - alpha``.

    Attributes:
        beta_min: Noise rate at ``t = 0``.
        beta_max: Noise rate at ``t = 1``.
        t_min: The smallest time at which the network is called.
        t_max: The largest time.
        sub_vp: Whether the process is the sub-VP SDE.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-3
    t_max: float = 1.0
    sub_vp: bool = False
    kind: ClassVar[str] = "vp"

    def __post_init__(self) -> None:
        for name in ("beta_min", "beta_max", "t_min", "t_max"):
            object.__setattr__(self, name, validate.real(name, getattr(self, name)))
        object.__setattr__(self, "sub_vp", validate.flag("sub_vp", self.sub_vp))
        for low, high in (("beta_min", "beta_max"), ("t_min", "t_max")):
            one, other = getattr(self, low), getattr(self, high)
            if not 0 < one < other < math.inf:
                raise ValueError(f"{low} and {high} must satisfy 0 < {low} < {high}, got {one!r} and {other!r}")
        if not self._decay(self.t_max) <= 2 * math.log(LARGEST_SIGMA):
            raise ValueError(
                f"beta_max and t_max must give a highest level of at most {LARGEST_SIGMA:g}, as squares of samples are "
                f"computed in float32, got beta_max={self.beta_max:g} and t_max={self.t_max:g}"
            )
        _check_lowest("t_min", self)

    @property
    def s_min(self) -> float:
        return self._level_at(self.t_min)

    @property
    def s_max(self) -> float:
        return self._level_at(self.t_max)

    def alpha(self, s: Tensor) -> Tensor:
        return 2 / (s + (s.square() + 4).sqrt()) if self.sub_vp else (1 + s.square()).rsqrt()

    def sigma(self, s: Tensor) -> Tensor:
        return s * self.alpha(s)

    def timestep(self, s: Tensor) -> Tensor:
        # The positive root of slope t^2 + beta_min t = -2 log alpha, free of cancellation near 0.
        decay = 2 * torch.asinh(s / 2) if self.sub_vp else torch.log1p(s.square())
        slope = (self.beta_max - self.beta_min) / 2
        return 2 * decay / (self.beta_min + (self.beta_min**2 + 4 * slope * decay).sqrt())

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "kind": "continuous_vp"}

    def _decay(self, t: float) -> float:
        """``-2 log alpha`` at time ``t``."""
        return t * (t * (self.beta_max - self.beta_min) / 2 + self.beta_min)

    def _level_at(self, t: float) -> float:
        decay = self._decay(t)
        return 2 * math.sinh(decay / 2) if self.sub_vp else math.sqrt(math.expm1(decay))


def process_from_dict(values: Mapping[str, Any]) -> NoiseProcess:
    """Rebuild a process from `NoiseProcess.to_dict`; ValueError if the kind is unknown or an entry is missing."""
    makers = {"ve": VarianceExploding, "vp": VariancePreserving, "flow": FlowMatching, "continuous_vp": ContinuousVP}
    entries = dict(values)
    kind = validate.choice("noise process kind", entries.pop("kind", None), makers)
    try:
        return makers[kind](**entries)
    except TypeError as error:
        raise ValueError(f"noise process {kind!r} cannot be read from {sorted(entries)}: {error}") from None


def _check_lowest(name: str, process: NoiseProcess) -> None:
    """ValueError, which names the argument that decides it, if the lowest level is below `SMALLEST_LEVEL`."""
    if process.s_min < SMALLEST_LEVEL:
        raise ValueError(
            f"{name} must give a lowest level of at least {SMALLEST_LEVEL:g}, as states over it are float32 numbers, "
            f"got {process.s_min:g}"
        )


def far_outside(process: NoiseProcess, s: Tensor) -> bool:
    """Whether levels lie a thousandfold beyond those of a noise process; from pure noise, the first may be any."""
    high, low = process.s_max, process.s_min
    above = bool((s[:1] > 1e3 * high).any() if math.isfinite(high) else (s[1:2] > 1e6).any())
    return above or float(s[-1]) < 1e-3 * low


def check_near(name: str, process: NoiseProcess, s: Tensor) -> None:
    """ValueError, which names the argument, if levels are `far_outside` those of the noise process."""
    if far_outside(process, s):
        raise ValueError(
            f"{name} must be near those of the noise process, {process.s_min:g} to {process.s_max:g} as levels s, "
            f"got s = {validate.shown(s.tolist())}"
        )
