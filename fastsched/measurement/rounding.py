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

#: The part of a schedule's summed step lengths that rounding may be. At 1% levels of the corrector cost are 4% to 7%
#: off, at 10% by a factor of 2. Of predictions of noise, velocity and EDM's F in bfloat16 it is 0.2% at most.
LARGEST_PART = 0.01


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


def stored_dtype(values: Tensor) -> torch.dtype:
    """The dtype that ``values`` were rounded to: a 16-bit one that holds them exactly, or else their own."""
    fitting = (dtype for dtype in STORAGE_ERROR if torch.equal(values.to(dtype).to(values.dtype), values))
    return next(fitting, values.dtype)


def stored_squares(raw: Tensor) -> Tensor:
    """The mean squared error that storage in 16 bits adds to the difference of outputs like ``raw``, [B] float64."""
    error = STORAGE_ERROR.get(stored_dtype(raw), 0.0)
    return error * torch.linalg.vector_norm(raw.flatten(1).float(), dim=1).cpu().double().square()


def warn_of_rounded_costs(costs: Tensor, rounding: Tensor, order: int) -> None:
    """Warn if the levels of a schedule follow ``rounding`` [N-1], the part of the ``costs`` that storage explains.

    ``cost^(1/p)`` are the lengths of the steps. Single costs are not compared: where nearly nothing changes, rounding
    always exceeds it, and has no effect on the schedule.
    """
    lengths, without = (values.clamp_min(0.0).pow(1 / order).sum() for values in (costs, costs - rounding))
    if float(without) < (1 - LARGEST_PART) * float(lengths):
        # The same words each time: Python shows a repeated warning once.
        validate.warn(
            "the network's outputs come in 16 bits and change so little from level to level that rounding counts as "
            "cost: too many levels are where it is large. Compute in float32 (dtype=torch.float32, or no autocast); "
            "make clean samples of outputs in float32 at least",
        )
