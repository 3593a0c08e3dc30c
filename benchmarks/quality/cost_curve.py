"""The error of the fitted solver against the total number of model calls that choosing its schedule took.

    python -m benchmarks.quality.cost_curve                     # a few minutes on two cores
    python -m benchmarks.quality.cost_curve --weights FOLDER    # networks of benchmarks/pretrained
    python -m benchmarks.quality.cost_curve --plot              # the picture alone

Runs `fastsched.fit(..., solver="fitted", model_calls=TOTAL)` for each denoiser, seed and total, and judges it on the
benchmark's noises. Errors are divided by the best of the six stock solvers' `fastsched.fit` with 1,500 calls at as many
calls to sample. For the benchmark's denoisers these errors are in ``results/quality.csv``; for others' networks they
are computed here. The picture also shows the other methods of that file, on the six denoisers, at the calls that they
take. Rows go to ``results/cost_curve.csv``, the picture to ``docs/cost_curve.png``.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.common import DOCS, Row, append, environment, geometric, read
from benchmarks.pretrained.networks import builders, find_zoo
from benchmarks.quality import glossary
from benchmarks.quality.choosing import Choosers
from benchmarks.quality.models import MODELS, Model
from benchmarks.quality.run import REFERENCE, RESULTS, SAMPLES, SOLVERS, result, steps_within
from fastsched.sampling.solvers import FITTED

TOTALS = (60, 100, 200, 300, 400, 800, 1500)
CALLS = (5, 8)
SEEDS = (0, 1, 2)
#: Image networks that others trained.
NETWORKS = ("cifar-grey", "mnist-flow")
#: Denoisers of two-dimensional data, for which fits with few calls are much worse.
PLANE = ("flow",)
KEY = ("denoiser", "solver", "seed", "calls", "total")
#: Markers of the other methods.
OTHERS = {
    "dmn_shipped": "<",
    "paper": "s",
    "gits": "^",
    "gits_tuned": "v",
    "oss": "D",
    "optimal_schedule": "P",
    "fit": "X",
}
#: A total whose tick gets no label, because the next label is too near.
UNLABELLED = 300
#: Least distance between the names of lines, in the natural logarithm of the error.
LABELS_APART = 0.25
#: Position on the logarithmic axis of methods that take no calls.
NO_CALLS = 20

Cell = tuple[str, str]


def model_of(name: str, weights: Path | None) -> Model:
    """A denoiser of the benchmark, or with ``weights`` a network that others trained."""
    if weights is None:
        return MODELS[name]()
    return builders(find_zoo(weights))[name]()


def rows_of(name: str, seed: int, weights: Path | None = None) -> list[Row]:
    """Rows for every total and number of steps; for others' networks also the fits of the stock solvers."""
    torch.set_num_threads(1)
    model = model_of(name, weights)
    choosers = Choosers(model, seed)
    reference = model.converged(SAMPLES, seed, **REFERENCE)
    wanted = [(FITTED, *each) for each in itertools.product(CALLS, TOTALS)]
    if weights is not None:
        wanted += [(solver, calls, TOTALS[-1]) for solver in SOLVERS if solver != FITTED for calls in CALLS]
    rows = []
    for solver, calls, total in wanted:
        steps = steps_within(solver, calls)
        chosen = (
            choosers.fit_within(total, FITTED, steps) if solver == FITTED else choosers.choose(solver, steps)["fit"]()
        )
        found = result(model, solver, chosen, reference)
        place = {"denoiser": name, "solver": solver, "seed": seed, "calls": calls, "total": total}
        rows.append({**place, "typical_error": found["typical_error"], "mean_error": found["mean_error"]})
    return rows


def best_stock(quality: Iterable[Row], method: str = "fit") -> dict[tuple[str, str, str], float]:
    """The least typical error over the stock solvers, by denoiser, seed and calls."""
    found: dict[tuple[str, str, str], float] = {}
    for row in quality:
        if row["method"] == method and row["solver"] != FITTED:
            key = row["denoiser"], row["seed"], row["calls"]
            found[key] = min(found.get(key, np.inf), float(row["typical_error"]))
    return found


def ratios(rows: Iterable[Row], best: dict[tuple[str, str, str], float]) -> dict[Cell, dict[int, float]]:
    """The fitted solver's error over the best stock fit's, averaged over seeds, by denoiser and calls, and total."""
    found: dict[Cell, dict[int, list[float]]] = {}
    for row in rows:
        key = row["denoiser"], row["seed"], row["calls"]
        if key in best and row["solver"] == FITTED:
            totals = found.setdefault((key[0], key[2]), {})
            totals.setdefault(int(row["total"]), []).append(float(row["typical_error"]) / best[key])
    return {cell: {total: geometric(each) for total, each in totals.items()} for cell, totals in found.items()}


