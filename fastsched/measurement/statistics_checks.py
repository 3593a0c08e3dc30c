"""What path statistics must be, whether they are measured, read from a file or made by hand."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastsched import validate
from fastsched.denoisers.noise import NoiseProcess, far_outside
from fastsched.measurement.deviated_paths import asked_levels
from fastsched.measurement.fingerprints import PROJECTIONS
from fastsched.sampling.origin import Origin

#: The tensors of statistics, and those that all have.
NEEDED = ("s", "seeds", "gram", "ends")
#: Those that may be large; of statistics in memory it is not asked whether they are finite.
VECTORS = ("increments", "responses")
TENSORS = (*NEEDED, "response_cross", "response_gram", "fingerprint", *VECTORS)
#: Their dtypes; float64 for the others.
DTYPES = {"seeds": torch.int64, "ends": torch.float32, "increments": torch.float32, "responses": torch.float32}
#: A product of two vectors may exceed that of their norms by this factor, and by this part of the largest such product:
#: rounding of 16 bits under autocast, in earlier versions, changed entries by 0.1%.
PRODUCT_SLACK = 1.01, 1e-5


def check_form(stats: Any) -> None:
    """Raise TypeError or ValueError unless kinds, shapes and levels are those of a measurement."""
    for name, kind in (("process", NoiseProcess), ("deviated", tuple), ("changes", tuple), ("origin", Origin)):
        value = getattr(stats, name)
        if not isinstance(value, kind) and not (value is None and name == "origin"):
            raise TypeError(f"holds {name} = {validate.shown(value)}, not of class {kind.__name__}")
    check_number("data_std", stats.data_std, float)
    check_number("model_calls", stats.model_calls, int)
    for name in TENSORS:
        if name in NEEDED or getattr(stats, name) is not None:
            check_tensor(name, getattr(stats, name))
    _check_shapes(stats)
    _check_levels(stats)


def check_values(stats: Any, *, vectors: bool = False) -> None:
    """Raise ValueError unless the numbers are finite, with ``vectors`` all, and can be products of vectors."""
    for name in TENSORS:
        if (vectors or name not in VECTORS) and getattr(stats, name) is not None:
            check_finite(name, getattr(stats, name))
    _check_products(stats)


def check_whole(stats: Any, *, vectors: bool = True) -> None:
    """What a file must hold: `check_form` and `check_values`, and no path counts twice, as in a draw with repetition.

    TypeError or ValueError also if a path has no seed of a measurement.
    """
    check_form(stats)
    check_values(stats, vectors=vectors)
    if len(set(stats.seeds.tolist())) < len(stats.seeds) or bool((stats.seeds < 0).any()):
        raise ValueError("holds seeds that repeat or are negative")


def check_number(name: str, value: Any, kind: type) -> None:
    """Raise ValueError unless an entry is a number from 0, whole if it is of the kind ``int``."""
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 <= value < 2**63:
        raise ValueError(f"has {name} = {value!r:.80}, not a number from 0")


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError or ValueError unless a tensor is a plain one of its dtype."""
    wanted = DTYPES.get(name, torch.float64)
    if not isinstance(value, Tensor):
        raise TypeError(f"holds {name} = {validate.shown(value)}, not a tensor")
    if value.dtype != wanted:
        raise ValueError(f"holds {name} in {value.dtype}, not {wanted}")
    if value.device.type != "cpu" or value.layout != torch.strided or value.requires_grad:
        raise ValueError(f"holds a {name} that is not a dense tensor on the CPU without gradients")


def check_finite(name: str, value: Tensor) -> None:
    """Raise ValueError unless all numbers of a tensor are finite."""
    numbers = value[1:] if name == "s" else value  # the first level may be pure noise
    if value.is_floating_point() and not bool(numbers.isfinite().all()):
        raise ValueError(f"holds NaN or inf in {name}")


def _check_shapes(stats: Any) -> None:
    b, n = len(stats.seeds), len(stats.s)
    rows = len(stats.deviated) * len(asked_levels(n))
    if b == 0 or stats.ends.ndim < 2 or stats.ends.numel() == 0:
        raise ValueError("holds no samples")
    if tuple(stats.ends.shape[1:]) != stats.shape:
        raise ValueError(f"is not whole: ends are of shape {tuple(stats.ends.shape[1:])}, not {stats.shape}")
    d = stats.ends[0].numel()
    shapes = {
        "s": (n,),
        "seeds": (b,),
        "ends": (b, *stats.ends.shape[1:]),
        "gram": (b, n - 1, n - 1),
        "response_cross": (b, rows, n - 1),
        "response_gram": (b, rows, rows),
        "increments": (b, n - 1, d),
        "responses": (b, rows, d),
    }
    for name, shape in shapes.items():
        value = getattr(stats, name)
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(f"is not whole: {name} has shape {tuple(value.shape)}, not {shape}")
    fingerprint = stats.fingerprint
    if fingerprint is not None and fingerprint.shape not in ((PROJECTIONS,), (2 * PROJECTIONS,)):
        raise ValueError(f"is not whole: fingerprint has shape {tuple(fingerprint.shape)}")
    if stats.increments is not None and (stats.responses is not None) != (rows > 0):
        raise ValueError("is not whole: it needs increments and responses of the deviated paths together")
    if {stats.response_cross is None, stats.response_gram is None} != {rows == 0}:
        raise ValueError("is not whole: responses need response_cross, response_gram and deviated together")


def _check_products(stats: Any) -> None:
    """Raise ValueError unless Gram matrices are symmetric, and no product exceeds those of the vectors' norms."""
    norms = {}
    for name in ("gram", "response_gram"):
        value = getattr(stats, name)
        if value is None:
            continue
        size = float(value.abs().max()) + math.ulp(0.0)
        if size > torch.finfo(torch.float32).max:
            raise ValueError(f"holds a {name} beyond float32, which a measurement refuses")
        if not torch.allclose(value, value.mT, rtol=0, atol=1e-6 * size):
            raise ValueError(f"holds a {name} that is not symmetric")
        squares = value.diagonal(dim1=1, dim2=2)
        if bool((squares < -1e-9 * size).any()):
            raise ValueError(f"holds a {name} with negative squared norms")
        norms[name] = squares.clamp_min(0.0).sqrt()
    kinds = {"gram": ("gram", "gram"), "response_gram": ("response_gram", "response_gram")}
    for name, (one, other) in {**kinds, "response_cross": ("response_gram", "gram")}.items():
        value = getattr(stats, name)
        if value is None:
            continue
        most = norms[one][:, :, None] * norms[other][:, None, :]
        if bool((value.abs() > PRODUCT_SLACK[0] * most + PRODUCT_SLACK[1] * most.max()).any()):
            raise ValueError(f"holds a {name} with products of vectors that exceed those of their norms")


def _check_levels(stats: Any) -> None:
    s = stats.s
    check_finite("s", s)
    if len(s) < 3 or not bool((s[1:] < s[:-1]).all()) or not float(s[-1]) > 0:
        raise ValueError("holds levels s that do not descend to a positive one")
    if far_outside(stats.process, s):
        raise ValueError("holds levels s far outside of those of its noise process")
