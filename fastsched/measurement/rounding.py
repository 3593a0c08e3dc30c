"""What 16-bit storage of a network's outputs does to the distances between levels."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsched import validate

#: Mean squared relative error of two independent roundings of Gaussian numbers: what storing two neighbouring outputs
#: adds to the squared distance between them, over the squared norm of one.
STORAGE_ERROR = {torch.bfloat16: 5.3e-6, torch.float16: 8.2e-8}

#: Distances above this many times the floor are accepted: storage adds at most 1% to them.
TRUSTED = 100.0


def storage_floor(norms: Tensor, dtype: torch.dtype, c: Tensor) -> Tensor:
    """Squared distance to the previous level that is due to rounding: ``5.3e-6 ||c_k R_k||^2`` in bfloat16.

    Rounding errors of neighbouring levels are taken as independent, as they are once outputs differ by more than the
    spacing of the format. Takes the norms [N, B] of outputs stored in ``dtype`` and their coefficients ``c`` [N].
    Returns [B, N] float64 on the CPU, zero for 32 bits and more.
    """
    sizes = c.cpu().double().unsqueeze(-1) * norms.cpu().double()
    return STORAGE_ERROR.get(dtype, 0.0) * sizes.square().T


def warn_of_storage(norms: Tensor, dtype: torch.dtype, c: Tensor, gram: Tensor) -> None:
    """Warn if 16-bit storage of ``R`` may add more than 1% to the squared distances between adjacent levels.

    Sums along the path are compared, averaged over the samples. Single distances are not: where outputs change very
    little, as near the data, rounding always exceeds 1%, and has no effect on the schedule. Arguments are as in
    `storage_floor`, with the Gram matrices of the increments, [B, N-1, N-1].
    """
    if dtype not in STORAGE_ERROR:
        return
    distances = gram.diagonal(dim1=-2, dim2=-1).mean(0)
    floor = storage_floor(norms, dtype, c).mean(0)[1:]  # one per distance
    if bool(distances.sum() < TRUSTED * floor.sum()):
        name = str(dtype).removeprefix("torch.")
        # The same words each time: Python shows a repeated warning once.
        validate.warn(
            f"the network's outputs come in {name} and change so little from level to level that rounding adds more "
            "than 1% to the squared changes. Measure with the network in float32 (dtype=torch.float32) or with fewer "
            "levels, or average over more samples",
        )
