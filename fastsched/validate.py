"""Argument checks shared by the public functions: each error names the argument and says what is valid. And warnings.

A public function begins with ``validate.arguments(locals())``, which checks every argument by name, used or not.
"""

from __future__ import annotations

import difflib
import inspect
import math
import numbers
import operator
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

Kind = TypeVar("Kind")
#: A function of an argument's name and value that raises TypeError or ValueError if the value is wrong.
Check: TypeAlias = Callable[[str, object], object]

#: Upper limit of counts: larger ones are mistakes, and would overflow.
COUNT_LIMIT = 2**31

#: The most samples of one call: more would fill the memory with their seeds before any check of it.
MOST_SAMPLES = 2**24


def arguments(given: Mapping[str, object], **checks: Check) -> None:
    """Check the arguments of a public function by their names.

    Args:
        given: Names and values: ``locals()`` at the start of the function.
        **checks: Checks of arguments that are not in `CHECKS`, or that have another meaning in this function.

    Raises:
        TypeError: If an argument has the wrong type; the message names it.
        ValueError: If an argument has a wrong value; the message names it.
    """
    for name, value in given.items():
        if name not in ("self", "cls"):
            (checks.get(name) or CHECKS[name])(name, value)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line outside the package by which its code was entered."""
    level, found, frame = 1, 1, inspect.currentframe()
    while frame is not None:
        level, name = level + 1, str(frame.f_globals.get("__name__"))
        # A decorator of torch lies between the caller and a function without gradients.
        if name.startswith("fastsched.") or (name == "torch.utils._contextlib" and found == level - 1):
            found = level
        frame = frame.f_back
    warnings.warn(message, category, stacklevel=found)


def shown(value: object) -> str:
    """A short representation, for messages."""
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim > 0:
        return f"{type(value).__name__} of shape {tuple(value.shape)}, {value.dtype}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def positive_int(name: str, value: object, *, minimum: int = 1) -> int:
    """Return ``value`` as an int of at least ``minimum``, below `COUNT_LIMIT`."""
    try:
        if isinstance(value, (bool, np.bool_)) or (isinstance(value, Tensor) and not _is_single(value)):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]  # the point of asking
    except TypeError:
        raise TypeError(f"{name} must be a whole number of at least {minimum}, got {shown(value)}") from None
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    if number >= COUNT_LIMIT:
        raise ValueError(f"{name} must be below 2^31, got {number}")
    return number


def _is_single(value: Tensor) -> bool:
    """Whether a tensor is one real number that can be read."""
    return value.ndim == 0 and not (value.is_meta or value.is_complex() or value.dtype == torch.bool)


def real(name: str, value: object) -> float:
    """Return ``value`` as a float; infinite ones are allowed, NaN is not."""
    single = isinstance(value, Tensor) and _is_single(value)
    if isinstance(value, (bool, np.bool_)) or not (single or isinstance(value, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    try:
        number = float(value.detach() if isinstance(value, Tensor) else value)  # type: ignore[arg-type]  # checked above
    except OverflowError:
        raise ValueError(f"{name} must be a finite number, got one that is too large") from None
    if math.isnan(number):
        raise ValueError(f"{name} must be a number, got NaN")
    return number


def positive(name: str, value: object) -> float:
    """Return ``value`` as a positive, finite float."""
    number = math.nan if isinstance(value, float) and math.isnan(value) else real(name, value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} must be positive and finite, got {shown(value)}")
    return number


def flag(name: str, value: object) -> bool:
    """Return ``value``, True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def path(name: str, value: object) -> str:
    """Return ``value``, a valid path of a file, as text."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} must be the path of a file, got {shown(value)}")
    text = os.fspath(value)
    if not isinstance(text, str):
        raise TypeError(f"{name} must be the path of a file as text (os.fsdecode makes it), got {shown(value)}")
    if not text or "\0" in text:
        raise ValueError(f"{name} must be the path of a file, got {shown(value)}")
    return text


def tensor(name: str, value: object) -> Tensor:
    """Return ``value``, a dense tensor of floating-point numbers of at least 16 bits, without its gradient."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype.itemsize < 2:
        raise TypeError(f"{name} must be a floating-point tensor of at least 16 bits, got {shown(value)}")
    _holds_data(name, value)
    return value.detach()


