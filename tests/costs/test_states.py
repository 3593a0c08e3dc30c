"""What all estimated costs share: their states, their random numbers, and the calls they count."""

import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from models import exact_denoiser, exact_denoisers, vp_table
from torch.utils.checkpoint import checkpoint

import fastsched as fs
from fastsched import costs
from fastsched.costs.states import StateSource

MIXTURE = fs.oracles.GaussianMixture.random(2, 3, seed=0)
ESTIMATORS = {
    "corrector": costs.stein_corrector,
    "corrector, all pairs": partial(costs.stein_corrector, pairs="all"),
    "predictor": costs.stein_predictor,
    "predictor, exact, all pairs": partial(costs.stein_predictor, pairs="all", probes=None),
    "fisher-rao": partial(costs.fisher_rao, probes=3),
    "klub": costs.klub,
}


class _Counter:
    """The mixture's denoiser, and how many states it was asked for."""

    def __init__(self):
        self.rows = 0

    def __call__(self, z, s):
        self.rows += len(z)
        return MIXTURE.denoise(z, s)


@pytest.mark.parametrize("from_data", [True, False], ids=["data", "path"])
@pytest.mark.parametrize("estimate", ESTIMATORS.values(), ids=ESTIMATORS)
def test_calls_reported_are_the_calls_made(estimate, from_data):
    counter = _Counter()
    denoiser = fs.Denoiser.from_denoiser(counter, 0.05, 10.0)
    data = MIXTURE.sample(9, seed=1, dtype=torch.float64) if from_data else None
    settings = {"sigmas": denoiser.levels(5), "samples": 7, "data": data, "batch_size": 3, "progress": False}
    cost = estimate(denoiser, shape=(2,), dtype=torch.float64, **settings)
    # A forward-mode derivative runs the network once, and so does the gradient of one.
    assert counter.rows == cost.model_calls + 7  # that tell whether it is a denoiser, changes or mixes samples
    assert cost.model_calls == sum(cost.calls)


@pytest.mark.parametrize("from_data", [True, False], ids=["data", "path"])
@pytest.mark.parametrize("estimate", ESTIMATORS.values(), ids=ESTIMATORS)
def test_ranges_of_samples_merge_into_the_whole(estimate, from_data):
    denoiser = fs.Denoiser.from_denoiser(MIXTURE.denoise, 0.05, 10.0)
    data = MIXTURE.sample(3, seed=1, dtype=torch.float64) if from_data else None
    settings = {"shape": (2,), "sigmas": denoiser.levels(4), "data": data, "dtype": torch.float64, "progress": False}
    cost = lambda samples: estimate(denoiser, samples=samples, batch_size=1, **settings)
    whole, merged = cost(5), cost(range(2)).merge(cost(range(2, 5)))
    assert torch.equal(merged.per_sample, whole.per_sample)
    assert torch.equal(merged.seeds, whole.seeds)
    with pytest.raises(ValueError, match="other repeats 2 of these samples"):
        whole.merge(cost(range(3, 6)))
    with pytest.raises(TypeError, match=r"other must be of class CostMatrix"):
        whole.merge(None)
    assert merged.calls == whole.calls
    with pytest.raises(ValueError, match="other must be the same cost"):
        whole.merge(estimate(denoiser, samples=1, **{**settings, "sigmas": denoiser.levels(5)}))


def test_costs_of_different_networks_do_not_merge():
    denoisers = [exact_denoiser(fs.oracles.Gaussian(std, (2,)), 0.05, 10.0) for std in (1.0, 2.0)]
    settings = {"shape": (2,), "sigmas": [4.0, 2.0, 1.0], "progress": False}
    first, other = (costs.klub(each, samples=range(n, n + 1), **settings) for n, each in enumerate(denoisers))
    for known in (first, replace(first, seeds=None, fingerprint=None).merge(first)):
        with pytest.raises(ValueError, match="other is of another network"):
            known.merge(other)


@pytest.mark.parametrize("estimate", ["corrector", "predictor"])
def test_costs_of_different_velocities_do_not_merge(estimate):
    denoiser = fs.Denoiser.from_denoiser(MIXTURE.denoise, 0.05, 10.0)
    settings = {"shape": (2,), "sigmas": [4.0, 2.0, 1.0], "progress": False}
    first, other = (
        ESTIMATORS[estimate](denoiser, samples=range(n, n + 2), velocity=velocity, **settings)
        for n, velocity in ((0, "noisier"), (2, None))
    )
    with pytest.raises(
        ValueError, match=f"other must be the same cost, stein_{estimate}, .* got stein_{estimate}, vel"
    ):
        first.merge(other)


