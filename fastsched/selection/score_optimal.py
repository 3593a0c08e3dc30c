"""Score-Optimal Diffusion Schedules: the paper's schedule, and a schedule for any cost matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastsched import validate
from fastsched.costs.corrector_cost import stein_corrector
from fastsched.costs.cost_matrix import CostMatrix
from fastsched.costs.states import finite_grid
from fastsched.denoisers.denoiser import Denoiser
from fastsched.denoisers.noise import NoiseProcess, VariancePreserving
from fastsched.sampling.schedule import Schedule
from fastsched.sampling.solvers import solver_name
from fastsched.selection.arc_length import equal_arc_length
from fastsched.selection.dynamic_programming import first_order_paths


def score_optimal_schedule(
    denoiser: Denoiser,
    steps: int,
    *,
    shape: Sequence[int],
    levels: int | Tensor = 48,
    samples: int = 8,
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
    """The paper's schedule: equal steps of ``sqrt(L_c)``, the corrector-optimised cost; the same for every solver.

    Algorithm 1 (UpdateSchedule) on ``L_c(k, k+1) = v^2 E ||score_{k+1}(z) - score_k(z)||^2``, estimated on a grid of
    N neighbouring levels (`fastsched.costs.stein_corrector`) by ``2 (N - 1)`` model calls a sample. Where a process
    starts from pure noise, whose score is not finite, the first node is chosen at the grid's first finite level and
    then moved to the start.

    Args:
        denoiser: What to schedule.
        steps: Model calls of a multistep solver: nodes above sigma 0.
        shape: The shape of one sample, without the batch.
        levels: How many levels the cost is estimated on, or the levels ``s`` themselves, descending.
        samples: How many states a level.
        data: Clean samples [n, *shape]: states are data plus noise. None: states of a probability-flow path.
        velocity: ``v``: ``"noisier"``, ``"cleaner"`` or None, as in `fastsched.costs.stein_corrector`. The first two
            agree on levels uniform in ``log s``, the denoiser's own.
        spare_last: The last node. True: ``steps + 1`` nodes at equal lengths from the highest level to the lowest,
            the last of them replaced by 0. False: ``steps`` nodes, the last at the lowest level, then 0.
        solver: What the schedule is marked as being for.
        seed: Of the noises and the choice of data.
        batch_size: Samples handled at once; all of them when None.
        device: Where to run; where the network's parameters are when None.
        dtype: What the network computes in; that of its parameters when None.
        progress: Show a progress bar.

    Returns:
        The schedule; it predicts no error.

    Raises:
        ValueError: If an argument is out of range or unknown, or the network returns NaN or inf.

    Source: Williams, Campbell, Doucet and Syed, NeurIPS 2024 (arXiv 2412.07877), algorithm 1.
    """
    steps = validate.positive_int("steps", steps)
    name = solver_name(solver)
    s = finite_grid(denoiser, levels) if isinstance(levels, int) else levels
    cost = stein_corrector(
        denoiser,
        shape=shape,
        sigmas=denoiser.process.sampler_sigma(validate.descending_sigmas(s, name="levels")),
        samples=samples,
        velocity=velocity,
        data=data,
        seed=seed,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        progress=progress,
    )
    return select(cost, steps, method="arc_length", spare_last=spare_last, solver=name)


def select(
    cost: CostMatrix,
    steps: int,
    *,
    method: str | None = None,
    spare_last: bool = True,
    solver: str = "dpmpp_2m",
) -> Schedule:
    """The schedule of ``steps`` steps that a cost matrix favours; no model calls.

    Both methods make ``sum_n cost(k_n, k_{n+1})`` small. Dynamic programming finds the levels of the grid with the
    least sum. Equal arc length (Algorithm 1 of the paper) gives every step the same ``cost^(1/p)``, cumulated over
    neighbouring levels: the least sum in the limit of short steps, where ``cost ~ delta * step^p``, off the grid
    too. They differ where steps are long.

    Args:
        cost: What `fastsched.costs.stein_corrector`, ``stein_predictor``, ``fisher_rao`` or ``klub`` returned.
        steps: Nodes above sigma 0; model calls of a multistep solver.
        method: ``"dynamic_programming"`` (needs all pairs of levels) or ``"arc_length"``. None: the first where all
            pairs are there.
        spare_last: The last node. True: ``steps + 1`` nodes from the highest level to the lowest, the last of them
            replaced by 0. False: ``steps`` nodes, the last at the lowest level, then 0.
        solver: What the schedule is marked as being for.

    Returns:
        The schedule; it predicts no error. A process that starts from pure noise has its first node moved there.

    Raises:
        ValueError: If an argument is out of range or unknown, or dynamic programming lacks pairs.
    """
    steps = validate.positive_int("steps", steps)
    complete = len(cost.pairs) == len(cost.s) * (len(cost.s) - 1) // 2
    if method is None:
        method = "dynamic_programming" if complete else "arc_length"
    validate.choice("method", method, ("dynamic_programming", "arc_length"))
    nodes = max(2, steps + int(spare_last))
    if method == "arc_length":
        s = equal_arc_length(cost.s, cost.lengths, nodes)
    elif not complete:
        raise ValueError(
            "method='dynamic_programming' needs the cost of all pairs of levels: estimate with pairs='all'"
        )
    elif nodes > len(cost.s):
        raise ValueError(f"steps must be at most {len(cost.s) - int(spare_last)} on {len(cost.s)} levels, got {steps}")
    else:
        clipped = cost.matrix.clamp_min(0.0).numpy()  # an unbiased estimate near 0 may fall below it
        s = cost.s[first_order_paths(clipped, nodes - 1).path(nodes - 1)]
    return Schedule.from_levels(cost.process, _to_zero(cost.process, s, steps), solver_name(solver))


def _to_zero(process: NoiseProcess, nodes: Tensor, steps: int) -> Tensor:
    """``steps`` nodes and a 0: from the process's start where it is pure noise, at levels its network knows."""
    s = torch.cat([nodes[:steps], nodes.new_zeros(1)])
    if math.isinf(process.s_max):
        s[0] = process.s_max
    if isinstance(process, VariancePreserving) and process.integer_timesteps:
        known = process.trained_levels
        for n in range(steps):
            known = known[known < s[n - 1]] if n else known
            if len(known) == 0:
                raise ValueError(f"steps = {steps} is more than the timesteps the network knows can tell apart here")
            s[n] = known[(known.log() - s[n].log()).abs().nan_to_num(0.0).argmin()]  # inf - inf: the start itself
    return s
