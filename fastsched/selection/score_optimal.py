"""Score-Optimal Diffusion Schedules: the schedule of the paper, and a schedule for any cost matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsched import validate
from fastsched.costs.corrector_cost import stein_corrector
from fastsched.costs.cost_matrix import CostMatrix, check_costs, is_cost
from fastsched.costs.states import finite_grid
from fastsched.denoisers.denoiser import Denoiser
from fastsched.denoisers.noise import NoiseProcess
from fastsched.sampling.schedule import Schedule
from fastsched.sampling.solvers import FITTED, solver_name
from fastsched.selection.arc_length import equal_arc_length
from fastsched.selection.constraints import distinct_known_levels, levels_of_timesteps
from fastsched.selection.dynamic_programming import first_order_path


def score_optimal_schedule(
    denoiser: Denoiser,
    steps: int,
    *,
    shape: Sequence[int],
    levels: int | Tensor = 48,
    samples: int | range = 8,
    data: Tensor | None = None,
    velocity: str | None = "noisier",
    spare_last: bool = True,
    solver: str = "dpmpp_2m",
    seed: int = 0,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Schedule:
    """The schedule of the paper: steps of equal ``sqrt(L_c)``, the corrector-optimised cost, the same for all solvers.

    Algorithm 1 (UpdateSchedule) on ``L_c(k, k+1) = v^2 E ||score_{k+1}(z) - score_k(z)||^2``, which
    `fastsched.costs.stein_corrector` estimates on a grid of N levels with ``2 (N - 1)`` model calls per sample. Pure
    noise has no finite score. For a process that starts there, the first node is found at the grid's first finite level
    and then moved to pure noise; without data, its path takes one more call.

    The arguments ``denoiser``, ``shape``, ``samples``, ``data``, ``velocity``, ``seed``, ``batch_size``, ``device``,
    ``dtype`` and ``progress`` are those of `fastsched.costs.stein_corrector`; ``spare_last`` and ``solver`` are those
    of `fastsched.select`. On levels uniform in ``log s``, as the denoiser's own are, ``velocity`` ``"noisier"`` and
    ``"cleaner"`` give the same schedule. The other arguments are

    * ``steps``: the number of nodes above sigma 0, which is the number of model calls of a multistep solver.
    * ``levels``: the number of levels on which the cost is estimated, or the levels ``s`` themselves, descending.

    Returns:
        The schedule; it predicts no error.

    Raises:
        ValueError: If an argument is out of range or unknown, or the network returns NaN or inf.

    Source: Williams, Campbell, Doucet and Syed, NeurIPS 2024 (arXiv 2412.07877), algorithm 1.
    """
    validate.arguments(locals(), levels=_is_grid, solver=_is_solver)
    levels_of_timesteps(denoiser.process, steps)  # raises before the cost is estimated if there are too few
    s = finite_grid(denoiser, int(levels)) if np.ndim(levels) == 0 else levels
    cost = stein_corrector(
        denoiser,
        shape=shape,
        sigmas=denoiser.process.sampler_sigma(validate.descending_sigmas("levels", s)),
        samples=samples,
        velocity=velocity,
        data=data,
        seed=seed,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        progress=progress,
    )
    return select(cost, steps, method="arc_length", spare_last=spare_last, solver=solver)


def select(
    cost: CostMatrix, steps: int, *, method: str | None = None, spare_last: bool = True, solver: str = "dpmpp_2m"
) -> Schedule:
    """The schedule of ``steps`` steps with the least total cost; no model calls.

    Both methods minimise ``sum_n cost(k_n, k_{n+1})``. Dynamic programming finds the levels of the grid with the least
    sum. Equal arc length (Williams et al. 2024, algorithm 1) gives every step the same ``cost^(1/p)``, summed over
    neighbouring levels. In the limit of short steps, where ``cost ~ delta * step^p``, this gives the least sum, and
    levels need not be on the grid. The methods differ where steps are long.

    Args:
        cost: The result of `fastsched.costs.stein_corrector`, ``stein_predictor``, ``fisher_rao`` or ``klub``.
        steps: The number of nodes (levels of the schedule) above 0: the model calls of a multistep solver.
        method: ``"dynamic_programming"`` (needs all pairs of levels) or ``"arc_length"``. None uses dynamic
            programming if ``cost`` has all pairs.
        spare_last: Whether the lowest level is replaced by 0. True: ``steps + 1`` nodes from the highest level to the
            lowest, the last of them replaced by 0. False: ``steps`` nodes, the last at the lowest level, then 0.
        solver: The solver that the schedule names.

    Returns:
        The schedule, without a predicted error. If the process starts from pure noise, so does the schedule.

    Raises:
        ValueError: If an argument is out of range or unknown, dynamic programming lacks pairs, or the cost is not
            finite, or at no step above 0.
    """
    validate.arguments(locals(), cost=is_cost, solver=_is_solver)
    check_costs(cost)
    steps = validate.positive_int("steps", steps)
    complete = len(cost.pairs) == len(cost.s) * (len(cost.s) - 1) // 2
    if method is None:
        method = "dynamic_programming" if complete else "arc_length"
    nodes = max(2, steps + int(spare_last))  # a path needs both ends, also for one step
    if method == "arc_length":
        s = equal_arc_length(cost.s, cost.lengths, nodes)
    elif not complete:
        raise ValueError(
            "method='dynamic_programming' needs the cost of all pairs of levels; estimate it with pairs='all'"
        )
    elif nodes > len(cost.s):
        raise ValueError(f"steps must be at most {len(cost.s) - int(spare_last)} on {len(cost.s)} levels, got {steps}")
    else:
        clipped = cost.matrix.clamp_min(0.0).numpy()  # an unbiased estimate of a cost near 0 may be negative
        s = cost.s[first_order_path(clipped, nodes - 1)]
    return Schedule.from_levels(cost.process, _to_zero(cost.process, s, steps), solver_name(solver))


def _is_solver(name: str, value: Any) -> None:
    """Check the name of a solver that takes levels alone."""
    if solver_name(value) == FITTED:
        raise ValueError(
            f"{name} must be one without weights of its own, got {value!r}; optimal_schedule and fit choose them"
        )


def _is_grid(name: str, value: object) -> None:
    """Check a number of levels, or the levels themselves."""
    if hasattr(value, "__index__") and getattr(value, "ndim", 0) == 0:
        validate.positive_int(name, value, minimum=2)
        return
    s = validate.descending_sigmas(name, value)
    if not (float(s[-1]) > 0 and math.isfinite(s[0])):
        raise ValueError(f"{name} must be above 0 and finite, as pure noise has no score, got {s.tolist()}")


def _to_zero(process: NoiseProcess, nodes: Tensor, steps: int) -> Tensor:
    """``steps`` nodes at levels that the network knows, then 0; the first at pure noise if the process starts there."""
    s = torch.cat([nodes[:steps], nodes.new_zeros(1)])
    if math.isinf(process.s_max):
        s[0] = process.s_max
    return torch.from_numpy(distinct_known_levels(process, s.numpy()))
