"""Try launches of the Gram kernel on the GPU at hand, and print them from best to worst.

``python -m benchmarks.speed.tune --levels 64 --dtype bfloat16``. Nothing is written: a winner that does not
spill (tests/test_kernel_compile.py) is entered in ``kernels/config.py`` by hand.
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
    """Launches worth trying."""
    rows = (64,) if levels <= 64 else (64, 128)
    grid = itertools.product(rows, (16, 32, 64, 128), (4, 8), (2, 3, 4), (1, 2, 3))
    return [config.GramLaunch(*fields) for fields in grid]


def main() -> None:
    """Time every candidate that launches."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--levels", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--states", default="levels", choices=("none", "shared", "levels"))
    parser.add_argument("--precision", default="bf16x3")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    case = Case(options.levels, d=1 << 21, states=options.states, dtype=getattr(torch, options.dtype), apart=1e-2)
    R, X, a, c = case.inputs("cuda")
    nbytes = case.nbytes(X)
    R, X = level_gram.columns_view(R, True), None if X is None else level_gram.columns_view(X, True)
    steps = level_gram.coefficient_steps(torch.stack([a, c])).cuda()
    bandwidth, rows = copy_bandwidth(), []
    for launch in candidates(options.levels):
        try:
            taken = interleaved(
                {"": lambda launch=launch: level_gram.launch(R, X, None, steps, options.precision, launch)},
                "cuda",
                options.repeats,
            )[""]
        except Exception as error:  # out of shared memory or registers: not a candidate after all
            rows.append({"launch": launch, "p50_ms": type(error).__name__, "share": -1.0})
            continue
        p50 = float(np.median(taken))
        rows.append({"launch": launch, "p50_ms": round(p50 * 1e3, 3), "share": round(nbytes / p50 / bandwidth, 3)})
    print(case, environment("cuda"))
    print(table(sorted(rows, key=lambda row: -row["share"]), ("share", "p50_ms", "launch")))


if __name__ == "__main__":
    main()
