"""The report: what it computes, that it needs nothing else, and how a browser shows it."""

import dataclasses
import math
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser

import matplotlib.axes
import matplotlib.image
import numpy as np
import pytest
import torch
from shell_runs import one_line, run

import fastsched as fs
from fastsched.cli import charts, report_data

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Balanced(HTMLParser):
    """Collects text, attributes and errors of nesting."""

    def __init__(self):
        super().__init__()
        self.open, self.wrong, self.attributes, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        self.text.append(data)


def parsed(path):
    parser = Balanced()
    parser.feed(path.read_text(encoding="utf-8"))
    assert parser.open == []
    assert parser.wrong == []
    return parser


@pytest.fixture(scope="module")
def page(folder, tmp_path_factory):
    """A report of everything: a fitted schedule, one with a measured error, errors of a comparison, and a picture."""
    path = tmp_path_factory.mktemp("report")
    stats = fs.PathStatistics.load(folder / "s.safetensors")
    fs.optimal_schedule(stats, 5, "fitted").save(path / "mine.json")
    chosen = fs.Schedule.load(folder / "x-4.json")
    dataclasses.replace(chosen, measured_error=0.0123).save(path / "run <b>.json")
    errors = "name,solver,steps,model_calls,typical_error,mean_error,standard_error,frechet\n"
    (path / "errors.csv").write_text(errors + "karras & co,ddim,6,6,0.25,0.3,0.1,0.2\n")
    matplotlib.image.imsave(path / "a.png", np.full((8, 8, 3), 128, dtype=np.uint8))
    result = run(
        *("report", folder / "s.safetensors", path / "mine.json", path / "run <b>.json", "-o", path / "report.html"),
        *("--solver", "Euler,dpmpp_2m,fitted", "--max-steps", "6", "--errors", path / "errors.csv", "-q"),
        *("--image", f"six <steps>={path / 'a.png'}", "--title", "A <model>"),
    )
    assert result.exit_code == 0, result.stderr
    return path / "report.html"


def test_the_page_holds_everything_and_needs_nothing(page):
    found = parsed(page)
    text = " ".join(found.text)
    for words in ("A <model>", "run <b>", "0.0123", "karras & co (ddim), measured", "six <steps>", "Weights of mine"):
        assert words in text
    sources = [value for name, value in found.attributes if name in ("src", "href", "xlink:href")]
    outside = [value for value in sources if not value.startswith("#")]  # "#": a marker in the same figure
    assert len(outside) == 4  # the weights, the Gram matrix and its key, and the picture
    assert all(value.startswith("data:image/png;base64,") for value in outside)
    assert not re.search(r"https?:|<script|<link|@import|url\((?!#)", page.read_text(encoding="utf-8"))
    sigmas = fs.Schedule.load(page.parent / "mine.json").sigmas.tolist()
    assert f"{sigmas[1]:.6g}"[:6] in text


def test_schedules_of_one_name_are_all_shown(folder, tmp_path):
    paths = [tmp_path / name / "same.json" for name in ("one", "two")]
    for path, steps in zip(paths, (3, 5), strict=True):
        path.parent.mkdir()
        fs.optimal_schedule(fs.PathStatistics.load(folder / "s.safetensors"), steps, "ddim").save(path)
    out = tmp_path / "r.html"
    arguments = ("report", folder / "s.safetensors", *paths, "-o", out, "--solver", "ddim", "--max-steps", "5", "-q")
    assert run(*arguments).exit_code == 0
    text = " ".join(parsed(out).text)
    assert "same" in text
    assert str(paths[1]) in text


def test_without_schedules_those_of_the_curves_are_shown(folder, tmp_path):
    out = tmp_path / "r.html"
    result = run("report", folder / "s.safetensors", "-o", out, "--solver", "ddim", "--max-steps", "5", "-q")
    assert result.exit_code == 0, result.stderr
    assert "ddim, 5 steps" in " ".join(parsed(out).text)


def test_a_measurement_without_responses_and_a_flow_have_pages(tmp_path):
    denoiser = fs.Denoiser.from_velocity(lambda x, t: x * (2 * t[:, None] - 1))
    fs.measure(denoiser, (3,), samples=1, levels=12, responses=False, progress=False).save(tmp_path / "s.safetensors")
    out = tmp_path / "r.html"
    result = run("report", tmp_path / "s.safetensors", "-o", out, "--solver", "ddim", "--max-steps", "4", "-q")
    assert result.exit_code == 0, result.stderr
    text = " ".join(parsed(out).text)
    assert "flow time (noise on the left)" in text
    assert "Responses to deviations" not in text


def test_the_plan_is_that_of_steps_needed(folder, monkeypatch):
    monkeypatch.setattr(report_data, "TARGETS", (3, 5))
    stats = fs.PathStatistics.load(folder / "s.safetensors")
    for solver in ("ddim", "dpmpp_2m", "fitted"):
        curve = fs.error_curve(stats, solver, 8)
        needed = [fs.steps_needed(stats, solver, target=("karras", steps)) for steps in (3, 5)]
        assert report_data.plan(stats, curve) == [n if n <= 8 else None for n in needed]


