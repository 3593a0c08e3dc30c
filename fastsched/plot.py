"""Figures of schedules, statistics and samples.

``plot_*`` functions return a matplotlib ``Figure`` without a window; ``figure.savefig("name.png")`` writes it. The
``draw_*`` functions below them draw on existing axes. The colours of Okabe & Ito remain distinct for colour-blind
readers. Needs matplotlib: ``pip install 'fastsched[plot]'``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsched import validate
from fastsched.comparison import Comparison
from fastsched.costs.cost_density import cost_density as cost_density  # `fs.plot.cost_density`
from fastsched.measurement.statistics import PathStatistics, is_statistics
from fastsched.sampling import display
from fastsched.sampling.schedule import Schedule, check_sigmas, is_schedule
from fastsched.selection.planning import ErrorCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.image import AxesImage

#: Okabe & Ito: blue, orange, green, pink, vermilion, sky, yellow, black.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
#: Endings of file names that figures can be saved under.
FORMATS = (".png", ".svg", ".pdf")

_ARE_COMPARISONS, _ARE_NAMES = (partial(validate.list_of, kind=kind) for kind in (Comparison, str))


def plot_schedules(schedules: Mapping[str, Schedule | Tensor], *, stats: PathStatistics | None = None) -> Figure:
    """A row of dots for each schedule, over the cost density of ``stats`` if given; bars mark decoupled levels.

    Args:
        schedules: By name: a `Schedule`, or sampler sigmas descending to 0. The 0 is not drawn.
        stats: Statistics of the same model, for a curve above the rows.

    Raises:
        ValueError: If there is no schedule, or flow times and sigmas are mixed.
    """
    validate.arguments(locals(), schedules=validate.named, stats=validate.optional(is_statistics))
    longest = max(len(line) for name in schedules for line in display.as_label(name).split("\n"))
    width = 7.2 + 0.1 * max(longest - 40, 0)  # names such as paths leave the axes their width
    figure = draw_empty(width, 1.1 + 0.32 * len(schedules) + (2.2 if stats else 0.0))
    if stats is None:
        draw_schedules(figure.subplots(), schedules)
        return figure
    _draw_under_cost_density(figure, schedules, stats, [2.2, 0.4 + 0.32 * len(schedules)])
    return figure


def plot_weights(schedule: Schedule) -> Figure:
    """The weights of a fitted schedule as a heat map, beside its noise levels.

    Row n is the step from the n-th level, a dot on the left; column m is the network's output at the m-th level. Bars
    on the left mark decoupled levels.

    Args:
        schedule: A schedule of the solver ``"fitted"``.

    Raises:
        ValueError: If it is for another solver.
    """
    validate.arguments(locals(), schedule=is_schedule)
    if schedule.weights is None:
        raise ValueError(f"schedule must be for the fitted solver, which has weights, got one for {schedule.solver!r}")
    side = 1.2 + 0.42 * schedule.steps
    figure = draw_empty(side + 3.4, max(2.4, side))
    nodes, weights = figure.subplots(1, 2, sharey=True, width_ratios=[1.6, side])
    draw_nodes(nodes, schedule)
    figure.colorbar(draw_weights(weights, schedule), ax=weights, label="weight", shrink=0.8)
    return figure


def plot_cost_density(stats: PathStatistics) -> Figure:
    """The cost density (`cost_density`) over sigma, unweighted and, if responses were measured, weighted too."""
    validate.arguments(locals())
    figure = draw_empty(7.2, 3.0)
    draw_cost_density(figure.subplots(), stats)
    return figure


def plot_sample_grid(samples: Mapping[str, Tensor], *, columns: int | None = None) -> Figure:
    """Samples of several schedules side by side, with the samples of one noise at the same position in each grid.

    Args:
        samples: By title: images [B, C, H, W] or [B, H, W], C 1 or 3, with values from -1 to 1.
        columns: Images per row of a grid; the square root of B when None.

    Raises:
        ValueError: If there is no grid, or one does not hold images.
    """
    validate.arguments(locals(), samples=validate.named)
    figure = draw_empty(2.4 * len(samples), 2.75)
    # Wider than the gaps within a grid.
    grids = figure.subplots(1, len(samples), squeeze=False, gridspec_kw={"wspace": 0.12})[0]
    for axes, (title, images) in zip(grids, samples.items(), strict=True):
        draw_sample_grid(axes, images, columns=columns)
        axes.set_title(display.as_label(title))
    return figure


def plot_errors(comparisons: Sequence[Comparison], names: Sequence[str] | None = None) -> Figure:
    """Typical error over model calls, one line per schedule name across all comparisons.

    Args:
        comparisons: Results of `fastsched.compare`, for example one for each number of steps.
        names: The schedules to draw; all of them when None.

    Raises:
        ValueError: If there is nothing to draw, or a name is not in the comparisons.
    """
    validate.arguments(locals(), comparisons=_ARE_COMPARISONS, names=validate.optional(_ARE_NAMES))
    figure = draw_empty(4.6, 3.2)
    draw_errors(figure.subplots(), comparisons, names)
    return figure


def plot_error_curves(curves: Sequence[ErrorCurve]) -> Figure:
    """Predicted error over model calls, one line per solver.

    Args:
        curves: Results of `fastsched.error_curve`.

    Raises:
        ValueError: If there is none.
    """
    validate.arguments(locals(), curves=partial(validate.list_of, kind=ErrorCurve))
    if not curves:
        raise ValueError("curves must hold at least one curve to draw")
    figure = draw_empty(4.6, 3.2)
    lines = [(curve.solver, curve.model_calls, curve.predicted_errors) for curve in curves]
    _draw_lines(figure.subplots(), lines, "model calls", "predicted squared error")
    return figure


def plot_overview(
    samples: Mapping[str, Tensor],
    converged: Tensor,
    schedules: Mapping[str, Schedule | Tensor],
    stats: PathStatistics,
    comparisons: Sequence[Comparison],
    *,
    title: str = "",
    columns: int | None = None,
) -> Figure:
    """Samples and their distance to the converged ones; below, schedules under the cost density, and errors.

    Args:
        samples: As in `plot_sample_grid`.
        converged: The converged samples from the same noises, in the same shape.
        schedules: As in `plot_schedules`; errors are drawn for the same names.
        stats: As in `plot_schedules`.
        comparisons: As in `plot_errors`.
        title: The title of the figure.
        columns: As in `plot_sample_grid`.

    Raises:
        ValueError: If there are no samples or comparisons, or an argument is invalid.
    """
    validate.arguments(
        locals(),
        samples=validate.named,
        converged=validate.tensor,
        schedules=validate.named,
        comparisons=_ARE_COMPARISONS,
        title=validate.anything,
    )
    if not comparisons:
        raise ValueError("comparisons must hold at least one entry")
    figure = draw_empty(10.5, 6.6)
    figure.suptitle(title, fontsize="large", fontweight="bold")
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=[1.0, 1.0], hspace=0.05)[:, 0]
    _draw_with_differences(top, samples, converged, comparisons[0].reference.steps, columns)
    left, right = bottom.subfigures(1, 2, squeeze=False, width_ratios=[1.75, 1.0], wspace=0.03)[0]
    _draw_under_cost_density(left, schedules, stats, [1.5, 1.0])
    draw_errors(right.subplots(), comparisons, list(schedules))
    return figure


def _draw_with_differences(
    figure: SubFigure, samples: Mapping[str, Tensor], converged: Tensor, steps: int, columns: int | None
) -> None:
    """Draw samples above their distance to the converged ones, which took ``steps`` calls and come last."""
    grids = figure.subplots(2, len(samples) + 1, squeeze=False, gridspec_kw={"wspace": 0.06})
    differences = []
    for (above, below), (name, images) in zip(grids.T, samples.items(), strict=False):
        draw_sample_grid(above, images, columns=columns)
        above.set_title(display.as_label(name), fontsize="medium")
        differences.append(draw_difference_grid(below, images, converged, columns=columns))
    above, key = grids.T[-1]
    draw_sample_grid(above, converged, columns=columns)
    above.set_title(f"converged\n{steps} model calls", fontsize="medium")
    key.set_axis_off()
    scale = key.inset_axes((0.1, 0.62, 0.8, 0.12))
    bar = figure.colorbar(differences[0], cax=scale, orientation="horizontal", ticks=[0, 0.25, 0.5])
    bar.set_label("distance of each pixel to the\nconverged one (black to white: 2)", fontsize="small")


def _draw_under_cost_density(
    figure: Figure | SubFigure, schedules: Mapping[str, Schedule | Tensor], stats: PathStatistics, heights: list[float]
) -> None:
    """Draw the cost density above the rows of `draw_schedules`, on axes of these relative heights."""
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=heights)
    draw_cost_density(above, stats)
    draw_schedules(below, schedules, flow=stats.process.kind == "flow")
    above.set_xlabel("")


def draw_cost_density(axes: Axes, stats: PathStatistics) -> None:
    """Draw `cost_density` divided by its largest value."""
    for weighted in (True, False) if stats.deviated else (False,):
        s, density = cost_density(stats, weighted=weighted)
        sigmas = stats.process.sampler_sigma(torch.from_numpy(s)).numpy()
        relative = density / max(density.max(), np.finfo(density.dtype).tiny)  # 0 for a network with one answer
        if weighted:
            axes.fill_between(sigmas, relative, color=COLOURS[5], alpha=0.35, linewidth=0)
            axes.plot(sigmas, relative, color=COLOURS[0], linewidth=1.6, label="weighted by effect on the final sample")
        else:
            axes.plot(sigmas, relative, color="#777777", linewidth=1.2, linestyle="--", label="unweighted")
    axes.set_ylim(0, 1.08)
    axes.set_ylabel("cost density\n(relative to its peak)")
    draw_legend(axes)
    draw_sigma_axis(axes, stats.process.kind == "flow")


def draw_schedules(axes: Axes, schedules: Mapping[str, Schedule | Tensor], *, flow: bool | None = None) -> None:
    """Draw a row of dots for each schedule, the first on top. ``flow``: whether sigmas are flow times."""
    validate.named("schedules", schedules)
    kinds = {schedule.noise == "flow" for schedule in schedules.values() if isinstance(schedule, Schedule)}
    if flow is not None:
        kinds.add(flow)
    if len(kinds) > 1:
        raise ValueError("schedules must all be in sigmas or all in flow times to share an axis")
    for row, schedule in enumerate(schedules.values()):
        sigmas = check_sigmas("schedules", schedule)
        inside = sigmas[(sigmas > 0) & torch.isfinite(sigmas)].numpy()
        colour, marker = COLOURS[row % len(COLOURS)], MARKERS[row % len(MARKERS)]
        axes.axhline(row, color="#DDDDDD", linewidth=0.8, zorder=0)
        axes.plot(inside, np.full(len(inside), row), marker, color=colour, markersize=6, clip_on=False)
        if isinstance(schedule, Schedule):
            draw_network_levels(axes, schedule, np.full(schedule.steps, row))
    axes.set_yticks(range(len(schedules)), [display.as_label(name) for name in schedules])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(schedules) - 0.5, -0.5)
    axes.spines["left"].set_visible(False)
    draw_sigma_axis(axes, bool(kinds and kinds.pop()))


def draw_network_levels(axes: Axes, schedule: Schedule, rows: NDArray) -> None:
    """Draw a bar in each step's row at the level of the network, if levels are decoupled."""
    if schedule.network_sigmas is not None:
        levels = schedule.network_sigmas.numpy()
        finite = np.isfinite(levels)
        axes.plot(levels[finite], rows[finite], "|", color="#222222", markersize=12, clip_on=False)


