"""The ops of `fastsched.ops` in PyTorch and NumPy: what runs where Triton does not."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_BUFFER_ELEMENTS = 1 << 21  # of a work buffer at most: long runs read memory best, and 8 MiB stay in the cache
_ONEDNN_COLUMNS = 4096  # from here on its faster product pays for preparing one
_LARGEST_RATIO = 2.0**30  # of coefficients: float32 holds sums of its square
_SIGN_TILE = (128, 64)  # signs per Philox block, Philox blocks per tile; `kernels/hutchinson.py` has the same
_MASK = 0xFFFFFFFF


def level_gram(
    R: Tensor, X: Tensor | None, W: Tensor | None, coefficients: Tensor, per_sample: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Column block by column block: increments in float32, their products, the sum over blocks in float64.

    Args:
        R: ``[N, B, d]``.
        X: ``[N, B, d]``, ``[B, d]`` or None.
        W: ``[N, B, d]`` or None.
        coefficients: ``[2, N]`` float64 on the host: ``a``, ``c``.
        per_sample: Keep the samples apart.

    Returns:
        Gram matrix, cross block, squared norms; the last two empty without ``W``.
    """
    N, B, _ = R.shape
    compute = torch.float32 if R.dtype != torch.float64 and _products_are_float32() else torch.float64
    a, c = coefficients.to(R.device).unsqueeze(-1)
    shared = X is not None and X.ndim == 2
    of_X = None if X is None else _Rows.of(a, compute, shared=shared)
    of_R = _Rows.of(c, compute, beside=of_X)
    flat = not per_sample and all(t is None or t.is_contiguous() for t in (R, X, W))
    R_groups, X_groups, W_groups = (_groups(t, flat) for t in (R, X, W))
    columns = R_groups[0].shape[-1]
    width = _width(R, columns)
    buffers = torch.empty(2, N * width, dtype=compute, device=R.device)
    gram = torch.zeros(len(R_groups), N, N, dtype=torch.float64, device=R.device)
    cross, w_squared = torch.zeros_like(gram), torch.zeros_like(gram[..., 0])
    for g in range(len(R_groups)):
        for start in range(0, columns, width):
            block = slice(start, min(start + width, columns))
            e, work = buffers[:, : N * (block.stop - start)].view(2, N, -1)
            of_R.write(e, R_groups[g][:, block].to(compute))
            if of_X is not None:
                x = X_groups[g][:, block].to(compute)
                e.addcmul_(x if shared else of_X.write(work, x), (of_X.factor / of_R.factor).to(compute))
            _add_square(gram[g], e)
            if W is not None:
                w = W_groups[g][:, block].to(compute)
                cross[g] += _product(w, e)
                w_squared[g] += torch.linalg.vecdot(w, w)
    if not per_sample:
        gram, cross, w_squared = (t.sum(0) / B for t in (gram, cross, w_squared))
    gram, cross = of_R.factor * gram * of_R.factor.T, cross * of_R.factor.T
    if W is None:
        return gram, gram.new_empty(0), gram.new_empty(0)
    return gram, cross, w_squared


def _groups(t: Tensor | None, flat: bool) -> list[Tensor]:
    """Views ``[N, columns]`` (``[1, columns]`` if shared): one of all samples together, or one a sample."""
    if t is None:
        return []
    levels = t if t.ndim == 3 else t.unsqueeze(0)
    return [levels.flatten(1)] if flat else list(levels.unbind(1))


