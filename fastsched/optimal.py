"""From a measurement to a schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastsched import validate
from fastsched.costs.path import path_cost
from fastsched.costs.states import finite_grid
from fastsched.costs.stein import stein_corrector
from fastsched.denoiser import Denoiser
from fastsched.noise import NoiseProcess, VariancePreserving
from fastsched.path_statistics import PathStatistics
from fastsched.schedule import Schedule
from fastsched.selection import cheapest_paths, equal_arc_length
from fastsched.solvers import get_solver


def optimal_schedule(
    stats: PathStatistics, steps: int, solver: str = "dpmpp_2m", *, weight: str | None = "geometric"
) -> Schedule:
    """The schedule of ``steps`` steps with the least weighted error under ``solver``; no model calls.

    Minimises ``sum_n weight_{k_n} s_{k_n}^2 C_n' G C_n`` over the levels ``k_1 < ... < k_steps = N`` of the measured
    grid (`fastsched.costs.path`), exactly for solvers that use up to two slopes; longer histories are scored by
    their two most recent slopes.

    Args:
        stats: What `fastsched.measure` returned.
        steps: Steps, of which the last ends at sigma 0; at most the number of levels less one.
        solver: A solver's name.
        weight: ``"geometric"`` (``sqrt(phi psi)``), ``"isotropic"`` (``phi``), ``"directional"`` (``psi``) or None.

    Returns:
        The schedule, with the predicted squared distance to the converged sample.

    Raises:
        ValueError: If an argument is out of range or unknown.
    """
    method = get_solver(solver)
    cost = path_cost(stats, method, weight)
    selection = cheapest_paths(cost, steps)
    nodes = selection.path(steps)
    s = torch.cat([stats.s, stats.s.new_zeros(1)])[nodes]
    return Schedule.from_levels(stats.process, s, method.name, float(cost.of(nodes).sum()))


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
        velocity: ``v``: ``"noisier"``, ``"cleaner"`` or None, as in `fastsched.costs.stein_corrector`.
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
    name = get_solver(solver).name
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
    nodes = equal_arc_length(cost.s, cost.lengths, max(2, steps + int(spare_last)))
    return Schedule.from_levels(denoiser.process, _to_zero(denoiser.process, nodes, steps), name)


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
