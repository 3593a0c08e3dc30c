"""Denoisers by name, for the shell."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from fastsched.denoisers.denoiser import Denoiser

FORMS = "'digits', package.module:function, or path/to/file.py:function"


def load_denoiser(name: str, device: str | None = None) -> tuple[Denoiser, tuple[int, ...] | None]:
    """The denoiser of that name, and its shape if it is known.

    Args:
        name: ``digits``, the shipped one; or ``module:function`` or ``file.py:function``, a function of no
            arguments that returns a `Denoiser`. Modules are looked for in the current folder first.
        device: Where to put the digits network; a function puts its own where it likes.

    Raises:
        ValueError: If the name has none of these forms, or there is no such function.
        TypeError: If it is not a function, or returns something else.
        FileNotFoundError: If there is no such file.
        ImportError: If there is no such module, or its import fails.
    """
    if name == "digits":
        from fastsched.denoisers.digits import DigitsNetwork, load_digits_network

        return Denoiser.from_edm(load_digits_network().to(device or "cpu")), DigitsNetwork.shape
    source, colon, function = name.rpartition(":")
    if not colon or not source or not function.isidentifier():
        near = "; did you mean 'digits'?" if difflib.get_close_matches(name, ["digits"]) else ""
        raise ValueError(f"denoiser must be {FORMS}, got {name!r}{near}")
    module = _module_of_file(source) if source.endswith(".py") else _module(source)
    build = getattr(module, function, None)
    if build is None:
        near = difflib.get_close_matches(function, dir(module), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"denoiser: {source} has no function {function!r}{hint}")
    if not callable(build):
        raise TypeError(f"denoiser: {name} is a {type(build).__name__}; name a function that returns a Denoiser")
    denoiser = build()
    if not isinstance(denoiser, Denoiser):
        raise TypeError(f"denoiser: {name}() returned {type(denoiser).__name__}; it must return a fastsched.Denoiser")
    return denoiser, None


def _module(name: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise ImportError(f"denoiser: importing {name} failed: {error}") from error
        raise ImportError(f"denoiser: no module {name!r} here or among the installed ones") from None


def _module_of_file(path: str) -> ModuleType:
    file = Path(path).resolve()
    if not file.is_file():
        raise FileNotFoundError(f"denoiser: no such file: {path}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"denoiser: {path} cannot be imported as a module")
    module = importlib.util.module_from_spec(spec)
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))  # so that it finds its neighbours
    sys.modules.setdefault(file.stem, module)  # dataclasses and pickling look a module up
    spec.loader.exec_module(module)
    return module
