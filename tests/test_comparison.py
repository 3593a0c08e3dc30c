import csv
import io
import itertools
import math
from dataclasses import replace
from http.client import IncompleteRead

import numpy as np
import pytest
import torch
from models import counted_denoiser

import fastsched as fs
from fastsched import metrics
from fastsched.comparison import Comparison, ComparisonRow, compare, comparison_calls
from fastsched.measurement.converged_samples import Reference, converged_reference
from fastsched.sampling.random_streams import noise_of, sample_seeds

SHAPE = (2, 3)
STD = 0.5
LOW, HIGH = 0.002, 80.0


@pytest.fixture(scope="module")
def gaussian() -> fs.Denoiser:
    oracle = fs.oracles.Gaussian(STD, SHAPE)
    return fs.Denoiser.from_denoiser(oracle.denoise, LOW, HIGH)


@pytest.fixture(scope="module")
def converged(gaussian: fs.Denoiser) -> Reference:
    return converged_reference(gaussian, SHAPE, samples=32, progress=False)


def gaussian_ends(noise: torch.Tensor) -> torch.Tensor:
    """Where the exact flow ends: down to the lowest level, then its denoised value."""
    oracle = fs.oracles.Gaussian(STD, SHAPE)
    return oracle.denoise(oracle.flow(HIGH * noise.double(), HIGH, LOW), LOW)


def ddim_gain(sigmas: torch.Tensor) -> float:
    """The factor from noise to end that Euler's method makes on Gaussian data, with slope ``z s / (c^2 + s^2)``."""
    gain = float(sigmas[0])
    for s, following in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        gain *= 1 + (following - s) * s / (STD**2 + s**2)
    return gain


def test_reference_is_the_exact_flow_to_within_a_thousandth_of_a_good_schedule(gaussian, converged):
    left = metrics.squared_distances(converged.ends, gaussian_ends(converged.noise)).mean()
    good = compare(
        gaussian, {"good": fs.baselines.kl_optimal(8, LOW, HIGH, STD)}, "dpmpp_2m", reference=converged, progress=False
    )
    assert float(left) < 1e-3 * good["good"].mean_error
    assert float(left) < 1e-6 * float(converged.ends.square().sum(1).mean())


def test_reference_converges_at_the_order_of_its_solver(gaussian):
    errors = []
    for steps in (25, 50, 100):
        run = converged_reference(gaussian, SHAPE, samples=8, steps=steps, progress=False)
        errors.append(float(metrics.squared_distances(run.ends, gaussian_ends(run.noise)).mean()))
    for coarse, fine in itertools.pairwise(errors):
        assert 10 < coarse / fine < 25  # 2^4 for a squared second-order error


def test_ddim_on_a_gaussian_is_its_closed_form(gaussian, converged):
    sigmas = fs.baselines.karras(5, LOW, HIGH)
    row = compare(gaussian, {"karras": sigmas}, "ddim", reference=converged, progress=False)["karras"]
    wrong = ddim_gain(sigmas) * converged.noise.double() - gaussian_ends(converged.noise)
    squared = wrong.flatten(1).square().sum(1)
    assert row.mean_error == pytest.approx(float(squared.mean()), rel=1e-3)
    assert row.standard_error == pytest.approx(float(squared.std()) / math.sqrt(32), rel=1e-3)
    assert row.typical_error == pytest.approx(float(squared.log().mean().exp()), rel=1e-3)
    # Ends are multiples of one noise, so the roots of both covariances commute: the distance is the mean of squares.
    ratio = ddim_gain(sigmas) / float(gaussian_ends(torch.ones(1, *SHAPE)).mean())
    ends = converged.ends.double().flatten(1)
    moments = float(ends.mean(0).square().sum() + ends.var(0).sum())
    assert row.frechet == pytest.approx((ratio - 1) ** 2 * moments, rel=1e-3)


def test_rows_rank_count_and_keep_their_order(gaussian, converged):
    optimal = fs.Schedule(fs.baselines.kl_optimal(6, LOW, HIGH, STD), solver="ddim")
    result = compare(
        gaussian,
        {"karras": fs.Schedule(fs.baselines.karras(6, LOW, HIGH), solver="heun"), "best": optimal},
        reference=converged,
        progress=False,
    )
    assert [row.name for row in result.rows] == ["karras", "best"]
    assert [row.model_calls for row in result.rows] == [11, 6]
    assert [row.solver for row in result.rows] == ["heun", "ddim"]
    errors = [row.typical_error for row in result.ranked]
    assert errors == sorted(errors)
    assert result.samples == 32
    assert result.reference is converged


