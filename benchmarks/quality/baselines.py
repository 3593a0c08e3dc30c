"""The schedules that fastsched is compared with, each from its own definition.

Schedules are sampler sigmas [steps + 1] ending in 0. Where a process starts from pure noise, a curve over noise levels
starts at the highest finite level of the denoiser's grid and its first node is then moved to the start, as
`fastsched.score_optimal_schedule` does; for flow models the curves are drawn in flow time as well.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import fastsched as fs
from fastsched.denoisers.noise import FlowMatching, NoiseProcess
from fastsched.sampling.multistep import log_rho
from fastsched.sampling.random_streams import noise_of, sample_seeds

Array = NDArray[np.float64]

#: A discount of 1.15 for each remaining step, and a teacher of 60 steps, as the authors of GITS set them.
GITS_DISCOUNT = 1.15
GITS_LEVELS = 61


def curves(process: NoiseProcess, steps: int, data_std: float) -> dict[str, Tensor]:
    """The closed-form schedules, by name; ``_spared`` where the node at the lowest level gave way to 0.

    Args:
        process: The noise process.
        steps: Steps, of which the last ends at sigma 0.
        data_std: The data's standard deviation, for ``kl_optimal``.
    """
    low, high = process.s_min, highest_finite(process)
    found: dict[str, Tensor] = {}
    for suffix, spare in (("", False), ("_spared", True)):
        levels = {
            "karras_7": fs.baselines.karras(steps, low, high, 7.0, spare_last=spare),
            "karras_3": fs.baselines.karras(steps, low, high, 3.0, spare_last=spare),
            "exponential": fs.baselines.exponential(steps, low, high, spare_last=spare),
            "kl_optimal": fs.baselines.kl_optimal(steps, low, high, data_std, spare_last=spare),
        }
        found |= {name + suffix: from_start(process, s) for name, s in levels.items()}
        if isinstance(process, FlowMatching):
            times = {
                "karras_7_time": fs.baselines.karras(steps, process.t_min, process.t_max, 7.0, spare_last=spare),
                "exponential_time": fs.baselines.exponential(steps, process.t_min, process.t_max, spare_last=spare),
            }
            found |= {name + suffix: t for name, t in times.items()}
    if isinstance(process, FlowMatching):
        found["linear"] = fs.baselines.flow_shift(steps, 1.0)
        found["flow_shift_3"] = fs.baselines.flow_shift(steps, 3.0)
    else:
        found["linear"] = fs.baselines.linear(steps, low, high)
    return found


def highest_finite(process: NoiseProcess) -> float:
    """The highest level, or the second of the grid where the first is pure noise."""
    return process.s_max if math.isfinite(process.s_max) else float(process.levels(3)[1])


def from_start(process: NoiseProcess, s: Tensor) -> Tensor:
    """Levels ``s`` as sampler sigmas, the first moved to the start of the process."""
    return process.sampler_sigma(torch.cat([s.new_tensor([process.s_max]), s[1:]]))


@dataclass(frozen=True)
class Gits:
    """GITS (Chen et al. 2024, arXiv 2405.11326), from its definition.

    A teacher's path ``z_0 .. z_{N-1}`` over 61 karras levels, by dpmpp_2m. ``cost[i, j]`` is the mean over samples of
    ``||z_i + (s_j - s_i) dz/ds(z_i) - z_j||``, one Euler step against the path, whatever the solver. Dynamic
    programming minimises ``c_1 + 1.15 (c_2 + 1.15 (c_3 + ...))``.

    Attributes:
        process: The noise process.
        s: The teacher's levels, [N].
        cost: [N, N], used above the diagonal.
        model_calls: What the path took, counted per sample.
    """

    process: NoiseProcess
    s: Tensor
    cost: Array
    model_calls: int

    @classmethod
    @torch.no_grad()
    def measure(cls, denoiser: fs.Denoiser, shape: tuple[int, ...], *, samples: int = 64, seed: int = 0) -> Gits:
        """Follow the teacher's path of ``samples`` noises and cost every Euler step along it."""
        process = denoiser.process
        s = fs.baselines.karras(GITS_LEVELS, process.s_min, highest_finite(process))[:-1]
        s[0] = process.s_max
        y = noise_of(sample_seeds(seed, samples), shape)
        states, denoised = [], []
        rho, lam = 1 / s, log_rho((1 / s).numpy())
        for k in range(len(s)):
            states.append(y)
            denoised.append(denoiser.denoise(y, s[k]))
            if k + 1 < len(s):
                ratio = (lam[k + 1] - lam[k]) / (lam[k] - lam[k - 1]) if k else 0.0
                before = denoised[max(k - 1, 0)]
                y = y + float(rho[k + 1] - rho[k]) * (denoised[k] + 0.5 * ratio * (denoised[k] - before))
        cost = np.full((len(s), len(s)), np.inf)
        for i in range(len(s)):
            for j in range(i + 1, len(s)):
                gap = states[i] + float(rho[j] - rho[i]) * denoised[i] - states[j]
                cost[i, j] = float(s[j]) * float(gap.flatten(1).norm(dim=1).mean())
        return cls(process, s, cost, len(s) * samples)

    def schedule(self, steps: int) -> Tensor:
        """Sampler sigmas of the best ``steps`` steps to the lowest level, which 0 then replaces."""
        nodes = discounted_path(self.cost, steps, GITS_DISCOUNT)
        return self.process.sampler_sigma(torch.cat([self.s[nodes[:-1]], self.s.new_zeros(1)]))


