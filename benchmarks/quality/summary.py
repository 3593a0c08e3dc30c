"""The page of the quality benchmark: ratios over all cells, cells that are lost, tables and a plot.

    python -m benchmarks.quality.summary

reads ``benchmarks/results/quality.csv`` and writes ``docs/quality.md`` and ``docs/quality.png``. A *cell* is a
denoiser, a solver and a number of model calls; its error under a method is the geometric mean over seeds. Ratios are
geometric means over cells.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.common import DOCS, RESULTS, Row, geometric, markdown, read
from benchmarks.quality import glossary, gradient_limit
from benchmarks.quality.choosing import OURS
from benchmarks.quality.figure import plot
from fastsched.sampling.solvers import FITTED

METRICS = {"typical_error": "typical", "mean_error": "mean", "frechet": "Frechet"}
#: A cell counts as lost if the ratio to the best other method is above this.
LOST = 1.05
#: What methods are compared with in `breakdown`.
AGAINST = {"best": "best other method", "karras_7": "karras"}
#: The methods that tune by running the sampler.
FITS = ("fit", "fit_decoupled")

Cell = tuple[str, str, int]  # denoiser, solver, model calls


@dataclass(frozen=True)
class Results:
    """Values of every metric, by cell and method, one for each seed."""

    values: dict[str, dict[Cell, dict[str, list[float]]]]  #: ``values[metric][cell][method]``, a list over seeds
    cells: tuple[Cell, ...]  #: the cells of stock solvers
    methods: tuple[str, ...]  #: all methods
    fitted: tuple[Cell, ...] = ()  #: the cells of the fitted solver, for which only fastsched chooses schedules

    @classmethod
    def read(cls, path: Path) -> Results:
        """The results in a CSV of `benchmarks.quality.run`, only of seeds that all methods of the cell have run."""
        names = (*METRICS, "sliced_wasserstein", "choosing_calls", "choosing_seconds", "predicted")
        values: dict[str, dict[Cell, dict[str, list[float]]]] = {name: {} for name in names}
        methods: dict[str, None] = {}
        rows = read(path)
        seeds: dict[Cell, dict[str, set[str]]] = {}
        for row in rows:
            seeds.setdefault(_cell(row), {}).setdefault(row["method"], set()).add(row["seed"])
        shared = {cell: set.intersection(*found.values()) for cell, found in seeds.items()}
        for row in rows:
            if row["seed"] not in shared[_cell(row)]:
                continue
            methods[row["method"]] = None
            for name in names:
                if row[name]:
                    by_method = values[name].setdefault(_cell(row), {})
                    by_method.setdefault(row["method"], []).append(float(row[name]))
        cells = tuple(values["typical_error"])
        stock = tuple(cell for cell in cells if cell[1] != FITTED)
        return cls(values, stock, tuple(methods), tuple(cell for cell in cells if cell[1] == FITTED))

    @property
    def baselines(self) -> tuple[str, ...]:
        """The methods that are neither fastsched's nor the limit."""
        return tuple(name for name in self.methods if name not in OURS and name != "limit")

    def error(self, metric: str, cell: Cell, method: str) -> float:
        """The geometric mean over seeds; NaN if the method was not run."""
        found = self.values[metric].get(cell, {}).get(method)
        return geometric(max(value, 1e-30) for value in found or ())

    def best(self, metric: str, cell: Cell, methods: Sequence[str] = ()) -> tuple[str, float]:
        """The method with the least error in a cell and its error, of ``methods``, or of those that are not ours."""
        errors = {name: self.error(metric, cell, name) for name in methods or self.baselines}
        known = {name: value for name, value in errors.items() if not np.isnan(value)}
        name = min(known, key=known.__getitem__)
        return name, known[name]

    def best_over_solvers(self, metric: str, cell: Cell, methods: Sequence[str], solvers: Sequence[str] = ()) -> float:
        """The least error over stock solvers (or over ``solvers``) for the denoiser and model calls of a cell."""
        alike = [c for c in self.cells if (c[0], c[2]) == (cell[0], cell[2]) and (not solvers or c[1] in solvers)]
        errors = [self.error(metric, other, method) for other in alike for method in methods]
        return min((error for error in errors if not np.isnan(error)), default=np.nan)

    def ratio(self, metric: str, cell: Cell, method: str, against: str) -> float:
        """A method's error over that of ``against``; ``"best"`` means the cell's `best` other method."""
        other = self.best(metric, cell)[1] if against == "best" else self.error(metric, cell, against)
        return self.error(metric, cell, method) / other

    def ratios(self, metric: str, method: str, cells: Iterable[Cell]) -> list[float]:
        """A method's errors over those of the `best` other methods, in the cells where it was run."""
        found = [self.ratio(metric, cell, method, "best") for cell in cells]
        return [ratio for ratio in found if not np.isnan(ratio)]

    def mean_ratio(self, metric: str, method: str, against: str, cells: Iterable[Cell] | None = None) -> float:
        """The geometric mean of `ratio` over cells where both are known."""
        return geometric(self.ratio(metric, cell, method, against) for cell in cells or self.cells)

    def spread(self, method: str, cells: Iterable[Cell]) -> float:
        """Standard deviation over seeds of the logarithm of the error, as a root mean square over cells."""
        found = [self.values["typical_error"][cell].get(method, ()) for cell in cells]
        logs = [np.log(values).var(ddof=1) for values in found if len(values) > 1]
        return float(np.sqrt(np.mean(logs))) if logs else np.nan

    def rank_correlation(self, denoiser: str, method: str, metric: str) -> float:
        """Spearman's correlation of predicted and actual error over the cells of a denoiser."""
        from scipy.stats import spearmanr

        cells = [cell for cell in self.cells if cell[0] == denoiser]
        pairs = [(self.error("predicted", cell, method), self.error(metric, cell, method)) for cell in cells]
        known = np.array([pair for pair in pairs if not np.isnan(pair).any()])
        return float(np.asarray(spearmanr(known[:, 0], known[:, 1]))[0]) if len(known) > 2 else np.nan


