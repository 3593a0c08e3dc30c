"""The surrogate, a model of the denoiser from a measurement: the error of any schedule, without a model call.

On the measured path the denoiser is known: ``D(lambda) = D_0 + sum_q p_q(lambda) e_q``, the natural cubic spline
through the levels. Off the path, its response to a deviation ``a`` of the state is modelled by a scalar Jacobian and
by secants (`fastsched.costs.secants`):

    ``D(z; s) = D_path(s) + j(s) a + sum_m c_m r_m(s)``,   ``a = z - z_path(s)``.

Errors of stock solvers are predicted by a variant of it (`fastsched.costs.sample_surrogate`).

If a sampler runs on this model, its error at the end is a combination ``sum_q C_q v_q`` of known vectors: the
increments, and the responses of the deviated paths. So their Gram matrix gives its size. This holds for every solver,
also with correctors and predicted states. Unlike the local errors of `fastsched.costs.step_cost`, this is the error of
a whole schedule: errors of the steps are passed on and added up with their signs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from fastsched.costs.norms import Array, Norms
from fastsched.costs.scalar_jacobian import scalar_jacobian
from fastsched.costs.secants import KnownAnswers, Secants
from fastsched.denoisers.noise import NoiseProcess
from fastsched.measurement.deviated_paths import asked_levels, positions
from fastsched.measurement.statistics import PathStatistics
from fastsched.sampling.multistep import log_rho
from fastsched.sampling.sampler import answered, integration, nodes_of
from fastsched.sampling.solvers import Solver, get_solver

Runs = TypeVar("Runs", bound=Any)


@dataclass(frozen=True, eq=False)
class Outcome:
    """The errors of C schedules that were run on the surrogate."""

    error: Array  #: coefficients of the error at the end over the known vectors, [C, V]
    #: Coefficients of the part of each state's deviation that no secant explains, times `amplitude`; one for each
    #: network evaluation after the first, [C, evaluations, V].
    deviations: Array


@dataclass(frozen=True, eq=False)
class OnPath:
    """The path and the model around it at C levels."""

    s: Array  #: the levels, [C]
    lam: Array  #: ``lambda`` of the levels, clipped to the grid, [C]
    state: Array  #: coefficients of ``y - y_0``, [C, N-1]
    denoised: Array  #: coefficients of ``D - D_0``, [C, N-1]
    jacobian: Array  #: the scalar Jacobian, [C]
    amplitude: Array  #: the factor from the size of a deviation at the level to its size at the end, [C]

    def __getitem__(self, which: NDArray[np.intp]) -> OnPath:
        """The entries with indices ``which``."""
        return OnPath(*(values[which] for values in vars(self).values()))


@dataclass(frozen=True, eq=False)
class Surrogate:
    """The model of the denoiser from a measurement."""

    process: NoiseProcess
    s: Array  #: levels of the grid, [N]
    norms: Norms  #: norms over the V known vectors: the increments, then the responses
    jacobian: Array  #: the scalar Jacobian ``j`` at the levels, [N]
    secants: Secants  #: the secants of the deviated paths

    @classmethod
    def of(cls, stats: PathStatistics) -> Surrogate:
        """The surrogate of a measurement.

        The scalar Jacobian is that of all samples together (`fastsched.costs.scalar_jacobian`). Without deviated paths
        it is that of Gaussian data with the standard deviation of the ends.
        """
        s, norms = stats.s.numpy(), Norms.of_increments(stats.vector_gram.numpy(), stats.levels - 1)
        gaussian = stats.data_std**2 / (stats.data_std**2 + s**2)
        bare = cls(stats.process, s, norms, gaussian, Secants.none(norms.vectors))
        if stats.response_gram is None:
            return bare
        levels, deviations, responses = bare._deviated(stats)
        lam = bare.lam[levels]
        j = scalar_jacobian(deviations, responses, norms.metric[None])[:, 0]
        secants = Secants(lam, deviations, responses - j[:, None, None] * deviations, norms.metric)
        return cls(stats.process, s, norms, np.interp(bare.lam, lam, j), secants)

    @property
    def vectors(self) -> int:
        """V, the number of known vectors."""
        return self.norms.vectors

    @property
    def spacing(self) -> float:
        """The median distance between levels of the grid in ``lambda``."""
        return float(np.median(np.diff(self.lam)))

    def _deviated(self, stats: PathStatistics) -> tuple[list[int], Array, Array]:
        """Level 0 and the levels where deviated paths evaluate; deviations and responses there, [G, M, V] each."""
        n, rho = len(self.s), 1 / self.s
        asked = [0, *asked_levels(n)]
        state, _ = self.path(self.s)
        deviations = np.zeros((len(asked), len(stats.deviated), self.vectors))
        responses = np.zeros_like(deviations)
        first = n - 1
        for m, path in enumerate(stats.deviated):
            column = {level: first + row for row, level in enumerate(asked[1:])}
            first += len(column)
            y = np.zeros((n, self.vectors))  # coefficients of y' - y_0, without the part of the constant D_0
            for k, used in enumerate(path.slopes(self.lam.tolist())):
                y[k + 1] = y[k]
                for level, weight in used:
                    y[k + 1, :level] += weight * (rho[k + 1] - rho[k])
                    if level > 0:
                        y[k + 1, column[level]] += weight * (rho[k + 1] - rho[k])
            y[:, : n - 1] -= state
            deviations[:, m] = (deviation_scale(self.s)[:, None] * y)[asked]
            for row, level in enumerate(asked[1:], 1):
                responses[row, m, column[level]] = 1.0
        return asked, deviations, responses

    @cached_property
    def lam(self) -> Array:
        """``lambda`` of the levels, ascending, [N]."""
        return np.array(positions(torch.from_numpy(self.s)))

    @cached_property
    def _pieces(self) -> Array:
        """Polynomials of each segment, lowest power first: ``p``, and ``P`` with ``d(e^lam P)/dlam = e^lam p``.

        Side by side, to evaluate them together: [4, N-1 segments, twice N-1 increments].
        """
        from scipy.interpolate import CubicSpline  # imported here, because the import is slow

        n = len(self.s)
        p = np.ascontiguousarray(CubicSpline(self.lam, np.tri(n, n - 1, -1), bc_type="natural").c[::-1], np.float64)
        integral, derivative = np.zeros_like(p), p
        for sign in (1, -1, 1, -1):  # P = p - p' + p'' - p'''
            integral += sign * np.concatenate([derivative, np.zeros_like(p[: 4 - len(derivative)])])
            derivative = derivative[1:] * np.arange(1, len(derivative))[:, None, None]
        return np.concatenate([p, integral], axis=2)

    @cached_property
    def _integration_constants(self) -> Array:
        """The constant of each segment that is added to ``e^lam P`` to give ``y - y_0``, [N-1, N-1]."""
        rho, (p, integral) = 1 / self.s, np.split(self._pieces, 2, axis=2)
        length = np.diff(self.lam)[:, None]
        at_end = lambda pieces: pieces[0] + length * (pieces[1] + length * (pieces[2] + length * pieces[3]))
        gains = rho[1:, None] * at_end(integral) - rho[:-1, None] * integral[0]
        if rho[0] == 0:
            gains[0] = rho[1] * 0.5 * (p[0, 0] + at_end(p)[0])
        reached = np.cumsum(gains, axis=0) - gains
        return reached - rho[:-1, None] * integral[0]

    @cached_property
    def _amplitudes(self) -> Array:
        """Size at the end of a unit deviation, [N]: ``a_k = (keep + (1 - keep) j_k) a_{k+1}``, ``a_N = 1``."""
        keep = np.append(self.s[1:], 0.0) / self.s
        return np.cumprod((keep + (1 - keep) * self.jacobian)[::-1], dtype=np.float64)[::-1]

    def path(self, s: Array) -> tuple[Array, Array]:
        """Coefficients of ``y - y_0`` and of ``D - D_0`` on the path at levels ``s`` [C]; each [C, N-1]."""
        rho, lam = 1 / s, self.position(s)
        segment = np.clip(np.searchsorted(self.lam, lam, side="right") - 1, 0, len(self.s) - 2)
        x = (lam - self.lam[segment])[:, None]
        c = self._pieces
        both = c[0][segment] + x * (c[1][segment] + x * (c[2][segment] + x * c[3][segment]))
        denoised, integral = np.split(both, 2, axis=1)
        state = rho[:, None] * integral + self._integration_constants[segment]
        if math.isinf(self.s[0]):  # D is linear in rho from pure noise to the first finite level
            first = (segment == 0)[:, None]
            state = np.where(first, 0.5 * rho[:, None] * (c[0, 0, : denoised.shape[1]] + denoised), state)
        return state, denoised

    def on_path(self, s: Array) -> OnPath:
        """The path and the model around it at levels ``s`` [C]."""
        return OnPath(s, self.position(s), *self.path(s), self.scalar_jacobian(s), self.amplitude(s))

    def run(
        self,
        levels: Array,
        solver: str | Solver,
        secants: Secants | KnownAnswers | None = None,
        offsets: Array | None = None,
    ) -> SurrogateRuns:
        """Run a sampler along C schedules at once.

        Args:
            levels: Levels ``s`` [C, steps + 1], descending to 0.
            solver: The solver.
            secants: The secants, which may have more vectors than the measurement; those of the measurement when None.
            offsets: ``log(s' / s)``, if the network is told ``s'`` and the state's level is ``s``, [C, steps].
        """
        begin = lambda asked: SurrogateRuns(self, secants or self.secants, asked, offsets)
        return run_along(levels, get_solver(solver), self.process, begin)

    def scalar_jacobian(self, s: Array) -> Array:
        """``j`` at levels ``s``, interpolated linearly in ``lambda``."""
        return np.interp(self.position(s), self.lam, self.jacobian)

    def amplitude(self, s: Array) -> Array:
        """The factor from the size of a deviation at levels ``s`` to its size at the end."""
        return np.interp(self.position(s), self.lam, self._amplitudes)

    def position(self, s: Array) -> Array:
        """``lambda`` of levels ``s``, clipped to the grid."""
        return np.clip(log_rho(1 / s), self.lam[0], self.lam[-1])


class SurrogateRuns:
    """C runs of a sampler on a surrogate at once. It takes the network's place, and keeps the deviations of the states.

    The path and the secants are looked up once, at all the levels [C, evaluations] that it will be asked at.

    Attributes:
        surrogate: The surrogate.
        secants: The secants.
        offsets: ``log(s' / s)``, if the network is told ``s'`` and the state's level is ``s``, [C, steps].
        end: Coefficients of the states ``y - y_0`` at the start, and after the run of the denoised samples ``D - D_0``,
            [C, V].
        weights: Weights of runs by `fastsched.costs.fitted_weights`, [C, steps, steps]; None for other runs.
    """

    def __init__(
        self, surrogate: Surrogate, secants: Secants | KnownAnswers, levels: Array, offsets: Array | None = None
    ) -> None:
        self.surrogate, self.secants, self.offsets = surrogate, secants, offsets
        self.end = np.zeros((len(levels), secants.vectors))
        self.weights: Array | None = None
        self._distinct = np.unique(levels)  # schedules of a descent share most levels
        self._path_at = surrogate.on_path(self._distinct)
        self._secants_at = secants.at(self._path_at.lam)
        self._away: list[Array] = []
        self._unexplained: list[Array] = []
        self._known: list[OnPath] = []

    @property
    def deviations(self) -> Array:
        """The states' deviations from the path at each evaluation, [evaluations, C, V]."""
        return np.array(self._away)

    @property
    def error(self) -> Array:
        """Coefficients of the errors at the end, [C, V]."""
        error = self.end.copy()
        error[:, : len(self.surrogate.s) - 1] -= 1.0
        return error

    @property
    def outcome(self) -> Outcome:
        """The errors at the end, and the unexplained deviations times their amplitudes."""
        return Outcome(self.error, self._at_end(self._unexplained))

    @property
    def deviations_at_end(self) -> Array:
        """The states' whole deviations times their amplitudes, [C, evaluations, V]."""
        return self._at_end(self._away)

    def _at_end(self, deviations: list[Array]) -> Array:
        """Deviations times their amplitudes, [C, evaluations, V], without the first evaluation: it is on the path."""
        scaled = [each * at.amplitude[:, None] for each, at in zip(deviations[1:], self._known[1:], strict=True)]
        return np.stack(scaled or [np.zeros((len(self.end), self.secants.vectors))], axis=1)

    def on_path(self, s: Array) -> OnPath:
        """The path and the model around it at levels ``s`` [C]."""
        return self._path_at[np.searchsorted(self._distinct, s)]

    def denoise(self, y: Array, s: Array) -> Array:
        """Coefficients of ``D - D_0`` [C, V] at levels ``s`` [C], where ``y - y_0`` has coefficients ``y``."""
        n, evaluation = len(self.surrogate.s) - 1, len(self._away)
        rows = np.searchsorted(self._distinct, s)
        known = self._path_at[rows]
        away = y.copy()
        away[:, :n] -= known.state
        away *= deviation_scale(known.s)[:, None]
        found = known.jacobian[:, None] * away
        offset = None if self.offsets is None else self.offsets[:, evaluation]
        answer, explained = self.secants.answer(evaluation, self._secants_at[rows], away, offset)
        found += answer
        found[:, :n] += known.denoised
        self._away.append(away)
        self._unexplained.append(away - explained)
        self._known.append(known)
        return found


def deviation_scale(s: Array) -> Array:
    """The factor from a deviation of ``y`` to that of ``z = s y``: ``s``, but 0 at pure noise, where there is none."""
    return np.where(np.isinf(s), 0.0, s)


def run_along(levels: Array, method: Solver, process: NoiseProcess, begin: Callable[[Array], Runs]) -> Runs:
    """Run a sampler along C schedules [C, steps + 1] at once.

    ``begin`` gets all levels that will be asked, [C, evaluations], and returns what takes the network's place.
    """
    levels = np.asarray(levels, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        nodes = nodes_of(process, torch.from_numpy(levels))
        stages = [] if method.stage is None else [1 / method.stage(*pair).rho for pair in pairwise(nodes[:-1])]
        found = begin(np.column_stack([levels[:, :-1], *stages]))
        shaped = lambda value: np.asarray(value).reshape(-1, *[1] * (found.end.ndim - 1))
        found.end = answered(integration(nodes, method, found.end, s=list(levels.T), number=shaped), found.denoise)
    return found
