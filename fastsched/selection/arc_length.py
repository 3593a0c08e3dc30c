"""Levels at equal arc length under a cost: Algorithm 1 of Score-Optimal Diffusion Schedules."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastsched import validate

#: The least length of an interval, as a fraction of the total length.
LEAST_LENGTH = 1e-9


def equal_arc_length(s: Tensor, increments: Tensor, n: int) -> Tensor:
    """``n`` levels at equal spacing along a cumulative length: Algorithm 1 (UpdateSchedule) of the paper.

    The inverse of ``Lambda(s_k) = sum_{i < k} increments_i`` is interpolated by a monotone cubic (Fritsch-Carlson) in
    ``log s`` and evaluated at ``n`` equally spaced lengths, both ends included.

    Args:
        s: Levels, descending, [N], positive and finite.
        increments: Length between neighbours, [N-1], non-negative. For a cost ``L`` of local order ``p`` pass
            ``L ** (1/p)``.
        n: The number of levels.

    Returns:
        [n] float64, descending from ``s[0]`` to ``s[-1]``.

    Raises:
        ValueError: If shapes disagree, a length is negative or not finite, or all are 0.

    Source: Williams et al. 2024 (arXiv 2412.07877), algorithm 1.
    """
    from scipy.interpolate import PchipInterpolator

    n = validate.positive_int("n", n, minimum=2)
    levels = validate.descending_sigmas("s", s).numpy()
    lengths = np.asarray(increments, dtype=np.float64)
    if lengths.shape != (len(levels) - 1,):
        raise ValueError(
            f"increments must have shape [{len(levels) - 1}] for {len(levels)} levels, got {lengths.shape}"
        )
    if not np.isfinite(lengths).all() or (lengths < 0).any() or lengths.sum() <= 0:
        raise ValueError("increments must be finite, non-negative and not all 0")
    lengths = np.maximum(lengths, LEAST_LENGTH * lengths.sum())  # a flat Lambda would have no inverse
    cumulative = np.concatenate([[0.0], np.cumsum(lengths)])
    # Monotone, so that levels descend; cubic, because the slope of a linear interpolant jumps at the grid's levels.
    inverse = PchipInterpolator(cumulative, np.log(levels))
    chosen = np.exp(inverse(np.linspace(0.0, cumulative[-1], n)))
    chosen[0], chosen[-1] = levels[0], levels[-1]
    return torch.from_numpy(chosen)


def moved_to_equal_arc_length(s: Tensor, increments: Tensor, fraction: float) -> Tensor:
    """Levels ``s`` [N] moved in ``log s`` by a ``fraction`` of the way to `equal_arc_length`; both ends stay."""
    target = equal_arc_length(s, increments, len(s))
    moved = (fraction * target.log() + (1 - fraction) * s.log()).exp()
    moved[0], moved[-1] = s[0], s[-1]  # exactly: exp(log(s)) rounds
    return moved
