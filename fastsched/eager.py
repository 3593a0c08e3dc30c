"""The ops of `fastsched.ops` in PyTorch and NumPy: what runs where Triton does not."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 18  # of one work buffer: a column block's increments stay in the cache
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
    compute = torch.float64 if R.dtype == torch.float64 else torch.float32
    before = torch.cat([coefficients.new_zeros(2, 1), coefficients[:, :-1]], 1)
    now, step = (t.to(R.device, compute).unsqueeze(-1) for t in (coefficients, coefficients - before))
    flat = not per_sample and all(t is None or t.is_contiguous() for t in (R, X, W))
    R_groups, X_groups, W_groups = (_groups(t, flat) for t in (R, X, W))
    columns = R_groups[0].shape[-1]
    width = max(1, min(columns, _CHUNK_ELEMENTS // N))
    buffers = torch.empty(2, N, width, dtype=compute, device=R.device)
    gram = torch.zeros(len(R_groups), N, N, dtype=torch.float64, device=R.device)
    cross, w_squared = torch.zeros_like(gram), torch.zeros_like(gram[..., 0])
    for g in range(len(R_groups)):
        for start in range(0, columns, width):
            block = slice(start, min(start + width, columns))
            e, scratch = buffers[..., : block.stop - start]
            _write_increments(e, R_groups[g][:, block].to(compute), now[1], step[1])
            if X is not None:
                _add_increments(e, scratch, X_groups[g][:, block].to(compute), now[0], step[0])
            gram[g] += e @ e.T
            if W is not None:
                w = W_groups[g][:, block].to(compute)
                cross[g] += w @ e.T
                w_squared[g] += torch.linalg.vecdot(w, w)
    if not per_sample:
        gram, cross, w_squared = (t.sum(0) / B for t in (gram, cross, w_squared))
    if W is None:
        return gram, gram.new_empty(0), gram.new_empty(0)
    return gram, cross, w_squared


def _groups(t: Tensor | None, flat: bool) -> list[Tensor]:
    """Views ``[N, columns]`` (``[1, columns]`` if shared): one of all samples together, or one a sample."""
    if t is None:
        return []
    levels = t if t.ndim == 3 else t.unsqueeze(0)
    return [levels.flatten(1)] if flat else list(levels.unbind(1))


def _write_increments(e: Tensor, t: Tensor, now: Tensor, step: Tensor) -> None:
    """``e_k = now_k (t_k - t_{k-1}) + step_k t_{k-1}``, ``e_0 = now_0 t_0``."""
    torch.mul(t[0], now[0], out=e[0])
    torch.sub(t[1:], t[:-1], out=e[1:])
    e[1:].mul_(now[1:]).addcmul_(t[:-1], step[1:])


def _add_increments(e: Tensor, scratch: Tensor, t: Tensor, now: Tensor, step: Tensor) -> None:
    """The same, added to ``e``. One row of ``t`` for all levels leaves ``step_k t``."""
    if t.shape[0] == 1:
        e.addcmul_(t, step)
        return
    e[0].addcmul_(t[0], now[0])
    torch.sub(t[1:], t[:-1], out=scratch[1:])
    e[1:].addcmul_(scratch[1:], now[1:]).addcmul_(t[:-1], step[1:])


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
    """Signs in the order `fastsched.reference.rademacher_sign` states."""
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


def min_plus(first: np.ndarray, cost: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Dynamic programme over pairs of levels (see `fastsched.ops.second_order_min_plus`).

    Args:
        first: ``[M]`` float64.
        cost: ``[M, M, M]`` float64.
        steps: Largest number of edges.

    Returns:
        Totals ``[steps]`` and paths ``[steps, steps + 1]``.
    """
    M = len(first)
    totals, paths = np.full(steps, np.inf), np.full((steps, steps + 1), -1)
    best = np.full((M, M), np.inf)  # [j, k]: cheapest path that ends with the edge j -> k
    best[0, 1:] = first[1:]
    before: list[np.ndarray] = []  # per number of edges: the level before j on that path
    by_edge = [np.ascontiguousarray(cost[:j, j, j + 1 :].T) for j in range(M)]  # [k - j - 1, i]
    for n in range(min(steps, M - 1)):
        if n > 0:
            best, argbest = _extend(best, by_edge)
            before.append(argbest)
        j = int(best[:, -1].argmin())
        totals[n] = best[j, -1]
        if np.isfinite(totals[n]):
            paths[n, : n + 2] = _backtrack(before, j, M - 1)
    return totals, paths


def _extend(best: np.ndarray, by_edge: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """One more edge: ``min_i best[i, j] + cost[i, j, k]`` and its smallest argmin, both ``[j, k]``."""
    longer, argbest = np.full_like(best, np.inf), np.zeros(best.shape, dtype=np.int64)
    for j in range(1, len(best) - 1):
        through = by_edge[j] + best[:j, j]
        chosen = through.argmin(1)
        argbest[j, j + 1 :] = chosen
        longer[j, j + 1 :] = through[np.arange(len(chosen)), chosen]
    return longer, argbest


def _backtrack(before: list[np.ndarray], j: int, k: int) -> list[int]:
    path = [k, j]
    for argbest in reversed(before):
        path.append(int(argbest[path[-1], path[-2]]))
    return path[::-1]
