"""The limit of nodes: coordinate descent of a schedule on the sampler's own typical error, for a few cells.

    python -m benchmarks.quality.limit

Each cell takes about 10^5 network evaluations, over 200 noises that no other part of the benchmark sees. The result
shows how much better other methods could still become. Schedules go to ``benchmarks/results/quality_limit.csv``; cells
that the file already has are not run again. `benchmarks.quality.run` evaluates these schedules beside the others.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

import fastsched as fs
from benchmarks.common import RESULTS, append, read
from benchmarks.quality.baselines import highest_finite
from benchmarks.quality.choosing import Choosers
from benchmarks.quality.models import MODELS
from fastsched.selection.descent import log_gaps

CELLS = (("ddim", 8), ("dpmpp_2m", 6), ("dpmpp_2m", 10), ("ipndm", 8))
SAMPLES = 200
SEED = 1000
STARTS = ("fit", "gits", "kl_optimal_to_zero", "exponential_to_zero", "karras_3_to_zero")
PATH = RESULTS / "quality_limit.csv"
#: Sizes of a move, tried in this order, as fractions of the gap in ``log s`` to a neighbour.
MOVES = (0.4, 0.2, 0.1, 0.05)


def descend(error: Callable[[Tensor], float], s: Tensor, low: float, high: float) -> tuple[Tensor, float, int]:
    """Move one inner node of levels [steps + 1] at a time by `MOVES`, and keep a move if the error falls.

    `log_gaps` defines the gaps at both ends. Returns the levels, their error, and the number of evaluations.
    """
    best, evaluations = error(s), 1
    for share in MOVES:
        for _ in range(3):
            before = best
            for n in range(1, len(s) - 1):
                for direction in (1, -1):
                    moved = _moved(s, n, direction * share, low, high)
                    value = error(moved)
                    evaluations += 1
                    if value < best:
                        s, best = moved, value
                        break
            if best > 0.99 * before:
                break
    return s, best, evaluations


def _moved(s: Tensor, n: int, share: float, low: float, high: float) -> Tensor:
    """Levels with node ``n`` moved by a share of the gap to its noisier (positive) or cleaner neighbour."""
    noisier, cleaner = log_gaps(s.numpy(), low, high)
    moved = s.clone()
    moved[n] *= math.exp(share * (noisier if share > 0 else cleaner)[n - 1])
    return moved


def find(name: str, solver: str, calls: int) -> dict[str, object]:
    """The limit of one cell, from the best of `STARTS`, as a row of the results."""
    model = MODELS[name]()
    process = model.denoiser.process
    reference = model.converged(SAMPLES, SEED)

    def error(s: Tensor) -> float:
        ends = fs.sample(model.denoiser, process.sampler_sigma(s), solver, reference.noise)
        return fs.metrics.geometric_mean(fs.metrics.squared_distances(ends, reference.ends))

    choosers = Choosers(model, SEED).choose(solver, calls)
    starts = [process.level(choosers[start]().nodes) for start in STARTS]
    start = min(starts, key=error)
    s, best, evaluations = descend(error, start, process.s_min, highest_finite(process))
    return {
        "denoiser": name,
        "solver": solver,
        "calls": calls,
        "typical_error": f"{best:.4g}",
        "start_error": f"{error(start):.4g}",
        "model_calls": evaluations * calls * SAMPLES,
        "sigmas": " ".join(f"{value:.6g}" for value in process.sampler_sigma(s).tolist()),
    }


def limit_schedules(name: str, solver: str, calls: int) -> dict[str, Tensor]:
    """``{"limit": sigmas}`` if the limit of the cell is known, else an empty dictionary."""
    sigmas = _known().get((name, solver, str(calls)))
    return {} if sigmas is None else {"limit": sigmas}


@functools.lru_cache(maxsize=1)
def _known() -> dict[tuple[str, str, str], Tensor]:
    sigmas = lambda row: torch.tensor([float(value) for value in row["sigmas"].split()], dtype=torch.float64)
    return {(row["denoiser"], row["solver"], row["calls"]): sigmas(row) for row in read(PATH)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    cells = [(name, *cell) for cell in CELLS for name in args.models]
    missing = [cell for cell in cells if not limit_schedules(*cell)]
    for cell in tqdm(missing, desc="limit", unit="cell"):
        append("quality_limit", [find(*cell)], ("denoiser", "solver", "calls"))


if __name__ == "__main__":
    main()
