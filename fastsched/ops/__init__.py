"""Tensor operations of the measurement: Gram matrices of increments between noise levels, and Hutchinson sums.

Each op has two implementations, Triton kernels (``kernels/``) and PyTorch (``eager.py``); ``reference.py`` states in
plain float64 what both compute. The caller chooses: ``backend="auto"`` takes Triton on a GPU that the kernels support
and PyTorch elsewhere (`resolve_backend`), ``"triton"`` and ``"torch"`` insist.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastsched import validate
from fastsched.ops import eager, registration
from fastsched.ops.backends import BACKENDS, KERNEL_DTYPES, in_float64, off_apple_gpu, resolve_backend

__all__ = [
    "BACKENDS",
    "PRECISIONS",
    "hutchinson_reduce",
    "level_increment_gram",
    "pairwise_squared_distances",
    "resolve_backend",
    "vector_gram",
]

PRECISIONS = ("bf16x3", "tf32x3", "ieee")
_DTYPES = (*KERNEL_DTYPES, torch.float64)


def level_increment_gram(
    R: Tensor,
    X: Tensor | None,
    a: Tensor | Sequence[float] | np.ndarray,
    c: Tensor | Sequence[float] | np.ndarray,
    *,
    per_sample: bool = False,
    precision: str = "bf16x3",
    backend: str = "auto",
) -> Tensor:
    """Gram matrix of the increments between noise levels, in one pass over the raw network outputs.

    With ``u_k = a_k X_k + c_k R_k`` the rows are ``e_0 = u_0`` and ``e_k = u_k - u_{k-1}``, and
    ``gram[p, q] = <e_p, e_q>`` over the ``d`` elements, averaged over the ``B`` samples unless ``per_sample``.
    An increment is computed as
    ``e_k = c_k (R_k - R_{k-1}) + (c_k - c_{k-1}) R_{k-1} + (the same in a, X)``, so that the difference of two
    close levels is not lost to rounding. ``kernels/README.md`` has the derivation.

    Infinities and NaN in the data reach the result; nothing is masked. Inputs in 16 bits were rounded when they
    were stored: where adjacent levels differ by 1e-2 of their size, bfloat16 storage alone increases their
    squared distance by several per cent (`fastsched.measure` warns).

    With the Triton backend, and ``a`` and ``c`` on R's device, a call copies nothing between host and device, which
    a CUDA graph needs; call it once before the capture, so that the kernel is compiled. Coefficients on the host
    are copied at each call, and that copy cannot be captured.

    Args:
        R: Raw network outputs ``[N, B, d]``, float32, bfloat16 or float16 (float64 too with the PyTorch
            backend).
        X: States ``[N, B, d]``, or one ``[B, d]`` shared by all levels, or None for ``u_k = c_k R_k``. Any
            of R's dtypes.
        a: Coefficients of ``X``, ``[N]``, on the host or on R's device. Their differences are taken in float64.
            Unused without ``X``.
        c: Coefficients of ``R``, ``[N]``, likewise.
        per_sample: Return one matrix per sample instead of their mean.
        precision: Products of the Triton kernel: ``"bf16x3"`` (off-diagonal entries within 5e-5 of
            ``||e_p|| ||e_q||``, typically 5e-6 at most), ``"tf32x3"`` (stricter) or ``"ieee"`` (float32, slow). The
            diagonal is float32 in all of them. PyTorch always uses float32 or better.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        ``[N, N]`` float64, or ``[B, N, N]`` per sample, on R's device; on the CPU for Apple's GPUs.

    Raises:
        TypeError: An argument is not a dense tensor.
        ValueError: A shape, dtype or device that does not fit, an unknown option, ``backend="triton"`` where the
            kernels cannot run, or more samples than one launch of the kernel can index.
    """
    validate.choice("precision", precision, PRECISIONS)
    _check_data("R", R)
    if X is not None:
        _check_like("X", X, R, "R")
    R, X = off_apple_gpu(R), None if X is None else off_apple_gpu(X)
    dtype = torch.float64 if X is not None and X.dtype == torch.float64 else R.dtype
    triton = resolve_backend(R.device, dtype, backend=backend) == "triton"
    coefficients = _coefficients(a, c, R)
    if _plain_call(triton, R):
        return eager.level_gram(R, X, coefficients, per_sample)
    return registration.level_gram(R, X, coefficients, per_sample, precision, triton)


def vector_gram(vectors: Tensor, *, precision: str = "bf16x3", backend: str = "auto") -> Tensor:
    """Gram matrix of the vectors of each sample, ``gram[b, i, j] = <v_i, v_j>``, in one pass over them.

    The PyTorch backend multiplies blocks of columns in float32 (in float64 if the program allows products in TF32
    or bfloat16) and adds their sums in float64, so no copy of the vectors is made.

    Args:
        vectors: ``[B, V, d]``, floating point; adjacent elements of a vector must be adjacent in memory.
        precision: As in `level_increment_gram`.
        backend: As in `level_increment_gram`.

    Returns:
        ``[B, V, V]`` float64 (float32 on Apple's GPUs), on the vectors' device.

    Raises:
        TypeError: ``vectors`` is not a dense tensor.
        ValueError: A shape or dtype that does not fit, an unknown option, or ``backend="triton"`` where the kernels
            cannot run.
    """
    _check_data("vectors", vectors, "B, V, d")
    validate.choice("precision", precision, PRECISIONS)
    triton = resolve_backend(vectors.device, vectors.dtype, backend=backend) == "triton"
    if _plain_call(triton, vectors):
        return eager.vector_gram(vectors)
    return registration.vector_gram(vectors, precision, triton)


def pairwise_squared_distances(gram: Tensor) -> Tensor:
    """Return ``D[i, j] = ||u_i - u_j||^2`` for all pairs of levels from the Gram matrix of their increments.

    ``D[i, j] = D[i, j-1] + G[j, j] + 2 sum_{i<k<j} G[k, j]``: a sum over increments, so that no large numbers
    cancel. Row 0 of ``G`` (``e_0 = u_0``) is not used. A relative error ``eps`` of ``G`` becomes about
    ``eps (path length / chord)^2`` here.

    Args:
        gram: ``[..., N, N]``, as `level_increment_gram` returns it.

    Returns:
        ``[..., N, N]`` float64, symmetric, zero on the diagonal; negative values from rounding become 0.
    """
    _check_dense("gram", gram)
    if gram.is_complex() or gram.ndim < 2 or gram.shape[-1] != gram.shape[-2]:
        raise ValueError(f"gram must be real, [..., N, N]; got {validate.shown(gram)}")
    gram = in_float64(gram)
    between = gram.triu(1)  # k < j
    below = between.flip(-2).cumsum(-2).flip(-2) - between  # [i, j]: sum over i < k < j
    step = (gram.diagonal(dim1=-2, dim2=-1).unsqueeze(-2) + 2 * below).triu(1)
    upper = step.cumsum(-1).triu(1).clamp(min=0)
    return upper + upper.mT


def hutchinson_reduce(V: Tensor, JV: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Hutchinson's trace and squared Frobenius norm: ``sum V * JV`` and ``sum JV * JV`` over the last axis.

    For random probes with ``E V V' = I`` their expectations are ``tr J`` and ``||J||_F^2`` (Hutchinson 1989).

    Args:
        V: Probes ``[N, B, d]``, or ``[B, d]`` shared by all levels.
        JV: Jacobian-vector products ``[N, B, d]``, float32, bfloat16 or float16 (float64 too with the
            PyTorch backend), as ``V``.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        Two tensors ``[N, B]``, float64, on JV's device; on the CPU for Apple's GPUs.

    Raises:
        TypeError: An argument is not a dense tensor.
        ValueError: A shape, dtype or device that does not fit, ``backend="triton"`` where the kernels cannot run,
            or more elements than one launch of the kernel can index.
    """
    _check_data("JV", JV)
    _check_like("V", V, JV, "JV")
    V, JV = off_apple_gpu(V), off_apple_gpu(JV)
    dtype = torch.float64 if V.dtype == torch.float64 else JV.dtype
    triton = resolve_backend(JV.device, dtype, backend=backend) == "triton"
    if _plain_call(triton, JV):
        return eager.hutchinson(V, JV)
    return registration.hutchinson(V, JV, triton)


def _plain_call(triton: bool, tensor: Tensor) -> bool:
    """Whether to call the PyTorch code directly: the dispatcher's first use imports torch's compiler (seconds)."""
    return not triton and type(tensor) is Tensor and tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_data(name: str, tensor: Tensor, axes: str = "N, B, d") -> None:
    _check_dtype(name, tensor)
    if tensor.ndim != 3 or 0 in tensor.shape:
        raise ValueError(f"{name} must be [{axes}] and not empty; got shape {tuple(tensor.shape)}")


def _check_dense(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {validate.shown(tensor)}")


def _check_like(name: str, tensor: Tensor, like: Tensor, like_name: str) -> None:
    _check_dtype(name, tensor)
    N, B, d = like.shape
    if tensor.shape not in (like.shape, like.shape[1:]):
        wanted = f"[{N}, {B}, {d}] or [{B}, {d}]"
        raise ValueError(f"{name} must be {wanted} to go with {like_name}; got shape {tuple(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like_name}'s device, {like.device}; got {tensor.device}")


def _check_dtype(name: str, tensor: Tensor) -> None:
    _check_dense(name, tensor)
    if tensor.dtype not in _DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise ValueError(f"{name} must be one of {allowed}; got {tensor.dtype}")


def _coefficients(
    a: Tensor | Sequence[float] | np.ndarray, c: Tensor | Sequence[float] | np.ndarray, R: Tensor
) -> Tensor:
    """``a`` and ``c`` as ``[2, N]`` float64: on R's device if both are there already, else on the host."""
    N, both = R.shape[0], []
    for name, value in (("a", a), ("c", c)):
        tensor = value if isinstance(value, Tensor) else validate.float64(name, value)
        if tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(f"{name} must be a tensor of real numbers; got {tensor.dtype}")
        if tensor.shape != (N,):
            raise ValueError(f"{name} must be [{N}], one per level of R; got shape {tuple(tensor.shape)}")
        both.append(tensor)
    device = R.device if all(tensor.device == R.device for tensor in both) else torch.device("cpu")
    return torch.stack([tensor.to(device, torch.float64) for tensor in both])
