"""Files of path statistics: safetensors with a header, a checksum, and strict checks of both."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastsched import validate
from fastsched.denoisers.noise import NoiseProcess, process_from_dict
from fastsched.measurement.deviated_paths import STRIDE, DeviatedPath
from fastsched.measurement.statistics_checks import (
    check_finite,
    check_form,
    check_number,
    check_seeds,
    check_tensor,
    check_values,
)
from fastsched.sampling.files import check_readable, check_version, checksum, json_object, kind_of, write_whole
from fastsched.sampling.origin import Origin

FORMAT = "fastsched.path_statistics"
#: 1: with a sensitivity from Jacobians, which is no longer used. 2: with responses instead. 3: with a checksum too.
VERSION = 3

#: Names of the responses' tensors in files; version 1 used them for its sensitivity.
NAMES = {"response_cross": "cross", "response_gram": "w_squared"}
REQUIRED = {"s", "seeds", "gram", "ends"}
OPTIONAL = {*NAMES.values(), "fingerprint", "increments", "responses"}
ENTRIES = {"format", "version", "process", "data_std", "model_calls", "deviated", "origin", "changes", "sha256"}
#: Entries of files before version 3.
FORMER_ENTRIES = {"sensitivity"}


def write_statistics(stats: Any, path: str | os.PathLike[str], vectors: bool) -> None:
    """Write statistics, with ``vectors`` also increments and responses; ValueError if the file could not be read."""
    from safetensors.torch import save

    kept = {"s": stats.s, "seeds": stats.seeds, "gram": stats.gram, "ends": stats.ends}
    kept |= {"fingerprint": stats.fingerprint, **{new: getattr(stats, old) for old, new in NAMES.items()}}
    if vectors:
        kept |= {"increments": stats.increments, "responses": stats.responses}
    tensors = {name: tensor.contiguous() for name, tensor in kept.items() if tensor is not None}
    header: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "process": stats.process.to_dict(),
        "data_std": stats.data_std,
        "model_calls": stats.model_calls,
        "deviated": [[path.hold, path.order] for path in stats.deviated],
    }
    if stats.origin is not None:
        header["origin"] = stats.origin.to_dict()
    if stats.changes:
        header["changes"] = [list(pair) for pair in stats.changes]
    try:
        _check_entries(header, tensors, VERSION)
        check_form(stats)
        check_values(stats)
        check_seeds(stats)
        check_process(stats.process, stats.s)
    except ValueError as error:
        raise ValueError(
            f"{os.fspath(path)} cannot be written, because it could not be read again: it {error}"
        ) from None
    header["sha256"] = _checksum(header, tensors)
    write_whole(path, save(tensors, metadata={"fastsched": json.dumps(header)}))


def check_process(process: NoiseProcess, s: Tensor) -> None:
    """Warn if a file would keep a noise process of another class with other values at levels ``s``.

    ValueError if a file could not keep it at all.
    """
    kept = process_from_dict(process.to_dict())
    names = ("alpha", "sigma", "sampler_sigma", "timestep")
    pairs = [(name, getattr(kept, name)(s), getattr(process, name)(s)) for name in names]
    other = [name for name, one, two in pairs if (one is None) != (two is None) or not _equal(one, two)]
    if other:
        validate.warn(
            f"a file of statistics keeps the noise process {type(process).__name__} as {type(kept).__name__}, which "
            f"has another {' and '.join(other)}: after loading, give the statistics the process again, "
            "dataclasses.replace(stats, process=denoiser.process)"
        )


def _equal(one: Tensor | None, two: Tensor | None) -> bool:
    return one is None or two is None or torch.equal(one.double(), two.double())


@contextlib.contextmanager
def opened(name: str) -> Iterator[Any]:
    """The safetensors file of this name, which may be no UTF-8, though safetensors opens no other."""
    from safetensors import safe_open

    plain = name.encode(errors="replace").decode() == name
    with open(name, "rb") as raw, safe_open(name if plain else f"/dev/fd/{raw.fileno()}", framework="pt") as file:
        yield file


def read_statistics(kind: type[Any], path: str | os.PathLike[str]) -> Any:
    """Read statistics, of this version or an earlier one; errors as in `PathStatistics.load`."""
    from safetensors import SafetensorError

    name = check_readable(path, "statistics")
    if kind_of(name) == "schedule":
        raise ValueError(f"{name} is a schedule, and statistics are needed, which 'fastsched measure' writes")
    try:
        with opened(name) as file:
            text = (file.metadata() or {}).get("fastsched", "{}")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, ValueError, OSError, RuntimeError) as error:
        raise ValueError(f"{name} is not a whole safetensors file ({error}); measure again") from None
    header = json_object(text, name)
    if header.get("format") != FORMAT:
        raise ValueError(f"{name} does not hold path statistics, which fastsched measure writes")
    version, given = check_version(name, header.get("version"), VERSION), header.get("sha256")
    try:
        if (version >= 3 or given is not None) and given != _checksum(header, tensors):
            raise ValueError("was changed or damaged after it was written: its checksum is another one")
        _check_entries(header, tensors, version)
        found = SimpleNamespace(**_fields(header, tensors, version))
        check_form(found)
        check_values(found)
        check_seeds(found)
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{name} lacks an entry of path statistics, or one is wrong: {error}") from None
    except ValueError as error:
        raise ValueError(f"{name} {error}; measure again") from None
    return kind(**vars(found))


def _checksum(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    parts = [json.dumps({key: header[key] for key in sorted(header) if key != "sha256"}).encode()]
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        parts += [f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()]
        parts += [tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""]
    return checksum(*parts)


def _check_entries(header: dict[str, Any], tensors: dict[str, Tensor], version: int) -> None:
    unknown = set(header) - ENTRIES - (FORMER_ENTRIES if version < 3 else set())
    unknown |= set(tensors) - REQUIRED - OPTIONAL
    if unknown:
        raise ValueError(f"holds entries that are not known: {', '.join(sorted(unknown))[:200]}")
    for missing in sorted(REQUIRED - set(tensors)):
        raise KeyError(missing)
    for key, kind in (("data_std", float), ("model_calls", int)):
        check_number(key, header[key], kind)
    names = {new: old for old, new in NAMES.items()}
    for name, tensor in tensors.items():
        field = names.get(name, name)
        check_tensor(field, tensor)
        check_finite(field, tensor)


def _fields(header: dict[str, Any], tensors: dict[str, Tensor], version: int) -> dict[str, Any]:
    fields = {new: old for old, new in NAMES.items()}
    if not isinstance(header["process"], dict):
        raise TypeError(f"process = {header['process']!r:.80}")
    if version == 1:
        tensors = {name: tensor for name, tensor in tensors.items() if name not in fields}
    return {
        "process": process_from_dict(header["process"]),
        "shape": tuple(tensors["ends"].shape[1:]),
        "data_std": float(header["data_std"]),
        "model_calls": header["model_calls"],
        "origin": Origin.from_dict(header["origin"]) if "origin" in header else None,
        "deviated": _deviated(header.get("deviated", [])),
        "changes": _changes(header.get("changes", [])),
        **dict.fromkeys((*NAMES, "increments", "responses", "fingerprint")),
        **{fields.get(name, name): tensor for name, tensor in tensors.items()},
    }


def _deviated(entries: Any) -> tuple[DeviatedPath, ...]:
    if not isinstance(entries, list):
        raise TypeError(f"deviated = {entries!r:.80}")
    for entry in entries:
        pair = isinstance(entry, list) and len(entry) == 2 and all(type(each) is int for each in entry)
        if not pair or entry[0] < STRIDE or entry[0] % STRIDE or entry[1] not in (1, 2):
            raise ValueError(f"holds the deviated path {entry!r:.80}; expected 2 numbers, levels to hold and an order")
    return tuple(DeviatedPath(*entry) for entry in entries)


def _changes(entries: Any) -> tuple[tuple[float, float], ...]:
    if not isinstance(entries, list):
        raise TypeError(f"changes = {entries!r:.80}")
    for entry in entries:
        pair = isinstance(entry, list) and len(entry) == 2 and all(type(each) is float for each in entry)
        if not pair or not math.inf > entry[0] > entry[1] > 0:
            raise ValueError(f"holds the change {entry!r:.80}; expected 2 levels s, the higher one first")
    return tuple((entry[0], entry[1]) for entry in entries)
