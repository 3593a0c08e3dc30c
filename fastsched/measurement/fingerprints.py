"""A few numbers that tell networks apart."""

from __future__ import annotations

import torch
from torch import Tensor

#: Numbers in a fingerprint.
PROJECTIONS = 16
#: Largest relative difference of two fingerprints of one network: other devices and kernels round otherwise.
SAME_NETWORK = {torch.float16: 5e-2, torch.bfloat16: 5e-2}
SAME_WIDE_NETWORK = 1e-2


def projections(raw: Tensor) -> Tensor:
    """Weighted sums over every 16th element of an output ``raw``, [PROJECTIONS] float64."""
    flat = raw.detach().cpu().flatten().double()
    weighted = flat * torch.arange(len(flat), dtype=torch.float64).cos()
    padded = torch.nn.functional.pad(weighted, (0, -len(flat) % PROJECTIONS))
    return padded.reshape(-1, PROJECTIONS).sum(0)


def same_network(one: Tensor | None, other: Tensor | None, dtype: torch.dtype = torch.float32) -> bool:
    """Whether two fingerprints may be those of one network; what is not known may be."""
    if one is None or other is None:
        return True
    size = max(float(one.norm()), float(other.norm()))
    return float((one - other).norm()) <= SAME_NETWORK.get(dtype, SAME_WIDE_NETWORK) * size
