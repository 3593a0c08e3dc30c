"""The operations that move the data: Gram matrices of increments, Hutchinson sums, second-order min-plus.

Each op has one schema, one fake and two implementations: Triton (``kernels/``) and eager PyTorch or NumPy
(``eager.py``). The choice between them is the caller's: ``backend="auto"`` takes Triton for tensors on a
GPU and PyTorch elsewhere, ``"triton"`` and ``"torch"`` mean what they say. Triton is imported when a kernel
launches, never before.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastsched.ops import eager

PRECISIONS = ("bf16x3", "tf32x3", "ieee")
BACKENDS = ("auto", "triton", "torch")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class LevelGram(NamedTuple):
    """What `level_increment_gram` returns, all float64.

    Attributes:
        gram: ``<e_p, e_q>``, ``[N, N]``, or ``[B, N, N]`` per sample.
        cross: ``<w_k, e_q>`` as ``cross[.., k, q]``, same shape as ``gram``; None without ``W``.
        w_squared: ``||w_k||^2``, ``[N]``, or ``[B, N]`` per sample; None without ``W``.
    """

    gram: Tensor
    cross: Tensor | None
    w_squared: Tensor | None


class MinPlus(NamedTuple):
    """What `second_order_min_plus` returns.

    Attributes:
        totals: Least total of the paths with ``1, 2, .., steps`` edges, ``[steps]`` float64, inf where
            there is none.
        paths: Levels of that path, ``[steps, steps + 1]`` int64, padded with -1; all -1 where there is none.
    """

    totals: Tensor
    paths: Tensor


def level_increment_gram(
    R: Tensor,
    X: Tensor | None,
    a: Tensor | Sequence[float] | np.ndarray,
    c: Tensor | Sequence[float] | np.ndarray,
    *,
    W: Tensor | None = None,
    per_sample: bool = False,
    precision: str = "bf16x3",
    backend: str = "auto",
) -> LevelGram:
    """Gram matrix of the increments between noise levels, in one pass over the raw network outputs.

    With ``u_k = a_k X_k + c_k R_k`` the rows are ``e_0 = u_0`` and ``e_k = u_k - u_{k-1}``, formed on the
    fly from factored terms, ``e_k = c_k (R_k - R_{k-1}) + (c_k - c_{k-1}) R_{k-1} + (the same in a, X)``,
    so that close levels keep their difference; ``gram[p, q] = <e_p, e_q>`` over the ``d`` elements,
    averaged over the ``B`` samples unless ``per_sample``. See ``kernels/README.md`` for the derivation.

    Infinities and NaN in the data reach the result; nothing is masked. Inputs stored in 16 bits are rounded
    before they come here: where adjacent levels differ by 1e-2 of their size, bfloat16 storage alone
    inflates their squared distance by several per cent (`fastsched.measure` warns).

    Args:
        R: Raw network outputs ``[N, B, d]``, float32, bfloat16 or float16 (float64 too with the PyTorch
            backend).
        X: States ``[N, B, d]``, or one ``[B, d]`` shared by all levels, or None for ``u_k = c_k R_k``. Any
            of R's dtypes.
        a: Coefficients of ``X``, ``[N]``, kept in float64 on the host until their differences are taken.
            Unused without ``X``.
        c: Coefficients of ``R``, ``[N]``, likewise.
        W: Sensitivity vectors ``[N, B, d]``, float32: adds the cross block ``<w_k, e_q>`` and ``||w_k||^2``.
        per_sample: Return one matrix per sample instead of their mean.
        precision: Products of the Triton kernel: ``"bf16x3"`` (off-diagonal entries within about 2e-6 of
            ``||e_p|| ||e_q||``), ``"tf32x3"`` (stricter) or ``"ieee"`` (float32, slow). The diagonal is
            float32 in all of them. PyTorch always uses float32 or better.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        `LevelGram`. Its tensors live on R's device.

    Raises:
        ValueError: A shape, dtype or device that does not fit, an unknown option, or ``backend="triton"``
            with tensors on the CPU.
    """
    _check_gram(R, X, W, precision)
    triton = _use_triton(backend, R)
    if triton and R.dtype == torch.float64:
        raise ValueError('R is float64, which the Triton kernel does not read; pass float32 or backend="torch"')
    coefficients = torch.stack([_coefficients("a", a, R.shape[0]), _coefficients("c", c, R.shape[0])])
    if _plain_call(triton, R):
        gram, cross, w_squared = eager.level_gram(R, X, W, coefficients, per_sample)
    else:
        gram, cross, w_squared = torch.ops.fastsched.level_gram(R, X, W, coefficients, per_sample, precision, triton)
    return LevelGram(gram, None, None) if W is None else LevelGram(gram, cross, w_squared)


def pairwise_squared_distances(gram: Tensor) -> Tensor:
    """Return ``D[i, j] = ||u_i - u_j||^2`` for all pairs of levels from the Gram matrix of their increments.

    ``D[i, j] = D[i, j-1] + G[j, j] + 2 sum_{i<k<j} G[k, j]``: a sum of increments, so that no large numbers
    cancel. Row 0 of ``G`` (``e_0 = u_0``) plays no part. A relative error ``eps`` of ``G`` becomes about
    ``eps (path length / chord)^2`` here.

    Args:
        gram: ``[..., N, N]``, as `level_increment_gram` returns it.

    Returns:
        ``[..., N, N]`` float64, symmetric, zero on the diagonal; rounding below zero is cut off.
    """
    if gram.ndim < 2 or gram.shape[-1] != gram.shape[-2]:
        raise ValueError(f"gram must be [..., N, N]; got shape {tuple(gram.shape)}")
    gram = gram.double()
    between = gram.triu(1)  # k < j
    below = between.flip(-2).cumsum(-2).flip(-2) - between  # [i, j]: sum over i < k < j
    step = (gram.diagonal(dim1=-2, dim2=-1).unsqueeze(-2) + 2 * below).triu(1)
    upper = step.cumsum(-1).triu(1).clamp(min=0)
    return upper + upper.mT


def hutchinson_reduce(V_or_seed: Tensor | int, JV: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Hutchinson's trace and squared Frobenius norm: ``sum V * JV`` and ``sum JV * JV`` over the last axis.

    With ``E V V' = I`` their expectations are ``tr J`` and ``||J||_F^2`` (Hutchinson 1989).

    Args:
        V_or_seed: Probes ``[N, B, d]``, or ``[B, d]`` shared by all levels, or a seed: then the shared
            probe is ``rademacher(seed, (B, d), JV.device)``, drawn inside the kernel instead of read from
            memory.
        JV: Jacobian-vector products ``[N, B, d]``, float32, bfloat16 or float16 (float64 too with the
            PyTorch backend).
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        Two tensors ``[N, B]``, float64.

    Raises:
        ValueError: A shape, dtype, device or seed that does not fit, or a backend that cannot be had.
    """
    _check_data("JV", JV, (*_FLOATS, torch.float64), "[N, B, d]")
    V, seed = (None, V_or_seed) if isinstance(V_or_seed, int) else (V_or_seed, 0)
    if V is not None:
        _check_data("V_or_seed", V, (*_FLOATS, torch.float64), None)
        _check_like("V_or_seed", V, JV, "JV", shared=True)
    elif not 0 <= seed < 2**63:
        raise ValueError(f"V_or_seed must be a tensor or a seed from 0 to 2^63 - 1; got {seed}")
    triton = _use_triton(backend, JV)
    if triton and torch.float64 in (JV.dtype, None if V is None else V.dtype):
        raise ValueError('float64 JV or V_or_seed is not read by the Triton kernel; pass float32 or backend="torch"')
    v_jv, jv_jv = torch.ops.fastsched.hutchinson(V, seed, JV, triton)
    return v_jv, jv_jv


