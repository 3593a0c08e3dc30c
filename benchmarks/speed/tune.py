"""Try launches of the Gram kernel on the GPU at hand, and print the best.

``python -m benchmarks.speed.tune`` tunes what `fastsched.measure` launches: Gram matrices of 61 and of 93 float32
vectors, one for each sample. ``--states levels`` tunes those of increments between levels, ``--mean`` one matrix for
all samples together. All launches are compiled first, in as many processes as there are cores, to use little GPU time.
Nothing is written: a winner without spills (tests/kernels/test_kernel_compile.py) is entered in
``kernels/config.py`` by hand.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import copy_bandwidth, environment, interleaved, table
from benchmarks.speed.level_gram import Case
from fastsched.kernels import config, level_gram

#: Elements of a level in the timed inputs; 48 such levels in float32 are 1.2 GB.
ELEMENTS = 3 << 21


@dataclass(frozen=True)
class Entry:
    """An entry of the launch table to tune, and the inputs for its timing."""

    levels: int
    dtype: str = "float32"
    states: str = "vectors"
    mean: bool = False
    samples: int = 4
    precision: str = "bf16x3"

    def inputs(self, elements: int) -> tuple[Tensor, Tensor | None, Tensor, int]:
        """``R``, ``X`` as the kernel views them, the coefficients, and the bytes to be read."""
        d = elements // self.samples // 16 * 16
        states = "none" if self.states == "vectors" else self.states
        case = Case(self.levels, self.samples, d, states, getattr(torch, self.dtype), apart=1e-2)
        R, X, a, c = case.inputs("cuda")
        return (
            level_gram.columns_view(R, self.mean),
            None if X is None else level_gram.columns_view(X, self.mean),
            level_gram.coefficient_steps(torch.stack([a, c])).cuda(),
            case.nbytes(X),
        )


def candidates(entry: Entry) -> list[config.GramLaunch]:
    """Launches to try. Launches that differ only in ``programs`` share a kernel."""
    rows = (64,) if entry.levels <= 64 else (64, 128)
    grid = itertools.product(rows, (32, 64, 128), (4, 8), (1, 2, 3, 4), (1, 2, 3, 4))
    return [config.GramLaunch(*fields) for fields in grid]


def compiled(entry: Entry, launches: list[config.GramLaunch]) -> None:
    """Compile launches by running them on little data; launches that fail are reported later by `timed`."""
    R, X, steps, _ = entry.inputs(1 << 14)
    for launch in launches:
        try:
            level_gram.launch(R, X, steps, entry.precision, launch, vectors=entry.states == "vectors")
        except Exception:  # out of shared memory or registers: `timed` reports it
            continue
    torch.cuda.synchronize()


def timed(entry: Entry, repeats: int, bandwidth: float) -> list[dict]:
    """One row per launch, the fastest first."""
    R, X, steps, nbytes = entry.inputs(ELEMENTS * 48 // entry.levels)
    plain = entry.states == "vectors"
    run = lambda launch: level_gram.launch(R, X, steps, entry.precision, launch, vectors=plain)
    rows = []
    for launch in candidates(entry):
        try:
            taken = interleaved({"": lambda launch=launch: run(launch)}, "cuda", repeats)[""]
        except Exception as error:  # out of shared memory or registers
            rows.append({"launch": launch, "p50_ms": type(error).__name__, "share": -1.0})
            continue
        p50 = float(np.median(taken))
        rows.append({"launch": launch, "p50_ms": round(p50 * 1e3, 3), "share": round(nbytes / p50 / bandwidth, 3)})
    return sorted(rows, key=lambda row: -row["share"])


def entries(options: argparse.Namespace) -> list[Entry]:
    """The entries that the options name."""
    grid = itertools.product(options.levels, options.dtypes)
    rest = {"states": options.states, "mean": options.mean, "samples": options.samples}
    return [Entry(levels, dtype, **rest, precision=options.precision) for levels, dtype in grid]


def main() -> None:
    """Compile and time all candidate launches."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--levels", type=int, nargs="+", default=[61, 93], help="numbers of levels, or of vectors")
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--states", default="vectors", choices=("vectors", "none", "shared", "levels"))
    parser.add_argument("--mean", action="store_true", help="one matrix for all samples")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--precision", default="bf16x3")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--show", type=int, default=12, help="how many of the best to print")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    start, chosen = time.perf_counter(), entries(options)
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        parts = [
            (entry, candidates(entry)[n : n + 4])  # four that share a kernel
            for entry in chosen
            for n in range(0, len(candidates(entry)), 4)
        ]
        list(pool.map(compiled, *zip(*parts, strict=True)))
    print(f"compiled in {time.perf_counter() - start:.0f} s", environment("cuda"), flush=True)
    bandwidth = copy_bandwidth()
    for entry in chosen:
        print(
            entry,
            table(timed(entry, options.repeats, bandwidth)[: options.show], ("share", "p50_ms", "launch")),
            sep="\n",
            flush=True,
        )


if __name__ == "__main__":
    main()
