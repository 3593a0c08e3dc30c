"""Shared by all benchmarks: interleaved timing, a description of the machine, and rows of results."""

from __future__ import annotations

import csv
import io
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastsched.sampling.display import aligned
from fastsched.sampling.files import write_whole

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"

Row = dict[str, Any]

#: Seconds after which a function is not timed again, though each is timed at least three times.
BUDGET = 60.0


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    device: str = "cpu",
    repeats: int = 9,
    clock: str = "wall",
) -> dict[str, np.ndarray]:
    """Seconds of every call of functions, by name, timed in turn so that drift of the machine affects all alike.

    Each is called once first, untimed. On a GPU the cache is overwritten before each call and CUDA events take the
    time. On the CPU the clock is ``"wall"``, or ``"cpu"``: CPU seconds of all threads of this process, which depend
    less on the load of the machine.
    """
    clear = torch.empty(1 << 28, dtype=torch.int8, device=device) if device == "cuda" else None
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            if len(seconds[name]) >= 3 and sum(seconds[name]) > BUDGET:
                continue
            seconds[name].append(_timed(function, clear, clock))
    return {name: np.array(values) for name, values in seconds.items()}


def _timed(function: Callable[[], Any], clear: torch.Tensor | None, clock: str) -> float:
    if clear is None:
        now = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
        start = now()
        function()
        return now() - start
    clear.zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def quantiles(seconds: np.ndarray) -> dict[str, float]:
    """Return ``p20_ms``, ``p50_ms``, ``p80_ms``."""
    return {f"p{p}_ms": round(float(np.percentile(seconds, p)) * 1e3, 4) for p in (20, 50, 80)}


def copy_bandwidth() -> float:
    """Bytes a second, read plus written, of a plain copy of 2 GB on the GPU."""
    source = torch.empty(int(2e9), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    seconds = interleaved({"copy": lambda: target.copy_(source)}, "cuda", repeats=20)["copy"]
    return 2 * source.numel() / float(np.median(seconds))


def environment(device: str = "cpu") -> dict[str, str]:
    """Device, versions and commit of a row; ``+`` marks uncommitted changes."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {_cores()} cores",
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "commit": _commit(),
    }


def read(path: Path) -> list[Row]:
    """The complete rows of a CSV, with all values as text; empty if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row and None not in row.values()]


def append(results: str | Path, rows: Sequence[Row], key: tuple[str, ...]) -> None:
    """Add rows to a CSV, or to ``results/<name>.csv``; a row replaces the one with the same ``key`` columns."""
    path = results if isinstance(results, Path) else RESULTS / f"{results}.csv"
    merged = {tuple(str(row.get(k, "")) for k in key): row for row in [*read(path), *rows]}
    columns = list(dict.fromkeys(column for row in merged.values() for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(merged.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.getvalue().encode())


def table(rows: Sequence[Row], columns: tuple[str, ...]) -> str:
    """Lay rows out for a terminal."""
    return aligned([columns, *([str(row.get(c, "")) for c in columns] for row in rows)], left=len(columns))


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows])


def geometric(values: Iterable[float]) -> float:
    """The geometric mean of the values that are not NaN; NaN if there are none."""
    known = [value for value in values if not math.isnan(value)]
    return math.exp(sum(map(math.log, known)) / len(known)) if known else math.nan


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _triton_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return ""


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "../fastsched", "../kernels", ".")
    return git("rev-parse", "--short", "HEAD") + "+" * bool(changed)
