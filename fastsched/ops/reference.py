"""The oracle of every op in `fastsched.ops`: eager, float64, written as the formula is written.

Nothing here is fast, and nothing here shares a line with the kernels: tests hold both against it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def levels(R: Tensor, X: Tensor | None, a: Tensor, c: Tensor) -> Tensor:
    """Return ``u_k = a_k X_k + c_k R_k`` in float64.

    Args:
        R: Raw network outputs ``[N, B, d]``.
        X: States ``[N, B, d]``, or ``[B, d]`` when every level shares one, or None for ``u_k = c_k R_k``.
        a: Coefficients of ``X``, ``[N]``.
        c: Coefficients of ``R``, ``[N]``.

    Returns:
        The levels, ``[N, B, d]``.
    """
    u = c.double().view(-1, 1, 1) * R.double()
    if X is None:
        return u
    return u + a.double().view(-1, 1, 1) * X.double()


def increments(R: Tensor, X: Tensor | None, a: Tensor, c: Tensor) -> Tensor:
    """Return ``e_0 = u_0`` and ``e_k = u_k - u_{k-1}``, ``[N, B, d]`` in float64."""
    u = levels(R, X, a, c)
    return torch.cat([u[:1], u[1:] - u[:-1]])


def increment_gram(R: Tensor, X: Tensor | None, a: Tensor, c: Tensor, *, per_sample: bool = False) -> Tensor:
    """Return ``G[p, q] = <e_p, e_q>``: ``[B, N, N]`` per sample, else its mean over samples ``[N, N]``."""
    e = increments(R, X, a, c)
    gram = torch.einsum("pbd,qbd->bpq", e, e)
    return gram if per_sample else gram.mean(0)


def cross_gram(W: Tensor, R: Tensor, X: Tensor | None, a: Tensor, c: Tensor, *, per_sample: bool = False) -> Tensor:
    """Return ``A[k, q] = <w_k, e_q>``: ``[B, N, N]`` per sample, else its mean over samples ``[N, N]``."""
    cross = torch.einsum("kbd,qbd->bkq", W.double(), increments(R, X, a, c))
    return cross if per_sample else cross.mean(0)


def squared_norms(W: Tensor, *, per_sample: bool = False) -> Tensor:
    """Return ``||w_k||^2``: ``[B, N]`` per sample, else its mean over samples ``[N]``."""
    norms = W.double().square().sum(-1).T
    return norms if per_sample else norms.mean(0)


def squared_distances(u: Tensor) -> Tensor:
    """Return ``||u_i - u_j||^2``, ``[N, N]``, averaged over the samples of ``u`` ``[N, B, d]``."""
    N = u.shape[0]
    D = torch.zeros(N, N, dtype=torch.float64)
    for i in range(N):
        for j in range(N):
            D[i, j] = (u[i].double() - u[j].double()).square().sum(-1).mean()
    return D


def hutchinson(V: Tensor, JV: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``sum V * JV`` and ``sum JV * JV`` over the last axis, both ``[N, B]`` in float64.

    Args:
        V: Probes ``[N, B, d]``, or ``[B, d]`` when every level shares them.
        JV: Jacobian-vector products ``[N, B, d]``.
    """
    return (V.double() * JV.double()).sum(-1), JV.double().square().sum(-1)


def philox_4x32(counter: Sequence[int], key: Sequence[int], rounds: int = 10) -> tuple[int, int, int, int]:
    """Return one block of Philox-4x32 in plain integers (Salmon et al., SC 2011, section 3.3).

    Args:
        counter: Four 32-bit words.
        key: Two 32-bit words.
        rounds: Number of rounds; ten is the generator's usual strength.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    mask = 0xFFFFFFFF
    for _ in range(rounds):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 & mask,
            (product0 >> 32) ^ c3 ^ k1,
            product0 & mask,
        )
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3


def rademacher_sign(seed: int, row: int, column: int) -> int:
    """Return one sign of the stream that `fastsched.ops.rademacher` draws, -1 or 1.

    A row is cut into tiles of 128 x 64 elements. Element ``(m, n)`` of tile ``t`` is bit ``m % 32`` of word
    ``m // 32`` of the Philox block with counter ``(64 t + n, row, 0, 0)`` and key ``(seed mod 2^32, seed //
    2^32)``.
    """
    tile, within = divmod(column, 128 * 64)
    m, n = divmod(within, 64)
    words = philox_4x32((tile * 64 + n, row, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))
    return 1 - 2 * ((words[m // 32] >> (m % 32)) & 1)


def second_order_min_plus(first: Tensor, cost: Tensor, steps: int) -> tuple[list[float], list[list[int]]]:
    """Try every path: the specification of `fastsched.ops.second_order_min_plus`.

    Among equally cheap paths the one that is smallest when read from its end wins, which is what taking the
    smallest index at every argmin of the dynamic programme amounts to.

    Returns:
        For every number of edges ``1..steps`` the least total, and its path (padded with -1 to ``steps +
        1``).
    """
    M = first.shape[0]
    totals, paths = [], []
    for edges in range(1, steps + 1):
        best, best_path = math.inf, []
        for inner in itertools.combinations(range(1, M - 1), edges - 1):
            path = [0, *inner, M - 1]
            total = float(first[path[1]])
            for i, j, k in zip(path, path[1:], path[2:], strict=False):
                total += float(cost[i, j, k])
            if total < best or (total == best and best_path and path[::-1] < best_path[::-1]):
                best, best_path = total, path
        totals.append(best)
        paths.append(best_path + [-1] * (steps + 1 - len(best_path)))
    return totals, paths
