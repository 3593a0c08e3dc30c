"""The costs between pairs of noise levels: which pairs, at what speed, batch by batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastsched import validate
from fastsched.costs.states import Batch, StateSource

PAIRS = ("adjacent", "all")

#: ``squares(batch, z, R, k, others)``: of the steps from level k, at states ``z ~ p_k``, to each of ``others``, [B, n].
Squares = Callable[[Batch, Tensor, Tensor, int, range], Tensor]


def pair_indices(levels: int, pairs: str) -> Tensor:
    """The steps (from, to) between levels, [P, 2] int64: neighbours, or all with from < to, by rows.

    Raises:
        ValueError: If ``pairs`` is neither ``"adjacent"`` nor ``"all"``.
    """
    if validate.choice("pairs", pairs, PAIRS) == "adjacent":
        return torch.stack([torch.arange(levels - 1), torch.arange(1, levels)], 1)
    return torch.triu_indices(levels, levels, 1).T


def step_speed(s: Tensor, pairs: Tensor, velocity: str | None) -> Tensor:
    """``v`` of each step, [P]: the noisier of its two levels, the cleaner, or 1.

    Raises:
        ValueError: If ``velocity`` is none of ``"noisier"``, ``"cleaner"`` and None.
    """
    if velocity is None:
        return torch.ones(len(pairs), dtype=torch.float64)
    validate.choice("velocity", velocity, ("noisier", "cleaner"))
    return s[pairs[:, 0 if velocity == "noisier" else 1]]


def step_costs(
    source: StateSource, steps: Tensor, speed: Tensor, squares: Squares, *, progress: bool, what: str
) -> Tensor:
    """``v^2 squares`` of the ``steps`` [P, 2] that `pair_indices` lists, for each sample, [samples, P] float64."""
    levels = source.levels
    reach = 1 if len(steps) == levels - 1 else levels

    def of_batch(batch: Batch, advance: Callable[[int], None]) -> Tensor:
        columns = []
        for k, z, raw in source.states(batch, levels - 1):
            columns.append(squares(batch, z, raw, k, range(k + 1, min(k + reach, levels - 1) + 1)))
            advance(len(z))
        return torch.cat(columns, 1)

    return source.over_batches(of_batch, levels - 1, progress, what) * speed.square()
