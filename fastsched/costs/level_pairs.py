"""Costs of steps between pairs of noise levels: the choice of pairs and velocity, and the loop over batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastsched.costs.cost_matrix import CostMatrix
from fastsched.costs.states import Batch, StateSource
from fastsched.measurement.rounding import stored_squares, warn_of_rounded_costs

#: ``squares(batch, z, R, k, others)``: the squared score differences of the steps from level k to each level of
#: ``others``, at states ``z ~ p_k`` with network output ``R``, [B, n].
Squares = Callable[[Batch, Tensor, Tensor, int, range], Tensor]


def pair_costs(
    source: StateSource, name: str, pairs: str, velocity: str | None, squares: Squares, *, order: int, progress: bool
) -> CostMatrix:
    """The cost ``v^2 squares`` of each step, with ``pairs`` as in `pair_indices`, ``velocity`` as in `step_velocity`.

    Warns if outputs are too coarse for the costs between neighbours.
    """
    levels = source.levels
    steps = pair_indices(levels, pairs)
    v = step_velocity(source.s, steps, velocity)
    reach = 1 if pairs == "adjacent" else levels
    rounding = torch.zeros(levels - 1, dtype=torch.float64, device="cpu")  # squared score differences, of neighbours

    def of_batch(batch: Batch, advance: Callable[[int], None]) -> Tensor:
        columns = []
        for k, z, raw in source.states(batch, levels - 1):
            columns.append(squares(batch, z, raw, k, range(k + 1, min(k + reach, levels - 1) + 1)))
            rounding[k] += source.score_c[k + 1].square() * stored_squares(raw).sum() / source.samples
            advance(len(z))
        return torch.cat(columns, 1)

    what = f"{name.replace('_', ' ').capitalize()} cost"
    costs = source.over_batches(of_batch, levels - 1, progress, what) * v.square()
    neighbours = steps[:, 1] == steps[:, 0] + 1
    warn_of_rounded_costs(costs[:, neighbours].mean(0), rounding * v[neighbours].square(), order)
    # Estimates of one name can be merged, so a velocity other than the usual one is part of it.
    name = name if velocity == "noisier" else f"{name}, velocity={velocity!r}"
    return source.cost_matrix(name, steps, costs, order)


def pair_indices(levels: int, pairs: str) -> Tensor:
    """The steps (from, to) between levels, [P, 2] int64: neighbours, or all with from < to, row by row."""
    every = torch.arange(levels, device="cpu")
    return every.unfold(0, 2, 1) if pairs == "adjacent" else torch.combinations(every)


def step_velocity(s: Tensor, pairs: Tensor, velocity: str | None) -> Tensor:
    """``v`` of each step, [P]: the ``s`` of its noisier level, of its cleaner level, or 1 for None."""
    if velocity is None:
        return torch.ones(len(pairs), dtype=torch.float64, device="cpu")
    return s[pairs[:, 0 if velocity == "noisier" else 1]]
