"""Shared by the comparisons of ops: command-line options and the columns of a row."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch

from benchmarks.common import quantiles

KEY = ("device", "threads", "clock", "torch", "commit", "case", "variant")


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of all comparisons; a comparison may add its own."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True)
    made.add_argument("--repeats", type=int, default=9)
    made.add_argument("--dry-run", action="store_true", help="print only")
    made.add_argument("--threads", type=int, help="threads of PyTorch; timings with 1 are steadier on a busy machine")
    made.add_argument("--clock", default="wall", choices=("wall", "cpu"), help="cpu: CPU seconds, not elapsed ones")
    return made


def parsed(made: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the options and set PyTorch's number of threads."""
    options = made.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    return options


def row_of(
    case: object, name: str, taken: np.ndarray, nbytes: int, bandwidth: float | None, clock: str
) -> dict[str, Any]:
    """One variant's timings, and the fraction of a copy's bandwidth at which it reads its bytes."""
    row = {"case": str(case), "variant": name} | quantiles(taken) | {"clock": clock, "bytes": nbytes}
    if bandwidth is not None:
        row["share_of_copy_bandwidth"] = round(nbytes / float(np.median(taken)) / bandwidth, 3)
    return row
