"""Secants of the denoiser: its responses to deviations from the reference path.

A secant is a deviation ``a = z - z_path`` and the residual ``r = D(z) - D(z_path) - j a`` that the scalar Jacobian
``j`` leaves. From several secants at one level, the response to another deviation ``a`` is modelled as

    ``D(z) - D(z_path) ~ j a + sum_m c_m r_m``,   ``c = argmin ||a - sum_m c_m a_m||^2 + sum_m mu_m ||c_m a_m||^2``,

a damped multisecant model (Fang & Saad 2009). Deviated paths of the measurement give secants at levels of the grid, and
these are interpolated in ``lambda`` between levels. Runs of the sampler give one secant for each evaluation. All
vectors are coefficients over known vectors: the increments, the responses, and the residuals and errors of runs. Norms
come from the Gram matrix of these, a mean over the samples, so all samples have the same coefficients ``c``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fastsched.costs.norms import Array

#: ``mu`` of the secants of deviated paths; here it multiplies the mean of ``||a_m||^2`` over the secants of a level.
GRID_DAMPING = 1e-3


@dataclass(frozen=True, eq=False)
class RunSecants:
    """Secants of m runs of the sampler at one of their evaluations."""

    deviations: Array  #: ``a_m``, [m, V]
    residuals: Array  #: ``r_m``, [m, V]
    damping: Array  #: ``mu_m``, [m]
    #: ``o_m = log(s' / s)``, if the network was told ``s'`` and the state's level was ``s``, [m].
    offsets: Array
    unit: float  #: the squared deviation that an offset of 1 is equivalent to


@dataclass(frozen=True, eq=False)
class LevelSecants:
    """The secants of deviated paths at C levels, interpolated."""

    deviations: Array  #: ``a_m``, [C, M, V]
    residuals: Array  #: ``r_m``, [C, M, V]
    products: Array  #: the deviations times the metric, [C, M, V]
    system: Array  #: the damped Gram matrices of the deviations, [C, M, M]

    def __getitem__(self, which: NDArray[np.intp]) -> LevelSecants:
        """The secants of the levels with indices ``which``."""
        return LevelSecants(*(values[which] for values in vars(self).values()))


@dataclass(frozen=True, eq=False)
class Secants:
    """All known secants, as coefficients over V vectors."""

    lam: Array  #: ``lambda`` of the levels at which deviated paths evaluated the network, ascending, [G]
    deviations: Array  #: ``a`` of the M deviated paths at these levels, [G, M, V]
    residuals: Array  #: ``r`` of the deviated paths at these levels, [G, M, V]
    metric: Array  #: the Gram matrix of the vectors, a weighted mean over the samples, [V, V]
    runs: tuple[RunSecants, ...] = ()  #: the secants of runs, one entry per evaluation; empty without runs

    @classmethod
    def none(cls, vectors: int) -> Secants:
        """No secants, over ``vectors`` vectors."""
        empty = np.zeros((2, 0, vectors))
        return cls(np.array([0.0, 1.0]), empty, empty, np.zeros((vectors, vectors)))

    @property
    def paths(self) -> int:
        """M, the number of deviated paths."""
        return self.deviations.shape[1]

    @property
    def vectors(self) -> int:
        """V, the number of vectors."""
        return len(self.metric)

    def answer(
        self, evaluation: int, known: LevelSecants, away: Array, offset: Array | None = None
    ) -> tuple[Array, Array]:
        """The secants' answers to deviations, without the scalar Jacobian's part.

        Args:
            evaluation: The index of the evaluation in its run.
            known: The secants at the levels of the deviations, `at` their ``lambda``.
            away: The deviations, [C, V].
            offset: ``log(s' / s)``, if the network is told ``s'`` and the state's level is ``s``, [C].

        Returns:
            The answers ``sum_m c_m r_m``, and the explained part ``sum_m c_m a_m`` of the deviations, both [C, V].
        """
        used = self._with_run(evaluation, known) if self.runs else known
        deviations, residuals, products, system = vars(used).values()
        if deviations.shape[1] == 0:
            return np.zeros_like(away), np.zeros_like(away)
        right = products @ away[:, :, None]
        if offset is not None and self.runs:
            found = self.runs[evaluation]
            right[:, right.shape[1] - len(found.offsets) :, 0] += found.unit * offset[:, None] * found.offsets
        c = np.linalg.solve(system, right)
        return (c.transpose(0, 2, 1) @ residuals)[:, 0], (c.transpose(0, 2, 1) @ deviations)[:, 0]

    def left_out(self, path: int) -> tuple[Array, Array]:
        """Error of a path's answers predicted from the others, and unexplained part of its deviations; [G, V] each."""
        others = np.arange(self.paths) != path
        deviations, residuals = self.deviations[:, others], self.residuals[:, others]
        products = self._products[:, others]
        system = _damped(products @ deviations.transpose(0, 2, 1))
        c = np.linalg.solve(system, products @ self.deviations[:, path, :, None]).transpose(0, 2, 1)
        return self.residuals[:, path] - (c @ residuals)[:, 0], self.deviations[:, path] - (c @ deviations)[:, 0]

    @cached_property
    def _products(self) -> Array:
        return self.deviations @ self.metric

    @cached_property
    def _grams(self) -> tuple[Array, Array]:
        """``<a_m, a_n>`` at each level, [G, M, M], and between neighbours, both orders added, [G - 1, M, M]."""
        own = self._products @ self.deviations.transpose(0, 2, 1)
        crossed = self._products[:-1] @ self.deviations[1:].transpose(0, 2, 1)
        return own, crossed + crossed.transpose(0, 2, 1)

    def at(self, lam: Array) -> LevelSecants:
        """The secants of deviated paths at ``lambda`` [C], interpolated linearly between their levels."""
        deviations, residuals = self.mixed(lam, self.deviations), self.mixed(lam, self.residuals)
        after, t = self._places(lam)
        t = t[:, None, None]
        own, crossed = self._grams
        system = (1 - t) ** 2 * own[after - 1] + t * (1 - t) * crossed[after - 1] + t**2 * own[after]
        return LevelSecants(deviations, residuals, self.mixed(lam, self._products), _damped(system))

    def mixed(self, lam: Array, values: Array) -> Array:
        """``values`` [G, ...] at the secants' levels, interpolated linearly at ``lambda`` [C], [C, ...]."""
        after, t = self._places(lam)
        t = t.reshape(-1, *[1] * (values.ndim - 1))
        return (1 - t) * values[after - 1] + t * values[after]

    def _places(self, lam: Array) -> tuple[NDArray[np.intp], Array]:
        """The level of the secants after each ``lambda``, and how far it is from the level before, from 0 to 1."""
        after = np.clip(np.searchsorted(self.lam, lam, side="right"), 1, len(self.lam) - 1)
        t = (lam - self.lam[after - 1]) / (self.lam[after] - self.lam[after - 1])
        return after, np.clip(t, 0.0, 1.0)

    @cached_property
    def _of_runs(self) -> list[tuple[Array, Array]]:
        """Of the runs' secants at each evaluation, the products with the metric, [m, V], and the damped system."""
        found = []
        for run in self.runs:
            own = run.deviations @ self.metric
            square = own @ run.deviations.T + run.unit * np.outer(run.offsets, run.offsets)
            found.append((own, square + np.diag(run.damping * np.diag(square))))
        return found

    def _with_run(self, evaluation: int, known: LevelSecants) -> LevelSecants:
        """``known`` with the secants of runs at this evaluation appended."""
        found, (own, square) = self.runs[evaluation], self._of_runs[evaluation]
        crossed = known.products @ found.deviations.T  # [C, M, m]
        each = lambda values: np.broadcast_to(values, (len(crossed), *values.shape))
        join = lambda first, second: np.concatenate([first, each(second)], axis=1)
        above = np.concatenate([known.system, crossed], axis=2)
        below = np.concatenate([crossed.transpose(0, 2, 1), each(square)], axis=2)
        return LevelSecants(
            join(known.deviations, found.deviations),
            join(known.residuals, found.residuals),
            join(known.products, own),
            np.concatenate([above, below], axis=1),
        )


@dataclass(frozen=True)
class KnownAnswers:
    """Stands in for `Secants` and answers with the residuals of one run, so that the surrogate repeats that run."""

    first: int  #: the index of the run's first residual among the vectors; the others follow it
    vectors: int  #: V, the number of vectors

    def at(self, lam: Array) -> LevelSecants:
        """No secants: the residuals do not depend on the levels."""
        return Secants.none(self.vectors).at(lam)

    def answer(
        self, evaluation: int, known: LevelSecants, away: Array, offset: Array | None = None
    ) -> tuple[Array, Array]:
        """As `Secants.answer`, with the run's residual as the answer, and the whole deviation explained."""
        answer = np.zeros_like(away)
        answer[:, self.first + evaluation] = 1.0
        return answer, away


def _damped(system: Array) -> Array:
    """Gram matrices [C, M, M] with `GRID_DAMPING` added."""
    count = system.shape[1]
    size = np.einsum("cmm->c", system)[:, None, None] / max(count, 1)
    return system + (GRID_DAMPING * size + np.finfo(np.float64).tiny) * np.eye(count)