def finite(name: str, value: object) -> Tensor:
    """Return ``value``, a batch [B, *shape] of finite floating-point numbers, without its gradient."""
    numbers = _batch(name, value)
    if not bool(numbers.isfinite().all()):
        raise ValueError(f"{name} must be finite, but holds NaN or inf")
    return numbers


def _noise(name: str, value: object) -> None:
    """Like `finite`, but values on a GPU are not read, to avoid waiting: NaN shows in the network's first output."""
    if _batch(name, value).device.type == "cpu":
        finite(name, value)


def _batch(name: str, value: object) -> Tensor:
    numbers = tensor(name, value)
    if numbers.ndim < 2:
        raise ValueError(f"{name} must be [B, *shape], got shape {tuple(numbers.shape)}")
    if numbers.numel() == 0:
        raise ValueError(f"{name} must hold at least one sample, got shape {tuple(numbers.shape)}")
    return numbers


def _holds_data(name: str, value: Tensor) -> None:
    """Refuse a tensor whose numbers cannot be read one by one."""
    bare = type(value) in (Tensor, torch.nn.Parameter)  # subclasses may hold their numbers elsewhere
    if (bare and value.is_meta) or value.layout != torch.strided or value.is_quantized:
        kind = "on the meta device" if value.is_meta else "quantized" if value.is_quantized else str(value.layout)
        raise TypeError(f"{name} must be a dense tensor that holds numbers, got one {kind}")


def function(name: str, value: object) -> object:
    """Return ``value``, a callable."""
    if not callable(value):
        raise TypeError(f"{name} must be a function, got {shown(value)}")
    if isinstance(value, type) and issubclass(value, torch.nn.Module):
        raise TypeError(f"{name} must be a module, got the class {value.__name__}; make one: {value.__name__}(...)")
    return value


def instance(name: str, value: object, kind: type[Kind], made_by: str) -> Kind:
    """Return ``value``, an instance of one of the package's classes; the error says how it is ``made_by``."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be of class {kind.__name__} ({made_by}), got {type(value).__name__}")
    return value


def list_of(name: str, value: object, kind: type) -> object:
    """Return ``value``, a list of instances of a class."""
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(each, kind) for each in value):
        raise TypeError(f"{name} must be a list of {kind.__name__}, got {shown(value)}")
    return value


def named(name: str, value: object) -> object:
    """Return ``value``, a dictionary by name with at least one entry."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dictionary by name, got {shown(value)}")
    if not value:
        raise ValueError(f"{name} must hold at least one entry by name")
    for key in value:
        if not isinstance(key, str):
            raise TypeError(f"{name} must have names that are text, got {shown(key)}")
    return value


def anything(name: str, value: object) -> object:
    """For arguments that the function checks itself."""
    return value


def optional(check: Check) -> Check:
    """A check that lets None pass."""
    return lambda name, value: None if value is None else check(name, value)


