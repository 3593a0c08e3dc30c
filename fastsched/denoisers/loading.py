"""Load a denoiser that is named by a string, for the shell."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from fastsched.denoisers.denoiser import Denoiser

FORMS = "'digits', package.module:function, path/to/file.py:function, or (in the shell) a saved pipeline's folder"


def load_denoiser(name: str, device: str | None = None) -> tuple[Denoiser, tuple[int, ...] | None]:
    """The denoiser of that name, and its shape if it is known.

    Args:
        name: ``digits``, the network in this package; or ``module:function`` or ``file.py:function``, a function
            without arguments that returns a `Denoiser`. While it loads, its folder (for a module, the current folder)
            is searched for other modules, after the installed ones.
        device: Where to put the digits network. A function puts its network where it needs to.

    Raises:
        ValueError: If the name has none of these forms, or there is no such function.
        TypeError: If the name is not that of a function, or the function does not return a `Denoiser`.
        FileNotFoundError: If there is no such file.
        ImportError: If there is no such module, or its import or the function fails.
    """
    if name == "digits":
        from fastsched.denoisers.digits import DigitsNetwork, digits_denoiser

        return digits_denoiser(device or "cpu"), DigitsNetwork.shape
    source, colon, function = name.rpartition(":")
    if not colon or not source or not function.isidentifier():
        raise ValueError(f"denoiser must be {FORMS}, got {name!r}{_hint(name)}")
    if not source.endswith(".py") and (Path(source).name != source or source.startswith(".")):
        raise ValueError(f"denoiser: the name of a file must end in .py, got {source!r}; a module is package.module")
    load = _module_of_file if source.endswith(".py") else _module
    with _searched_last(folder_of(name)):
        denoiser = _built(load(source), source, function)
    return denoiser, None


def folder_of(name: str) -> str:
    """The folder of the model of that name, as in `load_denoiser`: that of its file, or the current folder."""
    source = name.rpartition(":")[0]
    return str(Path(source).resolve().parent) if source.endswith(".py") else os.getcwd()


@contextlib.contextmanager
def _searched_last(folder: str) -> Iterator[None]:
    """Search ``folder`` for imported modules, after all other folders and only within the block.

    A folder in first place, or a permanent one, could hide packages from fastsched and its dependencies.
    """
    sys.path.append(folder)
    try:
        yield
    finally:
        # Remove the last occurrence, which was added here; imported code may have changed the list.
        for n in reversed(range(len(sys.path))):
            if sys.path[n] == folder:
                del sys.path[n]
                break


def _hint(name: str) -> str:
    """A hint for the error message about an invalid name."""
    if difflib.get_close_matches(name, ["digits"]):
        return "; did you mean 'digits'?"
    if name.endswith(".py"):
        return f"; name a function in it, such as {name}:build"
    return "" if ":" in name or os.path.exists(name) else "; there is no such folder"


def _built(module: ModuleType, source: str, function: str) -> Denoiser:
    """Call the function of that name, which must return a `Denoiser`."""
    build = getattr(module, function, None)
    if build is None:
        near = difflib.get_close_matches(function, dir(module), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"denoiser: {source} has no function {function!r}{hint}")
    if not callable(build) or isinstance(build, Denoiser):  # which is callable too
        kind = type(build).__name__
        raise TypeError(f"denoiser: {source}:{function} is a {kind}; name a function that returns a Denoiser")
    with _failing(f"{source}:{function}()"):
        denoiser = build()
    if not isinstance(denoiser, Denoiser):
        kind = type(denoiser).__name__
        raise TypeError(f"denoiser: {source}:{function}() returned {kind}; it must return a fastsched.Denoiser")
    return denoiser


def _module(name: str) -> ModuleType:
    try:
        with _failing(f"importing {name}"):
            return importlib.import_module(name)
    except ImportError as failure:
        missing = getattr(failure.__cause__, "name", None)
        if not isinstance(failure.__cause__, ModuleNotFoundError) or not f"{name}.".startswith(f"{missing}."):
            raise
        raise ImportError(f"denoiser: no module {name!r} here or among the installed ones") from None


@contextlib.contextmanager
def _failing(what: str) -> Iterator[None]:
    """Turn an error or exit of the user's code into an ImportError that says where it happened."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise ImportError(f"denoiser: {what} failed with {type(error).__name__}: {error}") from error


def _module_of_file(path: str) -> ModuleType:
    file = Path(path).resolve()
    if not file.is_file():
        raise FileNotFoundError(f"denoiser: no such file: {path}")
    # The prefix keeps a model file called json.py from replacing the module json.
    name = f"_fastsched_model_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None  # noqa: PT018 - a file that ends in .py has both
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module here
    try:
        with _failing(f"importing {path}"):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
