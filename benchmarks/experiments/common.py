"""Shared by the experiments: arguments, data, figures, and where results are written."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.common import RESULTS, append, environment, table
from fastsched.denoisers.oracles import GaussianMixture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHAPE = (1, 8, 8)
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0


def arguments(description: str | None, **choices: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. ``--quick`` is a run of less than a minute that writes under other file names.

    ``choices`` are further options with their values, the default first.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer samples and cases: under a minute")
    parser.add_argument("--threads", type=int, default=1)
    for name, values in choices.items():
        parser.add_argument(f"--{name}", choices=values, default=values[0])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def report(
    name: str,
    rows: list[dict[str, Any]],
    key: Sequence[str],
    *,
    quick: bool,
    figure: Figure | None = None,
) -> None:
    """Print a table, write ``results/experiment_<name>.csv`` and the figure beside it."""
    columns = tuple(dict.fromkeys(column for row in rows for column in row))
    print(table([{k: _short(v) for k, v in row.items()} for row in rows], columns))
    stem = f"experiment_{name}" + ("_quick" if quick else "")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{stem}.csv").unlink(missing_ok=True)
    append(stem, [{**row, **environment()} for row in rows], tuple(key))
    if figure is not None:
        figure.savefig(RESULTS / f"{stem}.png", dpi=120)
    print(f"written: {RESULTS / stem}.csv" + ("" if figure is None else " and .png"))


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def axes(columns: int = 1, rows: int = 1, width: float = 5.0, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    """A figure and its axes in reading order."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for ax in grid.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, list(grid.flat)


def number_decades(ax: Axes) -> None:
    """Label powers of ten on logarithmic axes, and also 2 and 5 times these if an axis has less than two decades."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for axis, scale in ((ax.xaxis, ax.get_xscale()), (ax.yaxis, ax.get_yscale())):
        low, high = axis.get_view_interval()
        if scale == "log" and high > low:
            axis.set_minor_locator(LogLocator(subs=(2, 5)) if high < 100 * low else LogLocator(subs=range(2, 10)))
            axis.set_minor_formatter("{x:g}" if high < 100 * low else NullFormatter())


def points_mixture(points: np.ndarray, std: float) -> GaussianMixture:
    """A Gaussian of deviation ``std`` at each of ``points`` [n, d]."""
    means = torch.from_numpy(np.atleast_2d(points)).double()
    n, d = means.shape
    return GaussianMixture(torch.ones(n), means, (std**2 * torch.eye(d, dtype=torch.float64)).expand(n, d, d).clone())