def test_the_solver_given_overrides_a_schedules_own(gaussian, converged):
    schedule = fs.Schedule(fs.baselines.exponential(6, LOW, HIGH), solver="dpmpp_2m")
    row = compare(gaussian, {"a": schedule}, "euler", reference=converged, progress=False)["a"]
    assert row.solver == "ddim"


def test_network_calls_are_those_reported():
    denoiser, calls = counted_denoiser(fs.oracles.Gaussian(STD, SHAPE), LOW, HIGH)
    found = converged_reference(denoiser, SHAPE, samples=5, steps=20, batch_size=2, progress=False)
    assert (sum(calls), max(calls)) == (found.model_calls + 7, 2)  # and those that check the network
    calls.clear()
    sigmas = fs.baselines.karras(4, LOW, HIGH)
    result = compare(denoiser, {"k": sigmas}, "heun", reference=found, batch_size=3, progress=False)
    assert sum(calls) - 7 == 5 * result["k"].model_calls == 35


def test_batches_do_not_change_the_result(gaussian, converged):
    sigmas = {"k": fs.baselines.karras(4, LOW, HIGH)}
    whole = compare(gaussian, sigmas, "dpmpp_2m", reference=converged, progress=False)
    parts = compare(gaussian, sigmas, "dpmpp_2m", reference=converged, batch_size=5, progress=False)
    assert parts["k"].typical_error == pytest.approx(whole["k"].typical_error, rel=1e-4)


def test_noises_differ_from_those_of_a_measurement(converged):
    for seed in (0, 1):
        measured = noise_of(sample_seeds(seed, 32), SHAPE)
        gaps = (converged.noise[:, None] - measured[None]).flatten(2).square().sum(2)
        assert float(gaps.min()) > 0


def test_flow_models_compare_in_times():
    c = STD

    def velocity(x, t):  # E[eps - x0 | x] of N(0, c^2) data
        t = t.reshape(-1, 1)
        return (t - (1 - t) * c**2) / ((1 - t) ** 2 * c**2 + t**2) * x

    denoiser = fs.Denoiser.from_velocity(velocity)
    stats = fs.measure(denoiser, (6,), samples=2, levels=48, progress=False)
    schedules = {
        "ours": fs.optimal_schedule(stats, 6, "ddim"),
        "shift 3": fs.Schedule(fs.baselines.flow_shift(6, 3.0), solver="ddim", noise="flow"),
        "times": fs.baselines.flow_shift(6, 1.0),
    }
    result = compare(denoiser, schedules, "ddim", shape=(6,), samples=16, progress=False)
    ends = c * result.reference.noise  # the exact flow from t = 1
    left = metrics.squared_distances(result.reference.ends, ends).mean()
    assert float(left) < 1e-4 * float(ends.square().sum(1).mean())
    assert result.ranked[0].name == "ours"


def test_networks_of_whole_timesteps_get_a_reference_of_levels_they_know():
    abar = torch.linspace(0.999, 0.01, 40, dtype=torch.float64)
    seen = set()

    def epsilon(x, t):
        assert t.dtype == torch.int64
        seen.update(t.tolist())
        a = abar[t].reshape(-1, 1).to(x.dtype)
        return x * (1 - a).sqrt() / (a * STD**2 + 1 - a)

    denoiser = fs.Denoiser.from_epsilon(epsilon, abar, integer_timesteps=True)
    run = converged_reference(denoiser, (4,), samples=3, progress=False)
    assert run.steps == 40
    assert seen == set(range(40))


def test_a_single_sample_has_no_spread(gaussian):
    settings = {"shape": SHAPE, "samples": 1, "reference_steps": 20, "progress": False}
    result = compare(gaussian, {"k": fs.baselines.karras(4, LOW, HIGH)}, "ddim", **settings)
    assert math.isnan(result["k"].frechet)
    assert math.isnan(result["k"].standard_error)
    assert "nan" not in str(result)


