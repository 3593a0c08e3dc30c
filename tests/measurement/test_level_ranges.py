"""Ranges of levels and tables that end above the data's deviation, or start near it, are warned of."""

import warnings

import pytest
import torch
from models import exact_denoisers

import fastsched as fs


@pytest.mark.parametrize(("low", "said"), [(0.05, 0), (1.0, 1)])
def test_a_range_of_levels_that_ends_above_the_data_is_doubtful(low, said):
    """The data deviate by about 0.4."""
    denoiser = fs.Denoiser.from_denoiser(fs.oracles.Gaussian(0.4, (16,)).denoise, low, 20.0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fs.measure(denoiser, (16,), levels=12, samples=4, progress=False)
    assert ["means of data" in str(each.message) for each in told] == [True] * said


def test_a_range_of_levels_that_starts_among_the_data_is_named():
    denoiser = fs.Denoiser.from_denoiser(fs.oracles.Gaussian(0.4, (16,)).denoise, 0.05, 0.5)
    with pytest.warns(UserWarning, match=r"the noise does not far exceed the data, whose deviation is 0\.[34]"):
        fs.measure(denoiser, (16,), levels=12, samples=2, progress=False)


@pytest.mark.parametrize("steps", [50, 100])
@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_a_table_that_ends_before_the_noise_exceeds_the_data_is_warned_of(steps, kind):
    """The first betas of DDPM's, as small repositories have them."""
    table = torch.cumprod(1 - torch.linspace(1e-4, 0.02, steps, dtype=torch.float64), 0)
    right = exact_denoisers(fs.oracles.GaussianMixture.random(16, 5, seed=1, std=1.0), table)[kind]
    with pytest.warns(UserWarning, match="the noise does not far exceed the data, whose deviation is"):
        fs.measure(right, (16,), levels=24, responses=False, progress=False)


def test_a_range_that_ends_near_the_data_s_spread_is_warned_of():
    """Up to 40 for modes that spread by 25: some noises move ``D`` by more than 0.3. Half the input is no ``D``."""
    modes = fs.oracles.GaussianMixture.random(2, 40, seed=0, spread=25.0)
    warned = []
    for seed in range(8):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            fs.measure(fs.Denoiser.from_denoiser(modes.denoise, 0.1, 40.0), (2,), seed=seed, levels=24, progress=False)
        warned += [bool(told)]
        assert all("does not far exceed" in str(each.message) for each in told)
    assert any(warned)
    half = fs.Denoiser.from_denoiser(lambda z, s: 0.5 * z, 0.1, 40.0)
    with pytest.raises(ValueError, match=r"depends little on its input|returns nearly its input"):
        fs.measure(half, (2,), levels=24, responses=False, progress=False)
