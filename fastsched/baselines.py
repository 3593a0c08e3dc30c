"""Schedules in common use, to compare with.

Every function returns a float64 tensor [steps + 1], strictly descending, whose last entry is 0: the
k-diffusion convention, in which a multistep sampler makes ``steps`` model calls. Entries are noise levels
``s = sigma / alpha`` (except `flow_shift`, which is in flow time). A flow model's highest level is infinite: use flow
times there, as in ``fs.Schedule(fs.baselines.karras(8, 0.002, 1.0), solver, "flow")``.

A schedule over a range of levels is a curve ``s(u)`` from ``s(0) = sigma_max`` to ``s(1) = sigma_min``.
``spare_last`` selects how it ends:

* ``False``, as in common use: ``steps`` nodes, the last at ``sigma_min``, and then 0;
* ``True``: ``steps + 1`` nodes, where 0 replaces the one at ``sigma_min``. This saves a model call at a level
  where the step changes little.

All raise ``ValueError`` naming the argument if ``steps`` is below 1, or if not
``0 < sigma_min < sigma_max < inf``. With ``steps = 1`` the schedule is ``[sigma_max, 0]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fastsched import validate

__all__ = [
    "ays",
    "beta",
    "cosine",
    "exponential",
    "flow_shift",
    "flow_shift_mu",
    "karras",
    "kl_optimal",
    "linear",
    "vp_uniform",
]

_AYS = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


def karras(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0, *, spare_last: bool = False) -> Tensor:
    """``s(u) = (s_max^(1/rho) + u (s_min^(1/rho) - s_max^(1/rho)))^rho``.

    Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", equation 5.
    ``rho`` is positive; 1 is `linear`, and as it grows the curve tends to `exponential`.
    """
    validate.arguments(locals())

    def curve(u: Tensor) -> Tensor:
        return _lerp(sigma_max ** (1 / rho), sigma_min ** (1 / rho), u) ** rho

    return _schedule(curve, steps, sigma_min, sigma_max, spare_last)


def exponential(steps: int, sigma_min: float, sigma_max: float, *, spare_last: bool = False) -> Tensor:
    """``s(u) = exp((1 - u) ln s_max + u ln s_min)``: uniform in the log-SNR, as DPM-Solver's default."""
    validate.arguments(locals())
    curve = lambda u: torch.exp(_lerp(math.log(sigma_max), math.log(sigma_min), u))
    return _schedule(curve, steps, sigma_min, sigma_max, spare_last)


def linear(steps: int, sigma_min: float, sigma_max: float, *, spare_last: bool = False) -> Tensor:
    """``s(u) = (1 - u) s_max + u s_min``."""
    validate.arguments(locals())
    return _schedule(lambda u: _lerp(sigma_max, sigma_min, u), steps, sigma_min, sigma_max, spare_last)


def kl_optimal(
    steps: int, sigma_min: float, sigma_max: float, data_std: float = 1.0, *, spare_last: bool = False
) -> Tensor:
    """``s(u) = c tan((1 - u) atan(s_max / c) + u atan(s_min / c))``, with ``c = data_std``.

    The optimum for Gaussian data of standard deviation ``c`` (Sabour, Fidler and Kreis 2024, "Align Your Steps",
    theorem 3.1). ``data_std`` is positive.
    """
    validate.arguments(locals())

    def curve(u: Tensor) -> Tensor:
        angle = _lerp(math.atan(sigma_max / data_std), math.atan(sigma_min / data_std), u)
        return data_std * torch.tan(angle)

    return _schedule(curve, steps, sigma_min, sigma_max, spare_last)


def vp_uniform(
    steps: int,
    sigma_min: float,
    sigma_max: float,
    beta_min: float = 0.1,
    beta_max: float = 20.0,
    *,
    spare_last: bool = False,
) -> Tensor:
    """Uniform in the time ``t`` of the variance-preserving SDE with a linear ``beta``.

    ``s(t) = sqrt(exp((beta_max - beta_min) t^2 / 2 + beta_min t) - 1)`` between the times of the two levels; the
    usual ``t`` from 1 to 1e-3 is levels 152.17 to 0.010486 (Song et al. 2021, "Score-Based Generative
    Modeling through Stochastic Differential Equations", appendix C). ``0 < beta_min < beta_max``.
    """
    validate.arguments(locals())
    if beta_min >= beta_max:
        raise ValueError(f"beta_min must be below beta_max={beta_max}; it is {beta_min}")
    slope = beta_max - beta_min

    def time(sigma: float) -> float:
        # The positive root of slope t^2 / 2 + beta_min t = log(1 + sigma^2), free of cancellation near 0.
        log_variance = math.log1p(sigma**2)
        return 2 * log_variance / (beta_min + math.sqrt(beta_min**2 + 2 * slope * log_variance))

    def curve(u: Tensor) -> Tensor:
        t = _lerp(time(sigma_max), time(sigma_min), u)
        return torch.sqrt(torch.expm1(0.5 * slope * t**2 + beta_min * t))

    return _schedule(curve, steps, sigma_min, sigma_max, spare_last)


def cosine(steps: int, sigma_min: float, sigma_max: float, *, spare_last: bool = False) -> Tensor:
    """Uniform in the time of the cosine process, between the times of the two levels.

    ``abar = cos^2((t + 0.008) / 1.008 * pi / 2)`` and ``s = sqrt(1 / abar - 1)`` (Nichol and Dhariwal 2021,
    "Improved Denoising Diffusion Probabilistic Models", equation 17), so ``s`` is the tangent of an angle linear
    in ``t``: given its range, this is `kl_optimal` for data of unit variance.
    """
    return kl_optimal(steps, sigma_min, sigma_max, 1.0, spare_last=spare_last)