def headline(results: Results) -> str:
    """Methods of fastsched against the best other method of each cell, karras, and the limit of nodes."""
    rows = []
    for method in OURS[::-1]:
        for metric, name in METRICS.items():
            if not any(method in found for found in results.values[metric].values()):
                continue
            ratios = results.ratios(metric, method, results.cells)
            against = [results.mean_ratio(metric, method, other) for other in ("best", "karras_7", "limit")]
            lost = sum(ratio > LOST for ratio in ratios)
            figures = [f"{value:.3f}" for value in against]
            rows.append([glossary.title(method), name, *figures, f"{lost} of {len(ratios)}"])
    return markdown(["method", "error", "best other method", "karras", "limit", "cells above 1.05"], rows)


def standings(results: Results, methods: Sequence[str], cells: Sequence[Cell]) -> str:
    """Errors of methods over those of karras, how often each method is best, and the cost of choosing."""
    shared = [name for name in results.methods if name != "limit"]
    wins = [results.best("typical_error", cell, shared)[0] for cell in cells]
    rows = []
    for name in sorted(methods, key=lambda n: results.mean_ratio("typical_error", n, "karras_7", cells)):
        ratios = [results.mean_ratio(metric, name, "karras_7", cells) for metric in METRICS]
        calls = [value for cell in cells for value in results.values["choosing_calls"][cell].get(name, ())]
        seconds = [value for cell in cells for value in results.values["choosing_seconds"][cell].get(name, ())]
        cost = [f"{np.max(calls):,.0f}", f"{np.max(seconds):.2g}"]
        spread = f"{results.spread(name, cells):.2f}"
        rows.append([glossary.title(name), *(f"{r:.3f}" for r in ratios), str(wins.count(name)), spread, *cost])
    header = ["method", *METRICS.values(), "best in cells", "spread", "calls", "seconds"]
    return markdown(header, rows)


