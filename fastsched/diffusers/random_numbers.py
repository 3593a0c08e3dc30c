"""Give a pipeline's call the same global random numbers in every run."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

#: Held while a pipeline is called or random numbers are seeded: threads share the global random states, and pipelines
#: may share a network.
ONE_CALL = threading.RLock()


@contextlib.contextmanager
def random_numbers_kept(arguments: Iterable[Any], seed: int = 0) -> Iterator[None]:
    """Seed the global random numbers, and at the end restore them and every generator among ``arguments``.

    So a pipeline that draws its conditioning at random draws the same one in every run, whatever ran in between. Other
    threads that call this function wait until the end.
    """
    with ONE_CALL:
        generators = [
            value
            for argument in arguments
            for value in (argument if isinstance(argument, (list, tuple)) else [argument])
            if isinstance(value, torch.Generator)
        ]
        states = [generator.get_state() for generator in generators]
        python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - what pipelines may use
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
        try:
            with torch.random.fork_rng(devices):
                torch.manual_seed(seed)
                random.seed(seed)
                np.random.seed(seed % 2**32)  # noqa: NPY002 - as above
                yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002 - as above
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
