"""The ops of `fastsched.ops` in PyTorch, used where Triton does not run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsched.ops.backends import widest_dtype

_BUFFER_ELEMENTS = 1 << 21  # the most in a work buffer: 8 MiB of float32 fit into the cache, and rows are still long
_LARGEST_RATIO = 2.0**30  # the largest ratio of a coefficient to its step: float32 can hold sums of its square


@torch.no_grad()
def level_gram(R: Tensor, X: Tensor | None, coefficients: Tensor, per_sample: bool) -> Tensor:
    """As `fastsched.ops.level_increment_gram`, with ``a`` and ``c`` as float64 ``[2, N]``, on the host or R's device.

    Increments and products of a block of columns are in float32, and the sum over blocks in float64.
    """
    N, B, _ = R.shape
    compute = torch.float32 if R.dtype != torch.float64 and _products_are_float32() else torch.float64
    a, c = coefficients.to(R.device).unsqueeze(-1)
    shared = X is not None and X.ndim == 2
    of_X = None if X is None else _Rows.of(a, compute, shared=shared)
    of_R = _Rows.of(c, compute, beside=of_X)
    flat = not per_sample and all(t is None or t.is_contiguous() for t in (R, X))
    R_groups, X_groups = (_groups(t, flat) for t in (R, X))
    columns = R_groups[0].shape[-1]
    width = _width(R, columns)
    buffers = torch.empty(2, N * width, dtype=compute, device=R.device)
    gram = torch.zeros(len(R_groups), N, N, dtype=torch.float64, device=R.device)
    for g in range(len(R_groups)):
        for start in range(0, columns, width):
            block = slice(start, min(start + width, columns))
            e, work = buffers[:, : N * (block.stop - start)].view(2, N, -1)
            of_R.write(e, R_groups[g][:, block].to(compute))
            if of_X is not None:
                x = X_groups[g][:, block].to(compute)
                e.addcmul_(x if shared else of_X.write(work, x), (of_X.factor / of_R.factor).to(compute))
            _add_square(gram[g], e)
    if not per_sample:
        gram = gram.sum(0) / B
    return of_R.factor * gram * of_R.factor.T


@torch.no_grad()
def vector_gram(vectors: Tensor) -> Tensor:
    """Gram matrices of ``[B, V, d]``, float64 ``[B, V, V]``: products of column blocks, the sum over them in float64.

    Apple's GPUs have no float64, so the sum is in float32 there.
    """
    B, V, d = vectors.shape
    wide = widest_dtype(vectors.device)
    compute = torch.float32 if vectors.dtype != torch.float64 and _products_are_float32() else wide
    gram = torch.zeros(B, V, V, dtype=wide, device=vectors.device)
    width = max(1024, _BUFFER_ELEMENTS // V)
    for own, total in zip(vectors, gram, strict=True):
        for start in range(0, d, width):
            _add_square(total, own[:, start : start + width].to(compute))
    return gram


def _groups(t: Tensor | None, flat: bool) -> list[Tensor]:
    """Views ``[N, columns]`` (``[1, columns]`` if shared): one of all samples together, or one per sample."""
    if t is None:
        return []
    levels = t if t.ndim == 3 else t.unsqueeze(0)
    return [levels.flatten(1)] if flat else list(levels.unbind(1))


def _width(R: Tensor, columns: int) -> int:
    """Columns of a block: two buffers take at most a quarter of R's bytes, unless 1024 columns take more."""
    fair = R.nbytes // (32 * R.shape[0])
    return min(columns, max(1, _BUFFER_ELEMENTS // R.shape[0]), max(1024, fair))


@dataclass(frozen=True)
class _Rows:
    """How to compute increments of R or X, each row divided by a factor with which the N x N result is scaled."""

    now: Tensor  #: the coefficients, ``[N, 1]``
    step: Tensor  #: their steps ``now_k - now_{k-1}``, ``[N, 1]``, subtracted in float64
    weight: Tensor | None  #: ``now / step``, ``[N, 1]``, for interpolation; None if a step is too small for it
    factor: Tensor  #: the factors of the rows, ``[N, 1]`` float64

    @classmethod
    def of(cls, now: Tensor, dtype: torch.dtype, *, shared: bool = False, beside: _Rows | None = None) -> _Rows:
        """From coefficients ``[N, 1]`` float64. ``shared``: levels share one row; ``beside``: rows to add these to."""
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

        Both forms subtract neighbours first, so that the difference of close ones is exact. Interpolation,
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
    """``gram += e e'``. Three of four blocks are computed; the fourth is the transpose of one of them."""
    half = len(e) // 2
    with without_autocast(e.device):
        left, right = e @ e[:half].T, e[half:] @ e[half:].T
    gram[:, :half] += left
    gram[:half, half:] += left[half:].T
    gram[half:, half:] += right


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which products have the precision of their factors, even if ``torch.autocast`` is on."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def _products_are_float32() -> bool:
    """Whether float32 products are computed in float32: a program can allow TF32 or bfloat16 for them."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # PyTorch raises if the precision was set by both its old and its new interface
        return False


@torch.no_grad()
def hutchinson(V: Tensor, JV: Tensor) -> tuple[Tensor, Tensor]:
    """``sum V * JV`` and ``sum JV * JV`` level by level, in float64; ``V`` is ``[N, B, d]`` or ``[B, d]``."""
    probes = V.expand_as(JV)
    v_jv = JV.new_empty(JV.shape[:2], dtype=torch.float64)
    jv_jv = torch.empty_like(v_jv)
    for k in range(JV.shape[0]):
        jv = JV[k].double()
        torch.linalg.vecdot(probes[k].double(), jv, out=v_jv[k])
        torch.linalg.vecdot(jv, jv, out=jv_jv[k])
    return v_jv, jv_jv
