"""Write files atomically, read JSON strictly, and tell the package's kinds of files apart."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

Name = str | os.PathLike[str]

#: Bytes at the beginning of a file that tell its kind.
HEAD = 10_000

#: How files of weights begin: those of torch.save (zip, formerly pickle) and GGUF. Those of safetensors begin with the
#: length of their header, which is below this; eight bytes of text would be a far larger number.
WEIGHTS, LONGEST_HEADER = (b"PK\x03\x04", b"\x80\x02", b"GGUF"), 10**9


def write_whole(path: Name, data: bytes) -> None:
    """Write ``data`` to a temporary file, which replaces the target only when it is complete and on the disk.

    The temporary file has a unique name, so two writers do not collide, and is removed if writing fails. A symbolic
    link is followed. Permissions are those of a new file (umask). Devices, and pipes that a program reads, are written
    to directly.

    Raises:
        OSError: If the file cannot be written; an existing file is then unchanged.
        ValueError: If the file holds statistics, a schedule, a fit's runs or weights, and ``data`` is of another kind.
    """
    target = _target(path)
    _check_replaced(path, target, [_kind(data[:HEAD])])
    if os.path.exists(target) and not os.path.isfile(target):
        with named(path), os.fdopen(_open_special(target), "wb") as file:  # cannot be replaced
            file.write(data)
        return
    name, descriptor = _create_beside(target)
    try:
        with named(path), os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    _sync_folder(target)


def _open_special(target: str) -> int:
    """Open a device or a pipe for writing; OSError if no program reads the pipe, instead of waiting forever."""
    without_waiting = getattr(os, "O_NONBLOCK", 0)  # not on Windows
    try:
        descriptor = os.open(target, os.O_WRONLY | without_waiting)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        advice = "no program reads this pipe; name a file, or start the reader first"
        raise OSError(errno.ENXIO, advice, target) from None
    if without_waiting:
        os.set_blocking(descriptor, True)
    return descriptor


@contextlib.contextmanager
def named(path: Name) -> Iterator[None]:
    """Add the file's name to an OSError without one, such as that of a full disk or of a removed current folder."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or os.fspath(path)
        raise


def check_writable(path: Name, *kinds: str) -> None:
    """Check before long work that `write_whole` can write data of these ``kinds``, any if none, to ``path``.

    Errors are those of `write_whole`.
    """
    target = _target(path)
    if kinds:
        _check_replaced(path, target, kinds)
    if os.path.exists(target) and not os.path.isfile(target):
        return
    name, descriptor = _create_beside(target)
    os.close(descriptor)
    os.unlink(name)


def _check_replaced(path: Name, target: str, kinds: Sequence[str | None]) -> None:
    """ValueError if data of these ``kinds`` would replace hours of work, more likely named by mistake than unwanted."""
    held = kind_of(target)
    if held not in (None, *kinds):
        what = {"schedule": "a schedule", "weights": "the weights of a network"}.get(held, held)
        raise ValueError(f"path must not be that of {what}, which {os.fspath(path)} holds; name another file")


def _target(path: Name) -> str:
    """``path`` with links followed, even to a file that does not exist yet; OSError if no file can be written there."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        return os.fspath(path)  # a device or a pipe; the links of /dev/fd lead to names that cannot be opened
    with named(path):  # there may be no current folder
        target = os.path.realpath(path)
    given = os.path.dirname(os.fspath(path)) or os.curdir
    if os.path.islink(target):
        raise OSError(f"{os.fspath(path)} is a link that leads back to itself; remove it, or name another file")
    if os.path.isdir(target):
        raise IsADirectoryError(f"{os.fspath(path)} is a folder; name a file in it")
    if os.path.exists(target) and not os.access(target, os.R_OK | os.W_OK):  # its folder may allow to replace it
        raise PermissionError(errno.EACCES, "no permission to read and replace this file", os.fspath(path))
    # realpath drops "missing/..", through which nothing can be read.
    for folder in (each for each in (os.path.dirname(target), given) if not os.path.isdir(each)):
        raise FileNotFoundError(f"no folder {folder} to write {os.path.basename(target)} to; create it first")
    with contextlib.suppress(FileNotFoundError):
        os.stat(target)  # raises OSError now, not after the work, if no file can have this name
    return target


def _create_beside(target: str) -> tuple[str, int]:
    folder, base = os.path.split(target)
    name = os.path.join(folder, f".{base[:40]}.{secrets.token_hex(8)}.unfinished")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        return name, os.open(name, flags, 0o666)
    except OSError as error:
        raise type(error)(error.errno, f"cannot write to the folder {folder}: {error.strerror}") from None


def _sync_folder(target: str) -> None:
    """Write the folder to disk, so that the new name survives a crash, on systems that support this."""
    with contextlib.suppress(OSError):
        descriptor = os.open(os.path.dirname(target), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def checksum(*parts: bytes) -> str:
    """SHA-256 of ``parts``, each with its length, in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def json_object(text: str, name: str) -> dict[str, Any]:
    """The entries of a JSON object from a file called ``name``; an empty dictionary for any other JSON value.

    Raises:
        ValueError: If the text is not JSON, holds an entry twice, NaN or a number such as 1e400, which would be read as
            infinity, or is nested too deeply.
    """
    try:
        found = json.loads(
            text.removeprefix("\ufeff"), object_pairs_hook=_unique, parse_constant=not_json, parse_float=finite_number
        )
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{name} is not a whole JSON file ({reason}); save it again") from None
    return found if isinstance(found, dict) else {}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("an entry occurs twice")
    return entries


