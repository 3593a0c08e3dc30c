"""Try launches of the Gram kernel on the GPU at hand, and print them from best to worst.

``python -m benchmarks.speed.tune --levels 64 --dtype bfloat16`` tunes what `fastsched.measure` launches: states at each
level, sensitivity vectors ``W``, one matrix per sample. ``--no-vectors`` and ``--mean`` leave these out. Nothing is
written: a winner without spills (tests/kernels/test_kernel_compile.py) is entered in ``kernels/config.py`` by hand.
"""

from __future__ import annotations

import argparse
import itertools

import numpy as np
import torch

from benchmarks.common import copy_bandwidth, environment, interleaved, table
from benchmarks.speed.level_gram import Case
from fastsched.kernels import config, level_gram


def candidates(levels: int) -> list[config.GramLaunch]:
    """Launches to try."""
    rows = (64,) if levels <= 64 else (64, 128)
    grid = itertools.product(rows, (16, 32, 64, 128), (4, 8), (2, 3, 4), (1, 2, 3))
    return [config.GramLaunch(*fields) for fields in grid]


def main() -> None:
    """Time every launch that the GPU takes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--levels", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--states", default="levels", choices=("none", "shared", "levels"))
    parser.add_argument("--vectors", action=argparse.BooleanOptionalAction, default=True, help="sensitivity vectors")
    parser.add_argument("--mean", action="store_true", help="one matrix for all samples")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--precision", default="bf16x3")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    dtype, d = getattr(torch, options.dtype), (1 << 23) // options.samples
    case = Case(options.levels, options.samples, d, options.states, dtype, apart=1e-2)
    R, X, a, c = case.inputs("cuda")
    W = case.vectors("cuda") if options.vectors else None
    nbytes = case.nbytes(X) + (0 if W is None else W.nbytes)
    R = level_gram.columns_view(R, options.mean)
    X, W = (None if t is None else level_gram.columns_view(t, options.mean) for t in (X, W))
    steps = level_gram.coefficient_steps(torch.stack([a, c])).cuda()
    bandwidth, rows = copy_bandwidth(), []
    for launch in candidates(options.levels):
        try:
            taken = interleaved(
                {"": lambda launch=launch: level_gram.launch(R, X, W, steps, options.precision, launch)},
                "cuda",
                options.repeats,
            )[""]
        except Exception as error:  # out of shared memory or registers
            rows.append({"launch": launch, "p50_ms": type(error).__name__, "share": -1.0})
            continue
        p50 = float(np.median(taken))
        rows.append({"launch": launch, "p50_ms": round(p50 * 1e3, 3), "share": round(nbytes / p50 / bandwidth, 3)})
    print(case, "W" * options.vectors, "mean" if options.mean else "per sample", environment("cuda"))
    print(table(sorted(rows, key=lambda row: -row["share"]), ("share", "p50_ms", "launch")))


if __name__ == "__main__":
    main()
