"""A few numbers that tell networks apart."""

from __future__ import annotations

import torch
from torch import Tensor

#: Number of projections that represent one output.
PROJECTIONS = 16


def fingerprint_of(raw: Tensor, denoised: Tensor, c: float) -> Tensor:
    """The fingerprint of a network and its parameterisation, [2 PROJECTIONS] float64, from one call at a fixed state.

    Its output is ``raw = R``; ``D = a x + c R`` is divided by ``c``, so that ``R`` has the same rounding in both.
    """
    return torch.cat([projections(raw), projections(denoised) / c])


def projections(raw: Tensor) -> Tensor:
    """Weighted sums over every 16th element of an output ``raw``, [PROJECTIONS] float64."""
    flat = raw.detach().cpu().flatten().double()
    weighted = flat * torch.arange(len(flat), dtype=torch.float64, device="cpu").cos()
    padded = torch.nn.functional.pad(weighted, (0, -len(flat) % PROJECTIONS))
    return padded.reshape(-1, PROJECTIONS).sum(0)


def largest_difference(dtype: torch.dtype) -> float:
    """Largest relative difference of two fingerprints or outputs of one network: devices and kernels round differently.

    At a high level, different noise predictors are similar: on the usual table, those of data of size 0.25 and 0.5
    differ by 5e-3, so the bound of wide dtypes is lower.
    """
    return 5e-2 if dtype.itemsize < 4 else 2e-3


def same_network(one: Tensor | None, other: Tensor | None, dtype: torch.dtype = torch.float32) -> bool:
    """Whether two fingerprints may be those of one network and parameterisation; True if one is not known.

    Those in files of earlier versions have only the first half.
    """
    if one is None or other is None:
        return True
    known = min(len(one), len(other))
    one, other = one[:known], other[:known]
    size = max(float(one.norm()), float(other.norm()))
    return float((one - other).norm()) <= largest_difference(dtype) * size
