"""The fitted solver: a linear multistep method whose weights belong to the schedule.

From the denoised samples ``D_0 .. D_n`` of all evaluations so far, step n computes

    ``y_{n+1} = y_n + (rho_{n+1} - rho_n) sum_m W[n, m] D_m``,   ``sum_m W[n, m] = 1``,

and the last step, to sigma 0, gives ``x0 = sum_m W[K-1, m] D_m``; stock solvers take ``D_{K-1}`` alone. The
weights sum to one, so that a constant denoiser is integrated exactly. ``W`` is lower triangular, [K, K].

The weights themselves are chosen in `fastsched.costs.fitted_weights` and tuned in `fastsched.fitting.gauss_newton`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsched import validate
from fastsched.sampling.multistep import Node
from fastsched.sampling.solvers import FITTED, Solver, get_solver, solver_name


def fitted_solver(weights: Tensor) -> Solver:
    """The solver with weights ``W`` [K, K], for schedules of as many steps."""
    rows = checked_weights(weights).numpy()

    def of_step(history: Sequence[Node], end: Node) -> list[float]:
        n = len(history) - 1
        return rows[n, n::-1].tolist()  # newest first

    return Solver(FITTED, "rho", len(rows), of_step, "least squares on a measured path", end_weights=of_step)


def _not_yet(history: Sequence[Node], end: Node) -> list[float]:
    raise ValueError("the fitted solver samples with a schedule's weights; pass the schedule")


#: The fitted solver before its weights are chosen, which happens together with the levels.
FITTED_SOLVER = Solver(FITTED, "rho", 1, _not_yet, "least squares on a measured path")


def chosen_solver(solver: str | Solver) -> Solver:
    """The solver to choose a schedule for, a stock one or `FITTED_SOLVER`; ValueError if none has this name."""
    if isinstance(solver, Solver):
        return solver
    return FITTED_SOLVER if solver_name(solver, stochastic=False) == FITTED else get_solver(solver)


def checked_weights(weights: Tensor | Sequence[Sequence[float]], steps: int | None = None) -> Tensor:
    """``weights`` as a float64 tensor [K, K] on the CPU.

    ValueError unless they are those of a fitted solver (see above), with ``K = steps`` if ``steps`` is given.
    """
    values = validate.float64("weights", weights)
    if values.ndim != 2 or values.shape[0] != values.shape[1] or len(values) == 0:
        raise ValueError(f"weights must be a square matrix with one row per step, got shape {tuple(values.shape)}")
    if not bool(values.isfinite().all()):
        raise ValueError("weights must be finite, but hold NaN or inf")
    if bool(values.triu(1).any()):
        raise ValueError("weights must be 0 above the diagonal: a step knows only the evaluations before it")
    sums = values.sum(1)
    if not torch.allclose(sums, torch.ones_like(sums), rtol=0, atol=1e-6):
        raise ValueError(f"weights must sum to 1 in every row, got {[round(value, 6) for value in sums.tolist()]}")
    if steps is not None and len(values) != steps:
        raise ValueError(f"weights must have a row for each of {steps} steps of the schedule, got {len(values)}")
    return values
