"""The page of a report: HTML with its style and charts inside, for a phone or a desk, light or dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
import torch

from fastsched.cli import charts
from fastsched.cli.charts import Series
from fastsched.cli.making import plain_decimals
from fastsched.cli.report_data import SCATTER, TARGETS, Measured, band, karras_error, plan
from fastsched.cli.report_style import STYLE
from fastsched.costs.cost_density import cost_density
from fastsched.costs.step_cost import error_weight
from fastsched.measurement.deviated_paths import asked_levels
from fastsched.measurement.statistics import PathStatistics
from fastsched.sampling.origin import Origin
from fastsched.sampling.schedule import Schedule
from fastsched.selection.planning import SAFETY, ErrorCurve

#: Steps of the schedules that are shown where none are given, if the curve has them.
SHOWN_STEPS = 8
Picture = tuple[str, str, bytes]


def page(
    title: str | None,
    stats: PathStatistics,
    schedules: Mapping[str, Schedule],
    curves: Sequence[ErrorCurve],
    measured: Sequence[Measured] = (),
    pictures: Sequence[Picture] = (),
) -> str:
    """The whole page.

    Args:
        title: Its title; None for the model's.
        stats: The measurement.
        schedules: By name; those of the curves at 8 steps where there are none.
        curves: Predicted errors, one for each solver.
        measured: Errors found by sampling.
        pictures: Title, media type and content of pictures of samples.
    """
    shown = dict(schedules) or _chosen(curves)
    parts = [
        _card("What this is", _facts(stats), wide=False),
        _card("Plan", _plan(stats, curves), wide=False),
        _card("Noise levels over the cost density", _nodes(stats, shown), wide=False),
        _card("Error and steps", _errors(stats, curves, schedules, measured), wide=False),
        *(
            _card(f"Weights of {name}", _weights(each), wide=False)
            for name, each in shown.items()
            if each.solver == "fitted"
        ),
        _card("How errors are passed on", _sensitivity(stats), wide=False),
        *([_card("Responses to deviations", _responses(stats), wide=False)] if stats.deviated else []),
        _card("Increments of the denoised image", _gram(stats), wide=False),
        _card("Schedules", _listed(shown)),
        *([_card("Samples", _strips(pictures))] if pictures else []),
    ]
    model = None if stats.origin is None else stats.origin.model or stats.origin.pipeline
    heading = escape(title or (f"Noise levels for {model}" if model else "Noise levels"))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{heading}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>{heading}</h1></header>\n<main>\n{''.join(parts)}</main>\n</body>\n</html>\n"
    )


def _card(title: str, body: str, *, wide: bool = True) -> str:
    return f"<section{' class=wide' if wide else ''}><h2>{escape(title)}</h2>{body}</section>\n"


def _chosen(curves: Sequence[ErrorCurve]) -> dict[str, Schedule]:
    found = {}
    for curve in curves:
        schedule = curve.schedules[min(SHOWN_STEPS, len(curve.schedules)) - 1]
        found[f"{curve.solver}, {schedule.steps} steps"] = schedule
    return found


def _facts(stats: PathStatistics) -> str:
    """What was measured, as a table."""
    low, high = float(stats.sigmas[-2]), float(stats.sigmas[0])
    origin = Origin() if stats.origin is None else stats.origin
    known = {
        "model": origin.model,
        "pipeline": origin.pipeline,
        "guidance": origin.guidance,
        "prompts": origin.prompts,
        "fingerprint of the network": origin.fingerprint,
        "measured": origin.date,
        "fastsched": origin.version,
    }
    rows = {
        **{key: str(value) for key, value in known.items() if value is not None},
        "noise process": {"ve": "variance exploding", "vp": "variance preserving", "flow": "flow"}[stats.process.kind],
        "shape of a sample": " x ".join(map(str, stats.shape)),
        "noise levels": f"{stats.levels}, from {_short(high)} to {_short(low)}",
        "samples": str(stats.samples),
        "model calls": f"{stats.model_calls:,}, counted per sample",
        "standard deviation of the data": f"{stats.data_std:.3g}",
    }
    cells = "".join(f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in rows.items())
    return f'<table class="facts">{cells}</table>'


def _plan(stats: PathStatistics, curves: Sequence[ErrorCurve]) -> str:
    most = curves[0].steps[-1]
    head = "".join(f"<th>{steps}</th>" for steps in TARGETS)
    rows = ""
    for curve in curves:
        cells = "".join(f"<td>{f'over {most}' if n is None else n}</td>" for n in plan(stats, curve))
        rows += f"<tr><th>{escape(curve.solver)}</th>{cells}</tr>"
    return (
        f'<table class="plan"><tr><th>steps that are as good as karras at</th>{head}</tr>{rows}</table>'
        f"<p>Their predicted error is at most that of karras over {SAFETY:g}, with the same solver; for the fitted "
        "solver, that of karras with dpmpp_2m. Heun and other two-stage solvers call the model twice a step.</p>"
    )


def _sigma_axis(stats: PathStatistics) -> tuple[tuple[float, float, bool], str]:
    """The range of the sampler's sigmas, noise on the left, and its label."""
    sigmas = [value for value in stats.sigmas[:-1].tolist() if math.isfinite(value)]
    if stats.process.kind == "flow":
        return (max(sigmas), 0.0, False), "flow time (noise on the left)"
    return (sigmas[0] * 1.15, sigmas[-1] / 1.15, True), "sigma (noise on the left; the final 0 is not drawn)"


