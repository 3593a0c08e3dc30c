"""The figures of a report, as SVG within its page."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from fastsched import plot
from fastsched.cli.report_data import Measured, band, rounding, shown_errors
from fastsched.costs.step_cost import error_weight
from fastsched.measurement.deviated_paths import asked_levels
from fastsched.measurement.statistics import PathStatistics
from fastsched.sampling import display
from fastsched.sampling.schedule import Schedule
from fastsched.sampling.solvers import FITTED
from fastsched.selection.planning import ErrorCurve, target_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Inches; narrow, so that text stays readable when a phone scales a figure to its width.
WIDTH, HEIGHT = 4.6, 3.2
#: Colours of figures, and the page's CSS variables that replace them. Their values differ in light and dark style.
PAGE_COLOURS = {
    **{colour.lower(): f"var(--c{n})" for n, colour in enumerate(plot.COLOURS)},
    "#dddddd": "var(--grid)",
    "#777777": "var(--soft)",
}


def nodes(stats: PathStatistics, schedules: Mapping[str, Schedule]) -> str:
    """Noise levels over the cost density."""
    figure = plot.plot_schedules(schedules, stats=stats)
    figure.set_figwidth(WIDTH)
    figure.axes[1].set_yticks(range(len(schedules)), [_label(name) for name in schedules])
    return _svg(figure, "noise levels of each schedule over the cost density")


def errors(
    stats: PathStatistics, curves: Sequence[ErrorCurve], schedules: Mapping[str, Schedule], measured: Sequence[Measured]
) -> str:
    """Predicted errors against steps, each in a band, with karras as a reference; errors of real runs as points."""
    known = {(each.name, each.solver, each.steps) for each in measured}  # these replace a fit's own errors
    points = [
        Measured(name, each.solver, each.steps, each.measured_error)
        for name, each in schedules.items()
        if each.measured_error and (name, each.solver, each.steps) not in known
    ]
    figure, axes = _axes(HEIGHT + 0.2 * (len(curves) + len(points) + len(measured)))
    colours = itertools.cycle(plot.COLOURS[:7])  # the eighth, black, is for karras
    for curve in curves:
        low, high = band(stats, curve)
        (line,) = axes.plot(
            curve.steps, shown_errors(stats, curve), "o-", color=next(colours), markersize=4, label=curve.solver
        )
        axes.fill_between(curve.steps, low, high, color=line.get_color(), alpha=0.16, linewidth=0)
    solvers = [curve.solver for curve in curves]
    reference = "dpmpp_2m" if "dpmpp_2m" in solvers or solvers[0] == FITTED else solvers[0]
    steps = range(2, curves[0].steps[-1] + 1)
    common = [target_error(stats, reference, ("karras", n)) for n in steps]
    axes.plot(steps, common, "--", color=plot.COLOURS[7], label=f"karras, {reference}")
    markers = itertools.cycle(plot.MARKERS[1:7])  # 6 and 7 are coprime: 42 different pairs with the colours
    found = [*((point, "in its fit") for point in points), *((point, "measured") for point in measured)]
    for point, how in found:
        solver = "" if re.search(rf"\b{re.escape(point.solver)}\b", point.name) else f" ({point.solver})"
        label = f"{_label(point.name)}{solver}, {how}"
        error = max(point.error, rounding(stats))  # the axis has no 0
        axes.plot(point.steps, error, next(markers), color=next(colours), label=label)
    axes.set(xlabel="steps", ylabel="squared distance to the converged sample", yscale="log")
    plot.draw_integer_ticks(axes)
    plot.draw_legend(axes, columns=1)
    return _svg(figure, "error and steps")


def weights(schedule: Schedule) -> str:
    """The weights of a fitted schedule."""
    figure, axes = _axes(1.2 + 0.3 * schedule.steps, max(WIDTH, 1 + 0.42 * schedule.steps))
    plot.draw_weights(axes, schedule)
    axes.set_yticks(range(schedule.steps), [str(n + 1) for n in range(schedule.steps)])
    axes.set_ylabel("step")
    return _svg(figure, "weights of the fitted solver")


def sensitivity(stats: PathStatistics) -> str:
    """How much an error made at a noise level grows until the end of the path."""
    figure, axes = _axes()
    growth = np.sqrt(error_weight(stats)[:-1])
    _over_sigma(axes, stats, stats.sigmas[:-1].numpy(), growth, color=plot.COLOURS[2])
    axes.set_ylabel("error at the end\nover error made here")
    return _svg(figure, "growth of an error until the end")


def responses(stats: PathStatistics) -> str:
    """Root mean square responses on the deviated paths, in standard deviations of the data."""
    figure, axes = _axes(HEIGHT + 0.2 * len(stats.deviated))
    asked = list(asked_levels(stats.levels))
    assert stats.response_gram is not None  # it is there if there are deviated paths
    sizes = stats.response_gram.diagonal(dim1=1, dim2=2).mean(0).sqrt() / (stats.data_std * math.sqrt(stats.dimension))
    for path, found, colour in zip(stats.deviated, sizes.split(len(asked)), plot.COLOURS, strict=False):
        label = f"order {path.order}, steps of {path.hold} levels"
        _over_sigma(axes, stats, stats.sigmas[asked].numpy(), found.numpy(), marker="o", color=colour, label=label)
    axes.set_ylabel("change of the denoised image,\nin standard deviations")
    plot.draw_legend(axes, columns=1)
    return _svg(figure, "responses to deviations")


def cosines(stats: PathStatistics) -> str:
    """The cosines ``G_pq / sqrt(G_pp G_qq)`` between increments: blue 1, white 0, red -1."""
    figure, axes = _axes(3.8)
    matrix = stats.gram.mean(0).numpy()
    norms = np.sqrt(np.maximum(matrix.diagonal(), np.finfo(float).tiny))
    image = axes.imshow(matrix / norms[:, None] / norms, cmap="RdBu", vmin=-1, vmax=1, interpolation="nearest")
    levels = stats.sigmas[1:-1].tolist()
    places = [0, len(levels) // 2, len(levels) - 1]
    names = [f"{levels[n]:.3g}" for n in places]
    axes.set_xticks(places, names)
    axes.set_yticks(places, names)
    axes.set_xlabel("flow time" if stats.process.kind == "flow" else "sigma")
    figure.colorbar(image, ax=axes, label="cosine")
    return _svg(figure, "cosines between increments")


def _axes(height: float = HEIGHT, width: float = WIDTH) -> tuple[Figure, Axes]:
    figure = plot.draw_empty(width, height)
    return figure, figure.subplots()


def _label(name: str) -> str:
    """The name, or its last 17 characters if it has more than 20; the page lists full names."""
    return display.as_label(name if len(name) <= 20 else f"...{name[-17:]}")


def _over_sigma(axes: Axes, stats: PathStatistics, sigmas: np.ndarray, values: np.ndarray, **style: Any) -> None:
    """Plot values, on a logarithmic axis, against sigma; infinite sigmas and values of 0 or below are left out."""
    kept = np.isfinite(sigmas) & (values > 0)
    axes.plot(sigmas[kept], values[kept], markersize=4, **style)
    axes.set_yscale("log")
    axes.grid(axis="y", color="#DDDDDD")
    if kept.sum() < 2:  # matplotlib finds no limits of its own
        axes.set_xlim(sigmas.min() / 1.1, sigmas[np.isfinite(sigmas)].max() * 1.1)
    plot.draw_sigma_axis(axes, stats.process.kind == "flow")


def _svg(figure: Figure, label: str) -> str:
    """A figure as an element of a page, in the page's colours and with text that can be searched."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(file, format="svg", transparent=True)
    # Only a standalone file needs the declarations and the metadata.
    drawn = re.search(r"<svg.*</svg>", file.getvalue(), re.DOTALL)
    assert drawn is not None
    text = re.sub(r"<metadata>.*?</metadata>", "", drawn[0], flags=re.DOTALL)
    text = re.sub("<[^>]*>", _in_page, text)  # tags alone: a name may hold anything
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


def _in_page(tag: re.Match[str]) -> str:
    """A tag of a figure in the page's colours, without what only a standalone file needs."""
    text = re.sub(r" xmlns(:xlink)?=\"[^\"]*\"", "", tag[0])
    return re.sub("#[0-9a-f]{6}", lambda found: PAGE_COLOURS.get(found[0], found[0]), text)
