"""Networks whose own path shows that their output has the wrong scale; right and guided ones are not refused."""

import re
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from models import exact_denoiser, exact_denoisers

import fastsched as fs
from fastsched.measurement.checks.network import check_network
from fastsched.measurement.checks.path import _Path

SIGNED = ("v", "edm")


def measure(denoiser, d, levels, seed=0, **options):
    options = {"samples": 1, "responses": False, "progress": False} | options
    return fs.measure(denoiser, (d,), levels=levels, seed=seed, **options)


def scaled(denoiser, factor):
    return replace(denoiser, network=lambda x, t: factor * denoiser.network(x, t))


@pytest.mark.parametrize("levels", [6, 7, 9, 12, 24])
@pytest.mark.parametrize("factor", [3, -1])
@pytest.mark.parametrize(("d", "mixture"), [(8, 0), (8, 1), (9, 3), (12, 1)])
def test_a_wrong_scale_or_sign_is_warned_of_or_refused(levels, factor, d, mixture):
    """D' = f D + (1 - f) a z; of these mixtures in many directions nearly a denoiser, of another density."""
    for kind in SIGNED:
        right = exact_denoisers(fs.oracles.GaussianMixture.random(d, 3, seed=mixture))[kind]
        for seed in range(3):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                with pytest.raises((ValueError, UserWarning), match=r"scale not|its sign"):
                    measure(scaled(right, factor), d, levels, seed)
                warnings.simplefilter("ignore")
                measure(right, d, levels, seed)


@pytest.mark.parametrize("factor", [1, 3])
def test_noise_moves_the_denoised_sample_of_a_scaled_network_alone_backwards(factor):
    """Half the noise and more, at the level of the data's deviation; of a right one, by 0.1 and more of it."""
    right = exact_denoisers(fs.oracles.Gaussian(0.2, (16,)))["edm"]
    message = re.compile(r"moves by -0\.[4-9]\d* of a step")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        measure(scaled(right, factor), 16, 12)
    assert [bool(message.search(str(each.message))) for each in told] == [True] * (factor > 1)


