"""The surrogate with a scalar Jacobian of each sample's own, which predicts the errors of stock solvers.

To the part of a deviation that no secant explains, the surrogate (`fastsched.costs.surrogate`) answers with one scalar
Jacobian for all samples. Here it answers with that of the sample ``b``:

    ``D(z; s) = D_path(s) + sum_m c_m (r_m + j a_m) + j_b (a - sum_m c_m a_m)``.

Over nine denoisers and 162 cells, schedules that were chosen without it had typical and mean errors of 1.04 and 1.02
times those chosen with it. Fits, and schedules of the fitted solver, do not gain by it. The samples no longer share
coefficients over the known vectors, so each has coordinates instead, in the space that its known vectors span.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from fastsched.costs.answer_errors import CORRELATION_LENGTH, relative_errors, variance_at_end
from fastsched.costs.interpolation_errors import interpolation_errors
from fastsched.costs.norms import Array
from fastsched.costs.scalar_jacobian import scalar_jacobian
from fastsched.costs.surrogate import Surrogate, deviation_scale, run_along
from fastsched.measurement.statistics import PathStatistics
from fastsched.sampling.solvers import Solver

#: Directions of a sample whose squared size is below this fraction of the largest are rounding, and left out.
ROUNDING = 1e-15


@dataclass(frozen=True, eq=False)
class SampleSurrogate:
    """A surrogate, and the scalar Jacobian of each sample."""

    shared: Surrogate  #: the surrogate in which all samples have the same scalar Jacobian
    own: Array  #: the scalar Jacobian of each sample at the levels, [N, B]
    elements: int  #: d, the number of elements of a sample, which bounds the rank of its known vectors

    @classmethod
    def of(cls, stats: PathStatistics) -> SampleSurrogate:
        """The surrogate of a measurement. Without deviated paths all samples have the Jacobian of Gaussian data."""
        shared = Surrogate.of(stats)
        secants = shared.secants
        if not secants.paths:
            return cls(shared, np.stack([shared.jacobian] * stats.samples, axis=1), stats.dimension)
        j = np.interp(secants.lam, shared.lam, shared.jacobian)[:, None, None]
        responses = secants.residuals + j * secants.deviations
        own = scalar_jacobian(secants.deviations, responses, shared.norms.relative_gram)
        return cls(shared, _interpolated(shared.lam, secants.lam, own), stats.dimension)

    @cached_property
    def roots(self) -> Array:
        """The coordinates of each sample's known vectors, [V, B, r]; their inner products are its Gram matrix."""
        sizes, axes = np.linalg.eigh(self.shared.norms.gram)
        kept = min(self.elements, max(1, int((sizes > ROUNDING * sizes[:, -1:]).sum(1).max())))
        roots = axes[..., -kept:] * np.sqrt(np.maximum(sizes[:, None, -kept:], 0.0))
        return np.ascontiguousarray(roots.transpose(1, 0, 2))

    def coordinates(self, vectors: Array) -> Array:
        """Coordinates [..., B, r] of vectors [..., n], coefficients over the first n known vectors of every sample."""
        return np.tensordot(vectors, self.roots[: vectors.shape[-1]], 1)

    @cached_property
    def secants(self) -> tuple[Array, Array]:
        """Coordinates of the secants' deviations and residuals, [G, M, B, r] each."""
        known = self.shared.secants
        return self.coordinates(known.deviations), self.coordinates(known.residuals)

    @cached_property
    def answer_errors(self) -> Array:
        """``kappa`` at the levels, [N]; without deviated paths ``sqrt(j (1 - j))``, that of a projection of mean j."""
        shared, known = self.shared, self.shared.secants
        if not known.paths:
            return np.sqrt(shared.jacobian * (1 - shared.jacobian))
        difference = _interpolated(known.lam, shared.lam, self.own - shared.jacobian[:, None])
        left_out = []
        for path in range(known.paths):
            error, unexplained = known.left_out(path)
            left_out.append((self.coordinates(error), self.coordinates(unexplained)))
        return np.interp(shared.lam, known.lam, relative_errors(left_out, difference))

    @cached_property
    def path_errors(self) -> Array:
        """Norm of the interpolation error of ``D`` on the path at the levels, [N, B]."""
        return interpolation_errors(self.shared.lam, self.shared.norms)

    def run(self, levels: Array, solver: Solver) -> SampleRuns:
        """Run a sampler along C schedules at once, from levels [C, steps + 1], descending to 0."""
        return run_along(levels, solver, self.shared.process, partial(SampleRuns, self))


