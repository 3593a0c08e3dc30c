"""Second-order min-plus dynamic programming on the device. `README.md` beside this file explains it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config


@triton.jit
def extend_kernel(p_best, p_cost, p_longer, p_before, M, BI: tl.constexpr, BK: tl.constexpr):
    """One more edge ``j -> k``: ``min_{i<j} best[i, j] + cost[i, j, k]`` and its smallest argmin.

    Grid ``(levels j, blocks of k)``. Lane ``i % BI`` keeps its own minimum, so that the next levels k are read side by
    side; the lanes meet once, at the end.
    """
    j, o_k = tl.program_id(0), tl.program_id(1) * BK + tl.arange(0, BK)
    m_k = (o_k > j) & (o_k < M)  # [BK]
    o_lane = tl.arange(0, BI)
    b_least = tl.full([BI, BK], float("inf"), tl.float64)
    b_from = tl.zeros([BI, BK], tl.int32) + o_lane[:, None]
    for it in range(tl.cdiv(j, BI)):
        o_i = it * BI + o_lane
        b_best = tl.load(p_best + o_i * M + j, mask=o_i < j, other=float("inf"))  # [BI]
        p_block = p_cost + (o_i.to(tl.int64)[:, None] * M + j) * M + o_k[None, :]  # [BI, BK]
        b_cost = tl.load(p_block, mask=(o_i < j)[:, None] & m_k[None, :], other=float("inf"))
        b_total = b_best[:, None] + b_cost
        b_from = tl.where(b_total < b_least, o_i[:, None], b_from)
        b_least = tl.minimum(b_total, b_least)
    b_longer = tl.min(b_least, 0)  # [BK]
    b_before = tl.min(tl.where(b_least == b_longer[None, :], b_from, M), 0)
    tl.store(p_longer + j * M + o_k, b_longer, mask=o_k < M)
    tl.store(p_before + j * M + o_k, b_before, mask=o_k < M)


@triton.jit
def backtrack_kernel(p_best, p_before, p_totals, p_paths, steps, M, BM: tl.constexpr):
    """One program: the best path of ``n + 1`` edges, from the last level back to level 0. Grid ``(steps,)``."""
    n = tl.program_id(0)
    o_j = tl.arange(0, BM)
    b_best = tl.load(p_best + (n * M + o_j).to(tl.int64) * M + M - 1, mask=o_j < M, other=float("inf"))  # [BM]
    total = tl.min(b_best, 0)
    j = tl.min(tl.where(b_best == total, o_j, BM), 0)
    tl.store(p_totals + n, total)
    if total < float("inf"):
        k = j * 0 + M - 1
        p_path = p_paths + n * (steps + 1)
        tl.store(p_path + n + 1, k.to(tl.int64))
        tl.store(p_path + n, j.to(tl.int64))
        for edge in range(n):
            i = tl.load(p_before + ((n - edge) * M + j).to(tl.int64) * M + k)
            k = j
            j = i
            tl.store(p_path + n - 1 - edge, j.to(tl.int64))


def min_plus(first: Tensor, cost: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Launch one kernel an edge, then one that walks the paths back; nothing is copied to the host.

    Args:
        first: ``[M]`` float64.
        cost: ``[M, M, M]`` float64.
        steps: Largest number of edges.

    Returns:
        Totals ``[steps]`` float64 and paths ``[steps, steps + 1]`` int64.
    """
    M = len(first)
    chosen = config.MinPlusLaunch()
    cost = cost.contiguous()
    best = cost.new_full((steps, M, M), float("inf"))  # [n, j, k]: cheapest path of n + 1 edges that ends with j -> k
    best[0, 0, 1:] = first[1:]
    before = torch.zeros((steps, M, M), dtype=torch.int32, device=cost.device)  # the level before j on that path
    for n in range(1, min(steps, M - 1)):
        extend_kernel[M, triton.cdiv(M, chosen.following)](
            best[n - 1], cost, best[n], before[n], M,
            BI=chosen.previous, BK=chosen.following, num_warps=chosen.warps,
        )  # fmt: skip
    totals = cost.new_empty(steps)
    paths = torch.full((steps, steps + 1), -1, dtype=torch.int64, device=cost.device)
    BM = triton.next_power_of_2(M)
    backtrack_kernel[(steps,)](best, before, totals, paths, steps, M, BM=BM, num_warps=1)
    return totals, paths
