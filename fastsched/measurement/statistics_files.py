"""Files of path statistics: safetensors with a header, a checksum, and strict checks of both."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastsched import validate
from fastsched.denoisers.noise import NoiseProcess, process_from_dict
from fastsched.measurement.deviated_paths import STRIDE, DeviatedPath
from fastsched.measurement.statistics_checks import TENSORS, VECTORS, check_whole
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

FORMAT = "fastsched.path_statistics"
#: 1: with a sensitivity from Jacobians, which is no longer used. 2: with responses instead. 3: with a checksum too.
VERSION = 3

#: Names of the responses' tensors in files; version 1 used them for its sensitivity.
NAMES = {"response_cross": "cross", "response_gram": "w_squared"}
ENTRIES = {"format", "version", "process", "data_std", "model_calls", "deviated", "origin", "changes", "sha256"}
#: Entries of files before version 3.
FORMER_ENTRIES = {"sensitivity"}

#: Entries that are lists of pairs: how errors name one, the type of both of its numbers, whether they are right, and
#: what they must be.
PAIRS: dict[str, tuple[str, type, Callable[[Any, Any], bool], str]] = {
    "deviated": (
        "deviated path",
        int,
        lambda hold, order: hold >= STRIDE and hold % STRIDE == 0 and order in (1, 2),
        "numbers, levels to hold and an order",
    ),
    "changes": ("change", float, lambda high, low: math.inf > high > low > 0, "levels s, the higher one first"),
}


def write_statistics(stats: Any, path: str | os.PathLike[str], vectors: bool) -> None:
    """Write statistics, with ``vectors`` also increments and responses; ValueError if the file could not be read."""
    from safetensors.torch import save

    kept = {name: getattr(stats, name) for name in TENSORS if vectors or name not in VECTORS}
    tensors = {NAMES.get(name, name): tensor.contiguous() for name, tensor in kept.items() if tensor is not None}
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
        check_whole(stats, vectors=vectors)
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
    other = [name for name in names if not _equal(getattr(kept, name)(s), getattr(process, name)(s))]
    if other:
        validate.warn(
            f"a file of statistics keeps the noise process {type(process).__name__} as {type(kept).__name__}, which "
            f"has another {' and '.join(other)}: after loading, give the statistics the process again, "
            "dataclasses.replace(stats, process=denoiser.process)"
        )


def _equal(one: Tensor | None, two: Tensor | None) -> bool:
    return one is two or (one is not None and two is not None and torch.equal(one.double(), two.double()))


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
        with named(name), opened(name) as file:
            text = (file.metadata() or {}).get("fastsched", "{}")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} is not a whole safetensors file ({error}); measure again") from None
    header = json_object(text, name)
    if header.get("format") != FORMAT:
        raise ValueError(f"{name} does not hold path statistics, which fastsched measure writes")
    version, given = check_version(name, header.get("version"), VERSION), header.get("sha256")
    try:
        if (version >= 3 or given is not None) and given != _checksum(header, tensors):
            raise ValueError("was changed or damaged after it was written: its checksum is another one")
        found = SimpleNamespace(**_fields(header, tensors, version))
        check_whole(found)
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


def _fields(header: dict[str, Any], tensors: dict[str, Tensor], version: int) -> dict[str, Any]:
    names = {name: NAMES.get(name, name) for name in TENSORS}
    unknown = set(header) - ENTRIES - (FORMER_ENTRIES if version < 3 else set())
    unknown |= set(tensors) - {*names.values()}
    if unknown:
        raise ValueError(unknown_entries(unknown))
    if not isinstance(header["process"], dict):
        raise TypeError(f"process = {header['process']!r:.80}")
    if version == 1:
        tensors = {name: tensor for name, tensor in tensors.items() if name not in NAMES.values()}
    return {
        "process": process_from_dict(header["process"]),
        "shape": tuple(tensors["ends"].shape[1:]),
        "data_std": header["data_std"],
        "model_calls": header["model_calls"],
        "origin": Origin.from_dict(header["origin"]) if "origin" in header else None,
        "deviated": tuple(DeviatedPath(*pair) for pair in _pairs(header, "deviated")),
        "changes": tuple(_pairs(header, "changes")),
        **{name: tensors.get(written) for name, written in names.items()},
    }


def _pairs(header: dict[str, Any], name: str) -> list[tuple[Any, Any]]:
    """The pairs of an entry of `PAIRS`; TypeError or ValueError if they are none."""
    (what, kind, right, wanted), entries = PAIRS[name], header.get(name, [])
    if not isinstance(entries, list):
        raise TypeError(f"{name} = {entries!r:.80}")
    for entry in entries:
        pair = isinstance(entry, list) and len(entry) == 2 and all(type(each) is kind for each in entry)
        if not pair or not right(*entry):
            raise ValueError(f"holds the {what} {entry!r:.80}; expected 2 {wanted}")
    return [tuple(entry) for entry in entries]