@pytest.mark.parametrize("levels", [8, 12, 24])
def test_right_networks_of_overlapping_modes_are_not_refused(levels):
    """What one path's end leaves of its noise is no evidence where that may as well be of another mode."""
    right = exact_denoisers(fs.oracles.GaussianMixture.random(8, 8, seed=0, std=1.0))["edm"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # in such a case one is allowed
        measure(right, 8, levels, seed=1)


def guided(whole, part, scale, kind):
    network = lambda z, s: whole.denoise(z, s) + scale * (part.denoise(z, s) - whole.denoise(z, s))
    return exact_denoisers(SimpleNamespace(denoise=network, score=len))[kind]


@pytest.mark.parametrize("levels", [6, 8, 10])
@pytest.mark.parametrize("d", [16, 64])
def test_guidance_over_few_levels_is_not_refused(levels, d):
    """Towards one or two of eight modes, by 2."""
    for seed in (0, 1, 2):
        whole = fs.oracles.GaussianMixture.random(d, 8, seed=seed)
        for modes in (1, 2):
            part = fs.oracles.GaussianMixture(
                *(each[:modes] for each in (whole.weights, whole.means, whole.covariances))
            )
            for kind in SIGNED:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # it may be more than its data allow
                    measure(guided(whole, part, 2.0, kind), d, levels)


@pytest.mark.parametrize(("spread", "std"), [(0.6, 0.3), (1.0, 0.1), (1.0, 0.3)])
def test_a_strongly_guided_flow_is_not_refused(spread, std):
    """Towards one of five modes, by 7.5: the rough sample moves far, but across the noise."""
    whole = fs.oracles.GaussianMixture.random(64, 5, seed=1, spread=spread, std=std)
    part = fs.oracles.GaussianMixture(*(each[:1] for each in (whole.weights, whole.means, whole.covariances)))
    strong = guided(whole, part, 7.5, "velocity")
    with pytest.warns(UserWarning, match="guided by more than its data allow"):
        measure(strong, 64, 16)
    with pytest.raises(ValueError, match="its sign the other one"):
        measure(replace(strong, network=lambda x, t: -strong.network(x, t)), 64, 16)


@pytest.mark.parametrize("kind", ["x0", "edm", "score", "epsilon", "v", "velocity"])
def test_usual_networks_are_asked_seven_times(kind):
    right = exact_denoisers(fs.oracles.Gaussian(0.3, (64,)))[kind]
    checked, plain = (measure(right, 64, 48, checks=checks).model_calls for checks in (True, False))
    assert checked - plain == 7


def test_states_are_kept_although_they_are_written_over():
    """The same question again has the same answer: D at the state that was kept is what the path was told."""
    right = exact_denoisers(fs.oracles.GaussianMixture.random(8, 3, seed=0))["edm"]
    s = right.levels(12)
    calls = check_network(right, (8,), torch.device("cpu"), torch.float32, s)
    path = _Path(calls, s)
    x = torch.randn(1, 8, generator=torch.Generator().manual_seed(0))
    raw = right.raw_output(x, s[path.level])
    path.see(x, path.level, raw)
    along = path.moved(path.level, path.noise)[1]
    path.see(x, path.level, raw)
    x.zero_()
    raw.zero_()
    assert path.moved(path.level, path.noise)[1] == along >= 0


def velocity(oracle, noise=False):
    """The exact velocity ``eps - x0``, or the noise ``eps`` in its place, as a function of ``x`` and ``t``."""

    def network(x, t):
        t = t.double()[:, None].clamp(1e-6, 1 - 1e-6)
        z, s = x.double() / (1 - t), t / (1 - t)
        x0 = oracle.denoise(z, s[:, 0])
        return ((z - x0) / s if noise else (x.double() - x0) / t).to(x)

    return network


@pytest.mark.parametrize("d", [64, 192])
@pytest.mark.parametrize("way", [{}, {"data_at": 1}])
def test_a_prediction_of_the_noise_is_no_velocity(d, way):
    oracle = fs.oracles.GaussianMixture.random(d, 5, seed=1, spread=0.4, std=0.2)
    reverse = lambda network: lambda x, t: -network(x, 1 - t) if way else network(x, t)
    measure(fs.Denoiser.from_velocity(reverse(velocity(oracle)), **way), d, 16, samples=8)
    with pytest.raises(ValueError, match=r"holds -?0\.0\d+ times the sample, .* predict the noise"):
        measure(fs.Denoiser.from_velocity(reverse(velocity(oracle, noise=True)), **way), d, 16, samples=8)


@pytest.mark.parametrize(("d", "spread", "std"), [(8, 0.7, 0.6), (16, 0.2, 0.2), (64, 0.2, 0.05)])
def test_a_prediction_of_the_noise_of_small_data_is_not_missed(d, spread, std):
    """Noise of deviation 1 might hide the sample, but what the output implies is smaller."""
    oracle = fs.oracles.GaussianMixture.random(d, 2, seed=51, spread=spread, std=std)
    measure(fs.Denoiser.from_velocity(velocity(oracle)), d, 16, samples=4)
    with pytest.raises((ValueError, UserWarning), match=r"times the sample, .* predict the noise"):
        measure(fs.Denoiser.from_velocity(velocity(oracle, noise=True)), d, 16, samples=4)


@pytest.mark.parametrize("guidance", [0.0, 0.5])
def test_too_little_of_the_sample_is_only_warned_of_where_pure_noise_shows_guidance(guidance):
    """A network whose output lacks the sample: of noise alone, or guided to far outside its data."""
    right = velocity(fs.oracles.GaussianMixture.random(64, 5, seed=1, spread=0.4, std=0.2))
    lacking = lambda x, t: right(x, t) + (0.95 * (1 - t[:, None]) * x - guidance * t[:, None])
    doubt = pytest.raises(ValueError, match="predict") if guidance == 0 else pytest.warns(UserWarning, match="predict")
    with doubt:
        measure(fs.Denoiser.from_velocity(lacking), 64, 16, samples=8)


def test_a_flow_of_wide_data_is_warned_of():
    """Time runs the other way: data of 0.5 seem to have 6, and the outputs are nearly those of a denoiser of these."""
    oracle = fs.oracles.GaussianMixture.random(192, 16, seed=0, spread=0.5, std=0.14)
    measure(fs.Denoiser.from_velocity(velocity(oracle)), 192, 16)
    with pytest.warns(UserWarning, match=r"deviation of [4-9]\.\d+, and those of flow models about 1.*data_at=0"):
        measure(fs.Denoiser.from_velocity(velocity(oracle), data_at=1), 192, 16)


def test_a_flow_of_modes_far_apart_is_not_refused():
    """The rough sample of the checks lies between modes, to which a denoiser moves it."""
    oracle = fs.oracles.GaussianMixture.random(16, 5, seed=10, spread=2.0, std=0.2)
    measure(fs.Denoiser.from_velocity(velocity(oracle)), 16, 16)


def told_of(denoiser, shape, **options):
    """All warnings of a measurement with the usual levels and paths."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fs.measure(denoiser, shape, responses=False, progress=False, **options)
    return " ".join(str(each.message) for each in told)


@pytest.mark.parametrize(("power", "samples"), [(0.0, 1), (0.0, 8), (1.0, 8)])
def test_a_consistency_function_is_no_denoiser(power, samples):
    """It leads noise to the end of its path; the data's deviations are equal, or fall as those of images do."""
    c = torch.arange(1, 33) ** -power
    c *= 0.5 / c.square().mean().sqrt()
    straight = lambda z, s: z * c / (c**2 + s.reshape(-1, 1) ** 2).sqrt()
    told = told_of(fs.Denoiser.from_denoiser(straight, 0.002, 80.0), (32,), samples=samples)
    assert "follows the noise" in told
    assert "consistency model" in told
    right = lambda z, s: z * c**2 / (c**2 + s.reshape(-1, 1) ** 2)
    assert not told_of(fs.Denoiser.from_denoiser(right, 0.002, 80.0), (32,), samples=samples)


def test_predictions_of_x0_of_too_low_a_level_are_warned_of():
    """A table of every tenth timestep: the network is told a tenth of its time."""
    data = fs.oracles.GaussianMixture.random(16, 4, seed=112, spread=0.5, std=0.1)
    table = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    exact = exact_denoisers(data, table)["v"]

    def clean(x, t):
        alpha = torch.lerp(table[t.long()].sqrt(), table[(t.long() + 1).clamp_max(999)].sqrt(), t.double() % 1)
        alpha = alpha[:, None]
        return (alpha * x - (1 - alpha**2).sqrt() * exact.network(x, t)).float()

    for step in (1, 10, 20):
        process = fs.denoisers.noise.VariancePreserving(table[step - 1 :: step])
        told = told_of(fs.Denoiser(clean, process, "x0"), (16,))
        assert ("too low a level" in told) == (step > 1)


LINEAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
SCALED_LINEAR = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)


