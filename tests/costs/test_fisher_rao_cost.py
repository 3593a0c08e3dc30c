import pytest
import torch
from models import gaussian

import fastsched as fs
from fastsched.costs import fisher_rao

STD = 0.5


def _cost(oracle, denoiser, samples, levels, **settings):
    settings |= {"shape": oracle.shape, "samples": samples, "dtype": torch.float64, "progress": False}
    data = oracle.sample(samples, seed=1, dtype=torch.float64)
    return fisher_rao(denoiser, sigmas=denoiser.levels(levels), data=data, **settings)


@pytest.mark.parametrize(("d", "samples"), [(1, 8_000), (16, 5_000), (256, 1_000)])
def test_gaussian_metric(d, samples):
    oracle, denoiser = gaussian(d)
    cost = _cost(oracle, denoiser, samples, 8)
    s = cost.s
    metric = 2 * d * s**4 / (STD**2 + s**2) ** 2
    exact = s.log().diff().square() * (metric[1:] + metric[:-1]) / 2
    error = cost.adjacent - exact
    # (chi^2 - d)^2 is heavy-tailed: relative deviation sqrt(14) at d = 1 and sqrt(2) at large d.
    assert (error.abs() / cost.stderr.diagonal(1)).max() < 3
    assert (error.abs() / exact).max() < 3 * (2 + 12 / d) ** 0.5 / samples**0.5
    assert cost.calls == (8 * samples, 16 * samples, 0)


def test_states_of_the_path():
    _, denoiser = gaussian(256)
    s = denoiser.levels(24)
    settings = {"shape": (256,), "sigmas": s, "samples": 1_000, "dtype": torch.float64, "progress": False}
    cost = fisher_rao(denoiser, **settings)
    metric = 2 * 256 * s**4 / (STD**2 + s**2) ** 2
    exact = s.log().diff().square() * (metric[1:] + metric[:-1]) / 2
    # (chi^2 - d)^2 varies by sqrt(2) of itself, 4.5% in a mean of 1,000. The path's spread is 0.6% off at most, which
    # moves every chi^2 by 1.2% of d = 256: 3 of them, against a deviation of sqrt(2 d) = 23, add (3 / 23)^2 = 1.8%.
    assert (cost.adjacent / exact - 1).abs().max() < 3 * 0.045 + 0.018


def test_gaussian_schedule_is_uniform_in_the_log_of_the_variance():
    oracle, denoiser = gaussian(64)
    schedule = fs.select(_cost(oracle, denoiser, 1_000, 64), 10)
    lengths = -oracle.fisher_rao_length(schedule.sigmas).diff()
    # 1,000 squares with relative deviation sqrt(2): 4.5% in a metric, half in a length; shared by all levels here.
    assert (lengths / lengths.mean() - 1).abs().max() < 0.05


def test_mixture_against_the_time_derivative_of_its_log_density():
    oracle = fs.oracles.GaussianMixture.random(3, 3, seed=0)
    denoiser = fs.Denoiser.from_denoiser(oracle.denoise, 0.1, 5.0)
    samples, s = 5_000, torch.tensor([0.8, 0.7], dtype=torch.float64)
    data = oracle.sample(samples, seed=2, dtype=torch.float64)
    settings = {"shape": (3,), "sigmas": s, "samples": samples, "dtype": torch.float64, "progress": False}
    few, many = (fisher_rao(denoiser, data=data, probes=probes, **settings) for probes in (2, 12))
    noise = torch.randn(samples, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    information = []
    for level in s.tolist():
        z = oracle.sample(samples, seed=3, dtype=torch.float64) + level * noise
        step = 1e-4
        change = (oracle.log_density(z, level + step) - oracle.log_density(z, level - step)) / (2 * step)
        information.append((level * change).square())
    exact = s.log().diff().square() * (information[0] + information[1]) / 2
    error = many.adjacent[0] - exact.mean()
    assert abs(float(error)) < 3 * float((many.stderr[0, 1] ** 2 + exact.var() / samples).sqrt())
    assert abs(float(few.adjacent[0] - many.adjacent[0])) < 3 * float(few.stderr[0, 1])


def test_batches_and_bad_arguments():
    oracle = fs.oracles.GaussianMixture.random(3, 3, seed=0)
    denoiser = fs.Denoiser.from_denoiser(oracle.denoise, 0.1, 5.0)
    torch.testing.assert_close(
        _cost(oracle, denoiser, 10, 4, batch_size=3).per_sample, _cost(oracle, denoiser, 10, 4).per_sample
    )
    with pytest.raises(ValueError, match="probes must be at least 2"):
        _cost(oracle, denoiser, 10, 4, probes=1)
    with pytest.raises(ValueError, match="needs the cost of all pairs"):
        fs.select(_cost(oracle, denoiser, 10, 4), 2, method="dynamic_programming")