def test_table_and_csv_hold_the_rows(tmp_path, converged):
    rows = (
        ComparisonRow("worse, by far", "ddim", 6, 6, 2.5, 3.0, 0.25, 0.125),
        ComparisonRow("best", "ddim", 6, 6, 0.5, 0.75, 0.125, 0.0625),
    )
    result = Comparison(rows, 32, converged)
    lines = str(result).splitlines()
    assert lines[0].split() == ["schedule", "solver", "steps", "calls", "typical", "error", "mean", "error", "frechet"]
    assert lines[1].split() == ["best", "ddim", "6", "6", "0.5", "0.75", "±", "0.12", "0.0625"]
    assert len({len(line) for line in lines[:3]}) == 1
    with pytest.raises(TypeError, match="path must be the path of a file, got 2"):
        result.to_csv(2)  # as open() takes it, the number of stderr
    text = result.to_csv(tmp_path / "rows.csv")
    assert (tmp_path / "rows.csv").read_text() == text
    read = list(csv.DictReader(io.StringIO(text)))
    assert [row["name"] for row in read] == ["worse, by far", "best"]
    assert [float(row["frechet"]) for row in read] == [row["frechet"] for row in result.to_dicts()]


def test_an_exact_copy_keeps_a_finite_place(gaussian, converged):
    fine = gaussian.levels(converged.steps)
    same = torch.cat([fine, fine.new_zeros(1)])
    row = compare(gaussian, {"same": same}, "dpmpp_2m", reference=converged, progress=False)["same"]
    assert row.mean_error == 0
    assert 0 < row.typical_error < 1e-12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedules": {}}, "schedules must hold at least one entry"),
        ({"solver": None}, "solver must be given, because schedules\\['k'\\]"),
        ({"solver": "dpmpp2m"}, "did you mean 'dpmpp_2m'"),
        ({"schedules": {"k": torch.tensor([3.0, 1.0])}}, "schedules\\['k'\\] must end in 0"),
        ({"schedules": {"k": torch.tensor([1.0, 3.0, 0.0])}}, "schedules\\['k'\\] must strictly descend"),
        ({"schedules": {"k": fs.Schedule(torch.tensor([0.9, 0.0]), "ddim", "flow")}}, "'flow' noise process"),
        ({"shape": None}, "shape must be given"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"seed": -1}, "seed must be within"),
        ({"reference_steps": 1}, "steps must be at least 2"),
    ],
)
def test_bad_arguments_are_named(gaussian, arguments, message):
    usual = {"schedules": {"k": fs.baselines.karras(4, LOW, HIGH)}, "solver": "ddim", "shape": SHAPE, "samples": 2}
    with pytest.raises(ValueError, match=message):
        compare(gaussian, **{**usual, "progress": False, **arguments})


def test_too_few_steps_of_the_reference_are_named_as_such(gaussian):
    with pytest.raises(ValueError, match=r"^reference_steps must be at least 2"):
        comparison_calls(gaussian, {"k": torch.tensor([1.0, 0.0])}, "ddim", reference_steps=1)


def test_a_reference_of_another_shape_is_refused(gaussian, converged):
    with pytest.raises(ValueError, match="not that of the reference"):
        compare(gaussian, {"k": torch.tensor([1.0, 0.0])}, "ddim", shape=(9,), reference=converged, progress=False)


def test_a_reference_of_another_network_is_told(gaussian, converged):
    run = {"k": torch.tensor([1.0, 0.0])}, "ddim"
    other = fs.Denoiser.from_denoiser(lambda z, s: 1.01 * gaussian.network(z, s), LOW, HIGH)
    with pytest.warns(UserWarning, match="reference was made with another network"):
        compare(other, *run, reference=converged, progress=False)
    compare(gaussian, *run, reference=converged, dtype=torch.bfloat16, progress=False)


def test_networks_of_batches_of_one_size_are_compared(gaussian):
    def network(z, s):
        assert len(z) == 4
        return gaussian.network(z, s)

    denoiser = fs.Denoiser.from_denoiser(network, LOW, HIGH)
    run = {"k": torch.tensor([1.0, 0.0])}, "ddim"
    found = compare(denoiser, *run, shape=SHAPE, samples=4, reference_steps=4, progress=False)
    assert found.reference.fingerprint is None
    compare(denoiser, *run, reference=found.reference, progress=False)


def test_an_unknown_row_names_those_there_are(converged):
    with pytest.raises(KeyError, match="there are 'a'"):
        Comparison((ComparisonRow("a", "ddim", 1, 1, 1.0, 1.0, 1.0, 1.0),), 32, converged)["b"]


def test_a_range_of_samples_is_a_part_of_them(gaussian, converged):
    part = converged_reference(gaussian, SHAPE, samples=range(8, 12), progress=False)
    assert torch.equal(part.noise, converged.noise[8:12])
    torch.testing.assert_close(part.ends, converged.ends[8:12], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="samples must be a number, or range"):
        compare(gaussian, {"ddim": [80.0, 1.0, 0.0]}, "ddim", shape=SHAPE, samples=range(4, 4))


