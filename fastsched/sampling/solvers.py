"""Deterministic solvers of the probability-flow ODE, as tables of coefficients.

In ``y = x / sigma`` the ODE is ``dy/drho = D``, with ``rho = alpha / sigma``. In ``tau``, the sampler sigma (``s``, or
``t`` for flow matching), it is ``d(tau y)/dtau = g`` with the slope ``g = y - D / tau``: the noise prediction, or the
velocity. Every linear solver steps from level ``j`` to ``k`` with a weighted mean ``sum_n b_n slope_n``,
``sum_n b_n = 1``. The slopes are at ``j``, at earlier levels ``i, h, ...``, and for some solvers at one *stage* ahead:

* over ``rho``: ``y_k = y_j + (rho_k - rho_j) sum_n b_n D_n``;
* over ``tau``: ``tau_k y_k = tau_j y_j + (tau_k - tau_j) sum_n b_n g_n``.

A variable and weights therefore define a solver (`sampling.multistep` has the weights of multistep solvers). With
all weight on ``j`` both forms are the same step: DDIM, which is also Euler in ``s`` and in flow time, and DPM-Solver-1.
The step to sigma 0 is ``z = D_j`` for every solver.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from fastsched import validate
from fastsched.sampling import multistep
from fastsched.sampling.multistep import Node, Weights
from fastsched.sampling.solver_names import known_as

Stage = Callable[[Node, Node], Node]


@dataclass(frozen=True)
class Solver:
    """One solver."""

    name: str  #: the name, spelled as in diffusers and k-diffusion
    variable: str  #: the variable that a step integrates over, ``"rho"`` or ``"tau"``
    order: int  #: the order once enough slopes are known; the first steps use fewer slopes
    #: ``weights(history, end) -> [b_j, b_i, ...]`` for nodes ``history``, newest first, and the step's end. With a
    #: ``stage`` the weight of the stage's slope comes first.
    weights: Weights
    source: str  #: where the solver is defined
    #: ``stage(start, end)`` is the node at which a further slope is evaluated, from an Euler prediction.
    stage: Stage | None = None
    #: Weights of a corrector, of which the first is for the slope at the end, evaluated at the predicted state. The
    #: next step uses this slope again, so the corrector costs no evaluation.
    corrector: Weights | None = None
    #: Weights of the step to sigma 0, whose history includes the current level; None for ``z = D_j``.
    end_weights: Weights | None = None
    #: Whether the second to last step has order 2 at most, as with `lower_order_final` in diffusers.
    lowered: bool = False

    @property
    def history(self) -> int:
        """The largest number of levels before the current one that a step uses."""
        return 0 if self.stage is not None else self.order - 1

    def history_at(self, step: int, steps: int) -> int:
        """The largest number of levels before the current one that step ``step`` of ``steps``, counted from 0, uses."""
        return min(self.history, 1) if self.lowered and step == steps - 2 else self.history

    def model_calls(self, steps: int) -> int:
        """Network evaluations of ``steps`` steps, the last of which ends at sigma 0."""
        return steps if self.stage is None else 2 * steps - 1


def heun_weights(history: Any, end: Node) -> list[Any]:
    """``b = (1/2, 1/2)``: the mean of the slopes at both ends (trapezoidal rule)."""
    half = np.full_like(history[0].tau, 0.5)
    return [half, half]


def midpoint_weights(history: Any, end: Node) -> list[Any]:
    """``b = (1, 0)``: the slope at the stage alone."""
    return [np.ones_like(history[0].tau), np.zeros_like(history[0].tau)]


def dpmpp_2s_weights(history: Any, end: Node) -> list[Any]:
    """``b = (1/(2r), 1 - 1/(2r))``, ``r = (lam_mid - lam_j) / (lam_k - lam_j)``: the stage alone if r = 1/2."""
    start = history[0]
    stage = middle(start, end)
    half = 0.5 * (end.lam - start.lam) / (stage.lam - start.lam)
    return [half, 1 - half]


def at_end(start: Node, end: Node) -> Node:
    """A stage at the end of the step."""
    return end


def middle(start: Node, end: Node) -> Node:
    """A stage at the geometric mean of the sampler sigmas: halfway in ``lambda`` unless the model is a flow."""
    tau = np.sqrt(start.tau * end.tau)
    rho = 1 / tau - (1 / end.tau - end.rho)  # 1/tau - rho is a constant of the process
    return Node(rho, np.log(rho), tau)


_EULER, _ADAMS = multistep.euler_weights, multistep.ipndm_weights
_SONG = "Song et al. 2021 (arXiv 2010.02502)"
_EDM = "Karras et al. 2022 (arXiv 2206.00364)"
_DPMPP = "Lu et al. 2022 (arXiv 2211.01095)"
_PNDM = "Liu et al. 2022 (arXiv 2202.09778); improved: Zhang & Chen 2023 (arXiv 2204.13902)"
_UNIPC = "Zhao et al. 2023 (arXiv 2302.04867)"


def _unipc(name: str, order: int, variant: str) -> Solver:
    predictor, corrector = (partial(each, variant=variant) for each in (multistep.unip_weights, multistep.unic_weights))
    return Solver(name, "rho", order, predictor, _UNIPC, corrector=corrector)


SOLVERS: dict[str, Solver] = {
    solver.name: solver
    for solver in (
        Solver("ddim", "rho", 1, _EULER, _SONG),
        Solver("heun", "tau", 2, heun_weights, f"{_EDM}, algorithm 1", stage=at_end),
        Solver("dpm_2", "tau", 2, midpoint_weights, f"{_EDM}, algorithm 1 with alpha = 1/2", stage=middle),
        Solver("dpmpp_2s", "rho", 2, dpmpp_2s_weights, f"{_DPMPP}, algorithm 1", stage=middle),
        Solver("dpmpp_2m", "rho", 2, multistep.dpmpp_2m_weights, f"{_DPMPP}, algorithm 2"),
        Solver("dpmpp_3m", "rho", 3, multistep.dpmpp_3m_weights, f"{_DPMPP}, appendix; as in diffusers"),
        Solver("ipndm", "tau", 4, _ADAMS, _PNDM),
        Solver("ipndm_3", "tau", 3, _ADAMS, _PNDM),
        Solver("ipndm_2", "tau", 2, _ADAMS, _PNDM),
        Solver("lms", "tau", 4, multistep.lms_weights, "Katherine Crowson, k-diffusion, sample_lms"),
        Solver("deis_2", "tau", 2, multistep.deis_weights, "Zhang & Chen 2023 (arXiv 2204.13902), log-rho form"),
        Solver("deis_3", "tau", 3, multistep.deis_weights, "Zhang & Chen 2023 (arXiv 2204.13902), log-rho form"),
        _unipc("unipc", 2, "bh2"),
        _unipc("unipc_3", 3, "bh2"),
        _unipc("unipc_bh1", 2, "bh1"),
        _unipc("unipc_bh1_3", 3, "bh1"),
    )
}
#: Solvers of third order that diffusers lowers to second order in the second to last step (`lower_order_final`).
LOWERED = ("dpmpp_3m", "deis_3", "unipc_3", "unipc_bh1_3")
SOLVERS |= {f"{name}_lowered": replace(SOLVERS[name], name=f"{name}_lowered", lowered=True) for name in LOWERED}

#: Other spellings of the same solvers.
ALIASES = {
    "euler": "ddim",
    "dpm_solver_1": "ddim",
    "dpmpp_1": "ddim",
    "deis": "deis_2",
    "ipndm_4": "ipndm",
    "unipc_bh2": "unipc",
    "unipc_bh2_3": "unipc_3",
    "uni_pc": "unipc_bh1",
    "uni_pc_bh2": "unipc",
}

#: The solver whose weights belong to the schedule (`fastsched.sampling.fitted`).
FITTED = "fitted"

#: Solvers of the reverse SDE (`fastsched.sampling.stochastic`), which are not in `SOLVERS`; one evaluation per step.
STOCHASTIC_SOLVERS = ("sde_dpmpp_2m", "ancestral")


def solver_name(solver: str | Solver, *, stochastic: bool = True) -> str:
    """The name of a solver, aliases resolved; ValueError, with the nearest, if there is none."""
    if isinstance(solver, Solver):
        return solver.name
    known = _known(solver, [*SOLVERS, *ALIASES, *(STOCHASTIC_SOLVERS if stochastic else ()), FITTED])
    return ALIASES.get(known, known)


def get_solver(solver: str | Solver) -> Solver:
    """The deterministic solver of that name; ValueError, with the nearest name, if there is none."""
    if isinstance(solver, Solver):
        return solver
    if isinstance(solver, str) and solver == FITTED:
        raise ValueError(
            "solver must be a stock one here, got 'fitted', whose weights belong to a schedule; pass the Schedule that "
            "fastsched.optimal_schedule or fastsched.fit returned with solver='fitted'"
        )
    known = _known(solver, [*SOLVERS, *ALIASES])
    return SOLVERS[ALIASES.get(known, known)]


def _known(solver: object, names: list[str]) -> str:
    """Like `validate.choice`; for a sampler's name in a menu or another library, the error suggests its name here.

    A stochastic solver that is not among ``names`` is refused as such, by whatever name.
    """
    if isinstance(solver, str) and solver not in names:
        found, _ = known_as(solver, names)
        if (found or solver) in set(STOCHASTIC_SOLVERS) - set(names):
            raise ValueError(
                f"solver must be deterministic here, got {solver!r}, which adds noise; fastsched.select chooses "
                "schedules for it from a cost such as fastsched.costs.klub"
            )
        if found is not None:
            known = ", ".join(map(repr, names))
            raise ValueError(f"solver must be one of {known}, got {solver!r}; did you mean {found!r}?")
    return validate.choice("solver", solver, names)


def from_pure_noise(solver: Solver, start: Node) -> bool:
    """Whether a step starts at ``tau = inf``, where the solver's formula has no limit; Euler over ``rho`` replaces it.

    Variance-preserving models of zero terminal SNR start there, and later steps do not use that slope. Flow models
    start at ``tau = 1``. The formulas of solvers over ``rho`` without a stage have a limit, at which that slope is
    infinitely far away.
    """
    if solver.variable != "tau" and solver.stage is None:
        return False
    return math.isinf(start.tau) if isinstance(start.tau, float) else bool(np.isinf(start.tau).all())


def step_scale(solver: Solver, start: Node, end: Node) -> Any:
    """The factor of the mean slope in ``y_k``: ``rho_k - rho_j``, or ``(tau_k - tau_j) / tau_k``."""
    if solver.variable == "rho":
        return end.rho - start.rho
    return (end.tau - start.tau) / end.tau
