import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from models import exact_denoisers, gaussian

import fastsched as fs
from fastsched.costs import stein_corrector
from fastsched.costs.corrector_cost import fused_score_distances, score_distances
from fastsched.costs.states import StateSource


def _exact(oracle, s, velocity):
    speed = {"noisier": s[:, None], "cleaner": s[None, :], None: torch.ones(1, 1)}[velocity]
    return speed**2 * oracle.stein_corrector(s[:, None], s[None, :])


@pytest.mark.parametrize(
    ("d", "samples", "velocity"),
    [(1, 40_000, "noisier"), (16, 8_000, "noisier"), (16, 8_000, "cleaner"), (16, 8_000, None), (256, 600, "noisier")],
)
def test_all_pairs_match_the_gaussian_closed_form(d, samples, velocity):
    oracle, denoiser = gaussian(d)
    s = denoiser.levels(12)
    settings = {"shape": (d,), "sigmas": s, "samples": samples, "dtype": torch.float64, "progress": False}
    data = oracle.sample(samples, seed=1, dtype=torch.float64)
    cost = stein_corrector(denoiser, pairs="all", velocity=velocity, data=data, **settings)
    upper = torch.ones(12, 12, dtype=torch.bool).triu(1)
    error, exact = (cost.matrix - _exact(oracle, s, velocity))[upper], _exact(oracle, s, velocity)[upper]
    # A mean of |N(0,1)|^2 over d * samples > 4e4 terms has a relative error of sqrt(2 / 4e4) = 0.7%.
    assert (error.abs() / exact).max() < 0.02
    # The pairs share their samples: some tens of independent numbers at most, so three standard errors hold.
    assert (error.abs() / cost.stderr[upper]).max() < 3
    assert cost.calls == (samples * (12 * 13 // 2 - 1), 0, 0)
    assert cost.model_calls == samples * 77
    assert cost.matrix[~upper & ~torch.eye(12, dtype=torch.bool)].isnan().all()


@pytest.mark.parametrize("velocity", ["noisier", "cleaner", None])
def test_mixture_state_by_state(velocity):
    mixture = fs.oracles.GaussianMixture.random(2, 3, seed=0)
    denoiser = fs.Denoiser.from_denoiser(mixture.denoise, 0.01, 10.0)
    data = mixture.sample(20, seed=5, dtype=torch.float64)
    settings = {"sigmas": [2.0, 0.8, 0.3, 0.05], "shape": (2,), "samples": 20, "data": data, "dtype": torch.float64}
    cost = stein_corrector(denoiser, pairs="all", velocity=velocity, progress=False, **settings)
    source = StateSource(denoiser, **settings)
    states = [z for _, z, _ in source.states(next(source.batches()), 4)]

    def score(z, s):  # the gradient of the density, not the oracle's own formula
        return torch.func.grad(lambda state: mixture.log_density(state, s).sum())(z)

    for pair, (i, j) in enumerate(cost.pairs.tolist()):
        s_i, s_j = float(cost.s[i]), float(cost.s[j])
        speed = {"noisier": s_i, "cleaner": s_j, None: 1.0}[velocity]
        exact = speed**2 * (score(states[i], s_j) - score(states[i], s_i)).square().sum(1)
        torch.testing.assert_close(cost.per_sample[:, pair], exact, rtol=1e-8, atol=1e-12)


def test_path_states_are_samples_of_the_marginals():
    oracle, denoiser = gaussian(16)
    s = denoiser.levels(48)
    cost = stein_corrector(denoiser, shape=(16,), sigmas=s, samples=2_000, dtype=torch.float64, progress=False)
    exact = _exact(oracle, s, "noisier").diagonal(1)
    # 0.8% of noise (2 / 32,000 degrees of freedom, squared root), and the solver's own error at 48 levels: the spread
    # it gives p_k is within 0.6% of the closed form, the cost within 1.2%.
    assert (cost.adjacent / exact - 1).abs().max() < 0.025
    assert cost.calls == (2_000 * 2 * 47, 0, 0)


def test_path_fills_in_where_levels_are_sparse():
    oracle, denoiser = gaussian(16)
    s = torch.tensor([3.0, 0.4], dtype=torch.float64)
    cost = stein_corrector(denoiser, shape=(16,), sigmas=s, samples=2_000, dtype=torch.float64, progress=False)
    exact = float(_exact(oracle, s, "noisier")[0, 1])
    assert float(cost.adjacent[0]) == pytest.approx(exact, rel=0.025)
    path = math.ceil(math.log(80 / 3) / 0.35) + 1
    assert cost.calls.forward == 2_000 * (path + 1)


def test_error_shrinks_with_the_reported_standard_error():
    oracle, denoiser = gaussian(4)
    s = torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)
    exact = _exact(oracle, s, "noisier")
    settings = {"shape": (4,), "sigmas": s, "samples": 200, "dtype": torch.float64, "progress": False}
    standardised = []
    for seed in range(40):
        data = oracle.sample(200, seed=1000 + seed, dtype=torch.float64)
        cost = stein_corrector(denoiser, data=data, seed=seed, **settings)
        standardised.append(float((cost.matrix[0, 1] - exact[0, 1]) / cost.stderr[0, 1]))
    # 40 standard normals: their mean square is 1 with deviation sqrt(2/40) = 0.22.
    assert np.mean(np.square(standardised)) == pytest.approx(1, abs=4 * 0.22)


def test_fused_op_and_plain_differences_agree():
    _, denoiser = gaussian(32)
    source = StateSource(denoiser, sigmas=denoiser.levels(10), shape=(32,), samples=5, dtype=torch.float64)
    k, z, raw = next(source.states(next(source.batches()), 1))
    plain = score_distances(source, z, raw, k, range(1, 10))
    fused = fused_score_distances(source, z, raw, k, range(1, 10))
    # At level 80 with a clean level of 0.002 the terms, z / s^2, are 6e4 times the score: 1e-11 of it is rounding.
    torch.testing.assert_close(fused, plain, rtol=1e-9, atol=0.0)


def test_batches_do_not_change_the_estimate():
    oracle, denoiser = gaussian(8)
    settings = {"shape": (8,), "sigmas": denoiser.levels(6), "samples": 11, "pairs": "all", "progress": False}
    settings["data"] = oracle.sample(7, seed=3)
    whole = stein_corrector(denoiser, **settings)
    torch.testing.assert_close(whole.per_sample, stein_corrector(denoiser, batch_size=4, **settings).per_sample)
    fewer = stein_corrector(denoiser, **{**settings, "samples": 5})
    torch.testing.assert_close(whole.per_sample[:5], fewer.per_sample)


@pytest.mark.parametrize("kind", ["velocity", "epsilon"])
def test_cost_in_s_does_not_depend_on_the_process(kind):
    oracle, exploding = gaussian(4)
    s = torch.logspace(1.0, -1.0, 9, dtype=torch.float64)
    data = oracle.sample(50, seed=2, dtype=torch.float64)
    settings = {"shape": (4,), "samples": 50, "data": data, "pairs": "all", "dtype": torch.float64, "progress": False}
    denoiser = exact_denoisers(oracle)[kind]
    expected = stein_corrector(exploding, sigmas=s, **settings)
    cost = stein_corrector(denoiser, sigmas=denoiser.process.sampler_sigma(s), **settings)
    torch.testing.assert_close(cost.per_sample, expected.per_sample, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(cost.sigmas, denoiser.process.sampler_sigma(s))


@pytest.mark.parametrize("kind", ["velocity", "epsilon"])
def test_path_states_of_other_processes(kind):
    oracle, _ = gaussian(16)
    denoiser = exact_denoisers(oracle)[kind]
    s = torch.tensor([2.0, 0.7], dtype=torch.float64)
    sigmas = denoiser.process.sampler_sigma(s)
    cost = stein_corrector(denoiser, shape=(16,), sigmas=sigmas, samples=2_000, dtype=torch.float64, progress=False)
    assert float(cost.adjacent[0]) == pytest.approx(float(_exact(oracle, s, "noisier")[0, 1]), rel=0.025)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": "al"}, "pairs must be one of .* did you mean 'all'"),
        ({"velocity": "noise"}, "velocity must be one of"),
        ({"sigmas": [1.0, 2.0]}, "sigmas must strictly descend"),
        ({"sigmas": [1.0, 0.0]}, "sigmas must be noise levels above 0"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"data": torch.zeros(3, 5)}, r"data must have shape \[n, 2\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(change, message):
    _, denoiser = gaussian(2)
    settings = {"shape": (2,), "sigmas": [2.0, 1.0], "samples": 2, "progress": False}
    with pytest.raises(ValueError, match=message):
        stein_corrector(denoiser, **{**settings, **change})


def test_nan_names_the_level():
    denoiser = fs.Denoiser.from_denoiser(lambda z, s: z * torch.where(s < 1.5, torch.nan, 1.0)[:, None], 0.1, 10.0)
    with pytest.raises(ValueError, match="sigma = 1"):
        stein_corrector(denoiser, shape=(2,), sigmas=[2.0, 1.0], samples=2, data=torch.ones(1, 2), progress=False)


@pytest.mark.parametrize("returned", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("prediction", ["x0", "edm", "epsilon", "v", "velocity", "score"])
def test_rounding_that_moves_levels_is_warned_of(prediction, returned):
    """Of predictions in bfloat16, of clean samples alone, whose scores are small differences of large numbers."""
    oracle = fs.oracles.Gaussian(0.5, (8,))
    exact = exact_denoisers(oracle)[prediction]
    denoiser = replace(exact, network=lambda x, t: exact.network(x, t).bfloat16().to(returned))
    levels = fs.baselines.exponential(25, 0.025, 80.0)[:-1]
    settings = {"shape": (8,), "sigmas": exact.process.sampler_sigma(levels), "samples": 32, "progress": False}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = fs.select(fs.costs.stein_corrector(denoiser, **settings), 8)
    expected = fs.select(fs.costs.stein_corrector(exact, **settings), 8)
    off = (found.sigmas / expected.sigmas)[:-1].log().abs().max()
    assert [str(each.message)[:40] for each in said] == ["the network's outputs come in 16 bits an"] * (
        prediction == "x0"
    )
    assert (float(off) > 0.04) == (prediction == "x0")