def process_group(name: str, value: object) -> object:
    """Return ``value``, a process group of ``torch.distributed``, which must be initialised."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise ValueError(f"{name} needs torch.distributed.init_process_group (torchrun does it), got {shown(value)}")
    if not isinstance(value, torch.distributed.ProcessGroup):
        raise TypeError(f"{name} must be a group of torch.distributed (or None), got {shown(value)}")
    return value


def sample_range(name: str, value: object) -> range:
    """Return the numbers of the samples, at least one, from their count or a ``range(a, b)``."""
    if not isinstance(value, range):
        value = range(positive_int(name, value))
    if not value or value.start < 0 or value.stop > COUNT_LIMIT or value.step != 1:
        raise ValueError(f"{name} must be a number, or range(a, b) with 0 <= a < b <= 2^31, got {shown(value)}")
    if len(value) > MOST_SAMPLES:
        raise ValueError(f"{name} must be at most {MOST_SAMPLES:,} in one call, got {len(value):,}; use range(a, b)")
    return value


def seed(name: str, value: object) -> int:
    """Return a seed, an int within ``[0, 2^31)``.

    NumPy integers are refused: their products overflow, and JSON cannot hold them.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        hint = "; pass int(seed)" if hasattr(value, "__index__") else ""
        raise TypeError(f"{name} must be a whole number within [0, 2^31), a Python int, got {shown(value)}{hint}")
    if not 0 <= value < 2**31:
        raise ValueError(f"{name} must be within [0, 2^31), got {value}")
    return value


def device(name: str, value: object) -> torch.device:
    """Return ``value``, a device or the name of one, as an available device."""
    if not isinstance(value, (str, torch.device, int)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a torch.device or a name such as 'cuda', got {shown(value)}")
    try:
        found = torch.device(value)
    except (RuntimeError, OverflowError, ValueError):
        raise ValueError(f"{name} must be one that PyTorch knows, such as cpu, cuda or cuda:1, got {value!r}") from None
    if found.type == "meta":
        raise ValueError(f"{name} must be one that holds numbers, got 'meta'; use cpu")
    if found.type == "cuda" and not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise ValueError(f"{name} is {value!r}, but torch {torch.__version__} ({built}) finds no CUDA GPU; use cpu")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{name} is {value!r}, but there are only {torch.cuda.device_count()} CUDA GPUs")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"{name} is {value!r}, but torch finds no MPS device here; use cpu")
    if found.type not in ("cpu", "cuda", "mps"):
        try:
            torch.empty(0, device=found)
        except (RuntimeError, AssertionError, ImportError):  # what builds without this backend raise
            raise ValueError(f"{name} is {value!r}, but torch cannot use such a device here; use cpu") from None
    return found


def floating_dtype(name: str, value: object) -> torch.dtype:
    """Return ``value``, a floating-point dtype of PyTorch, of at least 16 bits."""
    if not isinstance(value, torch.dtype) or not value.is_floating_point or value.itemsize < 2:
        raise TypeError(
            f"{name} must be a floating-point dtype of at least 16 bits, such as torch.float32, got {shown(value)}"
        )
    return value


def choice(name: str, value: object, known: Iterable[str]) -> str:
    """Return ``value``, one of the ``known`` names; the error lists them and suggests the nearest one."""
    names = list(known)
    if isinstance(value, str) and value in names:
        return value
    spelled = str(value)[:80].lower().replace("+", "p").translate(str.maketrans("- ", "__"))
    near = difflib.get_close_matches(spelled, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name} must be one of {', '.join(map(repr, names))}, got {shown(value)}{hint}")


def sample_shape(name: str, shape: object) -> tuple[int, ...]:
    """Return ``shape``, the shape of one sample, as a tuple of positive ints, at least one."""
    single = getattr(shape, "ndim", 1) != 1 or isinstance(shape, (str, bytes, Mapping, set))
    if single or not isinstance(shape, Iterable) or iter(shape) is shape:
        raise TypeError(f"{name} must be a sequence such as (4, 64, 64), without the batch, got {shown(shape)}")
    sizes = tuple(positive_int(name, size) for size in shape)
    if not sizes:
        raise ValueError(f"{name} must have at least one entry, got ()")
    if math.prod(sizes) >= 2**48:
        raise ValueError(f"{name} must be that of a sample that fits in memory, got {shown(sizes)}")
    return sizes


def float64(name: str, values: object) -> Tensor:
    """Copy ``values``, real numbers, to a float64 CPU tensor; a list of Python floats keeps every digit."""
    if isinstance(values, Tensor):
        if values.is_complex() or values.dtype == torch.bool:
            raise TypeError(f"{name} must be a tensor of real numbers, got {shown(values)}")
        _holds_data(name, values)
        return values.detach().cpu().to(torch.float64, copy=True)
    try:
        array = np.asarray(values)
        if array.dtype.kind not in "iuf" or np.ma.is_masked(values):  # text, truth values, masked ...
            raise TypeError
        return torch.from_numpy(np.array(array, dtype=np.float64))  # also of a reversed view, or in another byte order
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise TypeError(f"{name} must be a tensor or a list of numbers, got {shown(values)}") from None


def descending_sigmas(name: str, sigmas: object, *, to_zero: bool = False) -> Tensor:
    """Return ``sigmas`` as a float64 CPU tensor of at least two, strictly descending and non-negative.

    The first value may be ``inf``: the noise level of a flow or zero-terminal-SNR process at its start. With
    ``to_zero`` the last must be 0.
    """
    values = float64(name, sigmas).add_(0.0)  # -0 becomes 0, whose inverse is inf
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"{name} must be a list of at least two noise levels, got shape {tuple(values.shape)}")
    if bool(values.isnan().any()) or bool((values < 0).any()) or bool(values[1:].isinf().any()):
        raise ValueError(f"{name} must be non-negative numbers, got {shown(values.tolist())}")
    rising = (values[1:] >= values[:-1]).nonzero()
    if len(rising):
        k = int(rising[0])
        raise ValueError(
            f"{name} must strictly descend, but {name}[{k + 1}] = {values[k + 1]:g} follows {values[k]:g}; "
            "sort them from noisy to clean and remove repeats"
        )
    if to_zero and float(values[-1]) != 0:
        raise ValueError(f"{name} must end in 0, got {float(values[-1]):g}; append it")
    return values