def rademacher(
    seed: int, shape: Sequence[int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    """Random signs, the very ones that ``hutchinson_reduce(seed, ...)`` draws, the same on every device.

    The stream is Philox-4x32-10, a counter-based generator: a sign depends on the seed, its row and its
    column only, and a row's signs do not depend on its length (`fastsched.ops.reference.rademacher_sign` states
    the order).

    Args:
        seed: From 0 to ``2^63 - 1``.
        shape: ``(..., d)``; all axes but the last are counted together as rows. For ``hutchinson_reduce``:
            ``(B, d)``.
        device: Where to make them.
        dtype: What to make them.

    Returns:
        A tensor of -1 and 1.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must lie from 0 to 2^63 - 1; got {seed}")
    if len(shape) == 0:
        raise ValueError("shape must have at least one axis; got ()")
    return eager.rademacher(seed, tuple(shape), torch.device(device), dtype)


def second_order_min_plus(first: Tensor, cost: Tensor, steps: int, *, backend: str = "auto") -> MinPlus:
    """Cheapest paths through levels ``0..M-1`` when the cost of an edge depends on the level before it.

    ``F_1[0, k] = first[k]`` and ``F_{n+1}[j, k] = min_{i<j} F_n[i, j] + cost[i, j, k]`` (min-plus over
    pairs of levels); the best path of exactly ``n`` edges totals ``min_j F_n[j, M-1]``. Every argmin takes
    the smallest index among equals.

    Args:
        first: ``[M]``, cost of the first edge ``0 -> k``; entry 0 is not read.
        cost: ``[M, M, M]``, ``cost[i, j, k]`` of an edge ``j -> k`` that follows ``i -> j``. Only ``i < j <
            k`` is read. NaN is not allowed; inf forbids.
        steps: Largest number of edges; all smaller numbers come with it.
        backend: ``"auto"``, ``"triton"`` or ``"torch"`` (which is NumPy here, on the CPU).

    Returns:
        `MinPlus`, on ``cost``'s device.

    Raises:
        ValueError: A shape, dtype or device that does not fit, ``steps < 1``, or a backend that cannot be
            had.
    """
    for name, tensor in (("first", first), ("cost", cost)):
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} must be float64 or float32; got {tensor.dtype}")
    if first.ndim != 1 or first.shape[0] < 2:
        raise ValueError(f"first must be [M] with M at least 2; got shape {tuple(first.shape)}")
    M = first.shape[0]
    if cost.shape != (M, M, M):
        raise ValueError(f"cost must be [{M}, {M}, {M}] to go with first; got shape {tuple(cost.shape)}")
    if first.device != cost.device:
        raise ValueError(f"first and cost must share a device; got {first.device} and {cost.device}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")
    triton = _use_triton(backend, cost)
    if _plain_call(triton, cost):
        totals, paths = map(torch.from_numpy, eager.min_plus(first.double().numpy(), cost.double().numpy(), steps))
        return MinPlus(totals, paths)
    return MinPlus(*torch.ops.fastsched.min_plus(first.double(), cost.double(), steps, triton))


# Schemas and fakes. `triton` is the caller's choice, already made: an op never picks for itself.


@torch.library.custom_op("fastsched::level_gram", mutates_args=())
def _level_gram(
    R: Tensor,
    X: Tensor | None,
    W: Tensor | None,
    coefficients: Tensor,
    per_sample: bool,
    precision: str,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if triton:
        with torch.cuda.device_of(R):
            return _kernel("level_gram").level_gram(R, X, W, coefficients, per_sample, precision)
    return eager.level_gram(R, X, W, coefficients, per_sample)


@torch.library.register_fake("fastsched::level_gram")
def _(R, X, W, coefficients, per_sample, precision, triton):
    N, B, _ = R.shape
    lead = (B,) if per_sample else ()
    gram = R.new_empty((*lead, N, N), dtype=torch.float64)
    if W is None:
        return gram, gram.new_empty((0,)), gram.new_empty((0,))
    return gram, torch.empty_like(gram), gram.new_empty((*lead, N))


@torch.library.custom_op("fastsched::hutchinson", mutates_args=())
def _hutchinson(V: Tensor | None, seed: int, JV: Tensor, triton: bool) -> tuple[Tensor, Tensor]:
    if triton:
        with torch.cuda.device_of(JV):
            return _kernel("hutchinson").hutchinson(V, seed, JV)
    return eager.hutchinson(V, seed, JV)


@torch.library.register_fake("fastsched::hutchinson")
def _(V, seed, JV, triton):
    out = JV.new_empty(JV.shape[:2], dtype=torch.float64)
    return out, torch.empty_like(out)


@torch.library.custom_op("fastsched::min_plus", mutates_args=())
def _min_plus(first: Tensor, cost: Tensor, steps: int, triton: bool) -> tuple[Tensor, Tensor]:
    if triton:
        with torch.cuda.device_of(cost):
            return _kernel("min_plus").min_plus(first, cost, steps)
    totals, paths = eager.min_plus(first.cpu().numpy(), cost.cpu().numpy(), steps)
    return torch.from_numpy(totals).to(cost.device), torch.from_numpy(paths).to(cost.device)


@torch.library.register_fake("fastsched::min_plus")
def _(first, cost, steps, triton):
    return cost.new_empty((steps,)), cost.new_empty((steps, steps + 1), dtype=torch.int64)


def _kernel(name: str):
    return importlib.import_module(f"fastsched.kernels.{name}")


# Checks.


def _plain_call(triton: bool, tensor: Tensor) -> bool:
    """Whether nobody is tracing: a plain CPU tensor skips the dispatcher, whose first use imports torch's compiler."""
    return not triton and type(tensor) is Tensor and tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _use_triton(backend: str, tensor: Tensor) -> bool:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if backend == "auto":
        return tensor.is_cuda
    if backend == "triton" and not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f'backend="triton" needs tensors on a CUDA or HIP device; got {tensor.device}. Move them there, '
            'or pass backend="torch" or "auto" (for tests, TRITON_INTERPRET=1 runs the kernels on the CPU)'
        )
    return backend == "triton"


def _check_gram(R: Tensor, X: Tensor | None, W: Tensor | None, precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    _check_data("R", R, (*_FLOATS, torch.float64), "[N, B, d]")
    if X is not None:
        _check_data("X", X, (*_FLOATS, torch.float64), None)
        _check_like("X", X, R, "R", shared=True)
    if W is not None:
        _check_data("W", W, (*_FLOATS, torch.float64), None)
        _check_like("W", W, R, "R", shared=False)


def _check_data(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: str | None) -> None:
    if tensor.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must be one of {allowed}; got {tensor.dtype}")
    if shape is not None and (tensor.ndim != 3 or 0 in tensor.shape):
        raise ValueError(f"{name} must be {shape} and not empty; got shape {tuple(tensor.shape)}")


def _check_like(name: str, tensor: Tensor, like: Tensor, like_name: str, *, shared: bool) -> None:
    N, B, d = like.shape
    if tensor.shape != like.shape and not (shared and tensor.shape == like.shape[1:]):
        wanted = f"[{N}, {B}, {d}]" + (f" or [{B}, {d}]" if shared else "")
        raise ValueError(f"{name} must be {wanted} to go with {like_name}; got shape {tuple(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like_name}'s device, {like.device}; got {tensor.device}")


def _coefficients(name: str, value: Tensor | Sequence[float] | np.ndarray, N: int) -> Tensor:
    if not isinstance(value, Tensor):
        value = torch.as_tensor(value, dtype=torch.float64)
    coefficients = value.to("cpu", torch.float64)
    if coefficients.shape != (N,):
        raise ValueError(f"{name} must be [{N}], one per level of R; got shape {tuple(coefficients.shape)}")
    return coefficients
