"""Files of path statistics: safetensors with a header, a checksum, and strict checks of both."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastsched import validate
from fastsched.denoisers.noise import NoiseProcess, far_outside, process_from_dict
from fastsched.measurement.deviated_paths import STRIDE, DeviatedPath, asked_levels
from fastsched.measurement.fingerprints import PROJECTIONS
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
#: A product of two vectors may exceed that of their norms by this factor, and by this part of the largest such product:
#: rounding of 16 bits under autocast, in earlier versions, changed entries by 0.1%.
PRODUCT_SLACK = 1.01, 1e-5
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
        _check_values(stats)
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
        found = _statistics(kind, header, tensors, version)
        _check_values(found)
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{name} lacks an entry of path statistics, or one is wrong: {error}") from None
    except ValueError as error:
        raise ValueError(f"{name} {error}; measure again") from None
    return found


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
        value = header[key]
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 <= value < 2**63:
            raise ValueError(f"has {key} = {value!r:.80}, not a number from 0")
    for name, tensor in tensors.items():
        wanted = {"seeds": torch.int64, "ends": torch.float32, "increments": torch.float32, "responses": torch.float32}
        if tensor.dtype != wanted.get(name, torch.float64):
            raise ValueError(f"holds {name} in {tensor.dtype}, not {wanted.get(name, torch.float64)}")
        if tensor.is_floating_point() and not bool(
            tensor[1:].isfinite().all() if name == "s" else tensor.isfinite().all()
        ):
            raise ValueError(f"holds NaN or inf in {name}")


def _statistics(kind: type[Any], header: dict[str, Any], tensors: dict[str, Tensor], version: int) -> Any:
    fields = {new: old for old, new in NAMES.items()}
    if not isinstance(header["process"], dict):
        raise TypeError(f"process = {header['process']!r:.80}")
    if version == 1:
        tensors = {name: tensor for name, tensor in tensors.items() if name not in fields}
    return kind(
        process=process_from_dict(header["process"]),
        shape=tuple(tensors["ends"].shape[1:]),
        data_std=float(header["data_std"]),
        model_calls=header["model_calls"],
        origin=Origin.from_dict(header["origin"]) if "origin" in header else None,
        deviated=_deviated(header.get("deviated", [])),
        changes=_changes(header.get("changes", [])),
        **{fields.get(name, name): tensor for name, tensor in tensors.items()},
    )


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


def _check_values(stats: Any) -> None:
    """Raise ValueError unless shapes, order, signs and symmetry are those of a measurement."""
    b, n = len(stats.seeds), len(stats.s)
    rows = len(stats.deviated) * len(asked_levels(n))
    if b == 0 or stats.ends.ndim < 2 or stats.ends.numel() == 0:
        raise ValueError("holds no samples")
    d = stats.ends[0].numel()
    shapes = {
        "s": (n,),
        "seeds": (b,),
        "ends": (b, *stats.ends.shape[1:]),
        "gram": (b, n - 1, n - 1),
        "response_cross": (b, rows, n - 1),
        "response_gram": (b, rows, rows),
        "increments": (b, n - 1, d),
        "responses": (b, rows, d),
    }
    for name, shape in shapes.items():
        value = getattr(stats, name)
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(f"is not whole: {name} has shape {tuple(value.shape)}, not {shape}")
    fingerprint = stats.fingerprint
    if fingerprint is not None and fingerprint.shape not in ((PROJECTIONS,), (2 * PROJECTIONS,)):
        raise ValueError(f"is not whole: fingerprint has shape {tuple(fingerprint.shape)}")
    if stats.increments is not None and (stats.responses is not None) != (rows > 0):
        raise ValueError("is not whole: it needs increments and responses of the deviated paths together")
    if {stats.response_cross is None, stats.response_gram is None} != {rows == 0}:
        raise ValueError("is not whole: responses need cross, w_squared and the deviated paths together")
    if len(set(stats.seeds.tolist())) < b or bool((stats.seeds < 0).any()):
        raise ValueError("holds seeds that repeat or are negative")
    _check_levels(stats)
    _check_products(stats)


def _check_products(stats: Any) -> None:
    """Raise ValueError unless Gram matrices are symmetric, and no product exceeds those of the vectors' norms."""
    norms = {}
    for name in ("gram", "response_gram"):
        value = getattr(stats, name)
        if value is None:
            continue
        size = float(value.abs().max()) + math.ulp(0.0)
        if size > torch.finfo(torch.float32).max:
            raise ValueError(f"holds a {name} beyond float32, which a measurement refuses")
        if not torch.allclose(value, value.mT, rtol=0, atol=1e-6 * size):
            raise ValueError(f"holds a {name} that is not symmetric")
        squares = value.diagonal(dim1=1, dim2=2)
        if bool((squares < -1e-9 * size).any()):
            raise ValueError(f"holds a {name} with negative squared norms")
        norms[name] = squares.clamp_min(0.0).sqrt()
    kinds = {"gram": ("gram", "gram"), "response_gram": ("response_gram", "response_gram")}
    for name, (one, other) in {**kinds, "response_cross": ("response_gram", "gram")}.items():
        value = getattr(stats, name)
        if value is None:
            continue
        most = norms[one][:, :, None] * norms[other][:, None, :]
        if bool((value.abs() > PRODUCT_SLACK[0] * most + PRODUCT_SLACK[1] * most.max()).any()):
            raise ValueError(f"holds a {name} with products of vectors that exceed those of their norms")


def _check_levels(stats: Any) -> None:
    s = stats.s
    if len(s) < 3 or not bool((s[1:] < s[:-1]).all()) or not float(s[-1]) > 0:
        raise ValueError("holds levels s that do not descend to a positive one")
    if far_outside(stats.process, s):
        raise ValueError("holds levels s far outside of those of its noise process")
