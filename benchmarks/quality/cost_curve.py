"""What model calls buy: the error of the fitted solver against all calls that choosing it made.

    python -m benchmarks.quality.cost_curve           # a few minutes on two cores
    python -m benchmarks.quality.cost_curve --plot    # the picture alone

For each denoiser, seed and total, `fastsched.fit(..., solver="fitted", model_calls=TOTAL)` on its own, judged on the
benchmark's noises. Errors are ratios to the best of the six stock solvers' `fastsched.fit` with 1,500 calls at as many
calls to sample, from ``results/quality.csv``; the other methods of that file stand beside it at their own calls. Rows
go to ``results/cost_curve.csv``, the picture to ``docs/cost_curve.png``.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import fastsched as fs
from benchmarks.common import append, environment
from benchmarks.quality import table
from benchmarks.quality.choosing import Chosen
from benchmarks.quality.models import MODELS
from benchmarks.quality.run import REFERENCE, RESULTS, SAMPLES, result
from benchmarks.quality.summary import DOCS
from fastsched.sampling.solvers import FITTED

TOTALS = (60, 100, 200, 400, 800, 1500)
CALLS = (5, 8)
SEEDS = (0, 1, 2)
KEY = ("denoiser", "seed", "calls", "total")
#: Other ways, with a marker for each.
OTHERS = {"paper": "s", "gits": "^", "gits_tuned": "v", "oss": "D", "optimal_schedule": "P", "fit": "X"}


def rows_of(name: str, seed: int) -> list[dict[str, Any]]:
    """Every total and number of steps for one denoiser and seed."""
    torch.set_num_threads(1)
    model = MODELS[name]()
    reference = fs.converged_reference(
        model.denoiser, model.shape, samples=SAMPLES, seed=seed, progress=False, **REFERENCE
    )
    rows = []
    for total, calls in itertools.product(TOTALS, CALLS):
        schedule = fs.fit(model.denoiser, model.shape, calls, FITTED, model_calls=total, seed=seed, progress=False)
        found = result(model, FITTED, Chosen(schedule), reference)
        place = {"denoiser": name, "seed": seed, "calls": calls, "total": total}
        rows.append({**place, "typical_error": found["typical_error"], "mean_error": found["mean_error"]})
    return rows


def best_stock(quality: Iterable[table.Row], method: str = "fit") -> dict[tuple[str, str, str], float]:
    """The least typical error over the stock solvers, by denoiser, seed and calls."""
    found: dict[tuple[str, str, str], float] = {}
    for row in quality:
        if row["method"] == method and row["solver"] != FITTED:
            key = row["denoiser"], row["seed"], row["calls"]
            found[key] = min(found.get(key, np.inf), float(row["typical_error"]))
    return found


def ratios(rows: Iterable[table.Row], best: dict[tuple[str, str, str], float]) -> dict[str, dict[int, float]]:
    """Geometric mean over seeds and calls of the error against the best stock fit, by denoiser and total."""
    logs: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        key = row["denoiser"], row["seed"], row["calls"]
        if key in best:
            each = np.log(float(row["typical_error"]) / best[key])
            logs.setdefault(row["denoiser"], {}).setdefault(int(row["total"]), []).append(float(each))
    return {name: {total: float(np.exp(np.mean(v))) for total, v in found.items()} for name, found in logs.items()}


def other_ways(quality: list[table.Row], best: dict[tuple[str, str, str], float]) -> dict[str, tuple[float, float]]:
    """Of the other methods: the calls that choosing took, and the error of their best stock solver, both averaged."""
    found = {}
    for method in OTHERS:
        own = best_stock(quality, method)
        shared = [key for key in own if key in best and key[2] in map(str, CALLS)]
        spent = [int(row["choosing_calls"]) for row in quality if row["method"] == method and row["solver"] != FITTED]
        if shared and np.mean(spent) > 0:
            found[method] = float(np.mean(spent)), float(np.exp(np.mean([np.log(own[k] / best[k]) for k in shared])))
    return found


def plot() -> None:
    """Write the picture, and print its numbers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    quality = list(table.read(RESULTS / "quality.csv"))
    best = best_stock(quality)
    with (RESULTS / "cost_curve.csv").open(newline="") as file:
        found = ratios(list(csv.DictReader(file)), best)
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    last = 0.0
    for name, line in sorted(found.items(), key=lambda pair: pair[1][TOTALS[0]]):
        ax.plot(list(line), list(line.values()), "-", color="0.7", lw=1)
        last = max(line[TOTALS[0]], 1.45 * last)  # labels beside each other, not on each other
        ax.text(0.93 * TOTALS[0], last, name, fontsize=7, color="0.3", ha="right", va="center")
    ax.set_xlim(left=30)
    mean = {total: float(np.exp(np.mean([np.log(line[total]) for line in found.values()]))) for total in TOTALS}
    ax.plot(list(mean), list(mean.values()), "o-", color="#CC0022", lw=2, label="fs.fit, fitted solver: all denoisers")
    for method, (calls, ratio) in other_ways(quality, best).items():
        ax.plot(calls, ratio, OTHERS[method], color="#332288", ms=7, label=f"{method}, its best stock solver")
    ax.axhline(1, color="k", lw=0.8, ls=":")
    ax.set(xscale="log", yscale="log", xlabel="all model calls that choosing took, counted per sample")
    ax.set_ylabel("typical error against the best stock fs.fit\nwith 1,500 calls")
    ax.set_xticks(
        [60, 100, 200, 400, 800, 1500, 6000, 64000], ["60", "100", "200", "400", "800", "1,500", "6,000", "64,000"]
    )
    ax.minorticks_off()
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, frameon=False)
    figure.savefig(DOCS / "cost_curve.png", dpi=130)
    print({total: round(ratio, 3) for total, ratio in mean.items()})
    for name, line in found.items():
        print(name, {total: round(ratio, 2) for total, ratio in line.items()})
    print(other_ways(quality, best))


def main() -> None:
    """Run what is asked for, and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", action="store_true", help="draw what was run")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    if not options.plot:
        units = list(itertools.product(MODELS, options.seeds))
        with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            for rows in tqdm(pool.map(rows_of, *zip(*units, strict=True)), total=len(units)):
                append("cost_curve", [row | {"commit": environment()["commit"]} for row in rows], KEY)
    plot()


if __name__ == "__main__":
    main()
