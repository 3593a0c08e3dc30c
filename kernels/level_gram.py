"""The increment Gram matrix in one pass over the network outputs. `README.md` in this folder has the derivation."""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config

LARGEST_GRID = 65535  # programs along the second or third axis of a CUDA grid


@triton.jit
def load_row(p_block, o_level, N, m_col):
    """Rows ``o_level`` in float32, zero for levels that do not exist, [M, BK]."""
    m_level = (o_level >= 0) & (o_level < N)  # [M]
    return tl.load(p_block, mask=m_level[:, None] & m_col, other=0.0).to(tl.float32)


@triton.jit
def load_coefficients(p_now, o_level, N, STEP: tl.constexpr):
    """Coefficients of the four levels from each of ``o_level`` on, four [M, 1], from row ``STEP`` of ``[4, N]``."""
    p_block = p_now + STEP * N + o_level
    c_0 = tl.load(p_block, mask=o_level < N, other=0.0)[:, None]
    c_1 = tl.load(p_block + 1, mask=o_level + 1 < N, other=0.0)[:, None]
    c_2 = tl.load(p_block + 2, mask=o_level + 2 < N, other=0.0)[:, None]
    c_3 = tl.load(p_block + 3, mask=o_level + 3 < N, other=0.0)[:, None]
    return c_0, c_1, c_2, c_3


@triton.jit
def increments(p_rows, o_level, stride_level, N, o_col, m_col, now, step):
    """``now_k (t_k - t_{k-1}) + step_k t_{k-1}`` for the four levels k from each of ``o_level`` on, four [M, BK].

    Five slices of rows give four slices of differences without any exchange between threads.
    """
    stride_level = tl.cast(stride_level, tl.int64)  # a stride below 2^31 has multiples above it
    p_block = p_rows + o_level[:, None] * stride_level + o_col  # [M, BK]
    b_before = load_row(p_block - stride_level, o_level - 1, N, m_col)
    b_0 = load_row(p_block, o_level, N, m_col)
    b_1 = load_row(p_block + stride_level, o_level + 1, N, m_col)
    b_2 = load_row(p_block + 2 * stride_level, o_level + 2, N, m_col)
    b_3 = load_row(p_block + 3 * stride_level, o_level + 3, N, m_col)
    return (
        now[0] * (b_0 - b_before) + step[0] * b_before,
        now[1] * (b_1 - b_0) + step[1] * b_0,
        now[2] * (b_2 - b_1) + step[2] * b_1,
        now[3] * (b_3 - b_2) + step[3] * b_2,
    )


@triton.jit
def rows(p_rows, o_level, stride_level, N, o_col, m_col):
    """The four rows from each of ``o_level`` on, four [M, BK]."""
    stride_level = tl.cast(stride_level, tl.int64)
    p_block = p_rows + o_level[:, None] * stride_level + o_col
    return (
        load_row(p_block, o_level, N, m_col),
        load_row(p_block + stride_level, o_level + 1, N, m_col),
        load_row(p_block + 2 * stride_level, o_level + 2, N, m_col),
        load_row(p_block + 3 * stride_level, o_level + 3, N, m_col),
    )


@triton.jit
def interleave(b_0, b_1, b_2, b_3):
    """Four [M, BK] of every fourth row -> [4 M, BK]."""
    b_all = tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3))  # [M, BK, 2, 2]
    return b_all.permute(0, 2, 3, 1).reshape(4 * b_0.shape[0], b_0.shape[1])


@triton.jit
def level_tile(p_R, p_X, o_level, r_level, x_level, N, o_col, m_col, c, dc, a, da, STATES: tl.constexpr):
    """Increments of ``a_k X_k + c_k R_k``, or for vectors the rows of R themselves, [4 M, BK] float32."""
    if STATES == "vectors":
        r_0, r_1, r_2, r_3 = rows(p_R, o_level, r_level, N, o_col, m_col)
        return interleave(r_0, r_1, r_2, r_3)
    e_0, e_1, e_2, e_3 = increments(p_R, o_level, r_level, N, o_col, m_col, c, dc)
    if STATES == "levels":
        x_0, x_1, x_2, x_3 = increments(p_X, o_level, x_level, N, o_col, m_col, a, da)
        e_0, e_1, e_2, e_3 = e_0 + x_0, e_1 + x_1, e_2 + x_2, e_3 + x_3
    if STATES == "shared":
        b_x = tl.load(p_X + o_col, mask=m_col, other=0.0).to(tl.float32)  # [M or 1, BK]
        e_0, e_1, e_2, e_3 = e_0 + da[0] * b_x, e_1 + da[1] * b_x, e_2 + da[2] * b_x, e_3 + da[3] * b_x
    return interleave(e_0, e_1, e_2, e_3)


