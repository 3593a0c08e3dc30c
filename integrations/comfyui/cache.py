"""Fitted schedules and statistics kept in ComfyUI's user folder, by the content of what they were fitted on."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from fastsched.measurement.statistics import PathStatistics
from fastsched.sampling.schedule import Schedule

#: The oldest files are removed when there are more; files of other names are not touched.
MOST_FILES, OWN_NAME = 200, re.compile(r"[0-9a-f]{64}\.(json|safetensors)")

#: Increments that take more bytes than this are not kept in memory.
MOST_BYTES = 1 << 30

#: The last measurement with its increments, which files do not hold, so that a fit of other steps can reuse it.
_last: list[tuple[str, PathStatistics]] = []

Kept = TypeVar("Kept", Schedule, PathStatistics)


def folder() -> Path | None:
    """Where files are kept; None outside ComfyUI, or where it has no user folder."""
    try:
        import folder_paths

        return Path(folder_paths.get_user_directory()) / "fastsched"
    except (ImportError, AttributeError):
        return None


def schedule(key: str | None) -> Schedule | None:
    """The schedule kept under ``key``; None if there is none, or it cannot be read."""
    return _loaded(Schedule, key, ".json")


def statistics(key: str | None) -> PathStatistics | None:
    """The statistics kept under ``key``, with increments if they are the last ones."""
    if key is not None and _last and _last[0][0] == key:
        return _last[0][1]
    return _loaded(PathStatistics, key, ".safetensors")


def keep_schedule(key: str | None, found: Schedule) -> Exception | None:
    """Keep ``found``; returns what was wrong if it cannot be written, as on a full disk."""
    return _save(found, key, ".json")


def keep_statistics(key: str | None, found: PathStatistics) -> Exception | None:
    """Keep ``found``, as `keep_schedule` does; the last one is held in memory too."""
    if key is not None:
        large = [each for each in (found.increments, found.responses) if each is not None]
        fits = sum(each.nbytes for each in large) <= MOST_BYTES
        _last[:] = [(key, found if fits else replace(found, increments=None, responses=None))]
    return _save(found, key, ".safetensors")


def _loaded(kind: type[Kept], key: str | None, ending: str) -> Kept | None:
    path = _path(key, ending)
    with contextlib.suppress(OSError, ValueError):
        return None if path is None else kind.load(path)
    return None


def _save(found: Schedule | PathStatistics, key: str | None, ending: str) -> Exception | None:
    path = _path(key, ending)
    if path is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        found.save(path)
    except (OSError, ValueError) as error:
        return error
    with contextlib.suppress(OSError):
        _prune(path.parent)
    return None


def _path(key: str | None, ending: str) -> Path | None:
    home = folder()
    return None if key is None or home is None else home / (key + ending)


def _prune(home: Path) -> None:
    ours = (path for path in home.iterdir() if OWN_NAME.fullmatch(path.name) and path.is_file())
    files = sorted(ours, key=lambda path: path.stat().st_mtime)
    for path in files[: max(len(files) - MOST_FILES, 0)]:
        os.unlink(path)
