"""The tables of the benchmark on networks that others trained.

    python -m benchmarks.pretrained.summary

A cell is a network, a solver and a number of model calls; the error of a method there is the geometric mean over seeds.
In every cell the typical error of a method is divided by the least typical error of the methods that are not
fastsched's, and the mean error by their least mean error. Ratios are geometric means over cells. The tables go to
``docs/pretrained.md``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.common import DOCS, geometric, markdown
from benchmarks.pretrained.run import METHODS, PATH
from benchmarks.quality import glossary
from benchmarks.quality.choosing import OURS
from benchmarks.quality.summary import Cell, Results
from fastsched.sampling.solvers import FITTED

#: Schedules that need neither calls of the network nor a choice.
COMMON = ("karras_7", "karras_7_to_zero", "exponential", "exponential_to_zero", "native")
ERRORS = {"typical_error": "typical", "mean_error": "mean"}
#: Networks that share a table; every other network has its own table.
TOGETHER = ("cifar-grey", "mnist-flow")


def run_in(results: Results, cells: Sequence[Cell]) -> list[str]:
    """The methods of `OURS` that were run in all of these cells."""
    return [method for method in OURS if all(method in results.values["typical_error"][cell] for cell in cells)]


def groups(results: Results) -> dict[str, list[Cell]]:
    """Cells of all solvers by title: one group for `TOGETHER`, and one for each other network."""
    found: dict[str, list[Cell]] = {}
    for cell in (*results.cells, *results.fitted):
        title = ", ".join(TOGETHER) if cell[0] in TOGETHER else cell[0]
        found.setdefault(title, []).append(cell)
    return found


def standings(results: Results, cells: Sequence[Cell]) -> str:
    """All methods against the best method of each cell that is not fastsched's."""
    rows = []
    for method in METHODS:
        ratios = {kind: results.ratios(kind, method, cells) for kind in ERRORS}
        if ratios["typical_error"]:
            figures = [f"{figure(values):.3f}" for values in ratios.values() for figure in (geometric, max)]
            worse = sum(value > 1.05 for value in ratios["typical_error"])
            rows.append([glossary.title(method), *figures, f"{worse} of {len(ratios['typical_error'])}"])
    rows.sort(key=lambda row: float(row[1]))
    return markdown(["method", "typical", "worst cell", "mean", "worst cell", "typical above 1.05"], rows)


def by_cell(results: Results, cells: Sequence[Cell]) -> str:
    """The best method of each cell that is not fastsched's, its error, and the ratios of our methods to it."""
    rows, known = [], run_in(results, cells)
    for cell in cells:
        row = [cell[0], f"{cell[1]} {cell[2]}"]
        for kind in ERRORS:
            name, error = results.best(kind, cell)
            row += [
                glossary.title(name),
                f"{error:.3g}",
                *(f"{results.ratios(kind, method, [cell])[0]:.2f}" for method in known),
            ]
        rows.append(row)
    ours = [glossary.title(method) for method in known]
    header = [title for kind in ERRORS.values() for title in (f"best other method, {kind}", "its error", *ours)]
    return markdown(["network", "cell", *header], rows)


def fitted_solver(results: Results, cells: Sequence[Cell], title: str, rivals: Sequence[str]) -> str:
    """The fitted solver's errors over the least error of ``rivals`` with any stock solver at as many model calls."""
    ours = [cell for cell in cells if cell[1] == FITTED]
    known = run_in(results, ours)
    rows, ratios = [], {kind: {method: [] for method in known} for kind in ERRORS}
    for cell in ours:
        row = [cell[0], str(cell[2])]
        for kind in ERRORS:
            alike = [other for other in cells if (other[0], other[2]) == (cell[0], cell[2]) and other[1] != FITTED]
            errors = [(results.error(kind, other, rival), rival, other[1]) for other in alike for rival in rivals]
            least, rival, solver = min(found for found in errors if not math.isnan(found[0]))
            row += [f"{glossary.title(rival)}, {solver}" if len(rivals) > 1 else solver, f"{least:.3g}"]
            for method in known:
                error = results.error(kind, cell, method) / least
                row.append(f"{error:.2f}")
                ratios[kind][method].append(error)
        rows.append(row)
    means = [text for kind in ERRORS for text in ("", "", *(f"{geometric(ratios[kind][m]):.3f}" for m in known))]
    titles = [glossary.title(method) for method in known]
    header = [name for kind in ERRORS.values() for name in (f"{title}, {kind}", "its error", *titles)]
    return markdown(["fitted solver", "calls", *header], [*rows, ["geometric mean", "", *means]])


INTRODUCTION = """# Networks that others trained

Errors are squared distances to the converged sample from the same noise, on noises that no method saw; *typical* is
their geometric mean, *mean* their arithmetic mean. A *cell* is a network, a solver and a number of model calls. *Best
other method* is the one with the least error in the cell among those that are not fastsched's. The first table of each
section shows errors divided by that least error: geometric means over cells, the worst cell, and in how many cells the
typical error is more than 5% larger. A ratio below 1 is better than every other method. Tables by cell show the error
of the best other method as *its error*, and then ratios to it.

[quality.md](quality.md) says what the methods are; *native* is the time steps of the network's own repository. Sources
of the networks: `benchmarks/pretrained/README.md`. On `flower-flow`, points in the plane, GITS does badly with its own
metric, the distance from a straight line; *GITS, tuned* may choose the other metric.

Tables of the fitted solver compare it with the best of the stock solvers at as many model calls: under their own
`fs.fit`, and under the best common schedule (karras, exponential, the repository's own time steps). *fs.fit in 100
calls* measures only two samples within its 100 calls, so its results differ between seeds.

![Samples of rgb64-eps at 5 calls of dpmpp_2m under seven schedules, and of the fitted solver](pretrained_rgb64-eps.png)

![Samples of mnist-flow at 5 calls of dpmpp_2m under seven schedules](pretrained_mnist-flow.png)"""


def report(results: Results) -> str:
    """All tables as one page of markdown."""
    parts = [INTRODUCTION]
    for title, cells in groups(results).items():
        stock = [cell for cell in cells if cell[1] != FITTED]
        parts += [f"## {title}", standings(results, stock), by_cell(results, stock)]
        if len(stock) < len(cells):
            parts += [fitted_solver(results, cells, "best stock fs.fit", ["fit"])]
            parts += [fitted_solver(results, cells, "best common schedule", COMMON)]
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=PATH)
    parser.add_argument("--others", nargs="*", default=[name for name in METHODS if name not in OURS])
    parser.add_argument("--output", type=Path, default=DOCS / "pretrained.md")
    args = parser.parse_args(argv)
    results = Results.read(args.results)
    compared = tuple(name for name in results.methods if name in (*OURS, *args.others))
    page = report(replace(results, methods=compared))
    args.output.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