def draw_nodes(axes: Axes, schedule: Schedule) -> None:
    """Draw the levels of ``schedule`` from top to bottom, one row per step, as `draw_weights` does."""
    sigmas = schedule.sigmas[:-1].numpy()
    rows = np.arange(len(sigmas))
    finite = np.isfinite(sigmas)
    axes.plot(sigmas[finite], rows[finite], "o-", color=COLOURS[0], markersize=5, linewidth=1, clip_on=False)
    draw_network_levels(axes, schedule, rows)
    axes.set_yticks(rows, [f"{n + 1}:  {sigma:.3g}" for n, sigma in enumerate(sigmas)])
    axes.set_ylabel("step:  noise level at its start")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color="#DDDDDD")
    draw_sigma_axis(axes, schedule.noise == "flow")
    axes.set_xlabel("flow time" if schedule.noise == "flow" else "sigma")


def draw_weights(axes: Axes, schedule: Schedule) -> AxesImage:
    """Draw the weights of a fitted schedule: blue is positive, red negative, white 0; with numbers up to 12 steps.

    Returns:
        The image, for a colour bar.
    """
    assert schedule.weights is not None
    weights = schedule.weights.numpy()
    steps = len(weights)
    largest = float(np.abs(weights).max())
    shown = np.where(np.tri(steps, dtype=bool), weights, np.nan)  # a step cannot use later outputs
    image = axes.imshow(shown, cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto", interpolation="nearest")
    if steps <= 12:
        for n, row in enumerate(weights.round(2) + 0.0):  # no "-0.00"
            for m, weight in enumerate(row[: n + 1].tolist()):
                colour = "white" if abs(weight) > 0.6 * largest else "#222222"
                axes.text(m, n, f"{weight:.2f}", ha="center", va="center", fontsize="x-small", color=colour)
    axes.set_xticks(range(steps), [f"{sigma:.3g}" for sigma in schedule.sigmas[:-1].tolist()], rotation=90)
    axes.set_xlabel("output at noise level")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_ylim(steps - 0.5, -0.5)
    return image


def draw_sample_grid(axes: Axes, images: Tensor, *, columns: int | None = None) -> None:
    """Draw images [B, C, H, W] or [B, H, W] in rows; values from -1 (black) to 1 (white)."""
    sheet = _sheet(((_images(images) + 1) / 2).clamp(0, 1), columns)
    axes.imshow(sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_axis_off()


def draw_difference_grid(axes: Axes, images: Tensor, reference: Tensor, *, columns: int | None = None) -> AxesImage:
    """Draw ``|image - reference|`` of every pixel, averaged over channels: white is 0, the darkest is 0.5 or more.

    Returns:
        The image, for a colour bar.
    """
    if images.shape != reference.shape:
        raise ValueError(
            f"images and reference must have the same shape, got {tuple(images.shape)} and {tuple(reference.shape)}"
        )
    away = (_images(images) - _images(reference)).abs().mean(1, keepdim=True)
    sheet = _sheet(away, columns, fill=math.nan)
    axes.set_axis_off()
    return axes.imshow(sheet, cmap="Purples", vmin=0, vmax=0.5, interpolation="nearest")


def draw_errors(axes: Axes, comparisons: Sequence[Comparison], names: Sequence[str] | None = None) -> None:
    """Draw typical error over model calls, one line per schedule name."""
    every = [row for comparison in comparisons for row in comparison.rows]
    known = list(dict.fromkeys(row.name for row in every))
    lines = known if names is None else names
    if not every or not lines:
        raise ValueError("comparisons must hold at least one row to draw")
    drawn = []
    for name in lines:
        validate.choice("names", name, known)
        rows = sorted((row for row in every if row.name == name), key=lambda row: row.model_calls)
        drawn.append((name, [row.model_calls for row in rows], [row.typical_error for row in rows]))
    _draw_lines(axes, drawn, "model calls per sample", "typical squared distance\nto the converged sample")


def _draw_lines(
    axes: Axes, lines: Sequence[tuple[str, Sequence[int], Sequence[float]]], x_label: str, y_label: str
) -> None:
    """Draw errors over numbers of calls; ``lines`` has a name, x and y for each line."""
    for n, (name, x, y) in enumerate(lines):
        colour, marker = COLOURS[n % len(COLOURS)], MARKERS[n % len(MARKERS)]
        axes.plot(x, y, color=colour, marker=marker, linewidth=1.6, markersize=6, label=display.as_label(name))
    axes.set(xlabel=x_label, ylabel=y_label, yscale="log")
    draw_integer_ticks(axes)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD")
    draw_legend(axes)


def draw_integer_ticks(axes: Axes) -> None:
    """Put ticks at whole numbers of model calls only."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def draw_legend(axes: Axes, columns: int = 2) -> None:
    """Draw the legend above the axes, where it cannot cover a curve."""
    axes.legend(frameon=False, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns)


def draw_sigma_axis(axes: Axes, flow: bool) -> None:
    """Format the x axis: noise on the left, as in sampling; logarithmic in sigma, linear in flow time."""
    if not flow and math.isfinite(axes.dataLim.minposx):  # else pure noise alone, which is not drawn
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("flow time (noise on the left)" if flow else "sigma (noise on the left; the final 0 is not drawn)")
    axes.spines[["top", "right"]].set_visible(False)
    # Axes that share x call this twice: inverting again would undo it.
    if not axes.xaxis_inverted():
        axes.invert_xaxis()


def check_matplotlib() -> None:
    """Check before any work for a figure that it can be drawn: without matplotlib an ImportError names the extra."""
    try:
        import matplotlib.figure  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise ImportError(f"figures need matplotlib ({error}); pip install 'fastsched[plot]'") from None


def draw_empty(width: float, height: float) -> Figure:
    """An empty figure of this size in inches."""
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not by pyplot, which keeps every figure alive and may open windows.
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _images(images: Tensor) -> Tensor:
    validate.tensor("images of samples", images)
    batch = images[:, None] if images.ndim == 3 else images
    if batch.ndim != 4 or batch.shape[1] not in (1, 3) or len(batch) == 0:
        raise ValueError(
            f"images of samples must be [B, C, H, W] with C 1 or 3, or [B, H, W], got shape {tuple(images.shape)}"
        )
    return batch.detach().cpu().double()


def _sheet(images: Tensor, columns: int | None, fill: float = 1.0) -> NDArray:
    """Images [B, C, H, W] in rows on one sheet [height, width, C], with gaps of value ``fill`` between them."""
    count, channels, height, width = images.shape
    across = validate.positive_int("columns", math.ceil(math.sqrt(count)) if columns is None else columns)
    down, gap = math.ceil(count / across), max(1, height // 8)
    sheet = np.full((down * (height + gap) - gap, across * (width + gap) - gap, channels), fill)
    for n, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        top, left = (n // across) * (height + gap), (n % across) * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet
