"""The starts of the search for a schedule: schedules by dynamic programming, and schedules in common use."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastsched import baselines
from fastsched.costs.norms import Array
from fastsched.costs.step_cost import path_cost
from fastsched.denoisers.noise import NoiseProcess, VariancePreserving
from fastsched.measurement.statistics import PathStatistics
from fastsched.sampling.schedule import Schedule
from fastsched.sampling.solvers import FITTED, Solver, get_solver
from fastsched.sampling.stock_weights import NEAREST_STOCK, as_fitted
from fastsched.selection.constraints import distinct_levels
from fastsched.selection.dynamic_programming import cheapest_path

#: The starts by dynamic programming, and whether their cost weights errors by their effect at the end.
DYNAMIC_PROGRAMMING = {"dynamic programming": True, "dynamic programming, unweighted": False}


def starting_levels(stats: PathStatistics, steps: int, solver: Solver) -> dict[str, Array]:
    """Levels ``s`` [steps + 1] to start from, by name: dynamic programming, then schedules in common use."""
    if solver.name == FITTED:
        solver = get_solver(NEAREST_STOCK)
    s = np.append(stats.s.numpy(), 0.0)
    found = {}
    for name, weighted in DYNAMIC_PROGRAMMING.items():
        cost = path_cost(stats, solver, weighted=weighted)
        found[name] = s[cheapest_path(cost, steps)]
    return found | {name: levels.numpy() for name, levels in common_levels(stats, steps).items()}


def common_levels(stats: PathStatistics, steps: int) -> dict[str, Tensor]:
    """Levels ``s`` [steps + 1] of the schedules in common use, over the measured range."""
    low, high = stats.finite_range
    scale = max(stats.data_std, low)  # 0 for a constant denoiser
    levels = {
        "karras": baselines.karras(steps, low, high),
        "karras, sigma_min replaced by 0": baselines.karras(steps, low, high, spare_last=True),
        "exponential": baselines.exponential(steps, low, high),
        "exponential, sigma_min replaced by 0": baselines.exponential(steps, low, high, spare_last=True),
        "karras of rho 3, sigma_min replaced by 0": baselines.karras(steps, low, high, 3.0, spare_last=True),
        "kl_optimal, sigma_min replaced by 0": baselines.kl_optimal(steps, low, high, scale, spare_last=True),
    }
    process = stats.process
    if isinstance(process, VariancePreserving):
        trained = process.trained_levels
        uniform = torch.linspace(len(trained) - 1, 0, steps + 1, dtype=torch.float64, device="cpu").round().long()[:-1]
        levels["uniform timesteps"] = torch.cat([trained[uniform], trained.new_zeros(1)])
    for each in levels.values():
        each[0] = stats.s[0]  # pure noise, if the process starts from it
    if process.integer_timesteps:
        return {name: distinct_levels(each, stats.s) for name, each in levels.items()}
    if process.kind == "flow":
        top = float(process.sampler_sigma(stats.s[:1]))
        for name, shift in {"uniform times": 1.0, "shift 3": 3.0}.items():
            levels[name] = process.level(top * baselines.flow_shift(steps, shift))
    # Uniform timesteps repeat if there are fewer of them than steps, and may begin above the measured range.
    return {name: each for name, each in levels.items() if bool((each.diff() < 0).all())}


def common_sigmas(process: NoiseProcess, s: Tensor, name: str, steps: int, *, spare_last: bool = False) -> Tensor:
    """Sampler sigmas [steps + 1] of a schedule in common use, from the highest finite level in ``s`` to the lowest.

    The name and ``spare_last`` are as in `fastsched.baselines`. The name can also be uniform: equal steps in flow time
    from the highest to 0. The formula is applied to sampler sigmas, which are times for flow models.

    Raises:
        ValueError: If the schedule is only for flow models and the process is of another kind.
    """
    if name in ("uniform", "flow_shift") and process.kind != "flow":
        raise ValueError(
            f"{name} is for flow models, even or shifted in their times; for this model name linear, even in sigma, or "
            "exponential, even in log sigma"
        )
    if name == "flow_shift":
        return baselines.flow_shift(steps)
    sigmas = process.sampler_sigma(s)
    low, high = (float(end) for end in sigmas[sigmas.isfinite()].aminmax())
    if name == "uniform":
        return high * baselines.flow_shift(steps, 1.0)
    return getattr(baselines, name)(steps, low, high, spare_last=spare_last)


def even_schedule(process: NoiseProcess, steps: int, solver: str) -> Schedule:
    """A schedule of levels even in ``log s``; the fitted solver gets the weights of `NEAREST_STOCK`."""
    levels = process.levels(max(steps, 3))[:steps]
    levels = torch.cat([levels, levels.new_zeros(1)])
    schedule = Schedule.from_levels(process, levels, NEAREST_STOCK if solver == FITTED else solver)
    return as_fitted(schedule, process) if solver == FITTED else schedule
