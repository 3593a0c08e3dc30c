"""The sampler on what a measurement knows of the denoiser: the error of any schedule, without a model call.

On the measured path the denoiser is known, ``D(lambda) = D_0 + sum_q p_q(lambda) e_q``, the cubic spline through the
levels; off it, a deviation of the state is answered by a scalar share,

    ``D(z; s) = D_path(s) + j(s) (z - z_path(s))``.

Run on this model, a solver's error at the end is a combination ``sum_q C_q e_q`` of the increments, whatever the
solver, its correctors and predicted states included; so the Gram matrix of the increments gives its size. The states'
deviations from the path on the way are combinations as well: where ``j`` is wrong, it errs in proportion to them.

This is the path cost of `costs.step_cost` for a whole schedule at once, errors of the steps added up with their
signs. Exact for a denoiser whose Jacobian is a multiple of the identity.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import torch

from fastsched.costs.step_cost import Array
from fastsched.denoisers.noise import NoiseProcess
from fastsched.measurement.statistics import PathStatistics
from fastsched.sampling.multistep import Node, log_rho
from fastsched.sampling.sampler import integrate
from fastsched.sampling.solvers import Solver, get_solver

#: What a denoiser answers beyond a share of the state's deviation: given the number of the evaluation and the
#: deviations [C, n], the answers and the part of the deviations they are answers to, both [C, n].
Beyond: TypeAlias = "Callable[[int, Array], tuple[Array, Array]]"

#: How far above the first finite level pure noise is put in ``lambda`` for the spline, where it has no ``lambda``.
PURE_NOISE_GAP = 3.0

#: Increments before a level that its share is read off.
JACOBIAN_WINDOW = 8


def jacobian_shares(stats: PathStatistics) -> tuple[Array, float]:
    """The share of a state's deviation that the denoiser passes on at each level, and how far it is from the truth.

    The sweep's recursion ``w_k = keep w_{k+1} + (1 - keep) J w_{k+1}`` (``keep = s_{k+1} / s_k``) in the directions of
    the increments before level k gives ``x_q = <w_{k+1}, e_q>`` and ``<J w_{k+1}, e_q> = (<w_k, e_q> - keep x_q) / (1 -
    keep)``. Least squares, ``<J w, e_q> ~ j x_q``, over them and over the samples, every sample counting the same, and
    over three neighbouring levels, with ``j`` within [0, 1].

    Returns:
        ``j`` [N], and the root mean square over levels of what least squares leaves, ``|| <J w, e> - j x || / ||x||``:
        where ``J`` is a multiple of the identity, how far that varies among three levels. Without a sensitivity in the
        statistics ``c^2 / (c^2 + s^2)``, the share of Gaussian data of the ends' deviation ``c``, and 1.
    """
    s = stats.s.numpy()
    if stats.cross is None:
        return stats.data_std**2 / (stats.data_std**2 + s**2), 1.0
    cross, keep = stats.cross.numpy(), np.append(s[1:], 0.0) / s
    shares, left = np.zeros(len(s)), np.zeros(len(s))
    sums = np.zeros((3, len(s)))  # of x y, x x and y y, y = <J w, e>, each sample's divided by its x x
    for k in range(1, len(s)):
        window = slice(max(0, k - JACOBIAN_WINDOW), k)
        x = cross[:, k, window]
        y = (cross[:, k - 1, window] - keep[k] * x) / (1 - keep[k])
        size = np.maximum((x**2).sum(1), np.finfo(np.float64).tiny)
        sums[:, k] = [((first * second).sum(1) / size).sum() for first, second in ((x, y), (x, x), (y, y))]
    for k in range(1, len(s)):
        xy, xx, yy = sums[:, max(k - 1, 1) : k + 2].sum(1)
        if xx > 0:
            shares[k] = min(max(xy / xx, 0.0), 1.0)
            left[k] = max(yy - 2 * shares[k] * xy + shares[k] ** 2 * xx, 0.0) / xx
    shares[0] = shares[1]
    return shares, float(np.sqrt(left[1:].mean()))


@dataclass(frozen=True, eq=False)
class Outcome:
    """What C schedules of K steps come to on the model.

    Attributes:
        error: Coefficients of the error at the end over the increments (and what was added to them), [C, n].
        deviations: Those of the states' deviations ``z - z_path`` of which only a share is known to be answered, each
            times its amplitude at the end, one a network evaluation off the path, [C, evaluations, n].
    """

    error: Array
    deviations: Array


@dataclass(frozen=True, eq=False)
class Surrogate:
    """The denoiser as the statistics know it.

    Attributes:
        process: The noise process.
        s: Levels of the grid, [N].
        shares: ``j`` at the levels, [N].
        spread: How far the Jacobian is from ``j`` times the identity.
    """

    process: NoiseProcess
    s: Array
    shares: Array
    spread: float

    @classmethod
    def of(cls, stats: PathStatistics) -> Surrogate:
        """The model that the statistics leave."""
        return cls(stats.process, stats.s.numpy(), *jacobian_shares(stats))

    @cached_property
    def _lam(self) -> Array:
        lam = log_rho(1 / self.s)
        if math.isinf(self.s[0]):
            lam[0] = lam[1] - PURE_NOISE_GAP
        return lam

    @cached_property
    def _pieces(self) -> tuple[Array, Array]:
        """Polynomials of each segment, lowest power first: ``p``, and ``P`` with ``d(e^lam P)/dlam = e^lam p``.

        Each [4, N-1 segments, N-1 increments].
        """
        n = len(self.s)
        p = natural_spline(self._lam, np.tri(n, n - 1, -1))
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
        """Of a deviation at each level, at the end: ``a_k = (keep + (1 - keep) j_k) a_{k+1}``, ``a_N = 1``, [N]."""
        keep = np.append(self.s[1:], 0.0) / self.s
        return np.cumprod((keep + (1 - keep) * self.shares)[::-1], dtype=np.float64)[::-1]

    def path(self, s: Array) -> tuple[Array, Array]:
        """Coefficients of ``y - y_0`` and of ``D - D_0`` on the path at levels ``s`` [C]; each [C, N-1]."""
        rho, lam = 1 / s, self._position(s)
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

    def run(self, levels: Array, solver: str | Solver, beyond: Beyond | None = None, more: int = 0) -> Outcome:
        """Sample along C schedules at once.

        Args:
            levels: Levels ``s`` [C, steps + 1], descending to 0.
            solver: The solver.
            beyond: What is known of the denoiser beyond the shares (`fastsched.fitting.secants`).
            more: How many vectors besides the increments coefficients are over, last in the order; those that
                ``beyond`` answers with.
        """
        method, levels, n = get_solver(solver), np.asarray(levels, dtype=np.float64), len(self.s) - 1
        with np.errstate(divide="ignore", invalid="ignore"):
            rho = 1 / levels
            lam, tau = log_rho(rho), self.process.sampler_sigma(torch.from_numpy(levels)).numpy()
            nodes = [Node(rho[:, k], lam[:, k], tau[:, k]) for k in range(levels.shape[1])]
            deviations: list[Array] = []

            def denoise(y: Array, s: Array) -> Array:
                state, denoised = self.path(s)
                away = np.zeros_like(y)
                away[:, :n] = y[:, :n] - state
                away[:, n:] = y[:, n:]
                away *= np.where(np.isinf(s), 0.0, s)[:, None]
                answer, explained = (0.0, 0.0) if beyond is None else beyond(len(deviations), away)
                amplitude = np.interp(self._position(s), self._lam, self._amplitudes)
                deviations.append((away - explained) * amplitude[:, None])
                found = self.share(s)[:, None] * away + answer
                found[:, :n] += denoised
                return found

            column = lambda value: np.asarray(value)[..., None]
            start = np.zeros((len(levels), n + more))
            end = integrate(denoise, nodes, method, start, s=list(levels.T), number=column)
        end[:, :n] -= 1.0
        return Outcome(end, np.stack(deviations[1:] or [np.zeros_like(end)], axis=1))

    def share(self, s: Array) -> Array:
        """``j`` at levels ``s``, between those of the grid linear in ``lambda``."""
        return np.interp(self._position(s), self._lam, self.shares)

    def _position(self, s: Array) -> Array:
        """``lambda`` of levels ``s``, within the grid."""
        return np.clip(log_rho(1 / s), self._lam[0], self._lam[-1])


def squared_errors(gram: Array, outcome: Outcome, doubt: float) -> Array:
    """``||error||^2 + doubt^2 sum ||deviation||^2`` of each schedule and sample, [C, B].

    Args:
        gram: ``<e_p, e_q>`` of each sample, [B, N-1, N-1].
        outcome: Of C schedules.
        doubt: How far ``j`` may be off: deviations that cancel at the end on the model, may not in fact.
    """
    vectors = np.concatenate([outcome.error[:, None], doubt * outcome.deviations], axis=1)
    return quadratic_forms(gram, vectors)


def quadratic_forms(gram: Array, vectors: Array) -> Array:
    """``sum_v v' G_b v`` over the vectors of each schedule, [C, B], from ``gram`` [B, n, n], ``vectors`` [C, V, n]."""
    squares = vectors.transpose(0, 2, 1) @ vectors  # [C, n, n]
    return np.maximum(squares.reshape(len(vectors), -1) @ gram.reshape(len(gram), -1).T, 0.0)


