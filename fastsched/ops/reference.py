"""What every op in `fastsched.ops` computes, in float64 and written like its formula.

This code is slow and shares nothing with the implementations, which tests compare with it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def levels(R: Tensor, X: Tensor | None, a: Tensor, c: Tensor) -> Tensor:
    """Return ``u_k = a_k X_k + c_k R_k``, ``[N, B, d]`` in float64; arguments as in `level_increment_gram`."""
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


def squared_distances(u: Tensor) -> Tensor:
    """Return ``||u_i - u_j||^2``, ``[N, N]``, averaged over the samples of ``u`` ``[N, B, d]``."""
    N = u.shape[0]
    D = torch.zeros(N, N, dtype=torch.float64, device="cpu")
    for i in range(N):
        for j in range(N):
            D[i, j] = (u[i].double() - u[j].double()).square().sum(-1).mean()
    return D


def hutchinson(V: Tensor, JV: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``sum V * JV`` and ``sum JV * JV`` over the last axis, both ``[N, B]`` in float64."""
    return (V.double() * JV.double()).sum(-1), JV.double().square().sum(-1)
