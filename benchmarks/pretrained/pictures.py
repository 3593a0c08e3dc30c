"""Samples of one network under several schedules, a row each, from the same noises.

    python -m benchmarks.pretrained.pictures --weights FOLDER --network mnist-flow

writes ``docs/pretrained_mnist-flow.png``. Rows are labelled with the model calls that choosing their schedule took and
with the typical error of the samples shown. The last row but one uses the fitted solver; the last row is converged.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import fastsched as fs
from benchmarks.common import DOCS
from benchmarks.pretrained.networks import Network, builders, find_zoo
from benchmarks.pretrained.run import FITTED_METHODS, METHODS, Plan, plan_of, ways
from benchmarks.quality import glossary
from benchmarks.quality.choosing import Choosers
from fastsched.sampling.solvers import FITTED

#: Methods shown by default for the named solver, and for the fitted solver.
ROWS = ("native", "karras_7", "exponential", "paper", "optimal_schedule", "fit", "fit_decoupled")
FITTED_ROWS = ("fit_100",)


@dataclass(frozen=True)
class Row:
    """One row of pictures: its label and its samples [columns, *shape]."""

    label: str
    samples: Tensor


def rows_of(network: Network, shown: Sequence[tuple[str, str]], calls: int, columns: int, plan: Plan) -> list[Row]:
    """Samples for every pair of solver and method, and converged samples, from noises that no method saw."""
    reference = network.converged(columns, 0, **plan.reference)
    choosers = Choosers(network, 0, plan.effort)
    rows = []
    for solver, method in shown:
        chosen = ways(network, choosers, solver, calls)[method]()
        ends = fs.sample(network.denoiser, chosen.sigmas, solver, reference.noise)
        error = fs.metrics.geometric_mean(fs.metrics.squared_distances(ends, reference.ends))
        title = glossary.title(method) + ", fitted" * (solver == FITTED)
        rows.append(Row(f"{title}\n{chosen.model_calls:,} calls\nerror {error:.3g}", ends))
    return [*rows, Row(f"converged\n{reference.steps} steps", reference.ends)]


def plot(rows: Sequence[Row], network: Network, title: str, path: Path) -> None:
    """Write the rows as one picture; ValueError if the network's samples are not pictures."""
    from matplotlib.figure import Figure

    if network.image is None:
        raise ValueError("network must have an image function, which makes pictures of its samples")
    columns = len(rows[0].samples)
    figure = Figure(figsize=(1.7 + 0.85 * columns, 0.4 + 0.85 * len(rows)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.01, wspace=0, hspace=0)  # type: ignore[union-attr]  # it has one
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for line, row in zip(panels, rows, strict=True):
        for ax, picture in zip(line, network.image(row.samples).clamp(0, 1), strict=True):
            shown = picture.movedim(0, -1) if len(picture) == 3 else picture[0]
            ax.imshow(shown.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        line[0].set_ylabel(row.label, rotation=0, ha="right", va="center", fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=100)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="folder with zoo.py in it or beside it")
    parser.add_argument("--network", required=True)
    parser.add_argument("--solver", default="dpmpp_2m")
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--columns", type=int, default=8)
    parser.add_argument("--methods", nargs="*", default=ROWS, choices=METHODS)
    parser.add_argument(
        "--fitted", nargs="*", default=FITTED_ROWS, choices=FITTED_METHODS, help="for the fitted solver"
    )
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    network = builders(find_zoo(args.weights))[args.network]()
    plan = plan_of(network)
    shown = [*((args.solver, method) for method in args.methods), *((FITTED, method) for method in args.fitted)]
    rows = rows_of(network, shown, args.calls, args.columns, plan)
    path = args.output or DOCS / f"pretrained_{args.network}.png"
    plot(rows, network, f"{args.network}, {args.solver}, {args.calls} model calls a sample", path)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