def test_karras_is_drawn_with_dpmpp_2m_beside_the_fitted_solver_alone(folder, tmp_path):
    options = ("--solver", "fitted", "--max-steps", "3", "-q", "-o", tmp_path / "r.html")
    result = run("report", folder / "s.safetensors", *options)
    assert result.exit_code == 0, result.stderr
    assert "karras, dpmpp_2m" in parsed(tmp_path / "r.html").text


def test_bands_add_the_scatter_and_the_jackknife(folder):
    stats = fs.PathStatistics.load(folder / "s.safetensors")
    curve = fs.error_curve(stats, "ddim", 3)
    found = report_data.band(stats, curve)
    logs = [
        math.log(fs.predict_error(stats.select([b for b in range(3) if b != n]), curve.schedules[2])) for n in range(3)
    ]
    jackknife = np.sqrt(2 / 3 * np.sum((np.array(logs) - np.mean(logs)) ** 2))
    factor = math.exp(math.hypot(math.log(1.3), jackknife))
    assert found[1][2] / curve.predicted_errors[2] == pytest.approx(factor, rel=1e-9)
    assert curve.predicted_errors[2] / found[0][2] == pytest.approx(factor, rel=1e-9)
    alone = report_data.band(stats.select([0]), curve)
    assert alone[1][0] / curve.predicted_errors[0] == pytest.approx(1.3)


def test_a_curve_that_reaches_0_is_drawn_down_to_rounding(tmp_path):
    """Of Gaussian data with the exact denoiser: some samples are predicted without an error, others are not."""
    denoiser = fs.Denoiser.from_denoiser(lambda z, s: z / (1 + s.reshape(-1, 1) ** 2), 0.01, 20.0)
    stats = fs.measure(denoiser, (5,), samples=4, levels=24, progress=False)
    curve = fs.error_curve(stats, "fitted", 8)
    assert min(curve.predicted_errors) < 1e-200
    low, high = report_data.band(stats, curve)
    assert max(high[-1] / low[-1], high[4] / low[4]) < 100
    assert high[-1] > report_data.rounding(stats) > 1e-15
    stats.save(tmp_path / "s.safetensors")
    options = ("--solver", "fitted", "--max-steps", "8", "-q", "-o", tmp_path / "r.html")
    result = run("report", tmp_path / "s.safetensors", *options)
    assert result.exit_code == 0, result.stderr


def test_an_error_in_a_table_takes_the_place_of_the_schedules_own(page, folder, tmp_path):
    schedule = page.parent / "run <b>.json"
    rows = "name,solver,steps,typical_error\nrun <b>,ddim,4,0.02\n"
    (tmp_path / "errors.csv").write_text(rows, encoding="utf-8-sig")  # with a byte order mark, as spreadsheets save it
    options = ("--solver", "ddim", "--max-steps", "4", "--errors", tmp_path / "errors.csv", "-q")
    result = run("report", folder / "s.safetensors", schedule, "-o", tmp_path / "r.html", *options)
    assert result.exit_code == 0, result.stderr
    assert " ".join(parsed(tmp_path / "r.html").text).count("run <b> (ddim), measured") == 1


def test_points_of_a_comparison_differ_and_name_their_solver_once(folder, tmp_path, monkeypatch):
    """However many they are: no two have one colour and one marker."""
    rows = "".join(f"{name}-{n},ddim,4,{n + 1}\n" for n, name in enumerate(["karras-ddim", "words"] * 10))
    (tmp_path / "errors.csv").write_text("name,solver,steps,typical_error\n" + rows)
    drawn = []
    monkeypatch.setattr(charts, "_svg", lambda figure, _: drawn.append(figure) or "")
    options = ("--solver", "ddim", "--max-steps", "4", "--errors", tmp_path / "errors.csv", "-q")
    assert run("report", folder / "s.safetensors", "-o", tmp_path / "r.html", *options).exit_code == 0
    lines = next(figure.axes[0].lines for figure in drawn if "karras, ddim" in labels(figure))
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(lines) == 22
    names = [line.get_label() for line in lines]
    assert {"karras-ddim-0, measured", "words-1 (ddim), measured"} <= set(names)


def labels(figure):
    """What the lines of a figure's first axes are called."""
    return [line.get_label() for line in figure.axes[0].lines]


