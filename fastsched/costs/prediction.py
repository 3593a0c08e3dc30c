"""Predict the error of a whole schedule.

The sampler is run on the surrogate (`fastsched.costs.surrogate`) for each measured sample b. The surrogate is wrong
where no secant explains a deviation. A search for the least error finds the schedules whose error it underestimates
most: those of UniPC were predicted 2.5 to 4 times too low. So a variance is added to the squared error,

    ``q_b = ||error_b||^2 + variance_b``,

for errors of the answers to deviations (`fastsched.costs.answer_errors`) and of the path between its levels
(`fastsched.costs.interpolation_errors`). For the fitted solver, the squares of deviations times `PENALTY` and times
`DEVIATION_PENALTY` are added instead. The error of a schedule is the power mean of the samples' errors,

    ``(mean_b q_b^p)^(1/p)``,   ``p = 1/4``,

between the geometric mean (p = 0), on which a few samples with large errors have little effect, and the arithmetic mean
(p = 1), which they dominate. Schedules are chosen and ranked by this number, and it is the one that is reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsched import validate
from fastsched.costs.fitted_weights import surrogate_runs
from fastsched.costs.norms import Array, Norms
from fastsched.costs.sample_surrogate import SampleSurrogate
from fastsched.costs.surrogate import Outcome, Surrogate
from fastsched.denoisers.noise import check_near
from fastsched.measurement.statistics import PathStatistics
from fastsched.metrics import power_mean
from fastsched.sampling.fitted import chosen_solver
from fastsched.sampling.sampler import schedule_solver
from fastsched.sampling.schedule import Schedule, check_kind, check_sigmas
from fastsched.sampling.solvers import FITTED, Solver

#: Weight of deviations that no secant explains, for the fitted solver, and near schedules that were run
#: (`fastsched.fitting.neighbourhood`). It is about the relative error of the answers to them: if one deviated path
#: predicts the answers of the other, it is 0.13 to 0.45 of the unexplained part, a mean over levels (nine denoisers).
PENALTY = 0.3

#: Weight of all deviations, explained or not, for the fitted solver with at most `FEW_SAMPLES` samples: levels and
#: weights chosen together exploit errors in secants from few samples. Fits with this weight had typical and mean errors
#: of 0.88 and 0.77 of those without, with 100 calls, and 0.83 and 0.73 with 200, both with 2 samples. With 4 and 8
#: samples the ratios were 1.0 to 1.2.
DEVIATION_PENALTY, FEW_SAMPLES = 0.25, 3


@dataclass(frozen=True, eq=False)
class ErrorModel:
    """Predicts the errors of schedules for one solver."""

    #: The surrogate of the denoiser; for a stock solver the one in which each sample has its own scalar Jacobian.
    surrogate: Surrogate | SampleSurrogate
    solver: Solver

    @classmethod
    def of(cls, stats: PathStatistics, solver: str | Solver) -> ErrorModel:
        """The model of a measurement."""
        method = chosen_solver(solver)
        return cls((Surrogate if method.name == FITTED else SampleSurrogate).of(stats), method)

    def __call__(self, levels: Array) -> Array:
        """The predicted errors of C schedules, [C], from their levels ``s`` [C, steps + 1], descending to 0."""
        if isinstance(self.surrogate, Surrogate):
            norms = self.surrogate.norms
            found = surrogate_runs(self.surrogate, levels, self.solver)
            squared = squared_errors(norms, found.outcome)
            if len(norms.size) <= FEW_SAMPLES:
                squared += DEVIATION_PENALTY**2 * norms.mean_squared(found.deviations_at_end)[:, None] * norms.size
            return power_mean(squared)
        runs = self.surrogate.run(levels, self.solver)
        return power_mean(runs.squared_error + runs.variance)

    def weights(self, levels: Array) -> Tensor | None:
        """The weights of the fitted solver for one schedule's levels [steps + 1], [steps, steps]; None for others."""
        if not isinstance(self.surrogate, Surrogate):
            return None
        weights = surrogate_runs(self.surrogate, levels[None], self.solver).weights
        return None if weights is None else torch.from_numpy(weights[0])


def squared_errors(norms: Norms, outcome: Outcome, penalty: float = PENALTY) -> Array:
    """Squared errors of the fitted solver, and near schedules that were run, [C, B].

    ``||error_b||^2 + penalty^2 sum_n ||unexplained deviation_n||^2``, each deviation scaled to its size at the end. The
    squared deviations are a mean over samples relative to each sample's size, times the size of sample b.
    """
    unexplained = norms.mean_squared(outcome.deviations)
    return norms.squared(outcome.error) + penalty**2 * unexplained[:, None] * norms.size


def predict_error(
    stats: PathStatistics, sigmas: Tensor | Sequence[float] | Schedule, solver: str | Solver | None = None
) -> float:
    """The predicted error of any schedule, the number that `fastsched.optimal_schedule` minimises.

    The power mean over samples of the squared distance ``||x0 - x0_converged||^2``, summed over a sample's elements.

    Args:
        stats: The result of `fastsched.measure`.
        sigmas: Sampler sigmas [steps + 1] ending in 0, or a schedule.
        solver: A solver's name; that of the schedule when None, and dpmpp_2m if ``sigmas`` is not a schedule.

    Raises:
        ValueError: If the sigmas do not descend to 0, start below the measured range, lie a thousandfold beyond those
            of the noise process, or belong to a schedule with decoupled levels, which a measurement cannot predict.
    """
    validate.arguments(locals(), sigmas=check_sigmas)
    values = check_sigmas("sigmas", sigmas, to_zero=True)
    check_kind("sigmas", sigmas, stats.process)
    if isinstance(sigmas, Schedule):
        sigmas.check_coupled("a measurement")
    s = stats.process.level(values)
    if float(s[0]) < float(stats.s[-1]):
        raise ValueError(f"sigmas must start within the measured range, from {float(stats.sigmas[-2]):g} on")
    check_near("sigmas", stats.process, s[:-1])
    name = solver if solver is not None else getattr(sigmas, "solver", "dpmpp_2m")
    method = chosen_solver(name) if getattr(sigmas, "weights", None) is None else schedule_solver(sigmas, name)
    return float(ErrorModel.of(stats, method)(s.numpy()[None])[0])