def everywhere(results: Results) -> tuple[list[str], dict[str, list[str]]]:
    """The methods that were run for all denoisers, and by denoiser the methods that were run only for some."""
    places: dict[str, set[str]] = {}
    for cell in results.cells:
        for name in results.values["typical_error"][cell]:
            places.setdefault(name, set()).add(cell[0])
    denoisers = list(dict.fromkeys(cell[0] for cell in results.cells))
    shared = [name for name in results.methods if len(places[name]) == len(denoisers) and name != "limit"]
    further = {
        denoiser: [name for name in results.methods if denoiser in places[name] and name not in (*shared, "limit")]
        for denoiser in denoisers
    }
    return shared, {denoiser: names for denoiser, names in further.items() if names}


def breakdown(results: Results, methods: Sequence[str]) -> str:
    """Typical errors over those of the best other method and of karras, by solver, denoiser and model calls."""
    rows = []
    keys: tuple[Callable[[Cell], object], ...] = (lambda c: c[1], lambda c: c[0], lambda c: c[2])
    for key in keys:
        for value in dict.fromkeys(map(key, results.cells)):
            chosen = [cell for cell in results.cells if key(cell) == value]
            ratios = [results.mean_ratio("typical_error", m, other, chosen) for m in methods for other in AGAINST]
            figures = ["" if np.isnan(ratio) else f"{ratio:.3f}" for ratio in ratios]
            rows.append([f"{value} calls" if isinstance(value, int) else str(value), *figures])
    header = [f"{glossary.title(method)}: {title}" for method in methods for title in AGAINST.values()]
    return markdown(["", *header], rows)


def lost_cells(results: Results, method: str) -> str:
    """The cells in which another method is better by more than 5%, worst first, and why.

    The error on the noises that fastsched tuned on tells the reason. If it is below the other method's error, these
    noises were not representative; if it is above, the search did not find a schedule as good as the other one.
    """
    rows = []
    for cell in results.cells:
        name, best = results.best("typical_error", cell)
        ours, tuned = (results.error(metric, cell, method) for metric in ("typical_error", "predicted"))
        if ours > LOST * best:
            why = "too few noises" if tuned < best else "search"
            figures = [f"{value:.3g}" for value in (best, ours, tuned)]
            rows.append((ours / best, [cell[0], cell[1], str(cell[2]), glossary.title(name), *figures, why]))
    if not rows:
        return f"None under {glossary.title(method)}."
    rows.sort(key=lambda row: -row[0])
    names = ["best other method", "its error", glossary.title(method), "where it tuned", "why", "ratio"]
    header = ["denoiser", "solver", "calls", *names]
    return markdown(header, [[*row, f"{ratio:.2f}"] for ratio, row in rows])


def fitted_solver(results: Results) -> str:
    """Errors of the fitted solver over those of stock solvers with as many model calls."""
    rows = []
    for method in (*FITS[::-1], "optimal_schedule"):
        for metric, name in METRICS.items():
            errors = [(cell, results.error(metric, cell, method)) for cell in results.fitted]
            if all(np.isnan(error) for _, error in errors):
                continue
            against = {
                "best": [e / results.best_over_solvers(metric, cell, ["fit"]) for cell, e in errors],
                "2m": [e / results.best_over_solvers(metric, cell, ["fit"], ["dpmpp_2m"]) for cell, e in errors],
                "others": [e / results.best_over_solvers(metric, cell, results.baselines) for cell, e in errors],
            }
            worst = [f"{np.nanmax(against['best']):.2f}", f"{sum(r > LOST for r in against['best'])} of {len(errors)}"]
            rows.append([glossary.title(method), name, *(f"{geometric(r):.3f}" for r in against.values()), *worst])
    header = ["fitted solver", "error", "best stock fs.fit", "fs.fit of dpmpp_2m", "best other method"]
    return markdown([*header, "worst cell", "cells above 1.05"], rows)


