"""Costs of steps between pairs of noise levels: the choice of pairs and velocity, and the loop over batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastsched.costs.states import Batch, StateSource

#: ``squares(batch, z, R, k, others)``: the squared score differences of the steps from level k to each level of
#: ``others``, at states ``z ~ p_k`` with network output ``R``, [B, n].
Squares = Callable[[Batch, Tensor, Tensor, int, range], Tensor]


def pair_costs(
    source: StateSource, pairs: str, velocity: str | None, squares: Squares, *, progress: bool, what: str
) -> tuple[Tensor, Tensor]:
    """The steps, [P, 2] int64, and ``v^2 squares`` of each for each sample, [samples, P] float64.

    ``pairs`` is as in `pair_indices`, ``velocity`` as in `step_velocity`; ``what`` labels the progress bar.
    """
    levels = source.levels
    steps = pair_indices(levels, pairs)
    v = step_velocity(source.s, steps, velocity)
    reach = 1 if pairs == "adjacent" else levels

    def of_batch(batch: Batch, advance: Callable[[int], None]) -> Tensor:
        columns = []
        for k, z, raw in source.states(batch, levels - 1):
            columns.append(squares(batch, z, raw, k, range(k + 1, min(k + reach, levels - 1) + 1)))
            advance(len(z))
        return torch.cat(columns, 1)

    return steps, source.over_batches(of_batch, levels - 1, progress, what) * v.square()


def pair_indices(levels: int, pairs: str) -> Tensor:
    """The steps (from, to) between levels, [P, 2] int64: neighbours, or all with from < to, row by row."""
    if pairs == "adjacent":
        return torch.stack([torch.arange(levels - 1, device="cpu"), torch.arange(1, levels, device="cpu")], 1)
    return torch.triu_indices(levels, levels, 1, device="cpu").T


def step_velocity(s: Tensor, pairs: Tensor, velocity: str | None) -> Tensor:
    """``v`` of each step, [P]: the ``s`` of its noisier level, of its cleaner level, or 1 for None."""
    if velocity is None:
        return torch.ones(len(pairs), dtype=torch.float64, device="cpu")
    return s[pairs[:, 0 if velocity == "noisier" else 1]]
