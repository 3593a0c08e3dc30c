"""Schedules worth hearing: what an audition chooses among, made without model calls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fastsched import baselines
from fastsched.costs.prediction import predict_error
from fastsched.costs.step_cost import WEIGHTS, Array
from fastsched.measurement.statistics import PathStatistics
from fastsched.sampling.schedule import Schedule
from fastsched.sampling.solvers import Solver, get_solver
from fastsched.selection.descent import descend
from fastsched.selection.optimal import optimal_schedule
from fastsched.selection.polish import known_levels, measured_range, polish_objective

#: Doubts under which candidates are polished: from a bold trust in errors that cancel to a cautious one.
DOUBTS = (0.2, 0.8)

#: How many starts are polished under each doubt, those of least objective, and how many of the outcomes enter.
POLISHED, ENTERING = 4, 2

#: Schedules in common use that enter as they are.
COMMON = 2

#: Ratio of two levels, less 1, below which they are the same place.
SAME_PLACE = 0.03


def default_candidates(stats: PathStatistics, steps: int, solver: str | Solver) -> dict[str, Schedule]:
    """Up to nine schedules by name, the most promising first: all of `candidates_in_turn`."""
    return dict(candidates_in_turn(stats, steps, solver))


def candidates_in_turn(stats: PathStatistics, steps: int, solver: str | Solver) -> Iterator[tuple[str, Schedule]]:
    """Names and schedules, the most promising first, each made when it is asked for.

    The schedule of `optimal_schedule`; then the selections by dynamic programming under every weight and for ddim, and
    the schedules in common use (karras of rho 7 and 3, exponential, kl_optimal, and times of flow models), polished
    under two doubts (`selection.polish`), of which the best two of each; then the two common ones of least predicted
    error as they are; then the plain selections. Of schedules that coincide the first is listed.
    """
    method = get_solver(solver)
    default = default_weight(stats)
    found: list[Schedule] = []
    best = optimal_schedule(stats, steps, method.name, weight=default)
    yield from _unlike(found, {"optimal": best}, 1)
    weights = (None,) if stats.cross is None else (*WEIGHTS, None)
    selected = {
        f"{w or 'unweighted'}": optimal_schedule(stats, steps, method.name, weight=w, polish=False) for w in weights
    }
    selected["ddim's"] = replace(
        optimal_schedule(stats, steps, "ddim", weight=default, polish=False), solver=method.name, predicted_error=None
    )
    common = {
        label: Schedule.from_levels(stats.process, levels, method.name)
        for label, levels in _common_levels(stats, steps).items()
    }
    for doubt in DOUBTS:
        yield from _unlike(found, _polished(stats, {**selected, **common}, method, doubt), ENTERING)
    expected = {label: predict_error(stats, schedule, method, weight=default) for label, schedule in common.items()}
    yield from _unlike(found, {label: common[label] for label in sorted(common, key=expected.__getitem__)}, COMMON)
    yield from _unlike(found, {label: selected[label] for label in (default or "unweighted", "unweighted")}, 2)


def default_weight(stats: PathStatistics) -> str | None:
    """The weight of `optimal_schedule`, or None if no sensitivity was measured."""
    return None if stats.cross is None else "geometric"


def _polished(stats: PathStatistics, starts: dict[str, Schedule], method: Solver, doubt: float) -> dict[str, Schedule]:
    """The most promising starts, polished, the best first."""
    objective = polish_objective(stats, method, doubt)
    levels = {label: stats.process.level(start.sigmas).numpy() for label, start in starts.items()}
    values = dict(zip(levels, objective(np.stack(list(levels.values()))), strict=True))
    outcomes: dict[str, tuple[float, Array]] = {}
    for label in sorted(levels, key=values.__getitem__)[:POLISHED]:
        reached, value = descend(objective, levels[label], *measured_range(stats))
        outcomes[label] = value, known_levels(stats.process, reached)
    order = sorted(outcomes, key=lambda label: outcomes[label][0])
    return {
        f"{label}, doubt {doubt:g}": Schedule.from_levels(
            stats.process, torch.from_numpy(outcomes[label][1]), method.name
        )
        for label in order
    }


def _unlike(found: list[Schedule], more: dict[str, Schedule], most: int) -> Iterator[tuple[str, Schedule]]:
    """Up to ``most`` of ``more`` that are not found yet, and keep them with the found."""
    for label, schedule in more.items():
        if most == 0:
            return
        if not any(_same(schedule, other) for other in found):
            found.append(schedule)
            most -= 1
            yield label, schedule


def _same(one: Schedule, other: Schedule) -> bool:
    ratios = one.sigmas[1:-1] / other.sigmas[1:-1]
    return bool((ratios.log().abs() < SAME_PLACE).all())


def _common_levels(stats: PathStatistics, steps: int) -> dict[str, Tensor]:
    """Levels ``s`` [steps + 1] of the schedules in common use, over the measured range."""
    finite = stats.s[stats.s.isfinite()]
    low, high = float(finite[-1]), float(finite[0])
    scale = max(stats.data_std, low)  # 0 for a constant denoiser
    levels = {
        "karras": baselines.karras(steps, low, high),
        "karras, end spared": baselines.karras(steps, low, high, spare_last=True),
        "exponential": baselines.exponential(steps, low, high),
        "exponential, end spared": baselines.exponential(steps, low, high, spare_last=True),
        "karras of rho 3, end spared": baselines.karras(steps, low, high, 3.0, spare_last=True),
        "kl_optimal, end spared": baselines.kl_optimal(steps, low, high, scale, spare_last=True),
    }
    for each in levels.values():
        each[0] = stats.s[0]  # pure noise, where the process starts from it
    if getattr(stats.process, "integer_timesteps", False):
        return {label: _snapped(each, stats.s) for label, each in levels.items()}
    if stats.process.kind == "flow":
        top = float(stats.process.sampler_sigma(stats.s[:1]))
        for label, shift in {"uniform times": 1.0, "shift 3": 3.0}.items():
            levels[label] = stats.process.level(top * baselines.flow_shift(steps, shift))
    return levels


def _snapped(sigmas: Tensor, s: Tensor) -> Tensor:
    """``sigmas`` [steps + 1] moved to distinct levels of the grid ``s``, as near as order allows."""
    chosen: list[int] = []
    inner = sigmas[:-1]
    for n, sigma in enumerate(inner):
        low, high = (chosen[-1] + 1 if chosen else 0), len(s) - (len(inner) - n)
        nearest = int((s.log() - sigma.log()).abs().nan_to_num(nan=0.0).argmin())  # inf - inf: pure noise itself
        chosen.append(min(max(nearest, low), high))
    return torch.cat([s[chosen], s.new_zeros(1)])