def finite_number(digits: str) -> float:
    """The number; ValueError if it is so large that it would be read as infinity."""
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits:.40} is too large")
    return number


def not_json(name: str) -> float:
    """Refuse NaN and infinities, which Python's JSON parser accepts."""
    raise ValueError(f"{name} is not JSON")


def check_version(name: str, version: object, newest: int) -> int:
    """The version of the file called ``name``; ValueError unless it is one from 1 to the ``newest``."""
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f"{name} has version {version!r:.40}, not a whole number from 1")
    if version > newest:
        raise ValueError(f"{name} has version {version}, and the newest known here is {newest}; update fastsched")
    return version


def unknown_entries(names: Iterable[str]) -> str:
    """What a file holds whose entries of these ``names`` are not known; those of newer versions are not guessed at."""
    shown = ", ".join(sorted(names))
    return f"holds entries that are not known: {shown:.200} (if a newer fastsched wrote them, update fastsched)"


def check_readable(path: Name, what: str) -> str:
    """The name of a regular file that should hold ``what``; FileNotFoundError or ValueError if there is none.

    Pipes and devices are refused, because reading them may block or never end.
    """
    name = os.fspath(path)
    if not os.path.exists(name):
        raise FileNotFoundError(f"no such {what} file: {name}")
    if not os.path.isfile(name):
        raise ValueError(f"{name} is {'a folder' if os.path.isdir(name) else 'no regular file'}; name a {what} file")
    return name


def absolute_file(path: Name | None) -> Path | None:
    """``path`` from the root of the file system, because a model may change the current folder while it runs."""
    if path is None:
        return None
    with named(path):  # there may be no current folder
        return Path(path).absolute()


def runs_beside(checkpoint: str | os.PathLike[str], rank: int = 0, size: int = 1) -> str:
    """The path of the file of runs beside a measurement's checkpoint; each process of a group has its own."""
    return f"{os.fspath(checkpoint)}.runs" + (f".{rank}-of-{size}" if size > 1 else "")


def kind_of(path: Name) -> str | None:
    """``"statistics"``, ``"runs"`` (of a fit), ``"schedule"`` or ``"weights"``, by a file's content.

    Weights are all other files in the formats of weights. None for other files, or none.
    """
    if not os.path.isfile(path):
        return None
    try:
        with open(path, "rb") as file:
            return _kind(file.read(HEAD))
    except OSError:
        return None


def _kind(start: bytes) -> str | None:
    """`kind_of` a file that begins with these bytes."""
    if start[8:9] == b"{" and b"fastsched.path_statistics" in start:  # eight bytes of length, then the header
        return "statistics"
    if start[48:49] == b"{" and b"fastsched.runs" in start:  # the same, in a record with its length and SHA-256
        return "runs"
    if start.lstrip()[:1] == b"{" and b"fastsched.schedule" in start:
        return "schedule"
    safetensors = start[8:9] == b"{" and int.from_bytes(start[:8], "little") < LONGEST_HEADER
    return "weights" if safetensors or start.startswith(WEIGHTS) else None