def test_standard_errors():
    denoiser = fs.Denoiser.from_denoiser(MIXTURE.denoise, 0.05, 10.0)
    settings = {"shape": (2,), "sigmas": [2.0, 1.0, 0.5], "progress": False}
    one, five = (costs.stein_corrector(denoiser, samples=n, **settings) for n in (1, 5))
    assert one.stderr[0, 1].isnan()
    expected = torch.stack([five.per_sample[:, p].std() / 5**0.5 for p in range(2)])
    torch.testing.assert_close(five.stderr.diagonal(1), expected)


def test_every_seed_and_every_sample_has_random_numbers_of_its_own():
    denoiser = fs.Denoiser.from_denoiser(MIXTURE.denoise, 0.05, 10.0)
    drawn = []
    for seed in (0, 1):
        source = StateSource(denoiser, [2.0, 1.0], (40,), 3, seed=seed)
        batch = next(source.batches())
        drawn += [*batch.noise, *batch.normal(), *batch.normal(), *batch.signs(2)[:, 0], *batch.signs(2)[:, 1]]
    for first in range(len(drawn)):
        assert all(not torch.equal(drawn[first], other) for other in drawn[:first])


def test_batches_hold_the_samples_they_would_hold_together():
    denoiser = fs.Denoiser.from_denoiser(MIXTURE.denoise, 0.05, 10.0)
    settings = {"sigmas": [2.0, 1.0], "shape": (2,), "samples": 7, "data": MIXTURE.sample(5, seed=1), "seed": 3}
    whole = next(StateSource(denoiser, **settings).batches())
    parts = list(StateSource(denoiser, batch_size=3, **settings).batches())
    assert [len(part) for part in parts] == [3, 3, 1]
    for draw in (lambda b: b.noise, lambda b: b.clean, lambda b: b.normal(), lambda b: b.signs(2)):
        assert torch.equal(torch.cat([draw(part) for part in parts]), draw(whole))


def in_inference_mode(z, s):
    with torch.inference_mode():
        return MIXTURE.denoise(z, s)


WITHOUT_DERIVATIVE = {
    "detach": lambda z, s: MIXTURE.denoise(z.detach(), s),
    "inference mode": in_inference_mode,
    "NumPy": lambda z, s: torch.from_numpy(MIXTURE.denoise(z, s).numpy()),
}


@pytest.mark.parametrize("name", WITHOUT_DERIVATIVE)
@pytest.mark.parametrize("estimate", ["fisher-rao", "predictor", "predictor, exact, all pairs"])
def test_networks_without_a_derivative_are_refused(name, estimate):
    denoiser = fs.Denoiser.from_denoiser(WITHOUT_DERIVATIVE[name], 0.1, 5.0)
    settings = {"shape": (2,), "sigmas": [4.0, 2.0, 1.0], "samples": 3, "progress": False}
    with pytest.raises(ValueError, match="the network has no forward-mode derivative"):
        ESTIMATORS[estimate](denoiser, **settings)


@pytest.mark.parametrize("estimate", ["predictor", "predictor, exact, all pairs"])
def test_networks_whose_derivative_has_no_gradient_are_refused(estimate):
    checkpointed = lambda z, s: checkpoint(MIXTURE.denoise, z, s, use_reentrant=False)
    denoiser = fs.Denoiser.from_denoiser(checkpointed, 0.1, 5.0)
    settings = {"shape": (2,), "sigmas": [4.0, 2.0, 1.0], "samples": 3, "progress": False}
    with pytest.raises(ValueError, match=r"derivative has no gradient .* gradient checkpointing"):
        ESTIMATORS[estimate](denoiser, **settings)


def test_a_constant_network_has_a_derivative_of_0():
    denoiser = fs.Denoiser.from_denoiser(lambda z, s: 0 * z, 0.1, 5.0)
    settings = {"shape": (2,), "sigmas": [4.0, 2.0, 1.0], "samples": 3, "progress": False}
    with pytest.warns(UserWarning, match="the network answered the same to every question"):
        assert ESTIMATORS["fisher-rao"](denoiser, **settings).adjacent.shape == (2,)


