"""Polish a schedule: lower the typical error that the measurement predicts for it, between the levels of the grid.

The sampler is run on what the measurement knows of the denoiser (`costs.surrogate`), so that errors of different
steps add up with their signs. What cancels there need not cancel in fact, for the Jacobian is known as a scalar only;
so what is lowered is the geometric mean over samples of

    ``||error||^2 + doubt^2 sum_n ||deviation_n||^2``,

with the states' deviations from the path on the way, carried to the end. Of doubts of 0.2 to 3, on six denoisers, six
solvers and 5 to 14 model calls, 1 left the least error. Where the Jacobian is measured to be a multiple of the
identity, as on Gaussian data, there is no doubt.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from fastsched.costs.step_cost import Array
from fastsched.costs.surrogate import Surrogate, squared_errors, typical
from fastsched.denoisers.noise import NoiseProcess
from fastsched.measurement.statistics import PathStatistics
from fastsched.sampling.solvers import Solver
from fastsched.selection.descent import descend

#: The weight of deviations that cancel at the end.
DOUBT = 1.0

#: Spread of the Jacobian about its scalar from which there is all doubt; it is 0.3 to 0.8 on the benchmark's denoisers,
#: and 0.03 on Gaussian data over 48 levels, whose scalar differs that much from one level to the next.
DOUBTFUL_SPREAD = 0.25

#: Least distance of two nodes in ``log s``: differences of outputs between nearer ones are rounding, enlarged.
APART = 0.05

#: The error of C schedules [C, steps + 1], [C].
Objective = Callable[[Array], Array]


def polish_objective(stats: PathStatistics, solver: str | Solver, doubt: float = DOUBT) -> Objective:
    """What `polish` lowers, as a function of levels [C, steps + 1]; ``inf`` where two are too close."""
    surrogate, gram = Surrogate.of(stats), stats.gram.numpy()
    doubt *= min(1.0, surrogate.spread / DOUBTFUL_SPREAD)

    def objective(levels: Array) -> Array:
        return typical(squared_errors(gram, surrogate.run(levels, solver), doubt))

    return at_known_levels(stats.process, objective)


def polish(stats: PathStatistics, levels: Array, solver: str | Solver, doubt: float = DOUBT) -> Array:
    """Lower the objective by descent from ``levels`` [steps + 1]; both ends stay."""
    found, _ = descend(polish_objective(stats, solver, doubt), levels, *measured_range(stats))
    return known_levels(stats.process, found)


def measured_range(stats: PathStatistics) -> tuple[float, float]:
    """The lowest and the highest finite level of the measured grid."""
    finite = stats.s[stats.s.isfinite()]
    return float(finite[-1]), float(finite[0])


def at_known_levels(process: NoiseProcess, objective: Objective) -> Objective:
    """``objective`` at the nearest levels that the network knows; ``inf`` where two are not `APART`.

    Integer timesteps need only be different ones.
    """
    ratio = 1.0 if getattr(process, "integer_timesteps", False) else math.exp(-APART)

    def restricted(levels: Array) -> Array:
        known = known_levels(process, levels)
        valid = (known[:, 1:] < ratio * known[:, :-1]).all(axis=1)
        values = np.full(len(known), np.inf)
        if valid.any():
            values[valid] = objective(known[valid])
        return values

    return restricted


def known_levels(process: NoiseProcess, levels: Array) -> Array:
    """The nearest levels that the network knows: ``levels`` themselves, but for integer timesteps."""
    return process.nearest(torch.from_numpy(np.asarray(levels, dtype=np.float64))).numpy()
