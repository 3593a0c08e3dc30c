"""Which implementation runs an op: the Triton kernels, or PyTorch."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import re

import torch

from fastsched import validate

BACKENDS = ("auto", "triton", "torch")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_CAPABILITY = (8, 0)  # bfloat16 and TF32 products on tensor cores start here
_LEAST_TRITON = (3, 3)  # the first that passes tuples to functions of a kernel; torch 2.6 brings 3.2
_TRITONS = ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows")  # packages that hold it
_warned: set[torch.device] = set()


def _installed_triton() -> tuple[int, ...] | None:
    """Major and minor version of Triton; None if no package is known to hold it."""
    for name in _TRITONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return tuple(map(int, re.findall(r"\d+", importlib.metadata.version(name))[:2]))
    return None


_TRITON = _installed_triton()  # once, because torch.compile cannot trace the search


def widest_dtype(device: torch.device) -> torch.dtype:
    """float64; float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def off_apple_gpu(values: torch.Tensor) -> torch.Tensor:
    """``values``; on the CPU if they are on one of Apple's GPUs."""
    return values.cpu() if values.device.type == "mps" else values


def in_float64(values: torch.Tensor) -> torch.Tensor:
    """``values`` in float64; on the CPU if they are on one of Apple's GPUs."""
    return off_apple_gpu(values).double()


def resolve_backend(device: torch.device | str, dtype: torch.dtype = torch.float32, *, backend: str = "auto") -> str:
    """Return the implementation that an op uses for tensors of a device and dtype.

    The ops call it themselves. Call it before a long measurement to find out early that a GPU is not supported.

    ``"auto"`` takes Triton on an AMD GPU, or an NVIDIA GPU of compute capability 8.0 or newer, if Triton 3.3 or newer
    is installed and the dtype is float32, bfloat16 or float16. It takes PyTorch elsewhere. A GPU on which the kernels
    cannot run is reported by one warning per device and process.

    Args:
        device: Device of the tensors.
        dtype: Their dtype; float64 if any of them is float64.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        ``"triton"`` or ``"torch"``.

    Raises:
        ValueError: An unknown backend, or ``"triton"`` where the kernels cannot run.
    """
    validate.choice("backend", backend, BACKENDS)
    device = torch.device(device)
    if backend == "torch" or (backend == "auto" and (device.type != "cuda" or dtype not in KERNEL_DTYPES)):
        return "torch"
    obstacle = _obstacle(device, dtype)
    if obstacle is None:
        return "triton"
    if backend == "triton":
        raise ValueError(f'backend="triton" {obstacle}; pass backend="torch" or "auto"')
    if device not in _warned and not torch.compiler.is_compiling():
        _warned.add(device)
        validate.warn(f'backend="triton" {obstacle}; backend="auto" uses PyTorch there')
    return "torch"


def _obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run, as the end of a sentence that starts with the backend; None if they can."""
    if dtype not in KERNEL_DTYPES:
        return f"reads float32, bfloat16 and float16; got {dtype}".replace("torch.", "")
    if device.type != "cuda":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return f"needs tensors on a CUDA or HIP device; got {device} (for tests, TRITON_INTERPRET=1 runs on the CPU)"
    if torch.version.hip is None:
        properties = torch.cuda.get_device_properties(device)
        if (properties.major, properties.minor) < _LEAST_CAPABILITY:
            least = ".".join(map(str, _LEAST_CAPABILITY))
            return f"needs compute capability {least}; {device} has {properties.major}.{properties.minor}"
    # torch.compile cannot trace a search for modules, and needs Triton itself on a GPU.
    if not torch.compiler.is_compiling() and importlib.util.find_spec("triton") is None:
        return "needs the package triton, which is not installed"
    if _TRITON is not None and _TRITON < _LEAST_TRITON:
        least, known = (".".join(map(str, version)) for version in (_LEAST_TRITON, _TRITON))
        return f"needs triton {least}, which torch 2.7 and newer bring; installed is {known}"
    return None
