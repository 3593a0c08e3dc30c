"""All methods of choosing a schedule, for one denoiser and one seed, with their cost in model calls and seconds."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, TypeVar

from torch import Tensor

import fastsched as fs
from benchmarks.quality import baselines, dmn
from benchmarks.quality.gits import Gits, GitsTuning, warm_up_noise
from benchmarks.quality.models import Model
from benchmarks.quality.optimal_steps import OptimalSteps
from fastsched.costs.cost_matrix import CostMatrix
from fastsched.costs.states import finite_grid
from fastsched.fitting.budget import takes_responses
from fastsched.fitting.denoiser_fit import fit_report
from fastsched.sampling.solvers import FITTED, get_solver

Result = TypeVar("Result")

#: fastsched's own methods: dynamic programming, with the final descent, and `fastsched.fit` with more model calls.
OURS = ("optimal_schedule_unpolished", "optimal_schedule", "fit", "fit_decoupled", "fit_100")

#: Model calls of a fit in all.
FIT_CALLS = 1500

#: Added to the seed for the noises on which GITS's settings are chosen, which nothing else uses.
TUNING_SEED = 10_000


@dataclass(frozen=True)
class Effort:
    """How many noises the other methods are given; fastsched measures 8."""

    paper: int = 64  #: for the paper's cost
    gits: int = 256  #: for GITS's paths; the default is its authors' number
    tuning: int = 64  #: for choosing among GITS's settings
    optimal_steps: int = 16  #: for OSS
    most_steps: int = 20  #: not noises, but the most steps of OSS's paths; paths of fewer steps are found along the way


@dataclass(frozen=True)
class Chosen:
    """A schedule and the cost of choosing it."""

    #: Sampler sigmas [steps + 1], the last 0. For the fitted solver and for decoupled levels, the whole `fs.Schedule`
    #: with its weights or network levels.
    sigmas: Tensor | fs.Schedule
    #: Model calls of choosing, with the measurement even if it serves all solvers and numbers of steps.
    model_calls: int = 0
    seconds: float = 0.0  #: CPU seconds of choosing, with the measurement
    predicted: float | None = None  #: the squared distance that the method predicts, or None

    @property
    def nodes(self) -> Tensor:
        """Sampler sigmas, [steps + 1]."""
        return self.sigmas.sigmas if isinstance(self.sigmas, fs.Schedule) else self.sigmas

    @property
    def steps(self) -> int:
        """Number of steps; the last one ends at sigma 0."""
        return len(self.nodes) - 1


def _timed(measure: Callable[[Any], Result]) -> cached_property[Result]:
    """A cached property. The object's ``seconds`` stores the CPU seconds of computing it, by name."""

    @functools.wraps(measure)
    def measured(owner: Any) -> Result:
        start = time.process_time()
        found = measure(owner)
        owner.seconds[measure.__name__] = time.process_time() - start
        return found

    return cached_property(measured)


