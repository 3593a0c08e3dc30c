"""The page of a report: one HTML file with style and charts, for small and large screens, light or dark."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

from fastsched.cli import charts
from fastsched.cli.making import plain_decimals
from fastsched.cli.report_data import SCATTER, TARGETS, Measured, plan
from fastsched.measurement.statistics import PathStatistics
from fastsched.sampling.origin import Origin
from fastsched.sampling.schedule import Schedule
from fastsched.sampling.solvers import FITTED
from fastsched.selection.planning import SAFETY, ErrorCurve

#: Steps of the curves' schedules that are shown if no schedules are given; shorter curves show their longest.
SHOWN_STEPS = 8
Picture = tuple[str, str, bytes]  # title, media type and content
#: Captions of figures.
ABOUT_ERRORS = (
    "Lines: predicted for the best schedules of each solver. Bands: one standard deviation, which combines the scatter "
    f"of predictions over networks (a factor of {SCATTER:g}) and over the measured samples. Errors of a comparison are "
    "geometric means over samples; predicted errors, and those that a fit measured, are power means, which are larger."
)
ABOUT_RESPONSES = "Root mean square over samples and elements, on paths that deviate as those of coarse samplers do."
ABOUT_INCREMENTS = (
    "Cosines between the changes of the denoised image from level to level. Where neighbours point the same way, "
    "extrapolation works."
)
#: CSS for light and dark pages. Colours are those of Okabe & Ito, lightened for dark pages.
STYLE = """
:root { --page: #f6f6f3; --card: #ffffff; --text: #1d1d1b; --soft: #5c5c58; --grid: #dededa; --edge: #e4e4df;
  --c0: #0072b2; --c1: #c27c00; --c2: #00805d; --c3: #b3568b; --c4: #c44e00; --c5: #2f8fc4; --c6: #8a7d00;
  --c7: var(--text); }
@media (prefers-color-scheme: dark) {
  :root { --page: #131416; --card: #1d1f22; --text: #ececea; --soft: #a9aaad; --grid: #36383d; --edge: #2c2e33;
    --c0: #58a9e0; --c1: #e9b04a; --c2: #35b88f; --c3: #dd98c0; --c4: #f08a4b; --c5: #7cc4ee; --c6: #e5d94f; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); line-height: 1.45;
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
header, main { max-width: 1120px; margin: 0 auto; padding: 0 14px; }
header { padding-top: 20px; }
h1 { font-size: 1.45rem; margin: 0 0 12px; overflow-wrap: anywhere; }
h2 { font-size: 1.02rem; margin: 0 0 8px; overflow-wrap: anywhere; }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 14px;
  align-items: start; padding-bottom: 32px; }
section { background: var(--card); border: 1px solid var(--edge); border-radius: 8px; padding: 14px; min-width: 0; }
.wide { grid-column: 1 / -1; }
p { color: var(--soft); font-size: .87rem; margin: 8px 0 0; }
svg { display: block; width: 100%; height: auto; color: var(--text); }
svg text { fill: currentColor; }
table { border-collapse: collapse; font-size: .9rem; width: 100%; }
th { font-weight: 600; text-align: left; }
td, th { padding: 4px 10px 4px 0; border-bottom: 1px solid var(--edge); vertical-align: top; }
.facts th { font-weight: 400; color: var(--soft); width: 45%; }
.facts td { overflow-wrap: anywhere; }
.plan td, .plan tr:first-child th:nth-child(n+2) { text-align: right; white-space: nowrap; }
dl { margin: 0; }
dt { font-weight: 600; overflow-wrap: anywhere; }
dd { margin: 0 0 12px; }
code { font: .8rem ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
figure { margin: 0 0 14px; }
figure img { max-width: 100%; display: block; border-radius: 4px; }
figcaption { font-size: .85rem; color: var(--soft); margin-top: 4px; }
"""


def page(
    title: str | None,
    stats: PathStatistics,
    schedules: Mapping[str, Schedule],
    curves: Sequence[ErrorCurve],
    measured: Sequence[Measured] = (),
    pictures: Sequence[Picture] = (),
) -> str:
    """The whole page. There is one curve for each solver.

    If ``title`` is None, the page is titled with the model's name. Without ``schedules`` the curves' schedules of
    `SHOWN_STEPS` steps are shown.
    """
    shown = dict(schedules) or _chosen(curves)
    source = "from the measured responses" if stats.deviated else "as for Gaussian data: responses were not measured"
    fitted = {name: each for name, each in shown.items() if each.solver == FITTED}
    parts = [
        _card("What this is", _facts(stats)),
        _card("Plan", _plan(stats, curves)),
        _card("Noise levels over the cost density", charts.nodes(stats, shown)),
        _card("Error and steps", charts.errors(stats, curves, schedules, measured), ABOUT_ERRORS),
        *(_card(f"Weights of {name}", charts.weights(each)) for name, each in fitted.items()),
        _card("How errors are passed on", charts.sensitivity(stats), f"Root mean square, {source}."),
        *([_card("Responses to deviations", charts.responses(stats), ABOUT_RESPONSES)] if stats.deviated else []),
        _card("Increments of the denoised image", charts.cosines(stats), ABOUT_INCREMENTS),
        _card("Schedules", _listed(shown), wide=True),
        *([_card("Samples", _strips(pictures), wide=True)] if pictures else []),
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


def _card(title: str, body: str, about: str = "", *, wide: bool = False) -> str:
    below = f"<p>{escape(about)}</p>" if about else ""
    return f"<section{' class=wide' if wide else ''}><h2>{escape(title)}</h2>{body}{below}</section>\n"


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
        "noise levels": f"{stats.levels}, from {high:.4g} to {low:.4g}",
        "samples": str(stats.samples),
        "model calls": f"{stats.model_calls:,} (a batch of 4 counts as 4)",
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
        f"<p>Their predicted error is at most {1 / SAFETY:g} times that of karras with the same solver; for the "
        "fitted solver, that of karras with dpmpp_2m. Heun and other two-stage solvers call the model twice a step.</p>"
    )


def _listed(schedules: Mapping[str, Schedule]) -> str:
    items = ""
    for name, schedule in schedules.items():
        words = [schedule.solver, f"{schedule.steps} steps", f"{schedule.model_calls} model calls a sample"]
        errors = {"predicted error": schedule.predicted_error, "error in its fit": schedule.measured_error}
        words += [f"{kind} {error:.4g}" for kind, error in errors.items() if error is not None]
        sigmas = escape(plain_decimals(schedule.sigmas.tolist()))
        told = ""
        if schedule.network_sigmas is not None:
            told = f"<br>the network is told <code>{escape(plain_decimals(schedule.network_sigmas.tolist()))}</code>"
        items += f"<dt>{escape(name)}</dt><dd>{escape(', '.join(words))}<br><code>{sigmas}</code>{told}</dd>"
    return (
        f"<dl>{items}</dl><p>Errors are squared distances to the converged sample of the same noise. "
        "The error in a fit is of the noises that the schedule was tuned on; on new ones it is usually larger.</p>"
    )


def _strips(pictures: Sequence[Picture]) -> str:
    return "".join(
        f'<figure><img alt="{escape(title)}" src="data:{kind};base64,{base64.b64encode(content).decode()}">'
        f"<figcaption>{escape(title)}</figcaption></figure>"
        for title, kind, content in pictures
    )
