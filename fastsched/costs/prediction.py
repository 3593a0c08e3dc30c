"""Predict the error of a whole schedule.

With ``r_n = s_{k_n} sum_q C_{n,q} e_q`` the local error of step ``n`` (`costs.step_cost`), which ends at level
``k_n``, there are three estimates of ``E ||z_end - z_path||^2``:

* **local** ``sum_n a_n^2 E ||r_n||^2``, ``a = sqrt(weight)``: errors of different steps are taken as independent, as in
  the dynamic programme;
* **coherent**: the error of the sampler run on what the measurement knows of the denoiser (`costs.surrogate`):
  errors add up with their signs, each carried on by a scalar share of the Jacobian;
* **dual-weighted** ``E (sum_n w_{k_n} . r_n)^2``: they add up, each carried to the end by the measured adjoint vector,
  one probe a sample (Becker & Rannacher 2001, the dual-weighted residual).

Each is blind in its own way: the first to errors that add up, the second to turning directions, the third, with few
samples, to whatever its probes miss. An error that cancels in two may stand in the third, so `predicted_error` is the
largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from fastsched import validate
from fastsched.costs.step_cost import Array, PathCost, path_cost
from fastsched.costs.surrogate import Surrogate, squared_errors
from fastsched.measurement.statistics import PathStatistics
from fastsched.sampling.schedule import Schedule
from fastsched.sampling.solvers import Solver

#: How finely the measured grid is cut for schedules between its levels.
PARTS = 4


class ErrorEstimates(NamedTuple):
    """Three estimates of the squared distance between a schedule's samples and the converged ones.

    Attributes:
        local: Errors of the steps independent of each other.
        coherent: Errors of the steps added up, with scalar shares of the Jacobian.
        dual_weighted: Errors added up, with adjoint vectors; NaN if none were measured.
    """

    local: float
    coherent: float
    dual_weighted: float

    @property
    def largest(self) -> float:
        """The largest: what is reported as the predicted error."""
        return float(np.nanmax(self))


class ErrorModel:
    """The estimates of many schedules; what a step contributes is computed once."""

    def __init__(self, stats: PathStatistics, cost: PathCost) -> None:
        self.cost = cost
        self._surrogate, self._gram = Surrogate.of(stats), stats.gram.numpy()
        self._has_adjoint = stats.cross is not None
        self._cross = stats.cross.numpy() if stats.cross is not None else np.zeros((1, cost.levels, cost.levels - 1))
        self._levels, self._scale = np.append(cost.s, 0.0), np.append(cost.s, 1.0)
        self._known: dict[tuple[int, ...], tuple[float, Array]] = {}

    def __call__(self, nodes: Sequence[int]) -> ErrorEstimates:
        """The estimates for the schedule at level indices ``nodes``, the last of which is N (sigma 0)."""
        steps = [self._contribution(*self.cost.history_of(nodes, n)) for n in range(len(nodes) - 1)]
        carried = np.sum([value for _, value in steps], axis=0)
        outcome = self._surrogate.run(self._levels[None, list(nodes)], self.cost.solver)
        return ErrorEstimates(
            local=float(sum(value for value, _ in steps)),
            coherent=float(squared_errors(self._gram, outcome, 0.0).mean()),
            dual_weighted=float(np.mean(np.square(carried))) if self._has_adjoint else float("nan"),
        )

    def _contribution(self, nodes: tuple[int, ...], corrected: bool) -> tuple[float, Array]:
        """A step's local error, and the product of its error with each sample's adjoint vector."""
        key = (*nodes, corrected)
        if key not in self._known:
            end = nodes[-1]
            vector = self._scale[end] * self.cost.error_vector(nodes, corrected=corrected)
            self._known[key] = (self.cost.step(nodes, corrected=corrected), self._cross[:, end - 1] @ vector)
        return self._known[key]


def error_estimates(stats: PathStatistics, cost: PathCost, nodes: Sequence[int]) -> ErrorEstimates:
    """The three estimates for the schedule at level indices ``nodes``, the last of which is N (sigma 0)."""
    return ErrorModel(stats, cost)(nodes)


def predict_error(
    stats: PathStatistics,
    sigmas: Tensor | Sequence[float] | Schedule,
    solver: str | Solver = "dpmpp_2m",
    *,
    weight: str | None = "geometric",
) -> float:
    """Predicted ``E ||x0 - x0_converged||^2`` of any schedule, at the nearest levels of the fourfold grid.

    Args:
        stats: What `fastsched.measure` returned.
        sigmas: Sampler sigmas [steps + 1] ending in 0, or a schedule.
        solver: A solver's name.
        weight: As in `optimal_schedule`.

    Raises:
        ValueError: If the sigmas do not descend to 0, start below the measured range, or outnumber its levels.
    """
    values = validate.descending_sigmas(getattr(sigmas, "sigmas", sigmas))  # type: ignore[arg-type]  # or a Schedule
    if float(values[-1]) != 0.0:
        raise ValueError(f"sigmas must end in 0, got {float(values[-1]):g}; append it")
    if not getattr(stats.process, "integer_timesteps", False):
        stats = stats.refine(PARTS)
    position = -stats.process.level(values[:-1]).log()
    grid = -stats.s.log()
    nodes = [int((grid - p).abs().nan_to_num(nan=0.0).argmin()) for p in position]
    if position[0] > grid[-1]:
        raise ValueError(f"sigmas must start within the measured range, from {float(stats.sigmas[-2]):g} on")
    if len(nodes) > stats.levels:
        raise ValueError(f"sigmas has {len(nodes)} levels above 0, the measurement, refined, only {stats.levels}")
    for n in range(1, len(nodes)):
        nodes[n] = max(nodes[n], nodes[n - 1] + 1)
    for n in range(len(nodes)):  # room below for those that follow
        nodes[n] = min(nodes[n], stats.levels - (len(nodes) - n))
    return error_estimates(stats, path_cost(stats, solver, weight), [*nodes, stats.levels]).largest
