"""The ops registered with PyTorch: schemas, output shapes for tracing, and the call of the Triton or PyTorch code.

The caller sets ``triton``; an op never selects a backend. The kernels' modules and Triton are imported when a kernel is
launched.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from fastsched.ops import eager
from fastsched.ops.backends import widest_dtype


@torch.library.custom_op("fastsched::level_gram", mutates_args=())
def level_gram(
    R: Tensor, X: Tensor | None, coefficients: Tensor, per_sample: bool, precision: str, triton: bool
) -> Tensor:
    """Gram matrix of increments; see `fastsched.ops.level_increment_gram`."""
    if triton:
        with torch.cuda.device_of(R):
            return _kernel("level_gram").level_gram(R, X, coefficients, per_sample, precision)
    return eager.level_gram(R, X, coefficients, per_sample)


@torch.library.register_fake("fastsched::level_gram")
def _(R, X, coefficients, per_sample, precision, triton):
    N, B, _ = R.shape
    return R.new_empty((B, N, N) if per_sample else (N, N), dtype=torch.float64)


@torch.library.custom_op("fastsched::vector_gram", mutates_args=())
def vector_gram(vectors: Tensor, precision: str, triton: bool) -> Tensor:
    """Gram matrix of the vectors of each sample; see `fastsched.ops.vector_gram`."""
    if triton:
        with torch.cuda.device_of(vectors):
            return _kernel("level_gram").vector_gram(vectors, precision)
    return eager.vector_gram(vectors)


@torch.library.register_fake("fastsched::vector_gram")
def _(vectors, precision, triton):
    B, V, _ = vectors.shape
    return vectors.new_empty((B, V, V), dtype=widest_dtype(vectors.device))


@torch.library.custom_op("fastsched::hutchinson", mutates_args=())
def hutchinson(V: Tensor, JV: Tensor, triton: bool) -> tuple[Tensor, Tensor]:
    """``sum V * JV`` and ``sum JV * JV``; see `fastsched.ops.hutchinson_reduce`."""
    if triton:
        with torch.cuda.device_of(JV):
            return _kernel("hutchinson").hutchinson(V, JV)
    return eager.hutchinson(V, JV)


@torch.library.register_fake("fastsched::hutchinson")
def _(V, JV, triton):
    out = JV.new_empty(JV.shape[:2], dtype=torch.float64)
    return out, torch.empty_like(out)


def _kernel(name: str) -> ModuleType:
    return importlib.import_module(f"fastsched.kernels.{name}")