def _width(R: Tensor, columns: int) -> int:
    """Columns of a block, such that two buffers of them take a quarter of R's bytes at most, or little."""
    fair = R.nbytes // (32 * R.shape[0])
    return min(columns, max(1, _BUFFER_ELEMENTS // R.shape[0]), max(1024, fair))


@dataclass(frozen=True)
class _Rows:
    """How the increments of R or of X are written: but for a factor a row, which is left to the N x N result.

    Attributes:
        now: The coefficients, ``[N, 1]``.
        step: Their steps ``now_k - now_{k-1}``, ``[N, 1]``, subtracted in float64.
        weight: ``now / step``, ``[N, 1]``; None where a step is too small for that.
        factor: ``[N, 1]`` float64.
    """

    now: Tensor
    step: Tensor
    weight: Tensor | None
    factor: Tensor

    @classmethod
    def of(cls, now: Tensor, dtype: torch.dtype, *, shared: bool = False, beside: _Rows | None = None) -> _Rows:
        """From ``[N, 1]`` float64. ``shared``: one row serves all levels; ``beside``: what is added to these."""
        step = torch.cat([now[:1], now.diff(dim=0)])
        if shared:
            return cls(now.to(dtype), step.to(dtype), None, step)
        against = now.abs() if beside is None else torch.maximum(now.abs(), beside.factor.abs())
        interpolate = bool((step[1:].abs() * _LARGEST_RATIO > against[1:]).all())
        weight = (now / step).to(dtype) if interpolate else None
        factor = torch.ones_like(now)
        if interpolate:
            factor[1:] = step[1:]
        return cls(now.to(dtype), step.to(dtype), weight, factor)

    def write(self, out: Tensor, t: Tensor) -> Tensor:
        """``factor_k out_k = now_k (t_k - t_{k-1}) + step_k t_{k-1}`` and ``out_0 = now_0 t_0``, ``[N, columns]``.

        Both forms subtract neighbours first, so that close ones keep their difference. Interpolation,
        ``lerp(start, end, w) = start + w (end - start)``, takes one pass over memory instead of three.
        """
        torch.mul(t[0], self.now[0], out=out[0])
        if self.weight is not None:
            torch.lerp(t[:-1], t[1:], self.weight[1:], out=out[1:])
        else:
            torch.sub(t[1:], t[:-1], out=out[1:])
            out[1:].mul_(self.now[1:]).addcmul_(t[:-1], self.step[1:])
        return out


def _add_square(gram: Tensor, e: Tensor) -> None:
    """``gram += e e'``, three quarters of it computed: the last one is there by symmetry."""
    half = len(e) // 2
    left = _product(e, e[:half])
    gram[:, :half] += left
    gram[:half, half:] += left[half:].T
    gram[half:, half:] += _product(e[half:], e[half:])


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``left right'`` of ``[.., columns]``."""
    onednn = _onednn_linear() if left.dtype == torch.float32 and left.device.type == "cpu" else None
    if onednn is None or left.shape[1] < _ONEDNN_COLUMNS:
        return left @ right.T
    return onednn(left, right, None, "none", [], "")


@functools.cache
def _onednn_linear() -> Callable[..., Tensor] | None:
    """Find the product ``left right'`` of oneDNN, if PyTorch has it, else None.

    ``torch.mm`` calls MKL, which does without AVX-512 on AMD processors: this is twice as fast there. PyTorch's name
    for it is not public, hence the trial; its numbers show whether products are float32.
    """
    try:
        linear = torch.ops.mkldnn._linear_pointwise
        ones = torch.full((64, 64), 1 + 2.0**-20)
        trusted = torch.allclose(linear(ones, ones, None, "none", [], ""), ones @ ones.T, rtol=2.0**-21, atol=0.0)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return None
    return linear if trusted else None


def _products_are_float32() -> bool:
    """Whether a float32 matmul is one: a program may allow TF32 or bfloat16 in all of them."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set through the old interface and the new one; PyTorch will not say which holds
        return False


def hutchinson(V: Tensor | None, seed: int, JV: Tensor) -> tuple[Tensor, Tensor]:
    """Level by level, in float64; ``V`` is ``[N, B, d]``, ``[B, d]``, or None for the signs of ``seed``."""
    probes = rademacher(seed, tuple(JV.shape[1:]), JV.device, torch.float32) if V is None else V
    probes = probes.expand_as(JV)
    v_jv = JV.new_empty(JV.shape[:2], dtype=torch.float64)
    jv_jv = torch.empty_like(v_jv)
    for k in range(JV.shape[0]):
        jv = JV[k].double()
        torch.linalg.vecdot(probes[k].double(), jv, out=v_jv[k])
        torch.linalg.vecdot(jv, jv, out=jv_jv[k])
    return v_jv, jv_jv


def rademacher(seed: int, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Signs in the order `fastsched.ops.reference.rademacher_sign` states."""
    *lead, d = shape
    rows = math.prod(lead)
    per_block, blocks = _SIGN_TILE
    tiles = -(-d // (per_block * blocks))
    counter = torch.arange(tiles * blocks, device=device).expand(rows, -1)
    row = torch.arange(rows, device=device).unsqueeze(1).expand_as(counter)
    words = torch.stack(_philox(seed, counter, row), 1).view(rows, 4, tiles, 1, blocks)
    shifts = torch.arange(32, device=device).view(32, 1)
    signs = (1 - 2 * ((words >> shifts) & 1)).to(dtype)  # [rows, word, tile, bit, block]
    return signs.transpose(1, 2).reshape(rows, tiles * per_block * blocks)[:, :d].reshape(shape)


def _philox(seed: int, counter: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10 with 32-bit words held in int64, counter ``(counter, row, 0, 0)``, key ``seed``."""
    c0, c1, c2, c3 = counter, row, torch.zeros_like(counter), torch.zeros_like(counter)
    k0, k1 = seed & _MASK, seed >> 32
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wrap at 64 bits; both halves stay right
        c0, c1 = ((product1 >> 32) & _MASK) ^ c1 ^ k0, product1 & _MASK
        c2, c3 = ((product0 >> 32) & _MASK) ^ c3 ^ k1, product0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3