def over_cells(found: dict[Cell, dict[int, float]], names: Iterable[str]) -> dict[int, tuple[float, float]]:
    """The geometric mean over the cells of these denoisers, and the worst cell, by total."""
    cells = [line for (name, _), line in found.items() if name in names]
    values = {total: [line[total] for line in cells if total in line] for total in TOTALS}
    return {total: (geometric(each), max(each)) for total, each in values.items() if each}


def other_ways(quality: list[Row], best: dict[tuple[str, str, str], float]) -> dict[str, tuple[float, float]]:
    """By method, the mean calls that choosing took and the geometric mean of the best stock solver's error ratio."""
    found = {}
    for method in OTHERS:
        own = best_stock(quality, method)
        shared = [key for key in own if key in best and key[2] in map(str, CALLS)]
        spent = [int(row["choosing_calls"]) for row in quality if row["method"] == method and row["solver"] != FITTED]
        if shared:
            found[method] = float(np.mean(spent)), geometric(own[key] / best[key] for key in shared)
    return found


def known() -> tuple[dict[Cell, dict[int, float]], dict[str, tuple[float, float]]]:
    """`ratios` and `other_ways` of all recorded rows."""
    quality = read(RESULTS / "quality.csv")
    curve = read(RESULTS / "cost_curve.csv")
    stock = [row | {"method": "fit"} for row in curve if row["solver"] != FITTED]
    best = best_stock(quality)
    return ratios(curve, best | best_stock(stock)), other_ways(quality, best)


def show(found: dict[Cell, dict[int, float]], others: dict[str, tuple[float, float]]) -> None:
    """Print the numbers of the picture."""
    names = {name for name, _ in found}
    groups = {"all": names, "but of the plane": names - set(PLANE), "others' networks": names & set(NETWORKS)}
    for title, group in {**groups, **{name: {name} for name in sorted(names)}}.items():
        line = over_cells(found, group)
        print(title, {total: f"{mean:.3g} ({worst:.3g})" for total, (mean, worst) in line.items()})
    print({method: f"{ratio:.3g} at {calls:,.0f}" for method, (calls, ratio) in others.items()})


def plot(found: dict[Cell, dict[int, float]], others: dict[str, tuple[float, float]]) -> None:
    """Write the picture."""
    from matplotlib.figure import Figure
    from scipy.optimize import isotonic_regression

    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    ax = figure.subplots()
    lines = {name: over_cells(found, {name}) for name, _ in found}
    ordered = sorted(lines, key=lambda name: lines[name][TOTALS[0]])
    firsts = np.log([lines[name][TOTALS[0]][0] for name in ordered])
    apart = LABELS_APART * np.arange(len(ordered))
    places = np.exp(isotonic_regression(firsts - apart).x + apart)  # the nearest places at which names do not overlap
    for name, place in zip(ordered, places, strict=True):
        means = [mean for mean, _ in lines[name].values()]
        ax.plot(list(lines[name]), means, "--" if name in NETWORKS else "-", color="0.7", lw=1)
        ax.text(0.93 * TOTALS[0], place, name, fontsize=7, color="0.3", ha="right", va="center")
    ax.set_xlim(left=NO_CALLS / 1.15)
    for names, style, label in ((lines, "o-", "all"), (set(lines) - set(PLANE), "o:", "all but flow")):
        mean = [value for value, _ in over_cells(found, names).values()]
        ax.plot(TOTALS, mean, style, color="#CC0022", lw=2, label=f"fs.fit, fitted solver: {label}")
    for method, (calls, ratio) in others.items():
        label = f"{glossary.title(method)}, its best stock solver"
        ax.plot(calls or NO_CALLS, ratio, OTHERS[method], color="#332288", ms=7, label=label)
    ax.axhline(1, color="k", lw=0.8, ls=":")
    ax.set(xscale="log", yscale="log", xlabel="all model calls that choosing took, counted per sample")
    ax.set_ylabel("typical error against the best stock fs.fit\nwith 1,500 calls")
    ticks = [NO_CALLS, *TOTALS, 6000, 64000]
    labels = ["" if total == UNLABELLED else f"{total:,}" for total in ticks[1:]]
    ax.set_xticks(ticks, ["none", *labels])
    ax.tick_params(axis="x", labelsize=8)
    ax.minorticks_off()
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=7.5, frameon=False, loc="lower right", labelspacing=0.25)
    figure.savefig(DOCS / "cost_curve.png", dpi=130)


def main() -> None:
    """Run the benchmark and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", action="store_true", help="only draw the recorded results")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--weights", type=Path, default=None, help="others' networks: a folder with zoo.py in or beside it"
    )
    options = parser.parse_args()
    if not options.plot:
        commit = environment()["commit"]
        names = MODELS if options.weights is None else NETWORKS
        units = [(name, seed, options.weights) for name, seed in itertools.product(names, options.seeds)]
        with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            for rows in tqdm(pool.map(rows_of, *zip(*units, strict=True)), total=len(units)):
                append("cost_curve", [row | {"commit": commit} for row in rows], KEY)
    found, others = known()
    show(found, others)
    plot(found, others)


if __name__ == "__main__":
    main()