def _nodes(stats: PathStatistics, schedules: Mapping[str, Schedule]) -> str:
    x, label = _sigma_axis(stats)
    lines = []
    names = {True: "weighted by what becomes of an error", False: "unweighted"} if stats.deviated else {False: "cost"}
    for n, (weighted, name) in enumerate(names.items()):
        s, density = cost_density(stats, weighted=weighted)
        sigmas = stats.process.sampler_sigma(torch.from_numpy(s)).tolist()
        shares = (density / density.max()).tolist()
        shade = ([0.0] * len(shares), shares) if n == 0 else None
        lines.append(Series(name, sigmas, shares, 5 if n == 0 else 7, band=shade, dashed=n > 0))
    density = charts.chart(lines, x, (0.0, 1.05, False), label, "cost density, relative to its peak")
    rows = {name: _inside(schedule, x) for name, schedule in schedules.items()}
    return density + charts.node_rows(rows, x, label)


def _inside(schedule: Schedule, x: tuple[float, float, bool]) -> list[float]:
    low, high = sorted(x[:2])
    return [value for value in schedule.sigmas[:-1].tolist() if low <= value <= high]


def _errors(
    stats: PathStatistics, curves: Sequence[ErrorCurve], schedules: Mapping[str, Schedule], measured: Sequence[Measured]
) -> str:
    most = curves[0].steps[-1]
    lines = [
        Series(curve.solver, curve.steps, curve.predicted_errors, n, band=(found.low, found.high), dots=True)
        for n, curve in enumerate(curves)
        for found in [band(stats, curve)]
    ]
    reference = "dpmpp_2m" if "dpmpp_2m" in [curve.solver for curve in curves] else curves[0].solver
    numbers = list(range(2, most + 1))
    common = [karras_error(stats, reference, n) for n in numbers]
    lines.append(Series(f"karras, {reference}", numbers, common, 7, dashed=True))
    points = [
        Measured(name, each.solver, each.steps, each.measured_error)
        for name, each in schedules.items()
        if each.measured_error
    ]
    for n, point in enumerate([*points, *measured]):
        style = (n + len(curves)) % charts.STYLES
        name = f"{point.name} ({point.solver}), measured"
        lines.append(Series(name, [point.steps], [point.error], style, line=False, dots=True))
    low, high = charts.positive_range([value for line in lines for value in line.y])
    widest = max([most, *(point.steps for point in [*points, *measured])])
    drawn = charts.chart(
        lines, (1, widest, False), (low, high, True), "steps", "squared distance to the converged sample"
    )
    return drawn + (
        f"<p>Lines: predicted for the best schedules of each solver. Bands: one standard deviation, of predictions "
        f"over networks (a factor of {SCATTER:g}) and over the measured samples together. Measured errors are "
        "geometric means over samples.</p>"
    )