def beta(
    steps: int, sigma_min: float, sigma_max: float, alpha: float = 0.6, beta: float = 0.6, *, spare_last: bool = False
) -> Tensor:
    """``s(u) = s_min + (s_max - s_min) Q(1 - u)``, ``Q`` the quantile function of Beta(``alpha``, ``beta``).

    Lee et al. 2024, "Beta Sampling is All You Need", as diffusers applies it to levels. Both parameters are
    positive; 1 and 1 are `linear`.

    Raises:
        ValueError: Also if levels near an end are equal in float64.
    """
    validate.arguments(locals())
    from scipy.special import betaincinv

    def curve(u: Tensor) -> Tensor:
        quantile = torch.from_numpy(betaincinv(float(alpha), float(beta), (1 - u).numpy()))
        return sigma_min + (sigma_max - sigma_min) * quantile

    return _schedule(curve, steps, sigma_min, sigma_max, spare_last)


def flow_shift(steps: int, shift: float = 3.0) -> Tensor:
    """Shifted uniform flow times: ``m t / (1 + (m - 1) t)`` for ``t = 1, 1 - 1/steps, ..., 1/steps``, then 0.

    Entries are flow times in (0, 1], which flow models call sigma (``s = t / (1 - t)``); the first is 1. Esser et
    al. 2024, "Scaling Rectified Flow Transformers", equation 23; the shift ``m`` is 3 for Stable Diffusion 3 and
    ``exp(mu)`` for Flux, with ``mu`` from `flow_shift_mu`. ``shift`` is positive; 1 leaves ``t`` uniform.
    """
    validate.arguments(locals())
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device="cpu")
    shift = float(shift)  # torch takes no int above 2**63
    times = shift * t / (shift * t + (1 - t))
    if not bool((times[:-1] > times[1:]).all()):
        raise ValueError(f"shift must leave {steps} times apart in float64, got {shift!r}")
    return times.detach()


def flow_shift_mu(
    tokens: int, *, base_tokens: int = 256, max_tokens: int = 4096, base_shift: float = 0.5, max_shift: float = 1.15
) -> float:
    """Flux's ``mu``: linear in the number of image tokens, ``base_shift`` at ``base_tokens`` to ``max_shift``.

    An image of H x W pixels has ``H W / 256`` tokens (autoencoder by 8, patches by 2). The line extends outside
    the two points, as in Flux's own code. For the schedule, ``flow_shift(steps, math.exp(mu))``.

    Raises:
        ValueError: If ``tokens`` is below 1 or the two token counts coincide.
    """
    validate.arguments(
        locals(),
        **dict.fromkeys(("tokens", "base_tokens", "max_tokens"), validate.positive_int),
        base_shift=validate.real,
        max_shift=validate.real,
    )
    if base_tokens == max_tokens:
        raise ValueError(f"max_tokens must differ from base_tokens; both are {base_tokens}")
    return base_shift + (max_shift - base_shift) * (tokens - base_tokens) / (max_tokens - base_tokens)


def ays(steps: int, model: Literal["sd15", "sdxl", "svd"] = "sd15") -> Tensor:
    """The published tables of Align Your Steps, log-linearly interpolated to ``steps``.

    The tables are for 10 steps and have 11 levels, the last of which is replaced by 0 (Sabour, Fidler and Kreis 2024).

    Args:
        steps: Number of steps; 10 gives the table itself.
        model: ``"sd15"`` and ``"sdxl"`` (Stable Diffusion 1.5 and XL), ``"svd"`` (Stable Video Diffusion).

    Raises:
        ValueError: If ``steps`` is below 1 or ``model`` is not one of the three.
    """
    validate.arguments(locals(), model=partial(validate.choice, known=_AYS))
    table = torch.tensor(_AYS[model], dtype=torch.float64, device="cpu").log()
    place = torch.linspace(0, len(table) - 1, steps + 1, dtype=torch.float64, device="cpu")
    left = place.long().clamp(max=len(table) - 2)
    sigmas = torch.exp(table[left] + (place - left) * (table[left + 1] - table[left]))
    sigmas[-1] = 0.0
    return sigmas


def _schedule(
    curve: Callable[[Tensor], Tensor], steps: int, sigma_min: float, sigma_max: float, spare_last: bool
) -> Tensor:
    """Nodes on ``curve``, a function of u in [0, 1], with exact ends, and the final 0."""
    if sigma_min >= sigma_max:
        raise ValueError(f"sigma_min must be below sigma_max={sigma_max}; it is {sigma_min}")
    try:
        sigmas = curve(torch.linspace(0, 1, steps + spare_last, dtype=torch.float64, device="cpu")).detach()
    except OverflowError:
        raise ValueError(
            f"steps={steps} levels from {sigma_max} to {sigma_min} overflow with these parameters"
        ) from None
    sigmas[-1] = validate.positive("sigma_min", sigma_min)
    sigmas[0] = validate.positive("sigma_max", sigma_max)
    if spare_last:
        sigmas[-1] = 0.0
    else:
        sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
    if not bool((sigmas[:-1] > sigmas[1:]).all()):
        raise ValueError(f"steps={steps} levels from {sigma_max} to {sigma_min} coincide in float64; take fewer")
    return sigmas


def _lerp(start: float, end: float, u: Tensor) -> Tensor:
    return (1 - u) * start + u * end
