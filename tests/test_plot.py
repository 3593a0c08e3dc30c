import sys

import numpy as np
import pytest
import torch

import fastsched as fs
from fastsched import plot
from fastsched.comparison import Comparison, ComparisonRow
from fastsched.costs.step_cost import error_weight
from fastsched.measurement.converged_samples import Reference
from fastsched.sampling.random_streams import noise_of

STD = 0.5


@pytest.fixture(scope="module")
def stats() -> fs.PathStatistics:
    oracle = fs.oracles.Gaussian(STD, (4,))
    denoiser = fs.Denoiser.from_denoiser(oracle.denoise, 0.002, 80.0)
    return fs.measure(denoiser, (4,), samples=2, levels=96, progress=False)


@pytest.fixture
def schedules() -> dict[str, torch.Tensor]:
    return {"a": fs.baselines.karras(5, 0.002, 80.0), "b": fs.baselines.exponential(7, 0.002, 80.0)}


def comparison(calls: int, **errors: float) -> Comparison:
    rows = [ComparisonRow(name, "ddim", calls, calls, error, error, 0.0, 0.0) for name, error in errors.items()]
    return Comparison(tuple(rows), 2, Reference(torch.zeros(2, 4), torch.zeros(2, 4), "ddim", 300, 600))


def test_names_are_drawn_as_they_are():
    figure = plot.plot_errors([comparison(4, **{"$\\foo$": 1.0, "_a": 2.0, "5$": 3.0})])
    figure.canvas.draw()
    axes = figure.axes[0]
    assert [text.get_text().strip() for text in axes.get_legend().get_texts()] == [r"\$\foo\$", "_a", r"5\$"]
    grids = plot.plot_sample_grid({"$\\foo$": torch.zeros(1, 2, 2)})
    grids.canvas.draw()
    assert grids.axes[0].get_title() == r"\$\foo\$"


def test_density_of_gaussian_data_is_the_closed_form(stats):
    # D along the path is c^2 / (c^2 + s^2) z(s), z(s) = z_0 sqrt((c^2 + s^2) / (c^2 + s_0^2)).
    s, density = plot.cost_density(stats, weighted=False)
    start = torch.tensor(80.0**2 + STD**2).item()
    scale = float(80.0**2 * noise_of(stats.seeds, (4,)).square().sum(1).mean()) / start
    slope = STD**2 * s**2 * (STD**2 + s**2) ** -1.5  # |dD / d log s| per unit of that
    inside = (s > 0.02) & (s < 20)
    # Differences over steps of log(80 / 0.002) / 95 = 0.11: an error of about 0.11^2 relative; the path's own is less.
    np.testing.assert_allclose(density[inside], scale * slope[inside] ** 2, rtol=0.05)


def test_weighted_density_is_the_weight_times_the_plain_one(stats):
    _, plain = plot.cost_density(stats, weighted=False)
    _, weighted = plot.cost_density(stats)
    np.testing.assert_allclose(weighted / plain, error_weight(stats)[1:-1], rtol=1e-9)


def test_density_skips_the_gap_from_pure_noise():
    denoiser = fs.Denoiser.from_velocity(lambda x, t: x * (2 * t[:, None] - 1))
    stats = fs.measure(denoiser, (3,), samples=2, levels=16, responses=False, progress=False)
    s, density = plot.cost_density(stats, weighted=False)
    assert len(s) == len(density) == 14
    assert np.isfinite(s).all()
    assert np.isfinite(density).all()


def test_schedules_are_drawn_at_their_sigmas_noise_on_the_left(schedules, tmp_path):
    figure = plot.plot_schedules(schedules)
    (axes,) = figure.axes
    drawn = [line.get_xdata() for line in axes.lines if line.get_marker() not in ("None", None, "")]
    for found, sigmas in zip(drawn, schedules.values(), strict=True):
        np.testing.assert_allclose(found, sigmas[:-1].numpy())
    left, right = axes.get_xlim()
    assert left > right
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    figure.savefig(tmp_path / "a.svg")
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_schedules_over_the_density_share_its_axis(stats, schedules, tmp_path):
    figure = plot.plot_schedules(schedules, stats=stats)
    above, below = figure.axes
    assert above.get_xlim() == below.get_xlim()
    assert max(line.get_ydata().max() for line in above.lines) == 1.0
    figure.savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_flow_times_are_drawn_on_a_linear_axis():
    schedule = fs.Schedule(fs.baselines.flow_shift(4), "ddim", "flow")
    assert plot.plot_schedules({"flow": schedule}).axes[0].get_xscale() == "linear"


