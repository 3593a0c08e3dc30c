"""Run searches with one BLAS thread.

A prediction consists of many products of matrices with at most a few hundred rows. OpenBLAS, which the wheels of NumPy
and SciPy contain, divides each product among threads, which then wait for one another. On two cores, searches with one
thread took 0.4 to 0.7 of the time on a small network, and the same time on exactly Gaussian data with 64 levels.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from threadpoolctl import ThreadpoolController

_limiting = threading.Lock()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Limit OpenBLAS to one thread within the block (or as a decorator); other BLAS libraries are not changed.

    The number of threads belongs to the whole process. So if blocks are nested, or run at once in several threads, only
    the first one sets and restores it.
    """
    if not _limiting.acquire(blocking=False):
        yield
        return
    try:
        with _openblas().limit(limits=1):
            yield
    finally:
        _limiting.release()


@cache
def _openblas() -> ThreadpoolController:
    """All copies of OpenBLAS in this process; found once, which takes some milliseconds."""
    with warnings.catch_warnings():
        # threadpoolctl warns if two OpenMP libraries are loaded, which does not matter for OpenBLAS
        warnings.simplefilter("ignore", RuntimeWarning)
        return ThreadpoolController().select(internal_api="openblas")
