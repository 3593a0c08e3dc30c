"""Every way of choosing a schedule, for one denoiser and one seed, with what it takes in model calls and seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

import fastsched as fs
from benchmarks.quality import baselines
from benchmarks.quality.models import Model
from fastsched.costs.cost_matrix import CostMatrix
from fastsched.costs.states import finite_grid
from fastsched.fitting.denoiser_fit import fit_report

#: fastsched's own: the dynamic programme, the same polished, and what `fastsched.fit` makes of it with more calls.
OURS = ("fastsched_dp", "fastsched_polish", "fastsched")

#: Samples that GITS and the paper's cost are given; fastsched measures 8.
GENEROUS_SAMPLES = 64


@dataclass(frozen=True)
class Chosen:
    """A schedule and what it took to choose it.

    Attributes:
        sigmas: Sampler sigmas [steps + 1], the last 0.
        model_calls: Spent choosing, a measurement that serves all solvers and numbers of steps included.
        seconds: CPU seconds spent choosing, the measurement included.
        predicted: The squared distance it predicts, if it does.
    """

    sigmas: Tensor
    model_calls: int = 0
    seconds: float = 0.0
    predicted: float | None = None


class Choosers:
    """All choosers for one denoiser; what they measure is measured once, when first asked for."""

    def __init__(self, model: Model, seed: int) -> None:
        self.model, self.seed = model, seed
        self.seconds: dict[str, float] = {}

    @cached_property
    def statistics(self) -> fs.PathStatistics:
        """The measurement of fastsched, with its defaults."""
        return self._timed(
            "statistics",
            lambda: fs.measure(
                self.model.denoiser, self.model.shape, keep_increments=True, seed=self.seed, progress=False
            ),
        )

    @cached_property
    def corrector_cost(self) -> CostMatrix:
        """The paper's corrector-optimised cost between neighbouring levels."""
        denoiser = self.model.denoiser
        return self._timed(
            "corrector_cost",
            lambda: fs.costs.stein_corrector(
                denoiser,
                shape=self.model.shape,
                sigmas=denoiser.process.sampler_sigma(finite_grid(denoiser, 48)),
                samples=GENEROUS_SAMPLES,
                seed=self.seed,
                progress=False,
            ),
        )

    @cached_property
    def gits(self) -> baselines.Gits:
        """GITS's path and its costs."""
        return self._timed(
            "gits",
            lambda: baselines.Gits.measure(
                self.model.denoiser, self.model.shape, samples=GENEROUS_SAMPLES, seed=self.seed
            ),
        )

    def choose(self, solver: str, steps: int) -> dict[str, Callable[[], Chosen]]:
        """The choosers of a schedule of ``steps`` steps for ``solver``, by name."""
        process = self.model.denoiser.process
        fixed = baselines.curves(process, steps, self.statistics.data_std)
        return {
            **{name: lambda sigmas=sigmas: Chosen(sigmas) for name, sigmas in fixed.items()},
            "paper": lambda: self._paper(steps),
            "gits": lambda: self._gits(steps),
            "dmn": lambda: _clocked(lambda: Chosen(baselines.dmn(process, steps))),
            "fastsched_dp": lambda: self._optimal(solver, steps, polish=False),
            "fastsched_polish": lambda: self._optimal(solver, steps, polish=True),
            "fastsched": lambda: self._fit(solver, steps),
        }

    def _paper(self, steps: int) -> Chosen:
        cost = self.corrector_cost
        found = _clocked(lambda: Chosen(fs.select(cost, steps, method="arc_length").sigmas))
        return Chosen(found.sigmas, cost.model_calls, found.seconds + self.seconds["corrector_cost"])

    def _gits(self, steps: int) -> Chosen:
        gits = self.gits
        found = _clocked(lambda: Chosen(gits.schedule(steps)))
        return Chosen(found.sigmas, gits.model_calls, found.seconds + self.seconds["gits"])

    def _optimal(self, solver: str, steps: int, *, polish: bool) -> Chosen:
        statistics, start = self.statistics, time.process_time()
        found = fs.optimal_schedule(statistics, steps, solver, polish=polish)
        seconds = time.process_time() - start + self.seconds["statistics"]
        return Chosen(found.sigmas, statistics.model_calls, seconds, found.predicted_error)

    def _fit(self, solver: str, steps: int) -> Chosen:
        statistics, start = self.statistics, time.process_time()
        found = fit_report(self.model.denoiser, self.model.shape, steps, solver, stats=statistics, progress=False)
        seconds = time.process_time() - start + self.seconds["statistics"]
        return Chosen(found.schedule.sigmas, found.model_calls, seconds, found.schedule.measured_error)

    def _timed(self, name: str, measure: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = measure()
        self.seconds[name] = time.process_time() - start
        return result


def _clocked(choose: Callable[[], Chosen]) -> Chosen:
    start = time.process_time()
    found = choose()
    return Chosen(found.sigmas, found.model_calls, time.process_time() - start, found.predicted)