def of_falling_deviations(kind, d=256):
    """The exact network of Gaussian data of deviation 0.5, whose spectrum falls nearly as that of images does."""
    c = torch.arange(1, d + 1) ** -0.7
    c *= 0.5 / c.square().mean().sqrt()
    denoise = lambda z, s: z * c**2 / (c**2 + s.to(z.dtype).reshape(-1, 1) ** 2)
    return exact_denoisers(SimpleNamespace(denoise=denoise, score=len), LINEAR)[kind]


@pytest.mark.parametrize(("kind", "factor"), [("epsilon", 0.8), ("v", 1.2), ("velocity", 0.8)])
def test_a_time_that_is_off_by_a_fifth_is_noticed(kind, factor):
    """The path keeps noise that the network does not expect, or is given too little."""
    right = of_falling_deviations(kind)
    most = 1 if kind == "velocity" else 999
    wrong = replace(right, network=lambda x, t: right.network(x, (factor * t).clamp_max(most)))
    assert not told_of(right, (256,), samples=8)
    assert "of the noise's square away" in told_of(wrong, (256,), samples=8)


@pytest.mark.parametrize("mixture", range(3))
def test_a_noise_prediction_that_keeps_to_its_last_timestep_is_noticed(mixture):
    """As one that takes times from 0 to 1 does. Its ``D`` is nearly that of other data, without the mean of these."""
    right = exact_denoisers(fs.oracles.GaussianMixture.random(64, 3, seed=mixture))["epsilon"]
    wrong = replace(right, network=lambda x, t: right.network(x, (1000 * t).clamp_max(999)))
    assert not told_of(right, (64,), samples=8)
    assert "times the data variance" in told_of(wrong, (64,), samples=8)