def _weights(schedule: Schedule) -> str:
    assert schedule.weights is not None  # of the fitted solver
    return charts.weight_map(schedule.weights.numpy(), schedule.sigmas[:-1].tolist())


def _sensitivity(stats: PathStatistics) -> str:
    x, label = _sigma_axis(stats)
    sigmas, weights = stats.sigmas[:-1].tolist(), np.sqrt(error_weight(stats)[:-1]).tolist()
    kept = [(s, w) for s, w in zip(sigmas, weights, strict=True) if math.isfinite(s) and w > 0]
    line = Series("error at the end over error made here", [s for s, _ in kept], [w for _, w in kept], 2)
    low, high = charts.positive_range(line.y)
    drawn = charts.chart([line], x, (low, high, True), label, "growth of an error until the end")
    source = "from the measured responses" if stats.deviated else "as for Gaussian data: responses were not measured"
    return drawn + f"<p>Root mean square, {source}.</p>"


def _responses(stats: PathStatistics) -> str:
    x, label = _sigma_axis(stats)
    assert stats.response_gram is not None  # of the deviated paths
    sizes = stats.response_gram.diagonal(dim1=1, dim2=2).mean(0).sqrt() / (stats.data_std * math.sqrt(stats.dimension))
    asked = list(asked_levels(stats.levels))
    lines = []
    for n, path in enumerate(stats.deviated):
        sigmas = stats.sigmas[asked].tolist()
        name = f"order {path.order}, steps of {path.hold} levels"
        lines.append(Series(name, sigmas, sizes[n * len(asked) : (n + 1) * len(asked)].tolist(), n, dots=True))
    low, high = charts.positive_range([value for line in lines for value in line.y])
    drawn = charts.chart(lines, x, (low, high, True), label, "change of the denoised image, in standard deviations")
    return drawn + (
        "<p>Root mean square over samples and elements, on the paths that deviate as coarse samplers do.</p>"
    )


def _gram(stats: PathStatistics) -> str:
    mean = stats.gram.mean(0).numpy()
    label = "flow time" if stats.process.kind == "flow" else "sigma"
    middles = stats.sigmas[1:-1].tolist()
    return charts.cosine_map(mean, middles) + (
        f"<p>Cosines between the changes of the denoised image from level to level, both axes in {escape(label)}: "
        '<span class="key swatch c0"></span>1, white 0, <span class="key swatch c4"></span>-1. Where neighbours point '
        "the same way, extrapolation works.</p>"
    )


def _listed(schedules: Mapping[str, Schedule]) -> str:
    items = ""
    for name, schedule in schedules.items():
        words = [schedule.solver, f"{schedule.steps} steps", f"{schedule.model_calls} model calls a sample"]
        for kind, error in (("predicted", schedule.predicted_error), ("measured", schedule.measured_error)):
            words += [] if error is None else [f"{kind} error {_short(error)}"]
        sigmas = escape(plain_decimals(schedule.sigmas.tolist()))
        items += f"<dt>{escape(name)}</dt><dd>{escape(', '.join(words))}<br><code>{sigmas}</code></dd>"
    return f"<dl>{items}</dl><p>Errors are squared distances to the converged sample of the same noise.</p>"


def _strips(pictures: Sequence[Picture]) -> str:
    return "".join(
        f'<figure><img alt="{escape(title)}" src="{charts.data_uri(content, kind)}">'
        f"<figcaption>{escape(title)}</figcaption></figure>"
        for title, kind, content in pictures
    )


def _short(value: float) -> str:
    return f"{value:.4g}"