@pytest.mark.parametrize("estimate", ["corrector", "klub"])
def test_a_random_network_is_warned_of(estimate):
    random = lambda z, s: MIXTURE.denoise(z, s) + 0.1 * torch.randn(z.shape)
    denoiser = fs.Denoiser.from_denoiser(random, 0.1, 5.0)
    with pytest.warns(UserWarning, match="random numbers were drawn during the estimate"):
        ESTIMATORS[estimate](denoiser, shape=(2,), sigmas=[4.0, 2.0, 1.0], samples=3, progress=False)


@pytest.mark.parametrize("estimate", ["corrector", "klub", "fisher-rao"])
def test_networks_that_change_or_mix_samples_are_warned_of(estimate):
    calls = []
    changes = lambda z, s: (calls.append(len(z)), (1 + 0.01 * len(calls)) * MIXTURE.denoise(z, s))[1]
    mixes = lambda z, s: MIXTURE.denoise(z, s) + 0.3 * (z.mean(0, keepdim=True) - z)
    settings = {"shape": (2,), "sigmas": [4.0, 2.0, 1.0], "samples": 3, "progress": False}
    for network, told in ((changes, "before and after the estimate"), (mixes, "mixes the samples of a batch")):
        with pytest.warns(UserWarning, match=told):
            ESTIMATORS[estimate](fs.Denoiser.from_denoiser(network, 0.1, 5.0), **settings)
    ESTIMATORS[estimate](fs.Denoiser.from_denoiser(mixes, 0.1, 5.0), batch_size=1, **settings)


@pytest.mark.parametrize("from_data", [True, False], ids=["data", "path"])
@pytest.mark.parametrize("estimate", ["corrector", "klub"])
def test_networks_that_are_no_denoisers_are_warned_of(estimate, from_data):
    exact = fs.oracles.GaussianMixture.random(12, 3, seed=0)
    noise = lambda z, s: (z - exact.denoise(z, s)) / s.reshape(-1, 1)
    data = exact.sample(9, seed=1) if from_data else None
    settings = {"shape": (12,), "sigmas": [4.0, 2.0, 1.0], "samples": 3, "data": data, "progress": False}
    with pytest.warns(UserWarning, match="no denoiser of its noise process.*at the lowest level"):
        ESTIMATORS[estimate](fs.Denoiser.from_denoiser(noise, 0.02, 5.0), **settings)
    ESTIMATORS[estimate](fs.Denoiser.from_denoiser(exact.denoise, 0.02, 5.0), **settings)


@pytest.mark.parametrize("sigmas", [[1e9, 2.0, 1.0], [4.0, 2.0, 1e-6]])
def test_sigmas_far_beyond_the_noise_process_are_refused(sigmas):
    denoiser = fs.Denoiser.from_denoiser(MIXTURE.denoise, 0.1, 5.0)
    settings = {"shape": (2,), "samples": 3, "progress": False}
    with pytest.raises(ValueError, match="sigmas must be near those of the noise process"):
        fs.costs.stein_corrector(denoiser, sigmas=sigmas, **settings)


@pytest.mark.parametrize("from_data", [True, False], ids=["data", "path"])
@pytest.mark.parametrize("estimate", ["corrector", "fisher-rao", "klub"])
def test_networks_of_integer_timesteps_are_measured_at_levels_that_they_know(estimate, from_data):
    continuous = exact_denoisers(MIXTURE, vp_table(20))["epsilon"]  # 20 timesteps, a factor of 1.6 apart on average
    network = lambda x, t: continuous.network(x, t.float())
    integer = fs.Denoiser.from_epsilon(network, vp_table(20), integer_timesteps=True)
    between = fs.baselines.exponential(5, 0.11, 90.0)[:-1]
    known = integer.process.nearest(between)
    assert float((known / between).log().abs().max()) > 0.05
    settings = {"shape": (2,), "samples": 16, "data": MIXTURE.sample(16, seed=1) if from_data else None}
    found, expected = (
        ESTIMATORS[estimate](denoiser, sigmas=sigmas, progress=False, **settings)
        for denoiser, sigmas in ((integer, between), (continuous, known))
    )
    assert torch.equal(found.s, known)
    # Paths differ: one goes through timesteps alone. Costs at the levels between them are up to 80 times as large.
    torch.testing.assert_close(found.adjacent, expected.adjacent, rtol=1e-4 if from_data else 0.1, atol=0.0)