def discounted_path(cost: Array, steps: int, discount: float) -> list[int]:
    """The path of ``steps`` steps from the first index to the last that minimises ``c_1 + discount (c_2 + ...)``."""
    value = cost[:, -1].copy()
    following = []
    for _ in range(steps - 1):
        totals = cost + discount * value[None, :]
        following.append(totals.argmin(1))
        value = totals.min(1)
    path = [0]
    for choice in reversed(following):
        path.append(int(choice[path[-1]]))
    return [*path, len(cost) - 1]


#: Up to so many steps, DMN's authors let the weights of the first three not cancel those of later ones.
DMN_FEW_STEPS = 7


@functools.cache
def dmn(process: NoiseProcess, steps: int) -> Tensor:
    """DMN's schedule (Xue et al. 2024, arXiv 2402.17376), from its definition: no model calls, one for all solvers.

    Minimises `dmn_bound` over the nodes between the ends of the process, from nodes uniform in ``log s``, by L-BFGS in
    the logarithms of the gaps; 0 then replaces the last node.
    """
    from scipy.optimize import minimize

    low, high = math.log(process.s_min), math.log(highest_finite(process))

    def levels(log_gaps: Array) -> Array:
        gaps = np.exp(log_gaps - log_gaps.max(-1, keepdims=True))
        share = np.cumsum(gaps, -1) / gaps.sum(-1, keepdims=True)
        return np.exp(high + (low - high) * np.concatenate([np.zeros_like(share[..., :1]), share], -1))

    def value_and_gradient(log_gaps: Array) -> tuple[float, Array]:
        h = 1e-6  # forward differences, all in one batch
        values = np.log(dmn_bound(levels(np.concatenate([log_gaps[None], log_gaps + h * np.eye(steps)]))))
        return float(values[0]), (values[1:] - values[0]) / h

    bounds = [(-3.0, 3.0)] * steps  # nodes that fall together have no weights
    found = minimize(value_and_gradient, np.zeros(steps), jac=True, method="L-BFGS-B", bounds=bounds)
    s = torch.from_numpy(levels(found.x))
    s[-1] = 0.0
    return from_start(process, s)


def dmn_bound(s: Array) -> Array:
    """How far a denoiser that errs by ``s_i = sigma_i / alpha_i`` at level i can move the end, [...].

    ``sum_i s_i |W_i|``, ``W_i`` the weight of the i-th denoised sample in ``y`` at the end, under third-order
    multistep steps: ``D`` interpolated in ``lambda = -log s`` by the last three samples, and integrated over
    ``rho = e^lambda`` exactly; one sample in the first step and the last, two in the second and the last but one. With
    few steps, ``sqrt(sum (s_i W_i)^2)`` of each of the first three steps is added instead.

    Args:
        s: Levels [..., steps + 1], descending, the last above 0.
    """
    steps = s.shape[-1] - 1
    lam = -np.log(s)
    sums, apart = np.zeros((*s.shape[:-1], steps)), np.zeros(s.shape[:-1])
    for n in range(steps):
        order = max(1, min(3, n + 1, steps - n))
        used = slice(n + 1 - order, n + 1)
        h = lam[..., n + 1] - lam[..., n]
        moments = [np.expm1(h)]  # of (lambda - lambda_n)^p over e^lambda, less e^lambda_n
        for power in range(1, order):
            moments.append(h**power * np.exp(h) - power * moments[-1])
        positions = lam[..., used] - lam[..., n : n + 1]
        powers = positions[..., None, :] ** np.arange(order)[:, None]
        weights = np.linalg.solve(powers, np.stack(moments, -1)[..., None])[..., 0] / s[..., n : n + 1]
        terms = weights * s[..., used]
        if steps <= DMN_FEW_STEPS and n < 3 and order > 1:
            apart += np.sqrt((terms**2).sum(-1))
        elif order == 1:
            apart += np.abs(terms[..., 0])
        else:
            sums[..., used] += terms
    return apart + np.abs(sums).sum(-1)