@triton.jit
def split(b_w, SCALE: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """``w = high + low`` in the precision's format, as ``high`` and ``SCALE * low``; only ``low`` loses digits.

    The high part is rounded as an integer, which can lose a NaN; the low part never does.
    """
    DROPPED: tl.constexpr = 16 if PRECISION == "bf16x3" else 13  # of float32's 23 bits
    HALF: tl.constexpr = 1 << (DROPPED - 1)
    KEPT: tl.constexpr = -(1 << DROPPED)
    b_high = ((b_w.to(tl.int32, bitcast=True) + HALF) & KEPT).to(tl.float32, bitcast=True)
    b_low = SCALE * (b_w - b_high)
    if INTERPRET:  # NumPy has neither format, so the same values in float32
        b_cut = ((b_low.to(tl.int32, bitcast=True) + HALF) & KEPT).to(tl.float32, bitcast=True)
        return b_high, tl.where(b_low == b_low, b_cut, b_low)
    elif PRECISION == "bf16x3":
        return b_high.to(tl.bfloat16), b_low.to(tl.bfloat16)
    else:  # TF32 hardware truncates the low part
        return b_high, b_low


@triton.jit
def product(b_left, b_right, b_sum, MODE: tl.constexpr):
    """``sum + left right'``, one dot; ``MODE`` is the hardware's format of the operands."""
    return tl.dot(b_left, tl.trans(b_right), b_sum, input_precision=MODE, max_num_imprecise_acc=1)


@triton.jit
def square_product(b_e, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """A matrix M with ``(M + M') / 2 = e e'``, without the product of the low parts, [ROWS, ROWS]."""
    b_zero = tl.zeros([b_e.shape[0], b_e.shape[0]], tl.float32)
    if PRECISION == "ieee":
        return product(b_e, b_e, b_zero, "ieee")
    MODE: tl.constexpr = "ieee" if PRECISION == "bf16x3" else "tf32"
    b_high, b_low_twice = split(b_e, 2, PRECISION, INTERPRET)
    return product(b_high, b_low_twice, product(b_high, b_high, b_zero, MODE), MODE)


@triton.jit
def cross_product(b_left, b_right, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """``left right'``, without the product of the low parts, [ROWS, ROWS]."""
    b_zero = tl.zeros([b_left.shape[0], b_right.shape[0]], tl.float32)
    if PRECISION == "ieee":
        return product(b_left, b_right, b_zero, "ieee")
    MODE: tl.constexpr = "ieee" if PRECISION == "bf16x3" else "tf32"
    l_high, l_low = split(b_left, 1, PRECISION, INTERPRET)
    r_high, r_low = split(b_right, 1, PRECISION, INTERPRET)
    b_sum = product(l_high, r_high, b_zero, MODE)
    return product(l_low, r_high, product(l_high, r_low, b_sum, MODE), MODE)


@triton.jit
def add_lanes(b_x):
    """Sums of four adjacent columns, all in one thread, [ROWS, BK] -> [ROWS, BK / 4]."""
    return tl.sum(b_x.reshape(b_x.shape[0], b_x.shape[1] // 4, 4), 2)


@triton.jit
def gram_kernel(
    p_R, p_X, p_coefficients, p_pairs, p_gram, p_diagonal,
    N, K, iterations, r_level, r_sample, x_level, x_sample,
    STATES: tl.constexpr, PAIRED: tl.constexpr, STACK: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One program: every ``parts``-th tile of columns of one sample, for one pair of row blocks.

    Grid ``(pairs, parts, samples)``. With ``STATES == "vectors"`` the rows of R are multiplied as they are, else the
    increments between levels. With ``STACK`` > 1 a tile holds that many groups of columns, each a stack of
    ``ROWS / STACK`` levels. Partial sums are float32.
    """
    pair, part, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    parts = tl.num_programs(1).to(tl.int64)
    left, right = tl.load(p_pairs + pair), tl.load(p_pairs + tl.num_programs(0) + pair)
    o_slice = tl.arange(0, ROWS // 4) * 4  # rows of the tile: slice r holds rows 4 m + r
    HEIGHT: tl.constexpr = ROWS // STACK
    o_left, o_right = left * ROWS + o_slice % HEIGHT, right * ROWS + o_slice % HEIGHT
    o_shift = (o_slice // HEIGHT * BK)[:, None] if STACK > 1 else tl.zeros([1, 1], tl.int32)  # [ROWS / 4 or 1, 1]
    o_col = o_shift + tl.arange(0, BK)[None, :]
    a, da = load_coefficients(p_coefficients, o_right, N, 0), load_coefficients(p_coefficients, o_right, N, 2)
    c, dc = load_coefficients(p_coefficients, o_right, N, 1), load_coefficients(p_coefficients, o_right, N, 3)
    if PAIRED:
        la, lda = load_coefficients(p_coefficients, o_left, N, 0), load_coefficients(p_coefficients, o_left, N, 2)
        lc, ldc = load_coefficients(p_coefficients, o_left, N, 1), load_coefficients(p_coefficients, o_left, N, 3)
    p_R += sample.to(tl.int64) * r_sample
    p_X += sample.to(tl.int64) * x_sample
    b_gram = tl.zeros([ROWS, ROWS], tl.float32)
    b_diagonal = tl.zeros([ROWS, BK // 4], tl.float32)
    for it in range(iterations):
        first = (it * parts + part) * (BK * STACK)
        m_col = o_col < K - first
        b_e = level_tile(p_R + first, p_X + first, o_right, r_level, x_level, N, o_col, m_col, c, dc, a, da, STATES)
        if PAIRED:
            b_l = level_tile(
                p_R + first, p_X + first, o_left, r_level, x_level, N, o_col, m_col, lc, ldc, la, lda, STATES
            )
            b_gram += cross_product(b_l, b_e, PRECISION, INTERPRET)
        else:
            b_gram += square_product(b_e, PRECISION, INTERPRET)
        b_diagonal += add_lanes(b_e * b_e)
    tile = (part.to(tl.int64) * tl.num_programs(2) + sample) * tl.num_programs(0) + pair
    o_row = tl.arange(0, ROWS)
    tl.store(p_gram + tile * ROWS * ROWS + o_row[:, None] * ROWS + o_row[None, :], b_gram)
    tl.store(p_diagonal + tile * ROWS + o_row, tl.sum(b_diagonal, 1))


def level_gram(R: Tensor, X: Tensor | None, coefficients: Tensor, per_sample: bool, precision: str) -> Tensor:
    """As `fastsched.ops.level_increment_gram`; ``a`` and ``c`` are float64 ``[2, N]``, on the host or R's device."""
    B = R.shape[1]
    flat = not per_sample and all(t is None or t.is_contiguous() for t in (R, X))
    R, X = (None if t is None else columns_view(t, flat) for t in (R, X))
    gram = _total(R, X, coefficient_steps(coefficients).to(R.device), precision)
    return gram if per_sample else gram.sum(0) / B


def vector_gram(vectors: Tensor, precision: str) -> Tensor:
    """As `fastsched.ops.vector_gram`, by the same kernel; strides between vectors may exceed d."""
    R = columns_view(vectors.transpose(0, 1), flat=False)
    return _total(R, None, torch.zeros(4, len(R), device=R.device), precision, vectors=True)


def _total(R: Tensor, X: Tensor | None, steps: Tensor, precision: str, vectors: bool = False) -> Tensor:
    """Gram matrices ``[G, N, N]`` of ``[N, G, K]`` views: the partial sums of `launch`, added in float64."""
    aligned = all(t is None or _aligned(t) for t in (R, X))
    itemsize = max(t.element_size() for t in (R, X) if t is not None)
    chosen = config.gram_launch(len(R), itemsize, config.architecture(R.device), precision=precision, aligned=aligned)
    partials = launch(R, X, steps, precision, chosen, vectors=vectors)
    gram, diagonal = _assemble(*(t.sum(0, dtype=torch.float64) for t in partials), len(R))  # always in one order
    gram.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
    return gram


def launch(
    R: Tensor, X: Tensor | None, steps: Tensor, precision: str, chosen: config.GramLaunch,
    parts: int | None = None, vectors: bool = False,
) -> list[Tensor]:  # fmt: skip
    """Run the kernel over ``[N, G, K]`` views.

    Args:
        R: ``[N, G, K]``.
        X: ``[N, G, K]``, ``[1, G, K]`` or None.
        steps: ``[4, N]`` float32, from `coefficient_steps`.
        precision: As `fastsched.ops.level_increment_gram` takes it.
        chosen: Tile and warps.
        parts: Programs that share the columns; from the device's size if None.
        vectors: Whether the rows of R are multiplied as they are; ``steps`` are not used then.

    Returns:
        Partial sums of Gram matrix and diagonal: ``[parts, G, pairs, rows, rows]``, ``[parts, G, pairs, rows]``.
    """
    N, G, K = R.shape
    if G > LARGEST_GRID:
        raise ValueError(
            f"R must have at most {LARGEST_GRID} samples where they are kept apart or not contiguous; got {G}. "
            'Pass fewer at a time, or backend="torch"'
        )
    states = "vectors" if vectors else "none" if X is None else "shared" if X.shape[0] == 1 and N > 1 else "levels"
    fixed = constants(N, states, precision, chosen)
    # The upper triangle of row blocks. Made on the device: a CUDA graph cannot capture a copy from pageable memory.
    pairs = torch.triu_indices(*2 * [triton.cdiv(N, chosen.rows)], dtype=torch.int32, device=R.device)
    tiles = triton.cdiv(K, chosen.columns * fixed["STACK"])
    if parts is None:
        parts = config.splits(tiles, G * pairs.shape[1], chosen.programs * config.processors(R.device))
    shape = (parts, G, pairs.shape[1], chosen.rows)
    outputs = [R.new_empty(size, dtype=torch.float32) for size in ((*shape, chosen.rows), shape)]
    X = R if X is None else X
    gram_kernel[pairs.shape[1], parts, G](
        R, X, steps, pairs, *outputs,
        N, K, triton.cdiv(tiles, parts), R.stride(0), R.stride(1), X.stride(0), X.stride(1),
        **fixed, **chosen.options(),
    )  # fmt: skip
    return outputs


def constants(N: int, states: str, precision: str, chosen: config.GramLaunch) -> dict:
    """The kernel's compile-time arguments."""
    return {
        "STATES": states,
        "PAIRED": chosen.rows < N,
        "STACK": max(1, chosen.rows // max(16, triton.next_power_of_2(N))),
        "ROWS": chosen.rows,
        "BK": chosen.columns,
        "PRECISION": precision,
        "INTERPRET": config.interpreted(),
    }


def coefficient_steps(coefficients: Tensor) -> Tensor:
    """``[2, N]`` float64 -> ``[4, N]`` float32: the coefficients and their steps, subtracted in float64."""
    before = torch.cat([coefficients.new_zeros(2, 1), coefficients[:, :-1]], 1)
    return torch.cat([coefficients, coefficients - before]).float()


def columns_view(t: Tensor, flat: bool) -> Tensor:
    """``[N, B, d]`` or ``[B, d]`` -> ``[N or 1, G, K]`` with adjacent columns; ``flat`` joins the samples, G = 1."""
    t = t if t.ndim == 3 else t.unsqueeze(0)
    if flat:
        return t.flatten(1).unsqueeze(1)
    return t if t.stride(-1) == 1 else t.contiguous()


def _aligned(t: Tensor) -> bool:
    """Whether every row starts on a 16-element boundary and ends on one."""
    starts = t.data_ptr() % 16 == 0 and all(s % 16 == 0 for s in t.stride()[:-1])
    return starts and t.shape[-1] % 16 == 0


def _assemble(gram: Tensor, diagonal: Tensor, N: int) -> tuple[Tensor, Tensor]:
    """Tiles ``[G, pairs, rows, rows]`` and ``[G, pairs, rows]`` -> ``[G, N, N]`` and ``[G, N]``."""
    G, rows = len(gram), gram.shape[-1]
    blocks = triton.cdiv(N, rows)
    if blocks == 1:  # add up the diagonal blocks of stacked column groups
        height = min(rows, max(16, triton.next_power_of_2(N)))
        stacked = gram.view(G, rows // height, height, rows // height, height)
        gram = stacked.diagonal(dim1=1, dim2=3).sum(-1)[:, :N, :N]
        return (gram + gram.mT) / 2, diagonal.view(G, -1, height).sum(1)[:, :N]
    whole, line = gram.new_zeros(G, blocks, rows, blocks, rows), gram.new_zeros(G, blocks, rows)
    for pair, (i, j) in enumerate(itertools.combinations_with_replacement(range(blocks), 2)):
        whole[:, i, :, j] = gram[:, pair]
        if i == j:
            line[:, i] = diagonal[:, pair]
    gram = whole.flatten(3).flatten(1, 2)[:, :N, :N]
    return gram.triu() + gram.triu(1).mT, line.flatten(1)[:, :N]
