"""Grids of noise levels: how many there may be, and how they are spread."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastsched import validate

#: The most levels of a grid; more would fill memory before anything is called.
MOST_LEVELS = 10**6


def checked_level_count(n: object, minimum: int = 2) -> int:
    """How many levels are meant; at most `MOST_LEVELS`."""
    count = validate.positive_int("levels", n, minimum=minimum)
    if count > MOST_LEVELS:
        raise ValueError(f"levels must be at most {MOST_LEVELS:,}, got {count:,}; 32 to 64 are enough")
    return count


def log_uniform(high: float, low: float, n: int) -> Tensor:
    """``n`` levels from ``high`` to ``low``, uniform in the logarithm, both ends exact. Shape [n], float64."""
    levels = torch.linspace(math.log(high), math.log(low), n, dtype=torch.float64, device="cpu").exp()
    levels[0], levels[-1] = high, low
    return levels


def spread_indices(trained: Tensor, n: int) -> Sequence[int]:
    """``n`` distinct indices into the ascending levels ``trained``, spread as evenly as possible in ``log s``.

    With zero terminal SNR one of them is the infinite level, and the others are spread below it.
    """
    logs = trained.log().numpy()
    last = len(logs) - 1
    infinite = not np.isfinite(logs[last])
    top = logs[last - infinite]
    wanted = np.linspace(logs[0], top, n - infinite)
    chosen = {int(np.abs(logs - value).argmin()) for value in wanted} | {0, last}
    while len(chosen) < n:
        order = sorted(chosen)
        gaps = [(min(logs[b], top) - logs[a], a, b) for a, b in itertools.pairwise(order) if b - a > 1]
        _, a, b = max(gaps)
        middle = (logs[a] + min(logs[b], top)) / 2
        inner = np.arange(a + 1, b)
        chosen.add(int(inner[np.abs(logs[inner] - middle).argmin()]))
    return sorted(chosen)