def typical(squared: Array) -> Array:
    """The geometric mean over samples of [C, B] squared errors, [C]."""
    return np.exp(np.log(np.maximum(squared, np.finfo(np.float64).tiny)).mean(axis=1))


def natural_spline(x: Array, values: Array) -> Array:
    """The natural cubic spline through ``values`` [n, m] at ``x`` [n]: polynomials in ``x - x_k``, [4, n - 1, m].

    Lowest power first. The second derivatives ``M`` solve the tridiagonal system
    ``h_{k-1} M_{k-1} + 2 (h_{k-1} + h_k) M_k + h_k M_{k+1} = 6 (slope_k - slope_{k-1})``, ``M_0 = M_{n-1} = 0``.
    """
    h, n = np.diff(x)[:, None], len(x)
    slopes = np.diff(values, axis=0) / h
    system = np.eye(n)
    for k in range(1, n - 1):
        system[k, k - 1 : k + 2] = h[k - 1, 0], 2 * (h[k - 1, 0] + h[k, 0]), h[k, 0]
    right = np.zeros_like(values)
    right[1:-1] = 6 * np.diff(slopes, axis=0)
    second = np.linalg.solve(system, right)
    linear = slopes - h * (2 * second[:-1] + second[1:]) / 6
    return np.stack([values[:-1], linear, second[:-1] / 2, np.diff(second, axis=0) / (6 * h)])
