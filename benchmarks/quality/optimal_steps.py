"""OSS's schedules (Pei et al. 2025, "Optimal Stepsize for Diffusion Sampling", arXiv 2503.21774), after the paper.

A teacher makes 200 Euler steps in the states of flow matching, ``x = z / (1 + s)`` at time ``t = s / (1 + s)``. For
every level j and number of steps k the student keeps one state: the closest to the teacher's state at j that one Euler
step reaches from the student's states of k - 1 steps, or the state of fewer steps if that is closer. So errors of
earlier steps are carried along. The search is greedy: the best state at j need not lie on the best path to the end.
Every sample has its own path; a schedule takes the median over samples of each node's position on the grid, as the
authors do. Here paths start at the highest level.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import fastsched as fs
from benchmarks.quality.baselines import highest_finite
from fastsched.denoisers.noise import FlowMatching, NoiseProcess, VariancePreserving

#: Levels of the teacher, sigma 0 not counted.
LEVELS = 200


@dataclass(frozen=True)
class OptimalSteps:
    """Every sample's path of up to ``most`` steps."""

    process: NoiseProcess  #: the noise process
    s: Tensor  #: the teacher's levels, noisiest first, [N]
    #: Predecessors, [most, B, N + 1]: ``before[k - 1, b, j]`` is the position of the level before j on sample b's path
    #: of k steps to j. Position N is sigma 0.
    before: Tensor

    @classmethod
    @torch.no_grad()
    def measure(cls, denoiser: fs.Denoiser, noise: Tensor, most: int, *, levels: int = LEVELS) -> OptimalSteps:
        """Find the paths that start from each noise [B, *shape]."""
        s = grid(denoiser.process, levels)
        teacher = _teacher(denoiser, noise, s)
        before = [_paths(denoiser, noise[b], teacher[:, b], s, most) for b in range(len(noise))]
        return cls(denoiser.process, s, torch.stack(before, 1))

    def model_calls(self, steps: int) -> int:
        """Model calls, counted per sample: those of the teacher, and for each further step one at every level."""
        return self.before.shape[1] * (steps * len(self.s) + 1)

    def schedule(self, steps: int) -> Tensor:
        """Sampler sigmas [steps + 1], the last 0."""
        positions = torch.full((self.before.shape[1],), len(self.s))
        found = []
        for k in range(steps, 0, -1):
            positions = self.before[k - 1].gather(1, positions[:, None])[:, 0]
            found.append(positions.sort().values)
        middle = [-(-int(p[len(p) // 2] + p[(len(p) - 1) // 2]) // 2) for p in reversed(found)]
        nodes = [0]  # nodes must stay distinct although some samples need fewer steps
        for n, position in enumerate(middle[1:], 1):
            nodes.append(min(max(position, nodes[-1] + 1), len(self.s) - steps + n))
        return self.process.sampler_sigma(torch.cat([self.s[nodes], self.s.new_zeros(1)]))


def grid(process: NoiseProcess, levels: int) -> Tensor:
    """The levels of the model's own sampler: uniform times, or karras for processes without times, [levels]."""
    if isinstance(process, FlowMatching):
        return process.level(torch.linspace(1, 0, levels + 1, dtype=torch.float64)[:-1])
    if isinstance(process, VariancePreserving):
        trained = process.trained_levels
        return trained[
            torch.linspace(len(trained) - 1, 0, min(levels, len(trained)), dtype=torch.float64).round().long()
        ]
    return fs.baselines.karras(levels, process.s_min, highest_finite(process))[:-1]


def _teacher(denoiser: fs.Denoiser, noise: Tensor, s: Tensor) -> Tensor:
    """Euler's states ``x`` at all levels and sigma 0, [N + 1, B, d]."""
    y, states = noise, []
    t, rho = s / (1 + s), 1 / s
    t = torch.where(torch.isinf(s), 1.0, t)
    for k in range(len(s)):
        states.append(float(t[k]) * y)
        denoised = denoiser.denoise(y, s[k])
        y = y + float(rho[k + 1] - rho[k]) * denoised if k + 1 < len(s) else denoised
    return torch.stack([*states, y]).flatten(2)


def _paths(denoiser: fs.Denoiser, noise: Tensor, teacher: Tensor, s: Tensor, most: int) -> Tensor:
    """``before`` of one sample, [most, N + 1].

    A step from level i ends at time t in ``x = t y_i + (1 - t - t / s_i) D_i``. Its squared distance from the teacher's
    state is computed from inner products, in float64.
    """
    levels = len(s)
    t = torch.cat([torch.where(torch.isinf(s), 1.0, s / (1 + s)), s.new_zeros(1)])  # [N + 1]
    share = 1 - t - t / s[:, None]  # [N, N + 1]
    later = torch.arange(levels + 1) > torch.arange(levels)[:, None]
    states = torch.zeros(levels, *noise.shape)
    states[0] = noise
    known = torch.arange(levels) == 0
    best = torch.full((levels + 1,), torch.inf, dtype=torch.float64)
    position = torch.zeros(levels + 1, dtype=torch.long)
    target = teacher.double()
    found = []
    for k in range(most):
        used = known.nonzero()[:, 0] if k == 0 else torch.arange(levels)
        denoised = torch.zeros_like(states)
        denoised[used] = denoiser.denoise(states[used], s[used])
        y, d = states.flatten(1).double(), denoised.flatten(1).double()
        squares = (t * y.square().sum(1)[:, None].sqrt()).square() + share.square() * d.square().sum(1)[:, None]
        squares = squares + 2 * t * share * (y * d).sum(1)[:, None] + target.square().sum(1)
        squares = squares - 2 * t * (y @ target.T) - 2 * share * (d @ target.T)
        squares[~later] = torch.inf
        squares[~known] = torch.inf
        least, choice = squares.min(0)
        closer = least < best
        best, position = torch.where(closer, least, best), torch.where(closer, choice, position)
        x = t[:, None] * y[choice] + share[choice, torch.arange(levels + 1)][:, None] * d[choice]
        x = (x[:-1] / t[:-1, None]).reshape(states.shape).float()
        states = torch.where(closer[:-1].reshape(-1, *[1] * noise.ndim), x, states)
        known = known | closer[:-1]
        found.append(position)
    return torch.stack(found)