def test_levels_given_to_the_network_are_listed_and_an_error_of_0_is_drawn(folder, tmp_path, monkeypatch):
    drawn, plot = [], matplotlib.axes.Axes.plot
    monkeypatch.setattr(
        matplotlib.axes.Axes, "plot", lambda *given, **style: drawn.append(given) or plot(*given, **style)
    )
    fs.Schedule([80.0, 1.0, 0.0], "ddim", network_sigmas=[71.25, 1.125]).save(tmp_path / "told.json")
    (tmp_path / "e.csv").write_text("name,solver,steps,typical_error\nexact,ddim,77,0\n")
    files = ("report", folder / "s.safetensors", tmp_path / "told.json", "-o", tmp_path / "r.html")
    result = run(*files, "--errors", tmp_path / "e.csv", "--solver", "ddim", "--max-steps", "2", "-q")
    assert result.exit_code == 0, result.stderr
    assert "the network is told 71.25, 1.125" in re.sub(r"\s+", " ", " ".join(parsed(tmp_path / "r.html").text))
    (point,) = (given[2] for given in drawn if isinstance(given[1], int) and given[1] == 77)
    assert point == report_data.rounding(fs.PathStatistics.load(folder / "s.safetensors")) > 0


def test_a_missing_picture_is_named(folder, tmp_path):
    result = run("report", folder / "s.safetensors", "-o", tmp_path / "r.html", "--image", "a=no.png", "-q")
    assert result.exit_code == 1
    assert "image: no such file: no.png" in one_line(result)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-o", "r.txt"), "output must end in .html"),
        (("-o", "r.html", "--image", "no title.png"), "image must be TITLE=FILE"),
        (("-o", "r.html", "--image", "a=s.safetensors"), "image must be TITLE=FILE"),
        (("-o", "r.html", "--image", "a=fake.png"), "is not a picture"),
        (
            ("-o", "r.html", "--errors", "nan.csv"),
            "writes: x has an error of nan in 4 steps",
        ),
        (("-o", "r.html", "--errors", "fake.png"), "fake.png is not a table that 'fastsched compare --csv' writes"),
        (("-o", "r.html", "--errors", "latin.csv"), "latin.csv is not a table that 'fastsched compare --csv' writes"),
        (("flow.json", "-o", "r.html"), "flow is for a 'flow' noise process and the statistics are of a 've' one"),
        (("-o", "r.html", "--solver", "dpmpp_9m"), "solver"),
    ],
)
def test_wrong_arguments_are_named(folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fake.png").write_text("a,b\n1,2\n")
    (tmp_path / "latin.csv").write_bytes("name\n\xfc".encode("latin-1"))
    (tmp_path / "nan.csv").write_text("name,solver,steps,typical_error\nx,ddim,4,nan\n")
    fs.Schedule(torch.tensor([1.0, 0.5, 0.0]), "ddim", "flow").save("flow.json")
    result = run("report", folder / "s.safetensors", *arguments, "-q")
    assert result.exit_code == 2
    assert message in one_line(result)
    assert not (tmp_path / "r.html").exists()


def browser(path, *options):
    """Run Chromium once on a page, with a new profile."""
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={path.parent / 'profile'}", *options, path.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_colour_in_a_name_stays_in_the_figure(folder, tmp_path):
    schedule = fs.Schedule.load(folder / "x-4.json")
    figure = charts.nodes(fs.PathStatistics.load(folder / "s.safetensors"), {"a #dddddd": schedule})
    assert "a #dddddd" in figure
    assert "var(--c0)" in figure


@pytest.mark.parametrize(("scale", "levels"), [(0.0, 8), (1.0, 4)])
def test_figures_of_next_to_nothing_give_no_warnings(scale, levels):
    """Nothing to draw for a network that is 0, one level for four: warnings are errors here."""
    network = lambda z, s: scale * z / (1 + s.reshape(-1, 1) ** 2)
    denoiser = fs.Denoiser.from_denoiser(network, 0.01, 20.0)
    stats = fs.measure(denoiser, (1,), levels=levels, samples=1, checks=False, progress=False)
    for figure in (charts.sensitivity, charts.responses):
        assert figure(stats).startswith("<svg")


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
@pytest.mark.parametrize(("scheme", "dark"), [("1", False), ("0", True)], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1180], ids=["phone", "desk"])
def test_a_browser_shows_the_page(page, tmp_path, width, scheme, dark):
    """The page fills its width without a sideways scroll, and its colours follow the reader's choice."""
    image = pytest.importorskip("PIL.Image", reason="Pillow reads the screenshot")
    # Chromium lays out no window narrower than 500, but a frame may be.
    content = escape(page.read_text(encoding="utf-8"), quote=True)
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<title></title><iframe width="{width}" height="900" frameborder="0" srcdoc="{content}" onload="'
        "document.title = this.contentDocument.documentElement.scrollWidth + ' ' + this.contentWindow.innerWidth"
        '"></iframe>',
        encoding="utf-8",
    )
    settings = [f"--window-size={width},900", f"--blink-settings=preferredColorScheme={scheme}"]
    title = re.search(r"<title>(\d+) (\d+)</title>", browser(frame, "--dump-dom"))
    assert title is not None
    assert int(title[1]) <= int(title[2]) == width
    browser(page, *settings, f"--screenshot={tmp_path / 'shot.png'}")
    with image.open(tmp_path / "shot.png") as read:
        pixels = np.asarray(read.convert("L"))
    assert (pixels.mean() < 80) == dark
    assert pixels.std() > 5  # something is drawn