@pytest.mark.parametrize("layer", [torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(4)])
def test_a_network_in_training_mode_is_refused(layer):
    network = torch.nn.Sequential(torch.nn.Linear(4, 4), layer)
    denoiser = fs.Denoiser.from_denoiser(lambda z, s: network(z), LOW, HIGH)
    trained = fs.Denoiser.from_denoiser(lambda z, s: 0.1 * z, LOW, HIGH)
    stats = fs.measure(trained, (4,), levels=8, checks=False, progress=False)
    schedule = fs.optimal_schedule(stats, 4)
    noise = torch.zeros(2, 4)
    calls = {
        "converged_reference": lambda: converged_reference(denoiser, (4,), samples=4, progress=False),
        "compare": lambda: compare(
            denoiser, {"a": schedule}, reference=Reference(noise, noise, "ddim", 4, 0), progress=False
        ),
        "stein_corrector": lambda: fs.costs.stein_corrector(
            denoiser, sigmas=[1.0, 0.5, 0.1], shape=(4,), samples=4, progress=False
        ),
        "audition": lambda: fs.audition(denoiser, stats, 4, progress=False),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match="training mode"):
            call()


def test_names_and_batch_sizes_of_compare(gaussian, converged):
    schedule = fs.Schedule([10.0, 1.0, 0.0], "ddim")
    with pytest.raises(TypeError, match="schedules must have names that are text, got 8"):
        compare(gaussian, {8: schedule}, reference=converged, progress=False)
    rows = compare(gaussian, {"8": schedule}, reference=converged, batch_size=np.int64(2), progress=False).rows
    assert rows[0].steps == 2


def test_a_schedule_that_cannot_be_compared_is_named(gaussian):
    right = fs.Schedule([20.0, 1.0, 0.0], "ddim")
    told = replace(right, network_sigmas=[20.0, 1.0])
    for wrong, solver in ((replace(right, solver="ancestral"), None), (told, "heun")):
        with pytest.raises(ValueError, match=r"schedules\['b'\]: solver must be deterministic"):
            fs.compare(gaussian, {"a": right, "b": wrong}, solver, shape=SHAPE, samples=2, progress=False)
    flow = fs.Denoiser.from_velocity(lambda x, t: x)
    with pytest.raises(ValueError, match=r"schedules\['b'\]: sigmas of a flow model are times"):
        fs.compare(flow, {"b": right.sigmas}, "ddim", shape=(4,), samples=2, progress=False)


def test_a_random_network_is_warned_of_once():
    random = lambda z, s: 0.1 * torch.randn(z.shape)
    denoiser = fs.Denoiser.from_denoiser(random, 0.1, 5.0)
    with pytest.warns(UserWarning, match="random numbers were drawn during sampling") as told:
        fs.compare(denoiser, {"a": [5.0, 1.0, 0.0]}, "ddim", shape=(2,), samples=2, reference_steps=4, progress=False)
    assert len(told) == 1


@pytest.mark.parametrize(
    "other",
    [
        lambda z: 0.3 * (z.mean(0, keepdim=True) - z),
        lambda z: 0.1 * z * torch.arange(len(z)).reshape(-1, *[1] * (z.ndim - 1)),
    ],
)
def test_a_network_that_mixes_samples_is_warned_of(gaussian, other):
    network = lambda z, s: gaussian.network(z, s) + other(z)
    denoiser, options = fs.Denoiser.from_denoiser(network, LOW, HIGH), {"samples": 3, "progress": False}
    with pytest.warns(UserWarning, match="mixes the samples of a batch") as told:
        compare(denoiser, {"k": [HIGH, 1.0, 0.0]}, "ddim", shape=SHAPE, reference_steps=4, **options)
    assert len(told) == 1
    compare(denoiser, {"k": [HIGH, 1.0, 0.0]}, "ddim", shape=SHAPE, reference_steps=4, batch_size=1, **options)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_network_with_one_answer_is_warned_of(value, samples):
    denoiser = fs.Denoiser.from_denoiser(lambda z, s: torch.full_like(z, value), LOW, HIGH)
    with pytest.warns(UserWarning, match="the network answered the same to every question"):
        fs.converged_reference(denoiser, SHAPE, samples=samples, steps=4, progress=False)