def test_sample_grid_places_every_image():
    images = torch.linspace(-1, 1, 5).reshape(5, 1, 1, 1).expand(5, 1, 8, 8)
    figure = plot.plot_sample_grid({"left": images, "right": images[:, 0]}, columns=3)
    for axes, title in zip(figure.axes, ("left", "right"), strict=True):
        sheet = np.asarray(axes.images[0].get_array())
        assert sheet.shape == (2 * 8 + 1, 3 * 8 + 2)
        corners = [sheet[0, 0], sheet[0, 9], sheet[0, 18], sheet[9, 0], sheet[9, 9]]
        np.testing.assert_allclose(corners, np.linspace(0, 1, 5), atol=1e-7)
        assert sheet[9, 18] == 1.0  # no sixth image
        assert axes.get_title() == title


def test_colour_images_keep_their_channels():
    images = torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 3, 1, 1).expand(2, 3, 4, 4)
    sheet = np.asarray(plot.plot_sample_grid({"a": images}).axes[0].images[0].get_array())
    np.testing.assert_allclose(sheet[0, 0], [0.0, 0.5, 1.0])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1)])
def test_images_of_one_row_or_column_keep_their_shape(channels, size):
    """A row of three colours is no grey image of three columns."""
    figure = plot.plot_sample_grid({"a": torch.zeros(1, channels, *size)})
    sheet = np.asarray(figure.axes[0].images[0].get_array())
    assert sheet.shape == (size if channels == 1 else (*size, 3))


def test_sample_grids_are_further_apart_than_images_in_a_grid():
    figure = plot.plot_sample_grid({"left": torch.zeros(9, 3, 8, 8), "right": torch.zeros(9, 3, 8, 8)})
    figure.canvas.draw()
    left, right = (axes.get_position() for axes in figure.axes)
    assert right.x0 - left.x1 > 1.5 * left.width / 26  # 26 pixels across, gaps of one


def test_difference_grid_is_the_distance_of_each_pixel():
    axes = plot.draw_empty(2, 2).subplots()
    image = plot.draw_difference_grid(axes, torch.full((1, 2, 2), 0.75), torch.full((1, 2, 2), 0.5))
    np.testing.assert_allclose(np.asarray(image.get_array()), 0.25)


def test_errors_join_rows_of_one_name():
    figure = plot.plot_errors([comparison(8, a=0.5, b=2.0), comparison(6, a=1.0, b=3.0)], names=["a"])
    (line,) = figure.axes[0].lines
    assert list(line.get_xdata()) == [6, 8]
    assert list(line.get_ydata()) == [1.0, 0.5]


def test_overview_holds_every_part(stats, schedules):
    images = torch.zeros(4, 1, 8, 8)
    figure = plot.plot_overview({"a": images, "b": images}, images, schedules, stats, [comparison(6, a=1.0, b=2.0)])
    text = {axes.get_title() for axes in figure.axes}
    assert {"a", "b", "converged\n300 model calls"} <= text
    figure.draw_without_rendering()


