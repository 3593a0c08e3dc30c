import numpy as np
import pytest
import torch
from models import exact_denoiser, exact_denoisers, mixture, vp_table

import fastsched as fs

DENOISER = exact_denoiser(mixture(d=4), 0.01, 40.0)


def measure(**options):
    return fs.measure(DENOISER, (4,), levels=24, progress=False, **options)


def test_jackknife_by_its_definition():
    stats = measure(samples=5)
    found = fs.standard_errors(stats, 5)
    schedules = [fs.optimal_schedule(stats.select([i for i in range(5) if i != b]), 5, polish=False) for b in range(5)]
    logs = np.array([schedule.sigmas[:-1].log().numpy() for schedule in schedules])
    expected = np.sqrt(4 / 5 * ((logs - logs.mean(0)) ** 2).sum(0))
    np.testing.assert_allclose(found.log_sigmas.numpy(), expected, atol=1e-12)
    errors = np.array([schedule.predicted_error for schedule in schedules])
    assert found.predicted_error == pytest.approx(np.sqrt(4 / 5 * ((errors - errors.mean()) ** 2).sum()))


def test_a_single_step_has_no_sigma_that_moves(recwarn):
    found = fs.standard_errors(measure(samples=2), 1)
    assert found.log_sigmas.tolist() == [0.0]
    assert found.predicted_error > 0
    assert not recwarn.list


def test_standard_error_is_the_spread_over_measurements():
    """Of the predicted error of a given number of steps, over 12 measurements of 8 samples each: to a factor of 2.5."""
    runs = [measure(samples=8, seed=seed) for seed in range(12)]
    actual = np.std([fs.optimal_schedule(run, 6, polish=False).predicted_error for run in runs], ddof=1)
    reported = np.sqrt(np.mean([fs.standard_errors(run, 6).predicted_error ** 2 for run in runs]))
    assert 1 / 2.5 < reported / actual < 2.5


def test_pure_noise_at_the_start_has_no_standard_error():
    table = vp_table(100)
    table[-1] = 0.0
    network = exact_denoisers(mixture(d=4), vp_table(100))["v"].network

    def at_zero_too(x, t):  # the trained table's last level is finite, and v there is -E[x0]
        return torch.where((t < 99)[:, None], network(x, t.clamp_max(98)), -mixture(d=4).sample(512, seed=0).mean(0))

    stats = fs.measure(fs.Denoiser.from_v(at_zero_too, table), (4,), levels=24, samples=3, progress=False)
    found = fs.standard_errors(stats, 4)
    assert found.log_sigmas[0] == 0
    assert bool(found.log_sigmas.isfinite().all())


def test_one_sample_has_no_standard_error():
    with pytest.raises(ValueError, match="at least two samples"):
        fs.standard_errors(measure(samples=1), 5)
