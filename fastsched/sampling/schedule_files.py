"""Files of schedules: JSON in plain decimals, with a checksum, and strict checks of every entry."""

from __future__ import annotations

import json
import math
import os
from typing import Any

import numpy as np

from fastsched.sampling.files import (
    check_readable,
    check_version,
    checksum,
    json_object,
    kind_of,
    named,
    unknown_entries,
    write_whole,
)
from fastsched.sampling.origin import Origin

FORMAT = "fastsched.schedule"
VERSION = 4
LARGEST_FILE = 1 << 26

REQUIRED = ("format", "version", "sigmas", "solver", "noise")
OPTIONAL = (
    *("timesteps", "network_sigmas", "decoupled", "weights"),
    *("predicted_error", "measured_error", "origin", "sha256"),
)


def write_entries(path: str | os.PathLike[str], entries: dict[str, Any]) -> None:
    """Write entries and their checksum, one entry a line; errors as in `Schedule.save`."""
    texts = {key: _text(value) for key, value in entries.items()}
    texts["sha256"] = json.dumps(_checksum({key: json.loads(text) for key, text in texts.items()}))
    whole = "{\n" + ",\n".join(f'  "{key}": {text}' for key, text in texts.items()) + "\n}\n"
    write_whole(path, whole.encode())


def _text(value: Any) -> str:
    """``value`` as JSON: numbers without exponents, in as few digits as read back the same; infinity as text."""
    if isinstance(value, list):
        return "[" + ", ".join(map(_text, value)) + "]"
    if isinstance(value, float):
        return '"inf"' if math.isinf(value) else np.format_float_positional(value, trim="0")
    return json.dumps(value)


def read_entries(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The entries of a schedule file: solver, noise, and lists of floats; errors as in `Schedule.load`."""
    name = check_readable(path, "schedule")
    if kind_of(name) == "statistics":
        raise ValueError(
            f"{name} holds statistics, and a schedule is needed; make one with 'fastsched select {name} --steps 8 "
            "-o schedule.json'"
        )
    if os.path.getsize(name) > LARGEST_FILE:
        raise ValueError(f"{name} is larger than {LARGEST_FILE} bytes, so it is not a schedule")
    try:
        with named(name), open(name, encoding="utf-8") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not a whole JSON file ({error}); save the schedule again") from None
    entries = json_object(text, name)
    if entries.get("format") != FORMAT:
        raise ValueError(f"{name} does not hold a schedule; Schedule.save and fastsched select write them")
    check_version(name, entries.get("version"), VERSION)
    for missing in (key for key in REQUIRED if key not in entries):
        raise ValueError(f"{name} lacks the entry {missing!r}")
    if unknown := set(entries) - set(REQUIRED) - set(OPTIONAL):
        raise ValueError(f"{name} {unknown_entries(unknown)}")
    if "sha256" in entries and entries["sha256"] != _checksum(entries):
        raise ValueError(
            f"{name} was changed or damaged after it was saved; save the schedule again, or remove its entry sha256 if "
            "the change was meant"
        )
    try:
        return _checked(entries)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{name} does not hold a valid schedule: {error}") from None


def _checksum(entries: dict[str, Any]) -> str:
    return checksum(
        json.dumps({key: value for key, value in entries.items() if key != "sha256"}, sort_keys=True).encode()
    )


def _checked(entries: dict[str, Any]) -> dict[str, Any]:
    found = {key: entries.get(key) for key in ("solver", "noise", *OPTIONAL) if key != "sha256"}
    for key in ("solver", "noise", *(["decoupled"] if "decoupled" in entries else [])):
        if not isinstance(found[key], str):
            raise ValueError(f"{key} must be text, got {found[key]!r:.80}")
    found["sigmas"] = _numbers("sigmas", entries["sigmas"])
    if found["decoupled"] is not None and found["network_sigmas"] is None:
        raise ValueError("network_sigmas must be there, as its entry decoupled says; fit the schedule again")
    for key in ("timesteps", "network_sigmas"):
        if found[key] is not None:
            found[key] = _numbers(key, found[key])
    if found["weights"] is not None:
        if not isinstance(found["weights"], list):
            raise ValueError("weights must be a list of lists of numbers")
        found["weights"] = [_numbers("weights", row) for row in found["weights"]]
    for key in ("predicted_error", "measured_error"):
        if found[key] is not None:
            (found[key],) = _numbers(key, [found[key]])
    if found["origin"] is not None:
        found["origin"] = Origin.from_dict(found["origin"])
    return found


def _numbers(name: str, values: Any) -> list[float]:
    """Floats from a list of JSON numbers and ``"inf"``, which stands for an infinite sigma."""
    if not isinstance(values, list):
        raise ValueError(f"{name} must be a list of numbers, got {values!r:.80}")
    for value in values:
        if value != "inf" and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"{name} must be numbers, got {value!r:.80}")
    return [float(value) for value in values]
