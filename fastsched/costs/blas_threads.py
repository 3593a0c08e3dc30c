"""Run searches with one BLAS thread.

A prediction is many products of matrices with at most a few hundred rows. OpenBLAS, which the wheels of NumPy and SciPy
contain, shares each product between threads, and these wait for one another: on two cores, searches with one thread
took 0.4 to 0.7 of the time on a small network, and as long on exactly Gaussian data with 64 levels.
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
    """Limit OpenBLAS to one thread within the block, also as a decorator; other BLAS libraries stay as they are.

    The number of threads belongs to the whole process. So of blocks that are inside one another, or run at once in
    several threads, only the first sets it and sets it back.
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
        # that two kinds of OpenMP are loaded, which is no concern of a limit on OpenBLAS
        warnings.simplefilter("ignore", RuntimeWarning)
        return ThreadpoolController().select(internal_api="openblas")