def levels(name: str, value: object) -> int | Tensor:
    """Return the number of levels, at least three, or the levels themselves as a float64 CPU tensor."""
    if not isinstance(value, (Tensor, Sequence, np.ndarray)):
        return positive_int(name, value, minimum=3)
    s = descending_sigmas(name, value)
    if len(s) < 3 or float(s[-1]) <= 0:
        raise ValueError(f"{name} must be at least three positive noise levels; sigma 0 is added as the end")
    return s


#: The check of each argument name, the same in all public functions. `Denoiser` and `PathStatistics` add their own.
CHECKS: dict[str, Check] = {
    **dict.fromkeys(("steps", "iterations", "max_iterations"), positive_int),
    **dict.fromkeys(("batch_size", "max_steps", "columns", "prompts_per_call"), optional(positive_int)),
    **dict.fromkeys(("trials", "model_calls"), partial(positive_int, minimum=0)),
    "reference_steps": partial(positive_int, minimum=2),
    "samples": sample_range,
    "group": optional(process_group),
    "seed": seed,
    "shape": sample_shape,
    "device": optional(device),
    "dtype": optional(floating_dtype),
    "levels": levels,
    "sigmas": descending_sigmas,
    "pairs": partial(choice, known=("adjacent", "all")),
    "velocity": optional(partial(choice, known=("noisier", "cleaner"))),
    "store": optional(partial(choice, known=("device", "cpu"))),
    "method": optional(partial(choice, known=("dynamic_programming", "arc_length"))),
    "data": optional(finite),
    "noise": optional(_noise),
    "eta": real,
    "solver": anything,  # the function finds the solver of that name, which raises if there is none
    "progress": lambda name, value: None if callable(value) else flag(name, value),
    "checkpoint": optional(path),
    "path": path,
    **dict.fromkeys(("fn", "net", "estimate"), function),
    **dict.fromkeys(("checks", "responses", "keep_increments", "polish", "weighted"), flag),
    **dict.fromkeys(("spare_last", "integer_timesteps", "sub_vp", "vectors"), flag),
    **dict.fromkeys(("sigma_min", "sigma_max", "rho", "data_std", "beta_min", "beta_max", "shift"), positive),
    **dict.fromkeys(("alpha", "beta", "tolerance"), positive),
}