@pytest.mark.parametrize("kind", ["epsilon", "v"])
@pytest.mark.parametrize(("d", "steps", "seed"), [(16, 50, 1), (64, 100, 0), (64, 100, 1)])
def test_paths_from_noise_that_does_not_far_exceed_the_data_are_not_checked_about_0(kind, d, steps, seed):
    """They start from noise alone, so the size of ``D`` about 0 seems to grow towards the data."""
    table = torch.cumprod(1 - torch.linspace(1e-4, 0.02, steps, dtype=torch.float64), 0)
    right = exact_denoisers(fs.oracles.GaussianMixture.random(d, 5, seed=1, spread=1.0, std=0.2), table)[kind]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fs.measure(right, (d,), levels=16, samples=4, seed=seed, responses=False, progress=False)
    assert not [str(each.message) for each in told if "times the data variance" in str(each.message)]


@pytest.mark.parametrize("seed", [0, 4, 7])
def test_rare_values_of_the_data_are_no_doubt(seed):
    """A feature that is 0 in nine samples of ten, of which few paths tell the variance."""
    rare = exact_denoiser(fs.oracles.Empirical(torch.tensor([[0.0]] * 9 + [[1.0]])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure(rare, 1, 48, seed, samples=8)


def test_a_path_that_ends_near_0_by_chance_is_no_doubt():
    right = exact_denoisers(fs.oracles.GaussianMixture.random(1, 1, seed=13, spread=2.0, std=0.2))["x0"]
    assert not told_of(right, (1,), samples=1, levels=32, seed=30)


@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_a_scaled_linear_table_in_place_of_a_linear_one_is_noticed(kind):
    process = fs.denoisers.noise.VariancePreserving(SCALED_LINEAR)
    wrong = replace(of_falling_deviations(kind, d=1024), process=process)
    assert "of the noise's square away" in told_of(wrong, (1024,), samples=8)


def test_what_is_removed_agrees_with_the_slope_of_exact_denoisers():
    """``E |z - D|^2 = s^2 (d - tr J)``; here ``D = J z``, and ``tr J / d`` is known."""
    oracle = fs.oracles.Gaussian(0.5, (4096,))
    denoiser = exact_denoisers(oracle)["x0"]
    s = denoiser.levels(48)
    calls = check_network(denoiser, (4096,), torch.device("cpu"), torch.float32, s)
    path = _Path(calls, s)
    z = float(s[0]) * torch.randn(8, 4096, generator=torch.Generator().manual_seed(0))
    for k in range(48):
        x0 = denoiser.raw_output(z, s[k])
        path.see(z, k, x0)
        z = x0 + (z - x0) * float(s[min(k + 1, 47)] / s[k])
    level = float(s[path.removed_at])
    xx, xr, rr = torch.stack(path.products, 1)[:3, path.removed_at].double().sum(1).tolist()
    slope = path._slope(path.removed_at)
    assert slope == pytest.approx(0.25 / (0.25 + level**2), abs=0.02)
    assert (xx - 2 * xr + rr) / (8 * 4096 * level**2) == pytest.approx(1 - slope, abs=0.04)
