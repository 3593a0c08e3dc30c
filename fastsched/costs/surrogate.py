"""The sampler on what a measurement knows of the denoiser: the error of any schedule, without a model call.

On the measured path the denoiser is known, ``D(lambda) = D_0 + sum_q p_q(lambda) e_q``, the natural cubic spline
through the levels. Off it, a deviation of the state is answered by a scalar Jacobian and by secants
(`fastsched.costs.secants`),

    ``D(z; s) = D_path(s) + j(s) a + sum_m c_m r_m(s)``,   ``a = z - z_path(s)``.

Run on this model, a solver's error at the end is a combination ``sum_q C_q v_q`` of known vectors (the increments, and
the responses of the deviated paths), whatever the solver, its correctors and predicted states included; so their Gram
matrix gives its size. This is the local error of `fastsched.costs.step_cost` for a whole schedule at once: errors of
the steps are passed on and added up with their signs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fastsched.costs.answer_errors import LENGTH, relative_errors, uncorrelated
from fastsched.costs.interpolation_errors import interpolation_errors
from fastsched.costs.norms import Array, Norms
from fastsched.costs.secants import Secants
from fastsched.denoisers.noise import NoiseProcess
from fastsched.measurement.deviated_paths import asked_levels, positions
from fastsched.measurement.statistics import PathStatistics
from fastsched.sampling.multistep import Node, log_rho
from fastsched.sampling.sampler import answered, integration
from fastsched.sampling.solvers import Solver, get_solver


@dataclass(frozen=True, eq=False)
class Outcome:
    """The errors of C schedules that were run on the surrogate.

    Attributes:
        error: Coefficients of the error at the end over the known vectors, [C, V].
        deviations: Coefficients of the part of each state's deviation that no secant explains, times its amplitude at
            the end; one for each network evaluation off the path, [C, evaluations, V].
    """

    error: Array
    deviations: Array


class Answers(Protocol):
    """What is known of answers to deviations: `Secants`, or the answers that one run met."""

    @property
    def vectors(self) -> int:
        """V, how many vectors coefficients are over."""
        ...

    def answer(self, evaluation: int, lam: Array, away: Array, offset: Array | None = None) -> tuple[Array, Array]:
        """As `Secants.answer`."""
        ...


@dataclass(frozen=True, eq=False)
class OnPath:
    """What is known on the path at C levels.

    Attributes:
        s: The levels, [C].
        lam: Their ``lambda``, within the grid, [C].
        state: Coefficients of ``y - y_0``, [C, N-1].
        denoised: Coefficients of ``D - D_0``, [C, N-1].
        jacobian: The scalar Jacobian, [C].
        amplitude: How large a deviation is at the end, against its size there, [C].
    """

    s: Array
    lam: Array
    state: Array
    denoised: Array
    jacobian: Array
    amplitude: Array

    def __getitem__(self, which: NDArray[np.intp]) -> OnPath:
        """The same at levels by their numbers."""
        return OnPath(*(values[which] for values in vars(self).values()))


@dataclass(frozen=True, eq=False)
class Surrogate:
    """The denoiser as the statistics know it.

    Attributes:
        process: The noise process.
        s: Levels of the grid, [N].
        norms: Norms over the V known vectors: the increments, then the responses.
        jacobian: The scalar Jacobian ``j`` at the levels, [N].
        secants: What is known beyond it.
    """

    process: NoiseProcess
    s: Array
    norms: Norms
    jacobian: Array
    secants: Secants | None = None

    @classmethod
    def of(cls, stats: PathStatistics) -> Surrogate:
        """The surrogate of a measurement.

        The scalar Jacobian is the least-squares ``j`` of ``D(z') - D(z) ~ j a`` over the deviated paths and the
        samples, kept within [0, 1], so that no error is taken to change sign or to grow on its way; between modes it
        may grow, which is left to the secants. Without deviated paths it is ``c^2 / (c^2 + s^2)``, that of Gaussian
        data of the ends' standard deviation ``c``.
        """
        s, norms = stats.s.numpy(), Norms.of_increments(stats.vector_gram.numpy(), stats.levels - 1)
        if stats.response_gram is None:
            return cls(stats.process, s, norms, stats.data_std**2 / (stats.data_std**2 + s**2))
        bare = cls(stats.process, s, norms, np.zeros(len(s)))
        levels, deviations, responses = bare._deviated(stats)
        lam = bare._lam[levels]
        products = deviations @ norms.metric
        square = np.einsum("gmv,gmv->g", products, deviations)
        answered = np.einsum("gmv,gmv->g", products, responses)
        known = np.divide(answered, square, out=np.zeros_like(square), where=square > 0)
        known[0] = known[1]  # at the first level nothing has deviated yet
        j = np.clip(known, 0.0, 1.0)
        secants = Secants(lam, deviations, responses - j[:, None, None] * deviations, norms.metric)
        return cls(stats.process, s, norms, np.interp(bare._lam, lam, j), secants)

    @property
    def vectors(self) -> int:
        """V, how many vectors coefficients are over."""
        return self.norms.vectors

    @property
    def spacing(self) -> float:
        """How far apart levels are in ``lambda``, typically."""
        return float(np.median(np.diff(self._lam)))

    def _deviated(self, stats: PathStatistics) -> tuple[list[int], Array, Array]:
        """Levels that the deviated paths asked at, level 0 first; their deviations and responses there, [G, M, V]."""
        n, rho = len(self.s), 1 / self.s
        asked = [0, *asked_levels(n)]
        state, _ = self.path(self.s)
        scale = np.where(np.isinf(self.s), 0.0, self.s)
        deviations = np.zeros((len(asked), len(stats.deviated), self.vectors))
        responses = np.zeros_like(deviations)
        first = n - 1
        for m, path in enumerate(stats.deviated):
            column = {level: first + row for row, level in enumerate(asked[1:])}
            first += len(column)
            y = np.zeros((n, self.vectors))  # of y' - y_0, but for the constant part of D
            for k, used in enumerate(path.slopes(self._lam.tolist())):
                y[k + 1] = y[k]
                for level, weight in used:
                    y[k + 1, :level] += weight * (rho[k + 1] - rho[k])
                    if level > 0:
                        y[k + 1, column[level]] += weight * (rho[k + 1] - rho[k])
            y[:, : n - 1] -= state
            deviations[:, m] = (scale[:, None] * y)[asked]
            for row, level in enumerate(asked[1:], 1):
                responses[row, m, column[level]] = 1.0
        return asked, deviations, responses

    @cached_property
    def _lam(self) -> Array:
        return np.array(positions(torch.from_numpy(self.s)))

    @cached_property
    def _pieces(self) -> tuple[Array, Array]:
        """Polynomials of each segment, lowest power first: ``p``, and ``P`` with ``d(e^lam P)/dlam = e^lam p``.

        Each [4, N-1 segments, N-1 increments].
        """
        from scipy.interpolate import CubicSpline  # here, for it takes long to import

        n = len(self.s)
        p = np.ascontiguousarray(CubicSpline(self._lam, np.tri(n, n - 1, -1), bc_type="natural").c[::-1], np.float64)
        integral, derivative = np.zeros_like(p), p
        for sign in (1, -1, 1, -1):  # P = p - p' + p'' - p'''
            integral += sign * np.concatenate([derivative, np.zeros_like(p[: 4 - len(derivative)])])
            derivative = derivative[1:] * np.arange(1, len(derivative))[:, None, None]
        return p, integral

    @cached_property
    def _both_pieces(self) -> Array:
        """``p`` and ``P`` side by side, [4, N-1, 2 (N-1)]: evaluated together."""
        return np.concatenate(self._pieces, axis=2)

    @cached_property
    def _starts(self) -> Array:
        """What ``e^lam P`` lacks to ``y - y_0`` in each segment, [N-1, N-1]."""
        rho, (p, integral) = 1 / self.s, self._pieces
        length = np.diff(self._lam)[:, None]
        at_end = lambda pieces: pieces[0] + length * (pieces[1] + length * (pieces[2] + length * pieces[3]))
        gains = rho[1:, None] * at_end(integral) - rho[:-1, None] * integral[0]
        if rho[0] == 0:
            gains[0] = rho[1] * 0.5 * (p[0, 0] + at_end(p)[0])
        reached = np.cumsum(gains, axis=0) - gains
        return reached - rho[:-1, None] * integral[0]

    @cached_property
    def _amplitudes(self) -> Array:
        """A unit deviation's size at the end, [N]: ``a_k = (keep + (1 - keep) j_k) a_{k+1}``, ``a_N = 1``."""
        keep = np.append(self.s[1:], 0.0) / self.s
        return np.cumprod((keep + (1 - keep) * self.jacobian)[::-1], dtype=np.float64)[::-1]

    @cached_property
    def _answer_errors(self) -> Array:
        """``kappa`` at the levels, [N]; without deviated paths that of a Jacobian that projects, ``j`` its mean."""
        if self.secants is None:
            return np.sqrt(self.jacobian * (1 - self.jacobian))
        return np.interp(self._lam, self.secants.lam, relative_errors(self.secants, self.norms))

    @cached_property
    def _path_errors(self) -> Array:
        return interpolation_errors(self._lam, self.norms)

    def answer_errors(self, lam: Array) -> Array:
        """How large the error of an answer is, against the unexplained part of a deviation, at ``lam`` of any shape."""
        return np.interp(lam, self._lam, self._answer_errors)

    def path_errors(self, lam: Array) -> Array:
        """How far off ``D`` on the path is for each sample, [..., B], at ``lam`` [...]."""
        return np.stack([np.interp(lam, self._lam, of_sample) for of_sample in self._path_errors.T], axis=-1)

    def path(self, s: Array) -> tuple[Array, Array]:
        """Coefficients of ``y - y_0`` and of ``D - D_0`` on the path at levels ``s`` [C]; each [C, N-1]."""
        rho, lam = 1 / s, self.position(s)
        segment = np.clip(np.searchsorted(self._lam, lam, side="right") - 1, 0, len(self.s) - 2)
        x = (lam - self._lam[segment])[:, None]
        c = self._both_pieces
        both = c[0][segment] + x * (c[1][segment] + x * (c[2][segment] + x * c[3][segment]))
        denoised, integral = np.split(both, 2, axis=1)
        state = rho[:, None] * integral + self._starts[segment]
        if math.isinf(self.s[0]):  # D is linear in rho from pure noise to the first finite level
            first = (segment == 0)[:, None]
            state = np.where(first, 0.5 * rho[:, None] * (c[0, 0, : denoised.shape[1]] + denoised), state)
        return state, denoised

    def on_path(self, s: Array) -> OnPath:
        """What is known on the path at levels ``s`` [C]."""
        return OnPath(s, self.position(s), *self.path(s), self.scalar_jacobian(s), self.amplitude(s))

    def run(
        self,
        levels: Array,
        solver: str | Solver,
        secants: Answers | None = None,
        offsets: Array | None = None,
        *,
        passed_on: bool = False,
    ) -> SurrogateRuns:
        """Sample along C schedules at once.

        Args:
            levels: Levels ``s`` [C, steps + 1], descending to 0.
            solver: The solver.
            secants: What is known beyond the scalar Jacobian, over more vectors than the measurement's if runs found
                more; those of the measurement when None.
            offsets: How far the levels that the network is told lie from the states', in ``log s``, [C, steps].
            passed_on: Whether to find how errors of answers reach the end.
        """
        method, levels = get_solver(solver), np.asarray(levels, dtype=np.float64)
        later = method.model_calls(levels.shape[1] - 1) - 1 if passed_on else 0
        known = secants or self.secants or Secants.none(self.vectors)
        found = SurrogateRuns(self, known, len(levels), offsets, later)
        column = lambda value: np.asarray(value)[..., None]
        with np.errstate(divide="ignore", invalid="ignore"):
            nodes = nodes_of_levels(self.process, levels)
            queries = integration(nodes, method, found.end, s=list(levels.T), number=column)
            found.end = answered(queries, found.denoise)
        return found

    def scalar_jacobian(self, s: Array) -> Array:
        """``j`` at levels ``s``, between those of the grid linear in ``lambda``."""
        return np.interp(self.position(s), self._lam, self.jacobian)

    def amplitude(self, s: Array) -> Array:
        """How large a deviation at levels ``s`` is at the end, against its size there."""
        return np.interp(self.position(s), self._lam, self._amplitudes)

    def position(self, s: Array) -> Array:
        """``lambda`` of levels ``s``, within the grid."""
        return np.clip(log_rho(1 / s), self._lam[0], self._lam[-1])


class SurrogateRuns:
    """C runs of a sampler on a surrogate, side by side: stands for the network, and keeps the deviations it was given.

    Attributes:
        surrogate: The surrogate.
        secants: What is known beyond its scalar Jacobian.
        offsets: How far the levels that the network is told lie from the states', in ``log s``, [C, steps].
        end: Coefficients of the states ``y - y_0`` at the start, and of the denoised samples ``D - D_0`` at the end,
            [C, V], and then those of the errors of answers that are passed on, [C, V + later].
        weights: Those of the fitted solver, [C, steps, steps]; None where they were not chosen.
    """

    def __init__(
        self, surrogate: Surrogate, secants: Answers, count: int, offsets: Array | None = None, later: int = 0
    ) -> None:
        self.surrogate, self.secants, self.offsets = surrogate, secants, offsets
        self.end = np.zeros((count, secants.vectors + later))
        self.weights: Array | None = None
        self._away: list[Array] = []
        self._unexplained: list[Array] = []
        self._known: list[OnPath] = []

    @property
    def deviations(self) -> Array:
        """The states' deviations from the path, one for each evaluation, [evaluations, C, V]."""
        return np.array(self._away)

    @property
    def error(self) -> Array:
        """Coefficients of the errors at the end, [C, V]."""
        error = self.end[:, : self.secants.vectors].copy()
        error[:, : len(self.surrogate.s) - 1] -= 1.0
        return error

    @property
    def outcome(self) -> Outcome:
        """The errors at the end, and the unexplained deviations."""
        return Outcome(self.error, self._at_end(self._unexplained))

    @property
    def deviations_at_end(self) -> Array:
        """All of the states' deviations, each times its amplitude at the end, [C, evaluations, V]."""
        return self._at_end(self._away)

    def _at_end(self, deviations: list[Array]) -> Array:
        """Deviations times their amplitudes, [C, evaluations, V]; the first evaluation, on the path, is left out."""
        scaled = [each * at.amplitude[:, None] for each, at in zip(deviations[1:], self._known[1:], strict=True)]
        return np.stack(scaled or [np.zeros((len(self.end), self.secants.vectors))], axis=1)

    @property
    def variance(self) -> Array:
        """Variance of the squared error at the end, from what is not known of the network's answers, [C, B]."""
        norms, later = self.surrogate.norms, self._known[1:]
        if not later:
            return np.zeros((len(self.end), len(norms.gram)))
        lam = np.stack([at.lam for at in later], axis=1)
        passed_on = self.end[:, self.secants.vectors :][:, : len(later), None]
        answers = self.surrogate.answer_errors(lam)[:, :, None] * np.stack(self._unexplained[1:], axis=1)
        path = uncorrelated(passed_on * self.surrogate.path_errors(lam), lam, self.surrogate.spacing)
        return norms.sum_squared(uncorrelated(passed_on * answers, lam, LENGTH)) + (path**2).sum(1)

    def denoise(self, y: Array, s: Array) -> Array:
        """Coefficients of ``D - D_0`` [C, V] at levels ``s`` [C], where ``y - y_0`` has coefficients ``y``."""
        distinct, which = np.unique(s, return_inverse=True)  # a descent's schedules differ in few levels
        return self.denoise_at(y, self.surrogate.on_path(distinct)[which])

    def denoise_at(self, y: Array, known: OnPath) -> Array:
        """The same, where what is known at the levels was looked up."""
        n, vectors, evaluation = len(self.surrogate.s) - 1, self.secants.vectors, len(self._away)
        away = y.copy()
        away[:, :n] -= known.state
        away *= np.where(np.isinf(known.s), 0.0, known.s)[:, None]
        found = known.jacobian[:, None] * away
        away = away[:, :vectors]
        offset = None if self.offsets is None else self.offsets[:, evaluation]
        answer, explained = self.secants.answer(evaluation, known.lam, away, offset)
        found[:, :vectors] += answer
        found[:, :n] += known.denoised
        if evaluation > 0:
            found[:, vectors + evaluation - 1 : vectors + evaluation] += 1.0  # its error, if that has a column
        self._away.append(away)
        self._unexplained.append(away - explained)
        self._known.append(known)
        return found


def nodes_of_levels(process: NoiseProcess, levels: Array) -> list[Node]:
    """The levels of C schedules [C, steps + 1] as solver nodes of arrays [C]."""
    rho = 1 / levels
    lam, tau = log_rho(rho), process.sampler_sigma(torch.from_numpy(levels)).numpy()
    return [Node(rho[:, k], lam[:, k], tau[:, k]) for k in range(levels.shape[1])]
