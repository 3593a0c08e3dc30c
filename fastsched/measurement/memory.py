"""Predict how much memory a measurement takes, and compare it with the free memory before the first call.

For each path of a batch, increments and responses are kept: V float32 vectors of d elements. `WORKING` more hold the
solver's states and sums on the device. The memory of the network itself is unknown and not included.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastsched import validate
from fastsched.measurement.path_following import Measurement

#: States per path on the device, in addition to the kept vectors: the noise, the solver's history, two levels' states
#: and outputs, the network's copy of its input, its output, and sums. Allocators counted 12.
WORKING = 13

#: States on the CPU that the checks of the network keep until their last call.
ASKED = 7

#: The fraction of a device's free memory that kept vectors may take by default; the rest is for the network.
FRACTION = 0.5

#: Elements of increments and responses that each process of a group sends at a time: 64 MB.
PIECE = 1 << 24

CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Need:
    """Bytes that a measurement takes without the network: on the device of the states, and on the CPU.

    If the states are on the CPU, all bytes count there.
    """

    device: int
    cpu: int


def need(
    run: Measurement,
    paths: int,
    samples: int,
    elements: int,
    *,
    saved: bool = False,
    gathered: tuple[int, int] = (0, 1),
) -> Need:
    """Peak memory of following ``paths`` at once, of ``samples`` in all.

    With ``saved`` the statistics are saved after each batch, which takes copies of them. ``gathered`` is the number of
    samples whose increments this process receives in the end, and the number of processes in its group.
    """
    state = 4 * elements
    device, rows = WORKING * paths * state, run.rows * paths * state
    cpu = (2 * samples + ASKED) * state  # the ends, and a copy when batches are joined
    cpu += 16 * run.vectors**2 * (samples + paths)  # Gram matrices, and copies when they are made and joined
    held = run.vectors * samples * state if run.keep_vectors else 0
    copies = 3 if saved else 1
    cpu += held * copies
    on_cpu = run.device.type == "cpu" or run.store == "cpu"
    if not on_cpu:
        device += rows
    elif not held:  # otherwise they are the same memory
        cpu += rows
    if run.device.type == "cpu":
        device, cpu = 0, cpu + device
    received, processes = gathered
    if held and processes > 1:
        pieces = 5 * max(4 * PIECE, state) * (processes if received else 1)  # pickled, sent and put into their place
        cpu = max(cpu, held + run.vectors * received * state * copies + pieces)
    return Need(device, cpu)


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device, or on the CPU within the limits of its cgroup; None if unknown."""
    if device.type == "cpu":
        return min((size for size in (_available(), _free_in_cgroup()) if size is not None), default=None)
    module: Any = getattr(torch, device.type, None)
    with contextlib.suppress(AttributeError, RuntimeError, TypeError):
        cached = module.memory_reserved(device) - module.memory_allocated(device)
        return module.mem_get_info(device)[0] + cached
    return None


def with_store(run: Measurement, paths: int, elements: int) -> Measurement:
    """Choose ``store`` if it is None: ``"device"`` if `FRACTION` of its free memory is enough, else ``"cpu"``."""
    if run.store is not None:
        return run
    on_device = replace(run, store="device")
    free = None if run.device.type == "cpu" else free_bytes(run.device)
    wanted = need(on_device, paths, paths, elements).device
    if free is None or wanted <= FRACTION * free:
        return on_device
    validate.warn(
        f"increments and responses are kept in the CPU's memory, because of {_size(free)} free on {run.device} they "
        f'would take {_size(wanted)}; store="device" keeps them there, and fewer paths at once take less',
    )
    return replace(run, store="cpu")


def paths_at_once(
    run: Measurement, most: int, wanted: Callable[[int], Need], samples: int, elements: int, *, chosen: bool
) -> int:
    """How many paths to follow at once: ``most``, or as many as fit into memory if the caller did not choose.

    If they do not fit, a MemoryError says what to lower.
    """
    fits = next((paths for paths in range(most, 0, -1) if not _lacking(run, wanted(paths))), 0)
    if fits == most:
        return most
    if fits == 0 or chosen:
        raise MemoryError(_too_much(run, most, wanted, samples, elements, fits))
    validate.warn(
        f"{fits} paths are followed at once instead of all {most}, which would take {_total(wanted(most))} of memory "
        f"(batch_size={fits})",
    )
    return fits


def check_room(run: Measurement, paths: int, elements: int) -> None:
    """MemoryError, which says what to lower, unless one path for each image of a pipeline's call fits into memory."""
    lacking = _lacking(run, need(run, paths, paths, elements))
    if lacking:
        device, size, free = lacking[0]
        raise MemoryError(
            f"not enough memory: measuring {paths} images a call on {len(run.s)} levels takes {_size(size)} on "
            f"{device}, where {_size(free)} are free; lower prompts_per_call or the images of a call, then levels"
        )


def out_of_memory_message(run: Measurement, paths: int, samples: int, elements: int) -> str:
    """The error message for a measurement that ran out of memory."""
    return (
        f"out of memory: {paths} paths at once over {len(run.s)} levels hold about "
        f"{_total(need(run, paths, samples, elements))} in addition to the network; {_remedies(run, paths)}"
    )


def _lacking(run: Measurement, wanted: Need) -> list[tuple[torch.device, int, int]]:
    """Devices that have too little free memory, with the bytes needed and free there."""
    found = []
    for device, size in ((run.device, wanted.device), (torch.device("cpu"), wanted.cpu)):
        free = free_bytes(device) if size else None
        if free is not None and size > free:
            found.append((device, size, free))
    return found


def _too_much(
    run: Measurement, paths: int, wanted: Callable[[int], Need], samples: int, elements: int, fits: int
) -> str:
    device, size, free = _lacking(run, wanted(paths))[0]
    held = wanted(0).cpu
    remedy = f"batch_size={fits} fits" if fits else _remedies(run, paths)
    if not fits and device.type == "cpu" and run.keep_vectors and held > free / 2:
        remedy = f"increments of {samples} samples take {_size(held)}: lower samples, or keep_increments=False"
    return (
        f"not enough memory: {paths} paths at once over {len(run.s)} levels of {elements:,} elements take "
        f"{_size(size)} in addition to the network, but {_size(free)} are free on {device}; {remedy}"
    )


def _remedies(run: Measurement, paths: int) -> str:
    elsewhere = run.device.type != "cpu" and run.store == "device"
    store = 'pass store="cpu", ' if elsewhere else ""
    return f"{store}lower batch_size (now {paths}), then levels"


def _total(wanted: Need) -> str:
    return _size(wanted.device + wanted.cpu)


def _size(size: float) -> str:
    return f"{size / 2**30:.3g} GiB" if size >= 2**30 else f"{size / 2**20:.3g} MiB"


def _available() -> int | None:
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _free_in_cgroup() -> int | None:
    """Free bytes within the limit of cgroup version 2, which containers use."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        cache = next(
            line for line in (CGROUP / "memory.stat").read_text().splitlines() if line.startswith("inactive_file")
        )
        return limit - used + int(cache.split()[1])
    return None