class SampleRuns:
    """C runs of a sampler on a `SampleSurrogate` at once. It takes the network's place.

    Everything about the path and the secants is looked up once, at the K different levels of all runs.

    Attributes:
        model: The surrogate.
        end: Coordinates of the states ``y - y_0`` at the start, and after the run of the denoised samples ``D - D_0``,
            [C, B, r + later]. The last ``later`` columns are the factors with which errors of answers reach the end.
    """

    def __init__(self, model: SampleSurrogate, asked: Array) -> None:
        self.model, shared = model, model.shared
        self.samples, self.rank = model.roots.shape[1:]
        self.end = np.zeros((len(asked), self.samples, self.rank + asked.shape[1] - 1))
        self._distinct = np.unique(asked)  # schedules of a descent share most levels
        self._lam = shared.position(self._distinct)
        self._state, self._denoised = map(model.coordinates, shared.path(self._distinct))
        self._own = _interpolated(self._lam, shared.lam, model.own)
        self._scale = deviation_scale(self._distinct)
        self._state *= self._scale[:, None, None]
        self._weights = 1 / (self.samples * shared.norms.size[:, None])
        if shared.secants.paths:
            self._system = shared.secants.at(self._lam).system
            deviations, residuals = (shared.secants.mixed(self._lam, each) for each in model.secants)
            j = shared.scalar_jacobian(self._distinct)[:, None, None, None]
            joined = lambda values: values.reshape(len(values), -1, self.samples * self.rank)  # of all samples
            self._deviations, self._responses = joined(deviations), joined(residuals + j * deviations)
        self._unexplained: list[Array] = []
        self._rows: list[NDArray[np.intp]] = []

    def denoise(self, y: Array, s: Array) -> Array:
        """Coordinates of ``D - D_0`` at levels ``s`` [C], where those of ``y - y_0`` are ``y``; shaped as `end`."""
        rows, evaluation = np.searchsorted(self._distinct, s), len(self._rows)
        left = self._scale[rows, None, None] * y
        away = left[..., : self.rank]
        away -= self._state[rows]
        known = self._denoised[rows]
        if self.model.shared.secants.paths:
            deviations, responses = self._deviations[rows], self._responses[rows]
            weighted = (self._weights * away).reshape(len(rows), -1, 1)
            c = np.linalg.solve(self._system[rows], deviations @ weighted).transpose(0, 2, 1)
            away -= (c @ deviations).reshape(away.shape)
            known += (c @ responses).reshape(away.shape)
        found = self._own[rows][..., None] * left
        found[..., : self.rank] += known
        if evaluation > 0:
            found[..., self.rank + evaluation - 1] += 1.0  # the factor of this answer's error
        self._unexplained.append(away)
        self._rows.append(rows)
        return found

    @property
    def squared_error(self) -> Array:
        """Squared errors at the end, [C, B]."""
        increments = len(self.model.shared.s) - 1
        return _squared(self.end[..., : self.rank] - self.model.coordinates(np.ones(increments)))

    @property
    def variance(self) -> Array:
        """Variance of the error at the end from unknown errors of answers and of the path, [C, B]."""
        model, later = self.model, self._rows[1:]
        if not later:
            return np.zeros(self.end.shape[:2])
        lam = self._lam[np.stack(later, axis=1)]
        kappa = np.interp(lam, model.shared.lam, model.answer_errors)
        between = _interpolated(lam, model.shared.lam, model.path_errors)
        answers, path = [], []
        for n, unexplained in enumerate(self._unexplained[1:]):
            passed_on = self.end[..., self.rank + n]  # [C, B]
            answers.append((kappa[:, n, None] * passed_on)[..., None] * unexplained)
            path.append(between[:, n] * passed_on)
        variance = variance_at_end(answers, lam, CORRELATION_LENGTH, _squared)
        return variance + variance_at_end(path, lam, model.shared.spacing, np.square)


def _squared(vectors: Array) -> Array:
    return np.einsum("cbr,cbr->cb", vectors, vectors)


def _interpolated(lam: Array, known: Array, values: Array) -> Array:
    """``values`` [N, B] at ``known`` [N], interpolated linearly at ``lam`` [...], [..., B]."""
    return np.stack([np.interp(lam, known, of_sample) for of_sample in values.T], axis=-1)
