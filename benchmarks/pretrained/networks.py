"""Networks that others trained, from a folder that the user gives.

The folder or its parent holds ``zoo.py``, which defines ``ZOO``: a dictionary, by name, of functions without arguments
that build an entry. An entry has the attributes of `Network`; ``image`` may be missing or None. The file is run as a
program, so use only files that you trust. It reads the weights itself and should not unpickle them.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.models import Model

#: Name of the file that defines the networks.
ZOO_FILE = "zoo.py"


@dataclass(frozen=True)
class Network(Model):
    """A network that others trained."""

    #: ``native(steps)`` is the schedule of the network's repository, sampler sigmas [steps + 1] ending in 0.
    native: Callable[[int], Tensor]
    #: Turns samples into pictures, [B, C, H, W] in [0, 1]; None if samples are not pictures.
    image: Callable[[Tensor], Tensor] | None = None


def find_zoo(folder: Path) -> Path:
    """The ``zoo.py`` of a folder of weights, in it or beside it; FileNotFoundError if there is none."""
    for place in (folder, folder.parent):
        if (place / ZOO_FILE).is_file():
            return place / ZOO_FILE
    raise FileNotFoundError(f"weights must be a folder with {ZOO_FILE} in it or beside it, got {str(folder)!r}")


def builders(zoo: Path) -> dict[str, Callable[[], Network]]:
    """The functions of a zoo file that build networks, by name; ValueError if it defines no ``ZOO``."""
    spec = importlib.util.spec_from_file_location("pretrained_zoo", zoo)
    if spec is None or spec.loader is None:
        raise ValueError(f"zoo must be a Python file, got {str(zoo)!r}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module here
    write, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # the folder is the user's
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = write
    found = getattr(module, "ZOO", None)
    if not isinstance(found, Mapping):
        raise ValueError(f"{str(zoo)!r} must define ZOO, functions that build networks by name")
    return {str(name): lambda build=build: _network(build()) for name, build in found.items()}


def _network(entry: Any) -> Network:
    return Network(entry.denoiser, tuple(entry.shape), _checked(entry.native), getattr(entry, "image", None))


def _checked(native: Callable[[int], Any]) -> Callable[[int], Tensor]:
    def schedule(steps: int) -> Tensor:
        sigmas = torch.as_tensor(native(steps), dtype=torch.float64)
        if len(sigmas) != steps + 1 or float(sigmas[-1]) != 0:
            raise ValueError(f"native({steps}) must be {steps + 1} sigmas ending in 0, got {sigmas.tolist()}")
        return sigmas

    return schedule
