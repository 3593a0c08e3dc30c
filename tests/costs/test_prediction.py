import numpy as np
import pytest
import torch
from models import exact_denoiser, exact_denoisers, mixture
from scipy.stats import spearmanr

import fastsched as fs
from fastsched.costs.fitted_weights import surrogate_runs
from fastsched.costs.prediction import DEVIATION_PENALTY, ErrorModel, squared_errors
from fastsched.costs.surrogate import Surrogate
from fastsched.denoisers.digits import DigitsNetwork, digits_denoiser
from fastsched.metrics import power_mean
from fastsched.sampling.fitted import FITTED_SOLVER
from fastsched.sampling.random_streams import noise_of

KINDS = exact_denoisers(mixture(d=4))


@pytest.fixture(scope="module")
def stats():
    return fs.measure(KINDS["x0"], (4,), levels=24, samples=6, progress=False)


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "ipndm", "heun", "unipc"])
def test_the_error_on_gaussian_data_is_the_samplers(name):
    """The Jacobian is a multiple of the identity there: the sampler on the surrogate is the sampler."""
    oracle = fs.oracles.Gaussian(0.5, (8,))
    denoiser = exact_denoiser(oracle, 0.01, 20.0)
    stats = fs.measure(denoiser, (8,), levels=200, samples=4, progress=False)
    nodes = [0, 40, 75, 100, 120, 135, 150, 170, 200]
    levels = np.append(stats.s.numpy(), 0.0)[nodes]
    surrogate = Surrogate.of(stats)
    predicted = surrogate.norms.squared(surrogate.run(levels[None], name).outcome.error)[0]
    noise = noise_of(stats.seeds, (8,)).double()
    samples = fs.sample(denoiser, torch.from_numpy(levels), name, noise)
    actual = (samples - oracle.flow(noise * 20.0, 20.0, 0.0)).square().sum(1).numpy()
    # splines, straight lines between asked levels and float32 states: hundredths of an error that may cancel
    size = float(oracle.flow(noise * 20.0, 20.0, 0.0).square().sum(1).mean()) ** 0.5
    np.testing.assert_allclose(np.sqrt(predicted), np.sqrt(actual), rtol=0.05, atol=1e-3 * size)


@pytest.mark.parametrize(("samples", "doubt"), [(2, DEVIATION_PENALTY), (3, DEVIATION_PENALTY), (4, 0.0)])
def test_deviations_of_the_fitted_solver_are_penalised_with_few_samples(samples, doubt):
    few = fs.measure(KINDS["x0"], (4,), levels=24, samples=samples, progress=False)
    levels = np.append(few.s.numpy(), 0.0)[[0, 5, 10, 16, 24]]
    surrogate, norms = Surrogate.of(few), Surrogate.of(few).norms
    found = surrogate_runs(surrogate, levels[None], FITTED_SOLVER)
    ends = [found.deviations[n, 0] * surrogate.amplitude(levels[n : n + 1]) for n in range(1, 4)]
    relative = np.mean([sum(end @ gram @ end for end in ends) for gram in norms.gram / norms.size[:, None, None]])
    expected = squared_errors(norms, found.outcome)[0] + doubt**2 * relative * norms.size
    assert relative > 0
    np.testing.assert_allclose(ErrorModel.of(few, "fitted")(levels[None]), power_mean(expected), rtol=1e-9)


def schedules(stats, steps):
    """Schedules of all qualities, by name."""
    low, high = stats.finite_range
    makers = {"karras": fs.baselines.karras, "exponential": fs.baselines.exponential, "linear": fs.baselines.linear}
    found = {}
    for name, make in makers.items():
        found |= {f"{name} {spare}": make(steps, low, high, spare_last=bool(spare)) for spare in (0, 1)}
    for solver in ("ddim", "dpmpp_2m", "ipndm", "unipc"):
        found[solver] = fs.optimal_schedule(stats, steps, solver).sigmas
        found[f"{solver} unpolished"] = fs.optimal_schedule(stats, steps, solver, polish=False).sigmas
    return found


@pytest.mark.parametrize(("solver", "steps"), [("ddim", 8), ("dpmpp_2m", 6), ("unipc", 8)])
def test_predictions_rank_as_the_sampler_does_on_digits(solver, steps):
    """Of 14 schedules, against the power mean of 64 unseen noises."""
    denoiser = digits_denoiser()
    stats = fs.measure(denoiser, DigitsNetwork.shape, samples=8, progress=False)
    reference = fs.converged_reference(denoiser, DigitsNetwork.shape, samples=64, progress=False)
    predicted, actual = [], []
    for sigmas in schedules(stats, steps).values():
        predicted.append(fs.predict_error(stats, sigmas, solver))
        ends = fs.sample(denoiser, sigmas, solver, reference.noise)
        actual.append(float(power_mean(fs.metrics.squared_distances(ends, reference.ends))))
    ratios = np.log(np.array(predicted) / np.array(actual))
    assert spearmanr(predicted, actual)[0] > 0.85  # 0.9 to 0.98 over nine denoisers, three solvers, 5 to 12 steps
    assert float(np.abs(ratios).max()) < np.log(4.0)
    assert float(np.sqrt(np.mean(ratios**2))) < np.log(2.0)


def test_a_schedule_says_what_it_is_for(stats):
    schedule = fs.optimal_schedule(stats, 5, "unipc")
    assert fs.predict_error(stats, schedule) == pytest.approx(schedule.predicted_error, rel=1e-9)
    assert fs.predict_error(stats, schedule.sigmas) == fs.predict_error(stats, schedule.sigmas, "dpmpp_2m")
    fitted = fs.optimal_schedule(stats, 5, "fitted")
    assert fs.predict_error(stats, fitted) == pytest.approx(fitted.predicted_error, rel=1e-6)


def test_schedules_that_the_measurement_cannot_judge(stats):
    low = float(stats.s[-1])
    with pytest.raises(ValueError, match="sigmas must start within the measured range"):
        fs.predict_error(stats, [low / 2, low / 4, 0.0])
    with pytest.raises(ValueError, match="sigmas must end in 0"):
        fs.predict_error(stats, [10.0, 1.0])
    for beyond in ([1e308, 1.0, 0.0], [10.0, 1e-320, 0.0]):
        with pytest.raises(ValueError, match="sigmas must be near those of the noise process"):
            fs.predict_error(stats, beyond)


@pytest.mark.parametrize("name", KINDS)
def test_one_step_from_the_highest_level_is_predicted(name):
    """Also from pure noise, where the one level is infinite."""
    found = fs.measure(KINDS[name], (4,), levels=8, samples=2, progress=False)
    schedule = fs.optimal_schedule(found, 1, "ddim")
    assert fs.predict_error(found, schedule) == pytest.approx(schedule.predicted_error, rel=1e-9)