def true_limit(results: Results, limits: Sequence[dict[str, str]]) -> str:
    """The limit by gradient descent on nodes and weights, beside the best of our methods over all solvers.

    Errors are those on the noises of seed 0. Decoupled levels are left out, because the limit has none.
    """
    rows, coupled = [], [name for name in OURS if name != "fit_decoupled"]
    for limit in limits:
        every = (*results.cells, *results.fitted)
        cells = [cell for cell in every if cell[0] == limit["denoiser"] and cell[2] == int(limit["calls"])]
        errors = results.values["typical_error"]
        found = {(cell[1], name): errors[cell][name][0] for cell in cells for name in coupled if errors[cell].get(name)}
        if not found:
            continue
        (solver, name), best = min(found.items(), key=lambda item: item[1])
        reached = float(limit["typical_error"])
        row = [limit["denoiser"], limit["calls"], f"{reached:.3g}", f"{int(limit['model_calls']):,}"]
        rows.append([*row, f"{glossary.title(name)}, {solver}", f"{best:.3g}", f"{best / reached:.2f}"])
    return markdown(["denoiser", "calls", "true limit", "its model calls", "best of ours", "its error", "ratio"], rows)


def correlations(results: Results) -> str:
    """Spearman's correlation of predicted and actual errors, without and with the final descent, by denoiser."""
    rows = []
    for denoiser in dict.fromkeys(cell[0] for cell in results.cells):
        values = [results.rank_correlation(denoiser, m, e) for m in OURS[:2] for e in ("typical_error", "mean_error")]
        rows.append([denoiser, *(f"{value:.3f}" for value in values)])
    names = [f"{glossary.title(m)}: {e}" for m in OURS[:2] for e in ("typical", "mean")]
    return markdown(["denoiser", *names], rows)


def report(results: Results, limits: Sequence[dict[str, str]] = ()) -> str:
    """All tables as one page of markdown."""
    seeds = max(len(found) for by in results.values["typical_error"].values() for found in by.values())
    ours = [name for name in OURS if name in results.methods]
    fits = [name for name in FITS if name in ours] or ours[-1:]
    shared, further = everywhere(results)
    denoisers = list(dict.fromkeys(cell[0] for cell in results.cells))
    parts = [
        "# Quality",
        glossary.INTRODUCTION.format(cells=len(results.cells), seeds=seeds),
        headline(results),
        glossary.HEADLINE_COLUMNS,
        "![Typical error over model calls of dpmpp_2m, six denoisers](quality.png)",
        "Bands: the range over seeds.",
        "## What is compared",
        markdown(["denoiser", "what it is"], [[name, glossary.DENOISERS.get(name, "")] for name in denoisers]),
        markdown(["method", "what it is"], glossary.meanings(results.methods)),
        "## All methods",
        standings(results, shared, results.cells),
        glossary.STANDINGS_COLUMNS,
    ]
    for denoiser, names in further.items():
        cells = [cell for cell in results.cells if cell[0] == denoiser]
        parts += [f"For {denoiser} alone, beside the same methods there:", standings(results, [*names, *shared], cells)]
    parts += ["## By solver, denoiser and number of model calls", glossary.BREAKDOWN_COLUMNS, breakdown(results, fits)]
    if results.fitted:
        parts += ["## The fitted solver", glossary.FITTED_SOLVER, fitted_solver(results)]
    if limits:
        parts += ["## Against gradient descent on nodes and weights", glossary.TRUE_LIMIT, true_limit(results, limits)]
    parts += [
        "## Predicted and actual error",
        "Spearman's rank correlation of predicted and actual errors of schedules, over the cells of a denoiser.",
        correlations(results),
        "## Cells in which another method is ahead by more than 5%",
        *(lost_cells(results, method) for method in fits),
        glossary.LOST_COLUMNS,
    ]
    return "\n\n".join(parts) + "\n"


def _cell(row: Row) -> Cell:
    return row["denoiser"], row["solver"], int(row["calls"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "quality.csv")
    parser.add_argument("--limits", type=Path, default=RESULTS / f"{gradient_limit.NAME}.csv")
    parser.add_argument("--output", type=Path, default=DOCS, help="folder for quality.md and quality.png")
    args = parser.parse_args()
    results = Results.read(args.results)
    args.output.mkdir(parents=True, exist_ok=True)
    page = report(results, read(args.limits))
    (args.output / "quality.md").write_text(page)
    plot(results, args.output / "quality.png")
    print(page)


if __name__ == "__main__":
    main()
