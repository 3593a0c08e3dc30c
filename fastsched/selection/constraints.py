"""The levels that a schedule may have: levels that the network knows, not too close together."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsched.costs.norms import Array
from fastsched.denoisers.noise import NoiseProcess, VariancePreserving

#: Least distance of two nodes in ``log s``: between closer nodes, differences of outputs are amplified rounding errors.
APART = 0.05
#: Relative tolerance, for rounding, of a level at the ends of a range.
ROUNDING = 1e-9


def separate(process: NoiseProcess, levels: Array) -> NDArray[np.bool_]:
    """Whether the nodes of C schedules [C, steps + 1] are `APART`, [C]; integer timesteps only need to differ."""
    ratio = 1.0 if process.integer_timesteps else math.exp(-APART)
    return np.asarray((levels[:, 1:] < ratio * levels[:, :-1]).all(axis=1))


def known_levels(process: NoiseProcess, levels: Array) -> Array:
    """The nearest levels that the network knows: ``levels`` themselves, except for integer timesteps."""
    return process.nearest(torch.from_numpy(np.asarray(levels, dtype=np.float64))).numpy()


def distinct_known_levels(process: NoiseProcess, levels: Array, low: float = 0.0) -> Array:
    """`known_levels` of one schedule [steps + 1], all different and none below ``low``.

    ValueError if there are more steps than such levels.
    """
    known = levels_of_timesteps(process, len(levels) - 1, low)
    return levels if known is None else distinct_levels(torch.from_numpy(levels), known).numpy()


def levels_of_timesteps(process: NoiseProcess, steps: int, low: float = 0.0) -> Tensor | None:
    """The levels from ``low`` on of a network with integer timesteps, descending; None for other networks.

    ValueError if there are more steps than such levels.
    """
    if not (isinstance(process, VariancePreserving) and process.integer_timesteps):
        return None
    known = process.trained_levels.flip(0)
    known = known[known > low * (1 - ROUNDING)]
    if steps > len(known):
        raise ValueError(f"steps must be at most {len(known)}, the network's number of timesteps, got {steps}")
    return known


def distinct_levels(levels: Tensor, known: Tensor) -> Tensor:
    """``levels`` [steps + 1], the last 0, moved to different ``known`` levels, as near in ``log s`` as order allows.

    Both descend, and there are at least as many known levels as steps.
    """
    chosen: list[int] = []
    inner = levels[:-1]
    for n, level in enumerate(inner):
        low, high = (chosen[-1] + 1 if chosen else 0), len(known) - (len(inner) - n)
        nearest = int((known.log() - level.log()).abs().nan_to_num(nan=0.0).argmin())  # inf - inf at pure noise
        chosen.append(min(max(nearest, low), high))
    return torch.cat([known[chosen], known.new_zeros(1)])
