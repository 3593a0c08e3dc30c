"""Argument checks shared by the public functions: each error names the argument and says what would do."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def positive_int(name: str, value: object, *, minimum: int = 1) -> int:
    """Return ``value`` as an int of at least ``minimum``.

    Raises:
        TypeError: If ``value`` is not an integer.
        ValueError: If ``value`` is below ``minimum``.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a whole number of at least {minimum}, got {value!r}")
    number = value.__index__()  # type: ignore[attr-defined]  # checked by hasattr above
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    return number


def sample_range(samples: object) -> range:
    """Return which samples are meant: the first ``samples``, or those of a ``range(a, b)``.

    Raises:
        TypeError: If it is neither an integer nor a range.
        ValueError: If there is no sample, one is negative, or the range has another step than 1.
    """
    if not isinstance(samples, range):
        return range(positive_int("samples", samples))
    if len(samples) == 0 or samples.start < 0 or samples.step != 1:
        raise ValueError(f"samples must be a number, or range(a, b) with 0 <= a < b, got {samples!r}")
    return samples


def seed(value: object) -> int:
    """Return a seed, an int within ``[0, 2^31)``.

    Integers of NumPy are refused: products of theirs overflow, and JSON cannot hold them.

    Raises:
        TypeError: If it is not an int.
        ValueError: If it is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        hint = "; pass int(seed)" if hasattr(value, "__index__") else ""
        raise TypeError(f"seed must be a whole number within [0, 2^31), a Python int, got {value!r}{hint}")
    if not 0 <= value < 2**31:
        raise ValueError(f"seed must be within [0, 2^31), got {value}")
    return value


def device(value: object) -> torch.device:
    """Return ``value`` as a device.

    Raises:
        TypeError: If it is neither a device nor the name of one.
        ValueError: If there is no such device.
    """
    if not isinstance(value, (str, torch.device, int)) or isinstance(value, bool):
        raise TypeError(f"device must be a torch.device or a name such as 'cuda', got {value!r}")
    try:
        return torch.device(value)
    except RuntimeError as error:
        raise ValueError(f"device must be one that PyTorch knows, got {value!r} ({error})") from None


def floating_dtype(value: object, name: str = "dtype") -> torch.dtype:
    """Return ``value`` if it is a floating-point dtype of PyTorch.

    Raises:
        TypeError: If it is not.
    """
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise TypeError(f"{name} must be a floating-point dtype such as torch.float32, got {value!r}")
    return value


def sigma_range(sigma_min: float, sigma_max: float) -> tuple[float, float]:
    """Return ``(sigma_min, sigma_max)`` as floats with ``0 < sigma_min < sigma_max``, both finite.

    Raises:
        ValueError: If they are not.
    """
    low, high = float(sigma_min), float(sigma_max)
    if not (math.isfinite(low) and low > 0):
        raise ValueError(f"sigma_min must be positive and finite, got {sigma_min!r}")
    if not math.isfinite(high):
        raise ValueError(f"sigma_max must be finite, got {sigma_max!r}")
    if low >= high:
        raise ValueError(f"sigma_min must be below sigma_max, got sigma_min={low:g} and sigma_max={high:g}")
    return low, high


def choice(name: str, value: object, known: Iterable[str]) -> str:
    """Return ``value`` if it is one of the ``known`` names.

    Raises:
        ValueError: If it is not; the message lists the names and the nearest match.
    """
    names = list(known)
    if isinstance(value, str) and value in names:
        return value
    spelled = str(value).lower().replace("+", "p").translate(str.maketrans("- ", "__"))
    near = difflib.get_close_matches(spelled, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name} must be one of {', '.join(map(repr, names))}, got {value!r}{hint}")


def sample_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return ``shape``, the shape of one sample, as a tuple of positive ints.

    Raises:
        TypeError: If it is not a sequence of integers.
        ValueError: If it is empty or has an entry below 1.
    """
    if isinstance(shape, (int, str)) or not isinstance(shape, Iterable):
        raise TypeError(f"shape must be a sequence such as (4, 64, 64), without the batch, got {shape!r}")
    sizes = tuple(positive_int("shape", size) for size in shape)
    if not sizes:
        raise ValueError("shape must have at least one entry, got ()")
    return sizes


def float64(values: Tensor | Sequence[float]) -> Tensor:
    """``values`` as a float64 CPU tensor of its own; a list of Python floats keeps every digit."""
    if isinstance(values, Tensor):
        return values.detach().cpu().to(torch.float64, copy=True)
    return torch.tensor(values, dtype=torch.float64)


def descending_sigmas(sigmas: Tensor | Sequence[float], *, name: str = "sigmas") -> Tensor:
    """Return ``sigmas`` as a float64 CPU tensor, strictly descending and non-negative.

    The first value may be ``inf``: the noise level of a flow or zero-terminal-SNR process at its start.

    Raises:
        ValueError: If there are fewer than two values, or one is NaN, negative or not below the one before.
    """
    values = float64(sigmas)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"{name} must be a list of at least two noise levels, got shape {tuple(values.shape)}")
    if bool(values.isnan().any()) or bool((values < 0).any()) or bool(values[1:].isinf().any()):
        raise ValueError(f"{name} must be non-negative numbers, got {values.tolist()}")
    rising = (values[1:] >= values[:-1]).nonzero()
    if len(rising):
        k = int(rising[0])
        raise ValueError(
            f"{name} must strictly descend, but {name}[{k + 1}] = {values[k + 1]:g} follows {values[k]:g}; "
            "sort them from noisy to clean and remove repeats"
        )
    return values
