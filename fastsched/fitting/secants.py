"""What runs of the sampler tell of the denoiser off the path: secants, beside the surrogate's shares.

A run evaluates the denoiser at states ``z_k``, k = 0, 1, ..., which deviate from the measured path by ``a_k = z_k -
z_path(s_k)``. What it finds there beyond the surrogate (`fastsched.costs.surrogate`),

    ``r_k = D(z_k; s_k) - D_path(s_k) - j(s_k) a_k``,

is what the Jacobian answers to ``a_k`` and no multiple of it. With the pairs ``(a_k, r_k)`` of several runs at the
same evaluation the model of the denoiser becomes the multisecant

    ``D(z; s) = D_path(s) + j(s) a + sum_m c_m r_m``,
    ``c = argmin ||a - sum_m c_m a_m||^2 + sum_m mu_m ||c_m a_m||^2``,

on which a schedule like those that were run samples much as on the denoiser; with ``mu = 0`` and one run, that run is
met exactly. All of it is written in coefficients over the increments and the ``r``, with norms by their Gram matrix,
the samples' mean; the coefficients ``c`` are common to the samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsched.costs.step_cost import Array
from fastsched.costs.surrogate import Surrogate
from fastsched.denoisers.denoiser import Denoiser
from fastsched.measurement.statistics import PathStatistics
from fastsched.sampling.random_streams import noise_of
from fastsched.sampling.solvers import Solver

#: ``mu`` of a pair: at the level of the evaluation, and what the square of its distance in ``log s`` adds.
DAMPING = (1e-4, 1.0)

#: Squared size of a deviation, against the error at the end, below which its answer is rounding.
LEAST = 1e-10


@dataclass(frozen=True)
class Evaluations:
    """What a run of the sampler asked the network and was told.

    Attributes:
        s: Levels, in order.
        states: ``y = z / s`` at each, [B, *shape].
        denoised: ``D`` at each, [B, *shape].
    """

    s: tuple[float, ...]
    states: tuple[Tensor, ...]
    denoised: tuple[Tensor, ...]

    @classmethod
    def of(cls, calls: Sequence[tuple[float, Tensor, Tensor]]) -> Evaluations:
        """Of calls ``(s, y, D)``, in order."""
        s, states, denoised = zip(*calls, strict=True)
        return cls(s, states, denoised)


@dataclass(frozen=True)
class Performance:
    """A run of the sampler from the noises of the measured paths.

    Attributes:
        ends: Where the samples ended, [B, *shape].
        evaluations: What the network was asked on the way and what it said, if that was kept.
    """

    ends: Tensor
    evaluations: Evaluations | None = None

    def first(self, samples: int) -> Performance:
        """Of the first samples alone, at most all of them."""
        found = self.evaluations
        if found is not None:
            few = lambda tensors: tuple(each[:samples] for each in tensors)
            found = Evaluations(found.s, few(found.states), few(found.denoised))
        return Performance(self.ends[:samples], found)

    @classmethod
    def joined(cls, parts: Sequence[Performance]) -> Performance:
        """Of batches of samples, one after the other."""
        found = [part.evaluations for part in parts if part.evaluations is not None]
        ends = torch.cat([part.ends for part in parts])
        if len(found) < len(parts):
            return cls(ends)
        join = lambda batches: tuple(torch.cat(each) for each in zip(*batches, strict=True))
        states, denoised = join([each.states for each in found]), join([each.denoised for each in found])
        return cls(ends, Evaluations(found[0].s, states, denoised))


@dataclass(frozen=True)
class Recorder(Denoiser):
    """A denoiser that keeps what it is asked, and what it answers, on the CPU.

    Attributes:
        own: The denoiser that answers.
        calls: ``(s, y, D)`` of each.
    """

    own: Denoiser | None = None
    calls: list[tuple[float, Tensor, Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, denoiser: Denoiser) -> Recorder:
        """One that answers as ``denoiser``."""
        return cls(**{each.name: getattr(denoiser, each.name) for each in fields(Denoiser)}, own=denoiser)

    def denoise(self, y: Tensor, s: Tensor | float, *, dtype: torch.dtype | None = None) -> Tensor:
        """As `Denoiser.denoise`, of one level."""
        found = (self.own or super()).denoise(y, s, dtype=dtype)
        self.calls.append((float(s), y.cpu(), found.cpu()))
        return found

    def evaluations(self) -> Evaluations:
        """All so far."""
        return Evaluations.of(self.calls)


def residuals(surrogate: Surrogate, stats: PathStatistics, found: Evaluations) -> Tensor:
    """``r_k`` of a run from the noises of the measured paths, [B, evaluations, d] float32."""
    assert stats.increments is not None
    s = np.array(found.s)
    state, denoised = (torch.from_numpy(known) for known in surrogate.path(s))
    moved = torch.from_numpy(1 / s - 1 / surrogate.s[0])[:, None]  # of y by a constant D
    share = torch.from_numpy(surrogate.share(s))[:, None]
    scale = torch.from_numpy(np.where(np.isinf(s), 0.0, s))[:, None]
    noise = noise_of(stats.seeds, stats.shape)
    rows = []
    for b, increments in enumerate(stats.increments):
        e = increments.double()
        noisiest = stats.ends[b].double().flatten() - e.sum(0)  # D_0
        at = lambda tensors: torch.stack([each[b].double().flatten() for each in tensors])  # noqa: B023 - used at once
        away = scale * (at(found.states) - noise[b].double().flatten() - moved * noisiest - state @ e)
        rows.append((at(found.denoised) - noisiest - denoised @ e - share * away).float())
    return torch.stack(rows)


@dataclass(frozen=True, eq=False)
class Secants:
    """The pairs of each evaluation, ready to answer: `Surrogate.run` takes this as what is known beyond the shares.

    Attributes:
        deviations: ``a_m`` of each evaluation's pairs, [pairs, n].
        weights: ``c = a @ weights``, [n, pairs] each.
        columns: Which of the n vectors are their ``r_m``.
    """

    deviations: tuple[Array, ...]
    weights: tuple[Array, ...]
    columns: tuple[NDArray[np.int64], ...]

    def __call__(self, evaluation: int, away: Array) -> tuple[Array, Array]:
        """The answers to deviations ``away`` [C, n] beyond their share, and the part that they are answers to."""
        c = away @ self.weights[evaluation]
        answer = np.zeros_like(away)
        answer[:, self.columns[evaluation]] = c
        return answer, c @ self.deviations[evaluation]

    @classmethod
    def of(
        cls, deviations: Sequence[Array], first: Sequence[int], s: Sequence[Array], anchor: int, metric: Array
    ) -> Secants:
        """Of M runs.

        Args:
            deviations: ``a_k`` of each run, [evaluations, n] (`deviations_of`).
            first: At which of the n vectors each run's ``r_k`` start.
            s: Levels of each run's evaluations.
            anchor: The run near whose levels schedules are asked for.
            metric: The Gram matrix of the n vectors, [n, n].
        """
        pairs, weights, columns = [], [], []
        for k, level in enumerate(s[anchor]):
            a = np.array([run[k] for run in deviations])
            levels = np.array([run[k] for run in s])
            size = ((a @ metric) * a).sum(1)
            kept = (size > LEAST) & np.isfinite(levels) & math.isfinite(level)  # no deviation at pure noise
            a, apart = a[kept], np.log(levels[kept] / level)
            damping = size[kept] * (DAMPING[0] + DAMPING[1] * apart**2)
            pairs.append(a)
            weights.append(np.linalg.solve(a @ metric @ a.T + np.diag(damping), a @ metric).T)
            columns.append(np.array(first)[kept] + k)
        return cls(tuple(pairs), tuple(weights), tuple(columns))


def deviations_of(surrogate: Surrogate, levels: Array, solver: Solver, first: int, more: int) -> Array:
    """``a_k`` of a run with levels [steps + 1], in coefficients over the increments and ``more`` vectors.

    Its own ``r_k`` are the vectors from ``first`` on: what the surrogate lacks to it, evaluation by evaluation.
    """
    found: list[Array] = []

    def known(evaluation: int, away: Array) -> tuple[Array, Array]:
        found.append(away[0])
        answer = np.zeros_like(away)
        answer[:, first + evaluation] = 1.0
        return answer, away

    surrogate.run(levels[None], solver, known, more)
    return np.array(found)