def test_a_network_that_is_no_denoiser_is_warned_of():
    """It predicts the noise, and was declared to predict the clean sample."""
    exact = fs.oracles.GaussianMixture.random(12, 3, seed=0)
    noise = lambda z, s: (z - exact.denoise(z, s)) / s.reshape(-1, 1)
    options = {"shape": (12,), "samples": 3, "reference_steps": 4, "progress": False}
    with pytest.warns(UserWarning, match="no denoiser of its noise process.*at the lowest level.*the noise") as told:
        compare(fs.Denoiser.from_denoiser(noise, LOW, HIGH), {"k": [HIGH, 1.0, 0.0]}, "ddim", **options)
    assert len(told) == 1
    assert "checks=False" not in str(told[0].message)  # which `compare` does not have
    compare(fs.Denoiser.from_denoiser(exact.denoise, LOW, HIGH), {"k": [HIGH, 1.0, 0.0]}, "ddim", **options)


@pytest.mark.parametrize("after", [7, 11])
def test_a_network_that_changes_is_warned_of(gaussian, after):
    """While the reference is made, or while schedules are compared with it."""
    calls = []

    def network(x, condition):
        calls.append(len(x))
        return gaussian.network(x, condition) * (1.0 if len(calls) <= after else 0.9)

    denoiser = fs.Denoiser.from_denoiser(network, LOW, HIGH)
    with pytest.warns(UserWarning, match="different outputs for the same input before and after sampling"):
        compare(denoiser, {"k": [HIGH, 1.0, 0.0]}, "ddim", shape=SHAPE, samples=2, reference_steps=5, progress=False)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_comparison_keeps_its_reference(gaussian, error):
    schedules, calls = {"a": [HIGH, 1.0, 0.0], "b": [HIGH, 2.0, 0.5, 0.0]}, []
    options = {"samples": 3, "reference_steps": 5, "progress": False}

    def stopped(x, condition):
        calls.append(1)
        if len(calls) == stop:
            raise error
        return gaussian.network(x, condition)

    stop, denoiser = 0, fs.Denoiser.from_denoiser(stopped, LOW, HIGH)
    whole = compare(denoiser, schedules, "ddim", shape=SHAPE, **options)
    stop, calls = len(calls) - 2, []  # the second call of "b"
    with pytest.raises(error) as raised:
        compare(denoiser, schedules, "ddim", shape=SHAPE, **options)
    partial = raised.value.partial
    assert list(partial) == ["a"]
    assert torch.equal(partial.reference.ends, whole.reference.ends)
    stop = 0
    again = compare(denoiser, schedules, "ddim", reference=partial.reference, progress=False)
    assert again["b"].typical_error == whole["b"].typical_error
    stop, calls = 8, []  # while the reference is made
    with pytest.raises(error) as raised:
        compare(denoiser, schedules, "ddim", shape=SHAPE, **options)
    assert not hasattr(raised.value, "partial")
    stop, calls = 16, []  # after five calls of the checks, in its third batch
    with pytest.raises(error) as raised:
        compare(denoiser, schedules, "ddim", shape=SHAPE, batch_size=1, **options)
    finished = raised.value.partial.reference
    assert (raised.value.partial.rows, raised.value.partial.samples, finished.model_calls) == ((), 2, 10)
    assert torch.equal(finished.ends, whole.reference.ends[:2])
    stop, calls = 16, []
    with pytest.raises(error) as raised:
        converged_reference(denoiser, SHAPE, steps=5, samples=3, batch_size=1, progress=False)
    assert torch.equal(raised.value.partial.ends, finished.ends)
    stop = 0
    assert compare(denoiser, schedules, "ddim", reference=finished, progress=False).samples == 2


def test_the_error_of_a_network_may_have_a_partial_result_of_its_own():
    def unread(x, condition):
        raise IncompleteRead(b"half an answer")  # of a network on another machine

    denoiser = fs.Denoiser.from_denoiser(unread, LOW, HIGH)
    with pytest.raises(IncompleteRead) as raised:
        compare(denoiser, {"a": fs.baselines.karras(4, LOW, HIGH)}, "ddim", shape=SHAPE, samples=2, progress=False)
    assert raised.value.partial == b"half an answer"


def test_a_comparison_has_the_names_of_its_schedules(gaussian, converged):
    found = compare(gaussian, {"b": [HIGH, 1.0, 0.0], "a": [HIGH, 0.0]}, "ddim", reference=converged, progress=False)
    assert (list(found), "a" in found, "c" in found) == (["b", "a"], True, False)
