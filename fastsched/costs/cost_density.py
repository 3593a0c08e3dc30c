"""The density of the steps' cost along a path."""

from __future__ import annotations

import math

import numpy as np

from fastsched import validate
from fastsched.costs.norms import Array
from fastsched.costs.step_cost import error_weight
from fastsched.measurement.statistics import PathStatistics


def cost_density(stats: PathStatistics, *, weighted: bool = True) -> tuple[Array, Array]:
    """The cost density: ``weight_k ||e_q||^2 / (lambda_k - lambda_q)^2`` between neighbouring levels, ``k = q + 1``.

    It is the weighted squared speed of the denoiser's output per unit of ``log sigma``, averaged over paths. A short
    Euler step of length ``h`` costs ``h^4 / 4`` times this density, so the steps of the best Euler schedule have equal
    integrals of its fourth root.

    Args:
        stats: The result of `fastsched.measure`.
        weighted: Whether errors are weighted by their effect at the end of the path; ``weight = 1`` otherwise.

    Returns:
        The levels ``s`` (geometric mean of neighbours) and the density there, each [N - 1], or [N - 2] if the process
        starts from pure noise, which is infinitely far from the second level.
    """
    validate.arguments(locals())
    s = stats.s.numpy()
    first = int(not math.isfinite(s[0]))  # the gap from pure noise is infinite, so it has no density
    squared = stats.gram.mean(0).diagonal().numpy() * (error_weight(stats)[1:-1] if weighted else 1.0)
    gaps = np.log(s[first:-1] / s[first + 1 :])
    return np.sqrt(s[first:-1] * s[first + 1 :]), squared[first:] / gaps**2
