"""Secants that runs of the sampler add to those of the measurement.

A run evaluates the denoiser at states ``z_k`` that deviate from the measured path by ``a_k``. The residual there is
``r_k = D(z_k; s_k) - D_path(s_k) - j(s_k) a_k``. The pairs ``(a_k, r_k)`` of all runs are added to the secants
(`fastsched.costs.secants`) at evaluation ``k``. For schedules close to those that were run, sampling on the surrogate
is then close to sampling with the denoiser. With decoupled levels, the offset in ``log s`` from the state's level to
the level that the network was told is one more coordinate of the deviation.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsched.costs.norms import Array
from fastsched.costs.secants import RunSecants, Secants
from fastsched.costs.surrogate import Surrogate, deviation_scale
from fastsched.fitting.rollouts import Evaluations
from fastsched.measurement.statistics import PathStatistics
from fastsched.sampling.random_streams import noise_of

#: ``mu`` of a secant: its value at the level of the evaluation, and a factor of the squared distance in ``log s``.
DAMPING = (1e-4, 1.0)

#: Squared size of a deviation, relative to the squared error at the end, below which its residual is rounding.
LEAST = 1e-10
#: Largest squared size of unit noise relative to an error near 0; finite, because inf times an offset of 0 is NaN.
LARGEST = 1e300


def residuals(surrogate: Surrogate, stats: PathStatistics, found: Evaluations) -> Tensor:
    """``r_k`` of a run from the noises of the measured paths, [B, evaluations, d] float32."""
    assert stats.increments is not None
    s = np.array(found.s)
    state, denoised = (torch.from_numpy(known) for known in surrogate.path(s))
    moved = torch.from_numpy(1 / s - 1 / surrogate.s[0])[:, None]  # change of y by a constant D = 1
    jacobian = torch.from_numpy(surrogate.scalar_jacobian(s))[:, None]
    scale = torch.from_numpy(deviation_scale(s))[:, None]
    noise = noise_of(stats.seeds, stats.shape)
    rows = []
    for b, increments in enumerate(stats.increments):
        e = increments.double()
        noisiest = stats.ends[b].double().flatten() - e.sum(0)  # D_0
        at = lambda tensors: torch.stack([each[b].double().flatten() for each in tensors])  # noqa: B023 - used at once
        away = scale * (at(found.states) - noise[b].double().flatten() - moved * noisiest - state @ e)
        rows.append((at(found.denoised) - noisiest - denoised @ e - jacobian * away).float())
    return torch.stack(rows)


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
        secants: The secants of the measurement, over fewer vectors.
        s: Levels of the evaluations, [R, E].
        deviations: Deviations of the states at the evaluations, [R, E, V].
        columns: Indices of the evaluations' residuals among the vectors, [R, E].
        offsets: ``log(s' / s)``, if the network was told ``s'`` and the state's level was ``s``, [R, E].
        anchor: The index of the run near which the secants are used.
        metric: The Gram matrix of all vectors, [V, V].
        unit: The squared deviation at level 1 that an offset of 1 is equivalent to. It grows with the square of the
            level, as the state's noise does.
    """
    found = []
    for k, level in enumerate(s[anchor] if len(s) else ()):
        a = deviations[:, k]
        own = min(unit * level**2, LARGEST) if math.isfinite(level) else 0.0  # a constant network has errors near 0
        size = ((a @ metric) * a).sum(1) + own * offsets[:, k] ** 2
        kept = (size > LEAST) & np.isfinite(s[:, k]) & math.isfinite(level)  # at pure noise nothing has deviated
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
