"""Hutchinson sums in one pass over the Jacobian-vector products. `README.md` in this folder has the derivation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config

LARGEST_GRID = 2**31 - 1  # programs along the first axis of a CUDA grid; also the largest 32-bit offset
OPTIONS = {"num_warps": config.HUTCHINSON_WARPS, **config.FUSION}  # of the compiler


@triton.jit
def hutchinson_kernel(
    p_V, p_JV, p_sums, N, samples, d, v_level, v_sample, j_level, j_sample,
    SHARED: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: one tile of columns of one sample, at every level.

    Grid ``(tiles * samples,)``. A probe that all levels share is loaded once and stays in registers. Each level writes
    two float32 sums to ``sums[tile, 2, level, sample]``.
    """
    tile, sample = tl.program_id(0) // samples, tl.program_id(0) % samples
    first = tile.to(tl.int64) * COLUMNS
    o_col = tl.arange(0, COLUMNS)
    m_col = o_col < tl.minimum(d - first, COLUMNS).to(tl.int32)
    p_V += sample.to(tl.int64) * v_sample + first
    p_JV += sample.to(tl.int64) * j_sample + first
    p_sums += tile.to(tl.int64) * 2 * N * samples + sample
    if SHARED:
        b_v = tl.load(p_V + o_col, mask=m_col, other=0.0).to(tl.float32)  # [COLUMNS]
    for level in tl.range(N, num_stages=STAGES):
        if not SHARED:
            b_v = tl.load(p_V + o_col, mask=m_col, other=0.0).to(tl.float32)
            p_V += v_level
        b_jv = tl.load(p_JV + o_col, mask=m_col, other=0.0).to(tl.float32)
        p_JV += j_level
        tl.store(p_sums + level * samples, tl.sum(b_v * b_jv))
        tl.store(p_sums + (N + level) * samples, tl.sum(b_jv * b_jv))


def hutchinson(V: Tensor, JV: Tensor) -> tuple[Tensor, Tensor]:
    """As `fastsched.ops.hutchinson_reduce`: launch the kernel and add up its partial sums."""
    N, B, d = JV.shape
    tiles = triton.cdiv(d, config.HUTCHINSON_COLUMNS)
    if max(tiles, 2 * N) * B > LARGEST_GRID:
        raise ValueError(
            f"JV must have at most {LARGEST_GRID // max(tiles, 2 * N)} samples of this size; got shape "
            f'{tuple(JV.shape)}. Pass fewer at a time, or backend="torch"'
        )
    V, JV = (t if t.stride(-1) == 1 else t.contiguous() for t in (V, JV))
    v_level, v_sample = (0, V.stride(0)) if V.ndim == 2 else (V.stride(0), V.stride(1))
    partial = torch.empty((tiles, 2, N, B), dtype=torch.float32, device=JV.device)
    hutchinson_kernel[(tiles * B,)](
        V, JV, partial, N, B, d, v_level, v_sample, JV.stride(0), JV.stride(1), **constants(V.ndim == 2), **OPTIONS,
    )  # fmt: skip
    sums = partial.sum(0, dtype=torch.float64)  # in the same order in every run
    return sums[0].contiguous(), sums[1].clone()


def constants(shared: bool) -> dict:
    """The kernel's compile-time arguments. If all levels share a probe, both tiles in flight are of ``JV``."""
    return {"SHARED": shared, "COLUMNS": config.HUTCHINSON_COLUMNS, "STAGES": 3 if shared else 2}
