"""The benchmark's results: one CSV, a row for each denoiser, solver, number of model calls, seed and method."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common

KEY: tuple[str, ...] = ("denoiser", "solver", "calls", "seed", "method")
COLUMNS: tuple[str, ...] = (
    *KEY,
    "steps",
    "model_calls",
    "typical_error",
    "mean_error",
    "frechet",
    "sliced_wasserstein",
    "choosing_calls",
    "choosing_seconds",
    "predicted",
    "commit",
)

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """The complete rows of a file, with all values as text. Later rows replace earlier ones with the same key."""
    whole = [row for row in common.read(path) if None not in row.values() and None not in row]
    return list({tuple(row[name] for name in KEY): row for row in whole}.values())


def write(path: Path, rows: Iterable[Row]) -> None:
    """Replace a file by these rows in one step, after all of them are written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(unfinished, path)


def append(path: Path, rows: Sequence[Row]) -> None:
    """Add rows at the end of a file that `write` made."""
    with path.open("a", newline="") as file:
        csv.DictWriter(file, COLUMNS, lineterminator="\n").writerows(rows)