def test_pyplot_is_not_imported():
    import subprocess
    import sys

    code = (
        "import sys, torch, fastsched as fs; fs.plot.plot_schedules({'a': torch.tensor([1., 0.])});"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plot.plot_schedules({}), "schedules must hold at least one"),
        (lambda: plot.plot_schedules({"a": torch.tensor([1.0, 2.0])}), "strictly descend"),
        (
            lambda: plot.plot_schedules(
                {
                    "a": fs.Schedule(torch.tensor([0.9, 0.0]), "ddim", "flow"),
                    "b": fs.Schedule(torch.tensor([0.9, 0.0]), "ddim", "ve"),
                }
            ),
            "all be in sigmas or all in flow times",
        ),
        (lambda: plot.plot_sample_grid({}), "samples must hold at least one"),
        (lambda: plot.plot_sample_grid({"a": torch.zeros(3, 2, 8, 8)}), "C 1 or 3"),
        (lambda: plot.plot_sample_grid({"a": torch.zeros(3, 8, 8)}, columns=0), "columns"),
        (lambda: plot.plot_errors([]), "at least one row"),
        (lambda: plot.plot_errors([comparison(8, mine=0.5)], ["mine", "min"]), "names must be .* did you mean 'mine'"),
        (lambda: plot.plot_error_curves([]), "curves must hold at least one curve"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_without_responses_only_the_unweighted_density_is_drawn():
    denoiser = fs.Denoiser.from_denoiser(fs.oracles.Gaussian(STD, (4,)).denoise, 0.002, 80.0)
    figure = plot.plot_cost_density(fs.measure(denoiser, (4,), levels=8, responses=False, progress=False))
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["unweighted"]


@pytest.mark.parametrize("length", [60, 250])
def test_long_names_leave_the_axes_room(stats, schedules, length):
    figure = plot.plot_schedules({"/path" * (length // 5): schedules["a"]}, stats=stats)
    figure.draw_without_rendering()
    above, below = figure.axes
    for text in (above.get_legend(), below.xaxis.label, *below.get_yticklabels()):
        box = text.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= figure.bbox.x1


def test_ticks_of_model_calls_are_integers_and_legends_cover_no_curve(stats, schedules):
    curves = [fs.error_curve(stats, solver, 3) for solver in ("ddim", "dpmpp_2m", "heun")]
    errors = [comparison(calls, a=1.0 / calls, b=2.0 / calls) for calls in (5, 6, 7)]
    figures = [plot.plot_error_curves(curves), plot.plot_errors(errors), plot.plot_schedules(schedules, stats=stats)]
    for figure in figures:
        figure.canvas.draw()
        axes = figure.axes[0]
        legend = axes.get_legend().get_window_extent()
        assert legend.y0 >= axes.get_window_extent().y1 - 1e-6
        assert legend.x0 >= 0
        assert legend.x1 <= figure.bbox.x1
    for figure in figures[:2]:
        ticks = figure.axes[0].get_xticks()
        assert len(ticks) >= 2
        assert all(float(tick).is_integer() for tick in ticks)


def test_missing_matplotlib_is_said_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"fastsched\[plot\]"):
        plot.check_matplotlib()


@pytest.mark.parametrize("steps", [3, 20])
def test_weights_are_drawn_beside_the_levels(steps, tmp_path):
    weights = torch.eye(steps, dtype=torch.float64)
    weights[2] = torch.tensor([0.25, -0.5, 1.25] + [0.0] * (steps - 3))
    levels = [float("inf"), *(2.0**-n for n in range(steps - 1)), 0.0]
    figure = plot.plot_weights(fs.Schedule(torch.tensor(levels), "fitted", "vp", weights=weights))
    nodes, heat = figure.axes[:2]
    np.testing.assert_allclose(nodes.lines[0].get_xdata(), levels[1:-1])  # pure noise has no place on the axis
    np.testing.assert_array_equal(nodes.lines[0].get_ydata(), range(1, steps))
    assert nodes.get_ylim() == heat.get_ylim() == (steps - 0.5, -0.5)
    (image,) = heat.images
    np.testing.assert_allclose(image.get_array().filled(np.nan)[2, :3], [0.25, -0.5, 1.25])
    assert image.get_clim() == (-1.25, 1.25)
    assert [text.get_text() for text in heat.texts] == (
        ["1.00", "0.00", "1.00", "0.25", "-0.50", "1.25"] * (steps == 3)
    )
    figure.savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_bars_mark_decoupled_levels():
    told = torch.tensor([float("inf"), 1.2, 0.4], dtype=torch.float64)
    schedule = fs.Schedule(
        [float("inf"), 1.0, 0.5, 0.0], "fitted", "vp", weights=torch.eye(3), network_sigmas=told, decoupled="denoiser"
    )
    for figure in (plot.plot_schedules({"a": schedule}), plot.plot_weights(schedule)):
        dots, bars = (
            line for line in figure.axes[0].lines if len(line.get_xdata()) == 2 and line.get_marker() != "None"
        )
        np.testing.assert_allclose(bars.get_xdata(), told[1:])
        np.testing.assert_allclose(dots.get_xdata(), [1.0, 0.5])
        np.testing.assert_array_equal(bars.get_ydata()[-1] - dots.get_ydata()[-1], 0)


def test_only_fitted_schedules_have_weights_to_draw():
    with pytest.raises(ValueError, match="got one for 'ddim'"):
        plot.plot_weights(fs.Schedule(torch.tensor([1.0, 0.0]), "ddim"))


@pytest.mark.filterwarnings("ignore:the network answered the same:UserWarning")
def test_a_network_with_one_answer_is_drawn_without_warnings():
    denoiser = fs.Denoiser.from_denoiser(lambda z, s: torch.zeros_like(z), 0.02, 80.0)
    stats = fs.measure(denoiser, (4,), levels=6, samples=1, progress=False)
    plot.plot_cost_density(stats).canvas.draw()


def test_a_step_from_pure_noise_is_drawn_without_warnings():
    schedule = fs.Schedule([float("inf"), 0.0], "fitted", "vp", weights=torch.eye(1))
    for figure in (schedule.plot(), plot.plot_weights(schedule)):
        figure.canvas.draw()
        assert figure.axes[0].xaxis_inverted()
