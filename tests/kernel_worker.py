"""Runs kernels: on a GPU in this process, else in Triton's interpreter in another process.

Triton decides when it is imported whether it interprets or compiles, so each mode has its own worker process. Workers
return plain numbers and NumPy arrays, and assertions are made in this process, where pytest can explain failures.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def launch(function: Callable, *arguments: Any) -> Any:
    """Call ``function``, which launches kernels on `DEVICE`."""
    if DEVICE == "cuda":
        return function(*arguments)
    return _worker(interpret=True).submit(function, *arguments).result()


@contextlib.contextmanager
def nan_in_new_tensors() -> Iterator[None]:
    """Fill new tensors with NaN in a block, so that what a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def build(function: Callable, *arguments: Any) -> Any:
    """Call ``function``, which compiles kernels ahead of time."""
    return _worker(interpret=False).submit(function, *arguments).result()


@functools.cache
def _worker(interpret: bool) -> ProcessPoolExecutor:
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    cache = tempfile.TemporaryDirectory(prefix="fastsched-triton-")
    settings = {"TRITON_INTERPRET": "1" if interpret else "0", "TRITON_CACHE_DIR": cache.name}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        pool.submit(os.getpid).result()  # the process starts here, with this environment
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    pool.cache = cache  # type: ignore[attr-defined]  # lives as long as the worker
    return pool
