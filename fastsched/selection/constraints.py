"""Which levels a schedule may have: those the network knows, and none too close to the next."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from fastsched.costs.norms import Array
from fastsched.denoisers.noise import NoiseProcess

#: Least distance of two nodes in ``log s``: differences of outputs between nearer ones are amplified rounding.
APART = 0.05

#: The error of C schedules [C, steps + 1], [C].
Objective = Callable[[Array], Array]


def at_known_levels(process: NoiseProcess, objective: Objective) -> Objective:
    """``objective`` at the nearest levels that the network knows; ``inf`` where two are not `separate`."""

    def restricted(levels: Array) -> Array:
        known = known_levels(process, levels)
        valid = separate(process, known)
        values = np.full(len(known), np.inf)
        if valid.any():
            values[valid] = objective(known[valid])
        return values

    return restricted


def separate(process: NoiseProcess, levels: Array) -> NDArray[np.bool_]:
    """Whether the nodes of C schedules [C, steps + 1] are `APART`, [C]; integer timesteps need only be different."""
    ratio = 1.0 if getattr(process, "integer_timesteps", False) else math.exp(-APART)
    return np.asarray((levels[:, 1:] < ratio * levels[:, :-1]).all(axis=1))


def known_levels(process: NoiseProcess, levels: Array) -> Array:
    """The nearest levels that the network knows: ``levels`` themselves, but for integer timesteps."""
    return process.nearest(torch.from_numpy(np.asarray(levels, dtype=np.float64))).numpy()