def test_sigmas_at_one_integer_timestep_are_refused():
    denoiser = fs.Denoiser.from_epsilon(lambda x, t: 0.9 * x, vp_table(20), integer_timesteps=True)
    with pytest.raises(ValueError, match="sigmas must be at different integer timesteps"):
        fs.costs.klub(denoiser, shape=(2,), sigmas=[9.0, 8.9], samples=2, progress=False)


@pytest.mark.parametrize("prediction", ["x0", "edm"])
@pytest.mark.parametrize("estimate", ["corrector", "corrector, all pairs", "predictor", "fisher-rao", "klub"])
def test_outputs_in_16_bits_that_are_too_coarse_for_a_cost_are_warned_of(estimate, prediction):
    oracle = fs.oracles.GaussianMixture.random(4, 3, seed=1)
    network = exact_denoisers(oracle)[prediction].network
    rounded = lambda x, t: network(x, t).bfloat16()
    denoiser = fs.Denoiser(rounded, fs.Denoiser.from_denoiser(network, 0.002, 80.0).process, prediction)
    levels = 9 if estimate == "predictor" else 33
    sigmas = fs.baselines.exponential(levels, 0.002, 80.0)[:-1]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        data = oracle.sample(16, seed=0)
        ESTIMATORS[estimate](denoiser, shape=(4,), sigmas=sigmas, samples=16, data=data, progress=False)
    assert sum("outputs come in 16 bits" in str(each.message) for each in said) == (prediction == "x0")


@pytest.mark.parametrize("estimate", ESTIMATORS.values(), ids=ESTIMATORS.keys())
def test_data_in_another_unit_than_the_network_is_warned_of(estimate):
    """Their costs are those of a density that the network does not know."""
    oracle = fs.oracles.GaussianMixture.random(8, 3, seed=0)
    clean = oracle.sample(32, seed=0, dtype=torch.float32)
    settings = {"shape": (8,), "sigmas": [40.0, 5.0, 1.0, 0.3, 0.1], "samples": 16, "progress": False}
    for data, wrong in ((clean, False), (127.5 * (clean + 1), True)):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", UserWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            estimate(exact_denoiser(oracle), data=data, **settings)
        assert [str(each.message).startswith("data do not seem") for each in told] == [True] * wrong


@pytest.mark.parametrize(("d", "samples"), [(1, 1), (1, 8), (2, 2), (64, 4)])
def test_data_of_the_network_give_no_warning(d, samples):
    """One sample of one element may be further off than its noise by chance."""
    for seed in range(10):
        oracle = fs.oracles.GaussianMixture.random(d, 6, seed=seed, std=0.05)
        data = oracle.sample(samples, seed=seed, dtype=torch.float32)
        sigmas = torch.logspace(1.6, -1.7, 12)
        costs.stein_corrector(
            exact_denoiser(oracle), shape=(d,), sigmas=sigmas, samples=samples, data=data, progress=False
        )


def _told(denoiser, data, deviation):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        sigmas = deviation * torch.logspace(1.6, -1.3, 24)
        costs.stein_corrector(denoiser, shape=data.shape[1:], sigmas=sigmas, samples=16, data=data, progress=False)
    return [str(each.message) for each in told if str(each.message).startswith("data do not seem")]


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_data_of_a_network_that_predicts_samples_with_an_error_give_no_warning(shift):
    """Small ones are off by 0.1 to 0.3 of the data's deviation, also at levels far below."""
    oracle = fs.oracles.GaussianMixture.random(64, 6, seed=0, std=0.05)
    data = oracle.sample(32, seed=0, dtype=torch.float32)
    deviation = float(data.std())
    off = lambda z, s: oracle.denoise(z, s) + shift * deviation
    assert not _told(fs.Denoiser.from_denoiser(off, 0.002, 80.0), data, deviation)


@pytest.mark.parametrize("guidance", [2.0, 7.5])
def test_data_of_a_guided_network_give_no_warning(guidance):
    """Guidance pushes samples away from those of other classes where the noise exceeds the data."""
    whole = fs.oracles.GaussianMixture.random(8, 5, seed=1, spread=0.6, std=0.3)
    part = fs.oracles.GaussianMixture(*(each[:1] for each in (whole.weights, whole.means, whole.covariances)))
    data = part.sample(32, seed=0, dtype=torch.float32)
    guided = lambda z, s: guidance * part.denoise(z, s) + (1 - guidance) * whole.denoise(z, s)
    assert not _told(fs.Denoiser.from_denoiser(guided, 0.002, 80.0), data, float(data.std()))
