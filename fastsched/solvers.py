"""Deterministic solvers of the probability-flow ODE, as tables of coefficients.

In ``y = x / sigma`` the ODE is ``dy/drho = D``, with ``rho = alpha / sigma``. In ``tau``, the sampler sigma (``s``,
or ``t`` for flow matching), it is ``d(tau y)/dtau = g`` with the slope ``g = y - D / tau``: the noise prediction, or
the velocity. Every linear solver steps from level ``j`` to ``k`` with a weighted mean ``sum_n b_n slope_n``,
``sum_n b_n = 1``, of the slopes at ``j`` and at earlier levels (and at ``k``, for a solver that looks ahead):

* over ``rho``: ``y_k = y_j + (rho_k - rho_j) sum_n b_n D_n``;
* over ``tau``: ``tau_k y_k = tau_j y_j + (tau_k - tau_j) sum_n b_n g_n``.

A solver is therefore its variable and its weights. With all weight on ``j`` both forms are the same step, DDIM.
The step to sigma 0 is ``z = D_j`` for every solver.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fastsched import validate


class Node(NamedTuple):
    """A level in the variables that solvers are written in; floats, or arrays that broadcast."""

    rho: Any  #: alpha / sigma
    lam: Any  #: log rho, half the log-SNR
    tau: Any  #: sampler sigma


Weights = Callable[[Sequence[Node], Node], Sequence[Any]]


@dataclass(frozen=True)
class Solver:
    """One solver.

    Attributes:
        name: As diffusers and k-diffusion spell it.
        variable: ``"rho"`` or ``"tau"``: what a step integrates over.
        order: Slopes used once enough are known; the first steps warm up with fewer.
        weights: ``weights(history, end) -> [b_j, b_i, ...]`` for nodes ``history``, newest first, and the step's
            end. With ``lookahead`` the weight of the slope at the end comes first.
        lookahead: Whether a step also evaluates the slope at its end, from an Euler prediction.
        source: Where the solver is defined.
    """

    name: str
    variable: str
    order: int
    weights: Weights
    source: str
    lookahead: bool = False

    @property
    def history(self) -> int:
        """How many levels before the current one a step uses at most."""
        return self.order - 1 - int(self.lookahead)

    def model_calls(self, steps: int) -> int:
        """Network evaluations of ``steps`` steps of which the last ends at sigma 0."""
        return 2 * steps - 1 if self.lookahead else steps


def euler_weights(history: Sequence[Node], end: Node) -> Sequence[Any]:
    """``b = (1)``: the slope at the start of the step."""
    return [np.ones_like(history[0].tau)]


def heun_weights(history: Sequence[Node], end: Node) -> Sequence[Any]:
    """``b = (1/2, 1/2)``: the mean of the slopes at both ends (trapezoidal rule)."""
    half = np.full_like(history[0].tau, 0.5)
    return [half, half]


def dpmpp_2m_weights(history: Sequence[Node], end: Node) -> Sequence[Any]:
    """``b = (1 + 1/(2r), -1/(2r))``, ``r = (lam_j - lam_i) / (lam_k - lam_j)``; one slope: DDIM."""
    if len(history) < 2:
        return euler_weights(history, end)
    j, i = history[:2]
    with np.errstate(invalid="ignore", divide="ignore"):
        half = 0.5 * (end.lam - j.lam) / (j.lam - i.lam)  # 0 if level i is pure noise, lam_i = -inf
    return [1 + half, -half]


ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def ipndm_weights(history: Sequence[Node], end: Node) -> Sequence[Any]:
    """Adams-Bashforth weights of equal steps, whatever the steps: ``(3, -1)/2``, ``(23, -16, 5)/12``, ..."""
    return [np.full_like(history[0].tau, b) for b in ADAMS_BASHFORTH[len(history) - 1]]


SOLVERS: dict[str, Solver] = {
    solver.name: solver
    for solver in (
        Solver("ddim", "rho", 1, euler_weights, "Song et al. 2021 (arXiv 2010.02502)"),
        Solver("heun", "tau", 2, heun_weights, "Karras et al. 2022, algorithm 1", lookahead=True),
        Solver("dpmpp_2m", "rho", 2, dpmpp_2m_weights, "Lu et al. 2022 (arXiv 2211.01095), algorithm 2"),
        Solver("ipndm", "tau", 4, ipndm_weights, "Liu et al. 2022; Zhang & Chen 2023 (arXiv 2204.13902)"),
    )
}

#: Other spellings of the same solvers.
ALIASES = {"euler": "ddim", "dpm_solver_1": "ddim", "dpmpp_1": "ddim"}


def get_solver(solver: str | Solver) -> Solver:
    """The solver of that name.

    Raises:
        ValueError: If there is none; the message lists the names and the nearest match.
    """
    if isinstance(solver, Solver):
        return solver
    name = ALIASES.get(solver, solver) if isinstance(solver, str) else solver
    if name not in SOLVERS:
        validate.choice("solver", solver, [*SOLVERS, *ALIASES])
    return SOLVERS[name]


def step_scale(solver: Solver, start: Node, end: Node) -> Any:
    """What multiplies the mean slope in ``y_k``: ``rho_k - rho_j``, or ``(tau_k - tau_j) / tau_k``."""
    if solver.variable == "rho":
        return end.rho - start.rho
    return (end.tau - start.tau) / end.tau
