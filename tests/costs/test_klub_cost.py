import numpy as np
import pytest
import scipy.integrate
import torch
from models import gaussian

import fastsched as fs
from fastsched.costs import klub

STD = 0.5


def _exact(s_i, s_j, d):
    """The integral for Gaussian data: ``D = gain z``, ``z_i = z_s + sqrt(s_i^2 - s^2) eps``."""

    def integrand(s):
        gain, gain_i = (STD**2 / (STD**2 + level**2) for level in (s, s_i))
        return d * ((gain - gain_i) ** 2 * (STD**2 + s**2) + gain_i**2 * (s_i**2 - s**2)) / s**3

    return scipy.integrate.quad(integrand, s_j, s_i, epsabs=0, epsrel=1e-8)[0]


@pytest.mark.parametrize("from_data", [True, False], ids=["data", "path"])
def test_gaussian_integrals(from_data):
    d, samples = 32, 400
    oracle, denoiser = gaussian(d, 0.02, 20.0)
    s = denoiser.levels(40)
    data = oracle.sample(samples, seed=1, dtype=torch.float64) if from_data else None
    cost = klub(denoiser, shape=(d,), sigmas=s, samples=samples, data=data, dtype=torch.float64, progress=False)
    index = [0, 8, 16, 24, 32, 39]
    for i, j in [(a, b) for a in index for b in index if a < b]:
        exact = _exact(float(s[i]), float(s[j]), d)
        # Reading M as linear over cells of 0.18 in log s errs by h^2 / 4 at most; the rest is noise.
        assert float(cost.matrix[i, j]) == pytest.approx(exact, rel=0.18**2 / 4, abs=3 * float(cost.stderr[i, j]))
    assert cost.calls.forward == samples * 40 * (1 if from_data else 2)


def test_converges_to_the_integral_with_the_grid():
    oracle, denoiser = gaussian(512, 0.1, 2.0)
    samples = 1000
    data = oracle.sample(samples, seed=1, dtype=torch.float64)
    exact, errors = _exact(2.0, 0.1, 512), []
    for levels in (2, 4, 48):
        settings = {"shape": (512,), "sigmas": denoiser.levels(levels), "samples": samples, "dtype": torch.float64}
        cost = klub(denoiser, data=data, progress=False, **settings)
        errors.append(float(cost.matrix[0, -1]) / exact - 1)
        # A sample's integral varies by about 9% (512 elements), so the mean of 1,000 by 0.3%.
        assert float(cost.stderr[0, -1]) < 0.004 * exact
    # Piecewise linear: an error of second order in the cells, of 7.5% with a single one and a third of it with three.
    assert abs(errors[0]) > 2 * abs(errors[1])
    assert abs(errors[2]) < 3 * 0.004


def test_selects_and_batches():
    _, denoiser = gaussian(8, 0.02, 20.0)
    settings = {"shape": (8,), "sigmas": denoiser.levels(24), "samples": 9, "progress": False}
    whole = klub(denoiser, **settings)
    torch.testing.assert_close(whole.per_sample, klub(denoiser, batch_size=4, **settings).per_sample, rtol=1e-4, atol=0)
    schedule = fs.select(whole, 6)
    assert schedule.steps == 6
    assert np.isin(schedule.sigmas[:-1].numpy(), whole.sigmas.numpy()).all()


def test_a_cost_is_shown_without_its_tables():
    _, denoiser = gaussian(2, 0.1, 2.0)
    cost = klub(denoiser, shape=(2,), sigmas=denoiser.levels(4), samples=2, progress=False)
    assert repr(cost) == f"CostMatrix(name='klub', process={cost.process!r}, order=2, calls={cost.calls!r})"