class Choosers:
    """All methods for one denoiser and seed. Each measurement is made once, when a method first needs it."""

    def __init__(self, model: Model, seed: int, effort: Effort | None = None) -> None:
        self.model, self.seed, self.effort = model, seed, effort or Effort()
        self.seconds: dict[str, float] = {}

    @_timed
    def statistics(self) -> fs.PathStatistics:
        """The measurement of fastsched with default settings."""
        return fs.measure(self.model.denoiser, self.model.shape, keep_increments=True, seed=self.seed, progress=False)

    @_timed
    def corrector_cost(self) -> CostMatrix:
        """The paper's corrector-optimised cost between neighbouring levels."""
        denoiser = self.model.denoiser
        return fs.costs.stein_corrector(
            denoiser,
            shape=self.model.shape,
            sigmas=denoiser.process.sampler_sigma(finite_grid(denoiser, 48)),
            samples=self.effort.paper,
            seed=self.seed,
            progress=False,
        )

    @_timed
    def gits(self) -> Gits:
        """GITS's path and its costs, as its authors set it."""
        return self._gits_path("ipndm")

    @_timed
    def gits_tuning(self) -> GitsTuning:
        """Paths and reference samples for choosing among GITS's settings."""
        paths = {"ipndm": self.gits, "dpmpp_2m": self._gits_path("dpmpp_2m")}
        reference = self.model.converged(self.effort.tuning, TUNING_SEED + self.seed)
        return GitsTuning(self.model.denoiser, paths, reference)

    @_timed
    def optimal_steps(self) -> OptimalSteps:
        """The paths of OSS."""
        noise = warm_up_noise(self.seed, self.effort.optimal_steps, self.model.shape)
        return OptimalSteps.measure(self.model.denoiser, noise, self.effort.most_steps)

    def choose(self, solver: str, steps: int) -> dict[str, Callable[[], Chosen]]:
        """Functions that choose ``steps`` steps for ``solver``, by method; only our methods for the fitted solver."""
        ours = {
            "optimal_schedule_unpolished": self._after("statistics", partial(_optimal, solver, steps, polish=False)),
            "optimal_schedule": self._after("statistics", partial(_optimal, solver, steps)),
            "fit": self._fitting(solver, steps),
            "fit_decoupled": self._fitting(solver, steps, decoupled=True),
        }
        if solver == FITTED:
            return {name: ours[name] for name in ("optimal_schedule", "fit", "fit_decoupled")}
        if get_solver(solver).stage is not None:  # two-stage solvers have no decoupled levels
            del ours["fit_decoupled"]
        process = self.model.denoiser.process
        fixed = baselines.curves(process, steps, self.statistics.data_std)
        paper = lambda cost: Chosen(fs.select(cost, steps, method="arc_length").sigmas, cost.model_calls)
        return {
            **{name: lambda sigmas=sigmas: Chosen(sigmas) for name, sigmas in fixed.items()},
            "paper": self._after("corrector_cost", paper),
            "gits": self._after("gits", lambda gits: Chosen(gits.schedule(steps), gits.model_calls)),
            "gits_tuned": self._after("gits_tuning", lambda tuning: Chosen(*tuning.schedule(solver, steps))),
            "dmn": lambda: _clocked(lambda: Chosen(dmn.schedule(process, steps, "sigma", self.seed))),
            "dmn_shipped": lambda: _clocked(lambda: Chosen(dmn.schedule(process, steps, "sigma_squared", self.seed))),
            "oss": self._after("optimal_steps", lambda paths: Chosen(paths.schedule(steps), paths.model_calls(steps))),
            **ours,
        }

    def fit_within(self, model_calls: int, solver: str, steps: int, **options: Any) -> Chosen:
        """`fastsched.fit` with ``model_calls`` in all, including a measurement of its own."""
        return _clocked(lambda: self._fit(solver, steps, model_calls=model_calls, seed=self.seed, **options))

    def _fitting(self, solver: str, steps: int, **options: Any) -> Callable[[], Chosen]:
        """`fastsched.fit` in `FIT_CALLS`, by `statistics` unless its own measurement would be of another kind."""
        if takes_responses(FIT_CALLS, math.prod(self.model.shape), solver):
            return self._after("statistics", lambda found: self._fit(solver, steps, stats=found, **options))
        return lambda: self.fit_within(FIT_CALLS, solver, steps, **options)

    def _after(self, measured: str, choose: Callable[[Any], Chosen]) -> Callable[[], Chosen]:
        """A function that chooses from the property ``measured``; the seconds of both are added."""

        def chosen() -> Chosen:
            known = getattr(self, measured)
            return _clocked(lambda: choose(known), self.seconds[measured])

        return chosen

    def _gits_path(self, teacher: str) -> Gits:
        noise = warm_up_noise(self.seed, self.effort.gits, self.model.shape)
        return Gits.measure(self.model.denoiser, noise, teacher=teacher)

    def _fit(self, solver: str, steps: int, **options: Any) -> Chosen:
        found = fit_report(self.model.denoiser, self.model.shape, steps, solver, progress=False, **options)
        whole = solver == FITTED or found.schedule.network_sigmas is not None
        sigmas = found.schedule if whole else found.schedule.sigmas
        return Chosen(sigmas, found.model_calls, predicted=found.schedule.measured_error)


def _optimal(solver: str, steps: int, stats: fs.PathStatistics, *, polish: bool = True) -> Chosen:
    found = fs.optimal_schedule(stats, steps, solver, polish=polish)
    return Chosen(found if solver == FITTED else found.sigmas, stats.model_calls, predicted=found.predicted_error)


def _clocked(choose: Callable[[], Chosen], spent: float = 0.0) -> Chosen:
    """The result of ``choose``, with its CPU seconds plus ``spent``."""
    start = time.process_time()
    found = choose()
    return replace(found, seconds=time.process_time() - start + spent)
