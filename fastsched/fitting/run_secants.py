"""Secants that runs of the sampler add to those of the measurement.

A run evaluates the denoiser at states ``z_k`` that deviate from the measured path by ``a_k``. What it finds there is
the residual ``r_k = D(z_k; s_k) - D_path(s_k) - j(s_k) a_k``. The pairs ``(a_k, r_k)`` of all runs join the secants
(`fastsched.costs.secants`) at that evaluation: a schedule like those that were run then samples on the surrogate much
as on the denoiser. Where the network was told another level than the state's (decoupled levels), the offset in
``log s`` is one more coordinate of the deviation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsched.costs.norms import Array
from fastsched.costs.secants import RunSecants, Secants
from fastsched.costs.surrogate import Surrogate
from fastsched.fitting.rollouts import Evaluations
from fastsched.measurement.statistics import PathStatistics
from fastsched.sampling.random_streams import noise_of

#: ``mu`` of a secant: at the level of the evaluation, and what the square of its distance in ``log s`` adds.
DAMPING = (1e-4, 1.0)

#: Squared size of a deviation, against the error at the end, below which its answer is rounding.
LEAST = 1e-10


def residuals(surrogate: Surrogate, stats: PathStatistics, found: Evaluations) -> Tensor:
    """``r_k`` of a run from the noises of the measured paths, [B, evaluations, d] float32."""
    assert stats.increments is not None
    s = np.array(found.s)
    state, denoised = (torch.from_numpy(known) for known in surrogate.path(s))
    moved = torch.from_numpy(1 / s - 1 / surrogate.s[0])[:, None]  # of y by a constant D
    jacobian = torch.from_numpy(surrogate.scalar_jacobian(s))[:, None]
    scale = torch.from_numpy(np.where(np.isinf(s), 0.0, s))[:, None]
    noise = noise_of(stats.seeds, stats.shape)
    rows = []
    for b, increments in enumerate(stats.increments):
        e = increments.double()
        noisiest = stats.ends[b].double().flatten() - e.sum(0)  # D_0
        at = lambda tensors: torch.stack([each[b].double().flatten() for each in tensors])  # noqa: B023 - used at once
        away = scale * (at(found.states) - noise[b].double().flatten() - moved * noisiest - state @ e)
        rows.append((at(found.denoised) - noisiest - denoised @ e - jacobian * away).float())
    return torch.stack(rows)


@dataclass(frozen=True, eq=False)
class KnownAnswers:
    """The answers that one run met, in place of secants: its own deviations on the surrogate follow.

    Attributes:
        first: Which of the vectors is its first residual; the others follow it.
        vectors: V, how many vectors there are.
    """

    first: int
    vectors: int

    def answer(self, evaluation: int, lam: Array, away: Array, offset: Array | None = None) -> tuple[Array, Array]:
        """As `Secants.answer`: the residual itself, for the whole deviation."""
        answer = np.zeros_like(away)
        answer[:, self.first + evaluation] = 1.0
        return answer, away


def with_runs(
    secants: Secants,
    s: Array,
    deviations: Array,
    columns: NDArray[np.intp],
    offsets: Array,
    anchor: int,
    metric: Array,
    unit: float,
) -> Secants:
    """The secants of the measurement and of R runs of E evaluations, for schedules near one of the runs.

    Args:
        secants: Those of the measurement, over fewer vectors.
        s: Levels of the evaluations, [R, E].
        deviations: Deviations of the states there, [R, E, V].
        columns: Which of the vectors are the residuals there, [R, E].
        offsets: How far the levels that the network was told lay from the states' in ``log s``, [R, E].
        anchor: The run near whose levels schedules are asked for.
        metric: The Gram matrix of all vectors, [V, V].
        unit: What an offset of 1 counts as beside squares of deviations at level 1; as the state's noise it grows with
            the square of the level.
    """
    found = []
    for k, level in enumerate(s[anchor] if len(s) else ()):
        a = deviations[:, k]
        own = unit * level**2 if math.isfinite(level) else 0.0
        size = ((a @ metric) * a).sum(1) + own * offsets[:, k] ** 2
        kept = (size > LEAST) & np.isfinite(s[:, k]) & math.isfinite(level)  # no deviation at pure noise
        damping = DAMPING[0] + DAMPING[1] * np.log(s[kept, k] / level) ** 2
        residuals = np.zeros((int(kept.sum()), len(metric)))
        residuals[np.arange(len(residuals)), columns[kept, k]] = 1.0
        found.append(RunSecants(a[kept], residuals, damping, offsets[kept, k], own))
    wider = ((0, 0), (0, 0), (0, len(metric) - secants.deviations.shape[2]))
    return replace(
        secants,
        deviations=np.pad(secants.deviations, wider),
        residuals=np.pad(secants.residuals, wider),
        metric=metric,
        runs=tuple(found),
    )
