"""Weights of the multistep solvers, from the positions of the levels they use.

Each function takes the ``history`` of nodes, newest first, and the ``end`` of the step, and returns the weights
``b_n`` of their slopes, which sum to 1. Positions may be arrays that broadcast. With one node in the history all give
Euler's single weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np


class Node(NamedTuple):
    """A level in the variables of the solvers; floats, or arrays that broadcast."""

    rho: Any  #: alpha / sigma
    lam: Any  #: log rho, half the log-SNR
    tau: Any  #: sampler sigma


Weights = Callable[[Sequence[Node], Node], Sequence[Any]]

#: Stands for ``lambda = log rho = -inf`` of pure noise; so far away that slopes there have no weight.
PURE_NOISE_LAMBDA = -1e9


def log_rho(rho: Any) -> Any:
    """``lambda = log rho``, finite at pure noise."""
    with np.errstate(divide="ignore"):
        return np.maximum(np.log(rho), PURE_NOISE_LAMBDA)


def euler_weights(history: Sequence[Node], end: Node) -> list[Any]:
    """``b = (1)``: the slope at the start of the step."""
    return [np.ones_like(history[0].tau)]


def dpmpp_2m_weights(history: Sequence[Node], end: Node) -> list[Any]:
    """``b = (1 + 1/(2r), -1/(2r))``, ``r = (lam_j - lam_i) / (lam_k - lam_j)``."""
    if len(history) < 2:
        return euler_weights(history, end)
    j, i = history[:2]
    half = 0.5 * (end.lam - j.lam) / (j.lam - i.lam)
    return [1 + half, -half]


def dpmpp_3m_weights(history: Sequence[Node], end: Node) -> list[Any]:
    """Second-order Taylor expansion of ``D`` in ``lambda`` from three slopes.

    With ``h = lam_k - lam_j``, ``r0 = (lam_j - lam_i)/h``, ``r1 = (lam_i - lam_h)/h``, differences
    ``A = (D_j - D_i)/r0`` and ``B = (D_i - D_h)/r1``: the mean slope is ``D_j + c1 D' + c2 D''`` with
    ``D' = A + r0/(r0 + r1) (A - B)``, ``D'' = (A - B)/(r0 + r1)``, ``c1 = 1/(1 - e^-h) - 1/h`` and
    ``c2 = (1/2 - (e^-h - 1 + h)/h^2) / (1 - e^-h)``.
    """
    if len(history) < 3:
        return dpmpp_2m_weights(history, end)
    j, i, earlier = history[:3]
    h = end.lam - j.lam
    r0, r1 = (j.lam - i.lam) / h, (i.lam - earlier.lam) / h
    decay = -np.expm1(-h)
    c1 = 1 / decay - 1 / h
    c2 = (0.5 - (h - decay) / h**2) / decay
    on_a = c1 * (1 + r0 / (r0 + r1)) + c2 / (r0 + r1)
    on_b = -c1 * r0 / (r0 + r1) - c2 / (r0 + r1)
    return [1 + on_a / r0, -on_a / r0 + on_b / r1, -on_b / r1]


ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def ipndm_weights(history: Sequence[Node], end: Node) -> list[Any]:
    """Adams-Bashforth weights for equal steps, used for all steps: ``(3, -1)/2``, ``(23, -16, 5)/12``, ..."""
    return [np.full_like(history[0].tau, b) for b in ADAMS_BASHFORTH[len(history) - 1]]


def lms_weights(history: Sequence[Node], end: Node) -> list[Any]:
    """Adams-Bashforth weights for the actual steps: the slope interpolated as a polynomial in ``tau``.

    ``b_n = integral of L_n(tau) from tau_j to tau_k / (tau_k - tau_j)``, ``L_n`` the Lagrange polynomials.
    """
    scale = end.tau - history[0].tau
    positions = [(node.tau - history[0].tau) / scale for node in history]
    moments = [1 / (power + 1) for power in range(len(history))]
    return _interpolatory(positions, moments)


def deis_weights(history: Sequence[Node], end: Node) -> list[Any]:
    """The slope interpolated as a polynomial in ``log tau``, integrated over ``tau``.

    With ``l = log(tau / tau_j)``: moments ``m_p = integral of l^p dtau / (tau_k - tau_j)`` by
    ``integral l^p e^l dl = l^p e^l - p integral l^(p-1) e^l dl``.
    """
    start = history[0].tau
    positions = [np.log(node.tau / start) for node in history]
    reach = np.log(end.tau / start)
    growth = np.expm1(reach)
    integrals = [growth]
    for power in range(1, len(history)):
        integrals.append(reach**power * (1 + growth) - power * integrals[-1])
    return _interpolatory(positions, [integral / growth for integral in integrals])


def _interpolatory(positions: Sequence[Any], moments: Sequence[Any]) -> list[Any]:
    """Weights ``b`` with ``sum_n b_n p_n^q = moments_q``; the first position is 0."""
    weights = []
    for n, own in enumerate(positions):
        coefficients: list[Any] = [1.0]  # of prod (x - other), lowest power first
        scale: Any = 1.0
        for other in (position for m, position in enumerate(positions) if m != n):
            scale = scale * (own - other)
            coefficients.append(coefficients[-1])
            for power in range(len(coefficients) - 2, 0, -1):
                coefficients[power] = coefficients[power - 1] - other * coefficients[power]
            coefficients[0] = -other * coefficients[0]
        numerator: Any = 0.0
        for coefficient, moment in zip(coefficients, moments, strict=True):
            numerator = numerator + coefficient * moment
        weights.append(numerator / scale)
    return weights


def unip_weights(history: Sequence[Node], end: Node, variant: str = "bh2") -> list[Any]:
    """The predictor UniP of UniPC: ``D_j + B/B1 sum_m a_m (D_m - D_j) / r_m``, ``r_m = (lam_m - lam_j) / h``.

    ``B1 = 1 - e^-h``, ``B = B1`` (bh2) or ``h`` (bh1). The ``a_m`` solve ``sum_m r_m^(p-1) a_m = p! phi_p / B`` for
    ``p = 1 .. len(history) - 1``; a single ``a_m`` is 1/2, as the authors set it.
    """
    ratios, h = _unipc_ratios(history, end)
    a = [np.full_like(h, 0.5)] if len(ratios) == 1 else _unipc_solve(ratios, h, variant)
    return _unipc_combine(ratios, a, _unipc_gain(h, variant))


def unic_weights(history: Sequence[Node], end: Node, variant: str = "bh2") -> list[Any]:
    """The corrector UniC of UniPC: UniP with the slope at the end as a ``D_m``, ``r = 1``; its weight is first."""
    ratios, h = _unipc_ratios(history, end)
    a = _unipc_solve([*ratios, 1.0], h, variant) if ratios else [np.full_like(h, 0.5)]
    *earlier, at_end = a
    gain = _unipc_gain(h, variant)
    start, *others = _unipc_combine(ratios, earlier, gain)
    return [gain * at_end, start - gain * at_end, *others]


def _unipc_ratios(history: Sequence[Node], end: Node) -> tuple[list[Any], Any]:
    h = end.lam - history[0].lam
    return [(node.lam - history[0].lam) / h for node in history[1:]], h


def _unipc_gain(h: Any, variant: str) -> Any:
    """``B / B1``; a step from pure noise has no finite value for bh1 and uses that of bh2."""
    if variant == "bh2":
        return 1.0 + 0.0 * h
    return np.where(h > -PURE_NOISE_LAMBDA / 2, 1.0, h / -np.expm1(-h))


def _unipc_solve(ratios: Sequence[Any], h: Any, variant: str) -> list[Any]:
    """Solve the Vandermonde system for the ``a_m``, by the moments of the interpolating polynomial."""
    phi = np.expm1(-h) / -h - 1  # the right-hand sides, by the recurrence of the phi functions
    size = _unipc_gain(h, variant) * np.expm1(-h)
    moments, factorial = [], 1
    for p in range(1, len(ratios) + 1):
        moments.append(phi * factorial / size)
        factorial *= p + 1
        phi = phi / -h - 1 / factorial
    return _interpolatory(ratios, moments)


def _unipc_combine(ratios: Sequence[Any], a: Sequence[Any], gain: Any) -> list[Any]:
    differences = [gain * weight / ratio for weight, ratio in zip(a, ratios, strict=True)]
    return [1.0 + 0.0 * gain - sum(differences), *differences]
