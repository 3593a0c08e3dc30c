"""Hutchinson sums in one pass over the Jacobian-vector products. `README.md` beside this file derives it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config

BITS = 128  # signs a Philox block gives: rows of a tile
BLOCKS = 64  # Philox blocks a tile takes: columns of a tile


@triton.jit
def word_signs(b_word):
    """The 32 bits of each word as signs, [BLOCKS] uint32 -> [32, BLOCKS] float32."""
    b_bit = (b_word[None, :] >> tl.arange(0, 32)[:, None].to(tl.uint32)) & 1
    return (1 - 2 * b_bit.to(tl.int32)).to(tl.float32)


@triton.jit
def draw_signs(seed, tile, row, BLOCKS: tl.constexpr):
    """Signs of one tile, four [32, BLOCKS]: the four words of a Philox block give 32 signs each."""
    o_block = (tile * BLOCKS + tl.arange(0, BLOCKS)).to(tl.uint32)
    b_zero = o_block * 0
    w_0, w_1, w_2, w_3 = tl.philox(seed, o_block, b_zero + row.to(tl.uint32), b_zero, b_zero)
    return word_signs(w_0), word_signs(w_1), word_signs(w_2), word_signs(w_3)


@triton.jit
def load_quarters(p_tile, o_quarter, left, QUARTER: tl.constexpr):
    """A tile in float32, zero past the end of its row, four [32, BLOCKS]."""
    b_0 = tl.load(p_tile + o_quarter, mask=o_quarter < left, other=0.0).to(tl.float32)
    b_1 = tl.load(p_tile + o_quarter + QUARTER, mask=o_quarter < left - QUARTER, other=0.0).to(tl.float32)
    b_2 = tl.load(p_tile + o_quarter + 2 * QUARTER, mask=o_quarter < left - 2 * QUARTER, other=0.0).to(tl.float32)
    b_3 = tl.load(p_tile + o_quarter + 3 * QUARTER, mask=o_quarter < left - 3 * QUARTER, other=0.0).to(tl.float32)
    return b_0, b_1, b_2, b_3


@triton.jit
def hutchinson_kernel(
    p_V, p_JV, p_sums, seed, N, samples, d, v_level, v_sample, j_level, j_sample,
    PROBE: tl.constexpr, BITS: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: one tile of 8192 columns of one sample, at every level.

    Grid ``(tiles * samples,)``. A probe that all levels share is loaded, or drawn, once and stays in registers. A level
    leaves two float32 sums in ``sums[tile, 2, level, sample]``.
    """
    tile, sample = tl.program_id(0) // samples, tl.program_id(0) % samples
    QUARTER: tl.constexpr = BITS * BLOCKS // 4
    o_quarter = tl.arange(0, 32)[:, None] * BLOCKS + tl.arange(0, BLOCKS)[None, :]  # [32, BLOCKS]
    first = tile.to(tl.int64) * (BITS * BLOCKS)
    left = tl.minimum(d - first, BITS * BLOCKS).to(tl.int32)
    p_V += sample.to(tl.int64) * v_sample + first
    p_JV += sample.to(tl.int64) * j_sample + first
    p_sums += tile.to(tl.int64) * 2 * N * samples + sample
    if PROBE == "seed":
        v_0, v_1, v_2, v_3 = draw_signs(seed, tile, sample, BLOCKS)
    elif PROBE == "shared":
        v_0, v_1, v_2, v_3 = load_quarters(p_V, o_quarter, left, QUARTER)
    for level in tl.range(N, num_stages=STAGES):
        if PROBE == "levels":
            v_0, v_1, v_2, v_3 = load_quarters(p_V, o_quarter, left, QUARTER)
            p_V += v_level
        j_0, j_1, j_2, j_3 = load_quarters(p_JV, o_quarter, left, QUARTER)
        p_JV += j_level
        v_jv = tl.sum((v_0 * j_0 + v_1 * j_1) + (v_2 * j_2 + v_3 * j_3))
        jv_jv = tl.sum((j_0 * j_0 + j_1 * j_1) + (j_2 * j_2 + j_3 * j_3))
        tl.store(p_sums + level * samples, v_jv)
        tl.store(p_sums + (N + level) * samples, jv_jv)


def hutchinson(V: Tensor | None, seed: int, JV: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the kernel and add up its partial sums.

    Args:
        V: ``[N, B, d]``, ``[B, d]``, or None for the signs of ``seed``.
        seed: From 0 to ``2^63 - 1``.
        JV: ``[N, B, d]``.

    Returns:
        ``sum V * JV`` and ``sum JV * JV``, ``[N, B]`` float64.
    """
    sums = launch(V, seed, JV).sum(0, dtype=torch.float64)  # one order for every run
    return sums[0].contiguous(), sums[1].clone()


def launch(V: Tensor | None, seed: int, JV: Tensor, fill: float | None = None) -> Tensor:
    """Run the kernel: partial sums ``[tiles, 2, N, B]``, filled with ``fill`` first (tests poison them)."""
    N, B, d = JV.shape
    JV = JV if JV.stride(-1) == 1 else JV.contiguous()
    probe = "seed" if V is None else "shared" if V.ndim == 2 else "levels"
    V = JV[0] if V is None else V if V.stride(-1) == 1 else V.contiguous()
    v_level, v_sample = (0, V.stride(0)) if V.ndim == 2 else (V.stride(0), V.stride(1))
    chosen = config.hutchinson_launch(probe)
    tiles = triton.cdiv(d, BITS * BLOCKS)
    sums = torch.empty((tiles, 2, N, B), dtype=torch.float32, device=JV.device)
    if fill is not None:
        sums.fill_(fill)
    hutchinson_kernel[(tiles * B,)](
        V, JV, sums, seed, N, B, d, v_level, v_sample, JV.stride(0), JV.stride(1),
        **constants(probe, chosen), num_warps=chosen.warps,
    )  # fmt: skip
    return sums


def constants(probe: str, chosen: config.HutchinsonLaunch) -> dict:
    """The kernel's compile-time arguments."""
    return {"PROBE": probe, "BITS": BITS, "BLOCKS": BLOCKS, "STAGES": chosen.stages}
