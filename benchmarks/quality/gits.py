"""GITS's schedules (Chen et al. 2024, arXiv 2405.11326), implemented from the paper."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import fastsched as fs
from benchmarks.quality.baselines import highest_finite
from fastsched.denoisers.noise import NoiseProcess
from fastsched.measurement.converged_samples import Reference
from fastsched.sampling.random_streams import noise_of, sample_seeds
from fastsched.sampling.sampler import answered, integration, nodes_of
from fastsched.sampling.solvers import get_solver

Array = NDArray[np.float64]

#: Number of the teacher's levels above 0, which are karras with rho 7.
LEVELS = 61
#: Factor, applied at every step, on the cost of all later steps; the authors' for all but Stable Diffusion.
DISCOUNT = 1.15
#: The metrics and discounts that the authors offer; `GitsTuning` tries all pairs.
METRICS = ("dev", "l2")
DISCOUNTS = (1.0, 1.1, 1.15, 1.2)


@dataclass(frozen=True)
class Gits:
    """A teacher's path ``z_0 .. z_{N-1}``, and the cost of one Euler step between any two of its levels.

    For every solver, the step from i to j ends in ``z = z_i + (s_j - s_i) dz/ds(z_i)``. Its cost is a mean over
    samples: of ``||z - z_j||`` for the metric l2, and of ``dev(z) - dev(z_j)`` for dev, where ``dev`` is the distance
    from the line through ``z_0`` and ``z_{N-1}``.
    """

    process: NoiseProcess  #: the noise process
    s: Tensor  #: the teacher's levels, [N]
    costs: dict[str, Array]  #: by metric, [N, N], used above the diagonal
    model_calls: int  #: model calls of the path, counted per sample

    @classmethod
    @torch.no_grad()
    def measure(cls, denoiser: fs.Denoiser, noise: Tensor, *, teacher: str = "ipndm", levels: int = LEVELS) -> Gits:
        """Follow the teacher's path from each noise [B, *shape] and compute the cost of every Euler step."""
        process = denoiser.process
        s = fs.baselines.karras(levels, process.s_min, highest_finite(process))[:-1]
        s[0] = process.s_max
        states: list[Tensor] = []
        denoised: list[Tensor] = []

        def recorded(y: Tensor, level: float) -> Tensor:
            states.append(y)
            denoised.append(denoiser.denoise(y, level))
            return denoised[-1]

        states.append(answered(integration(nodes_of(process, s), get_solver(teacher), noise, s=s), recorded))
        y, d = (torch.stack(found).flatten(2).double() for found in (states, denoised))  # [N, B, d], [N - 1, B, d]
        costs = {"l2": _distances(y, d, s), "dev": _deviations(y, d, s)}
        return cls(process, s, costs, (len(s) - 1) * len(noise))

    def schedule(self, steps: int, metric: str = "dev", discount: float = DISCOUNT) -> Tensor:
        """Sampler sigmas of the best path of ``steps`` steps; its last node, the lowest level, is replaced by 0."""
        nodes = discounted_path(self.costs[metric], steps, discount)
        return self.process.sampler_sigma(torch.cat([self.s[nodes[:-1]], self.s.new_zeros(1)]))


@dataclass(frozen=True)
class GitsTuning:
    """Chooses among 16 settings of GITS (teacher, metric, discount) on separate noises."""

    denoiser: fs.Denoiser  #: the denoiser to sample from
    paths: dict[str, Gits]  #: GITS's paths, by the teacher's solver
    reference: Reference  #: converged samples of the noises

    def schedule(self, solver: str, steps: int) -> tuple[Tensor, int]:
        """The schedule with the least typical error under ``solver`` over all settings, and the model calls spent."""
        settings = itertools.product(self.paths.values(), METRICS, DISCOUNTS)
        schedules = [path.schedule(steps, metric, discount) for path, metric, discount in settings]
        found = {tuple(sigmas.tolist()): sigmas for sigmas in schedules}
        best = min(found.values(), key=lambda sigmas: self._error(sigmas, solver))
        tried = len(found) * get_solver(solver).model_calls(steps) * len(self.reference.noise)
        before = sum(path.model_calls for path in self.paths.values()) + self.reference.model_calls
        return best, before + tried

    def _error(self, sigmas: Tensor, solver: str) -> float:
        ends = fs.sample(self.denoiser, sigmas, solver, self.reference.noise)
        return fs.metrics.geometric_mean(fs.metrics.squared_distances(ends, self.reference.ends))


def warm_up_noise(seed: int, samples: int, shape: tuple[int, ...]) -> Tensor:
    """The noises of the teacher's paths, [samples, *shape]."""
    return noise_of(sample_seeds(seed, samples), shape)


def _distances(y: Tensor, d: Tensor, s: Tensor) -> Array:
    """Means over samples of ``||z - z_j||``, [N, N]."""
    rho = 1 / s
    cost = np.full((len(s), len(s)), np.inf)
    for i in range(len(s) - 1):
        for j in range(i + 1, len(s)):
            gap = y[i] + (rho[j] - rho[i]) * d[i] - y[j]
            cost[i, j] = float(s[j] * gap.norm(dim=1).mean())
    return cost


def _deviations(y: Tensor, d: Tensor, s: Tensor) -> Array:
    """Means over samples of ``dev(z) - dev(z_j)``, [N, N].

    The projection across the line is linear in the state, so ``y_i`` and ``D_i`` are projected once for all steps
    from i.
    """
    rho = 1 / s
    end = s[-1] * y[-1]
    line = end * rho[0] - y[0]  # z_{N-1} - z_0 over s_0, which may be infinite
    line = line / line.norm(dim=1, keepdim=True)

    def across(v: Tensor) -> Tensor:
        return v - (v * line).sum(-1, keepdim=True) * line

    end = across(end)
    path = torch.stack(
        [s_j * across(y_j) - end if torch.isfinite(s_j) else 0 * end for s_j, y_j in zip(s, y, strict=True)]
    )
    deviation = path.norm(dim=2).mean(1)  # [N]
    cost = np.full((len(s), len(s)), np.inf)
    for i in range(len(s) - 1):
        state, slope = across(y[i]), across(d[i])
        for j in range(i + 1, len(s)):
            gap = s[j] * (state + (rho[j] - rho[i]) * slope) - end
            cost[i, j] = float(gap.norm(dim=1).mean() - deviation[j])
    return cost


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
