"""A file of all finished runs of the sampler, so that an interrupted fit continues where it stopped.

A fit is determined by its measurement and the results of its runs. So the same call requests the same runs, and those
in the file are not repeated. Each run adds a record to the file: its length, its SHA-256 and a safetensors file. An
unfinished record at the end, left by an interruption, is dropped. The first record identifies the fit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastsched import validate
from fastsched.fitting.rollouts import Evaluations, Rollout, Run
from fastsched.measurement.statistics import PathStatistics
from fastsched.sampling.files import check_readable, checksum, json_object, named, write_whole
from fastsched.sampling.schedule import Schedule

FORMAT = "fastsched.runs"
VERSION = 1

#: Bytes before the content of a record: the length of the content, and its SHA-256.
LENGTH, DIGEST = 8, 32


def identity(stats: PathStatistics, **arguments: object) -> dict[str, Any]:
    """The identity of a fit: a checksum of its measurement, and the arguments that change its runs."""
    parts = (stats.s, stats.seeds, stats.ends, stats.gram)
    measurement = checksum(json.dumps(stats.process.to_dict()).encode(), *map(_bytes, parts))
    return {"format": FORMAT, "version": VERSION, "stats": measurement, **arguments}


def schedule_key(schedule: Schedule) -> str:
    """A checksum of a schedule's levels, solver, noise, weights and the levels that the network is told."""
    return checksum(*_schedule_parts(schedule))


class RunLog:
    """The runs of one fit or tuning, of which ``what`` is the `identity`, in a file that is created if it is missing.

    Raises:
        ValueError: If the file holds something else, or the runs of another call.
    """

    def __init__(self, path: str | os.PathLike[str], what: Mapping[str, Any]) -> None:
        self.path = os.fspath(path)
        self._found: dict[str, tuple[int, int]] = {}  # first byte and length of the content of each run's record
        if not os.path.exists(self.path):
            write_whole(self.path, _framed(_packed({}, what)))
            return
        check_readable(self.path, "checkpoint")
        whole = self._scan(dict(what))
        if whole < os.path.getsize(self.path):
            os.truncate(self.path, whole)

    def __len__(self) -> int:
        return len(self._found)

    def run(self, schedule: Schedule, first: int, last: int, make: Callable[[], Rollout | None]) -> Rollout | None:
        """Read the run of a schedule for samples ``first .. last - 1`` from the file, or make it and add it."""
        key = checksum(*_schedule_parts(schedule), f"{first} {last}".encode())
        if key in self._found:
            return _rollout(*_unpacked(self._record(*self._found[key]), self.path))
        found = make()
        self._append(_packed(_tensors(found), {"key": key, "levels": _levels(found), "failed": found is None}))
        return found

    def _scan(self, what: dict[str, Any]) -> int:
        """Find the complete records; returns the position where they end."""
        size, at, place = os.path.getsize(self.path), 0, 0
        with open(self.path, "rb") as file:
            while at < size:
                head = file.read(LENGTH + DIGEST)
                length = int.from_bytes(head[:LENGTH], "little")
                content = file.read(length) if len(head) == LENGTH + DIGEST and length < size else b""
                if not content or len(content) < length or bytes.fromhex(checksum(content)) != head[LENGTH:]:
                    if place > 0 and at + len(head) + length <= size:  # of full length, so no interruption cut it off
                        known = f"{self.path} is damaged after its first {place - 1} runs"
                        validate.warn(f"{known}; the others are made again")
                    break
                metadata = _unpacked(content, self.path)[0]
                if place == 0:
                    self._check_identity(what, metadata)
                else:
                    self._found[str(metadata.get("key"))] = (at + LENGTH + DIGEST, length)
                at, place = at + LENGTH + DIGEST + length, place + 1
        if place == 0:
            raise self._not_runs()
        return at

    def _not_runs(self) -> ValueError:
        return ValueError(f"{self.path} does not hold runs of fastsched; remove it, or name another file")

    def _check_identity(self, what: dict[str, Any], found: dict[str, Any]) -> None:
        if found.get("format") != FORMAT:
            raise self._not_runs()
        for key in sorted({*what, *found}):
            wanted, given = json.loads(json.dumps(what.get(key))), found.get(key)
            if wanted != given:
                known = {"stats": "another measurement", "start": "another start"}
                difference = known.get(key, f"{key} = {given!r}, not {wanted!r}")
                raise ValueError(
                    f"{self.path} holds runs of another call, with {difference}; go on with the same arguments, remove "
                    "it, or name another file"
                )

    def _record(self, first: int, length: int) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(first)
            return file.read(length)

    def _append(self, content: bytes) -> None:
        with named(self.path), open(self.path, "ab") as file:
            file.write(_framed(content))
            file.flush()
            os.fsync(file.fileno())


def logged(run: Run, log: RunLog) -> Run:
    """``run`` with a cache: runs in ``log`` are read from it, and every new run is added to it."""
    return lambda schedule, first, last: log.run(schedule, first, last, partial(run, schedule, first, last))


def _framed(content: bytes) -> bytes:
    return len(content).to_bytes(LENGTH, "little") + bytes.fromhex(checksum(content)) + content


def _packed(tensors: dict[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    from safetensors.torch import save

    return save(tensors, metadata={"fastsched": json.dumps(dict(metadata))})


def _unpacked(content: bytes, path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors.torch import load

    length = int.from_bytes(content[:8], "little")
    header = json_object(content[8 : 8 + length].decode(), path)
    return json_object(header["__metadata__"]["fastsched"], path), load(content)


def _tensors(rollout: Rollout | None) -> dict[str, Tensor]:
    if rollout is None:
        return {}
    found = {"ends": rollout.ends}
    if rollout.evaluations is not None:
        for n, (state, denoised) in enumerate(
            zip(rollout.evaluations.states, rollout.evaluations.denoised, strict=True)
        ):
            found |= {f"state {n}": state, f"denoised {n}": denoised}
    # Copies, because the end may be the last network output itself, and safetensors refuses tensors that share memory.
    return {name: tensor.clone().contiguous() for name, tensor in found.items()}


def _levels(rollout: Rollout | None) -> list[str] | None:
    """Levels of the evaluations as hexadecimal floats, which are exact and can be infinite."""
    if rollout is None or rollout.evaluations is None:
        return None
    return [float(level).hex() for level in rollout.evaluations.s]


def _rollout(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> Rollout | None:
    if metadata["failed"]:
        return None
    levels = metadata["levels"]
    if levels is None:
        return Rollout(tensors["ends"])
    every = lambda name: tuple(tensors[f"{name} {n}"] for n in range(len(levels)))
    return Rollout(tensors["ends"], Evaluations(tuple(map(float.fromhex, levels)), every("state"), every("denoised")))


def _schedule_parts(schedule: Schedule) -> list[bytes]:
    lists = [schedule.sigmas, schedule.timesteps, schedule.weights]
    lists += [] if schedule.network_sigmas is None else [schedule.network_sigmas]
    names = [schedule.solver, schedule.noise, *(["denoiser"] if schedule.decoupled == "denoiser" else [])]
    return [*(name.encode() for name in names), *(b"" if x is None else _bytes(x) for x in lists)]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
