import itertools

import numpy as np
import pytest
from models import exact_denoiser, exact_denoisers, mixture

import fastsched as fs
from fastsched.costs import path_cost
from fastsched.costs.prediction import error_estimates
from fastsched.costs.surrogate import Surrogate
from fastsched.sampling.random_streams import noise_of

KINDS = exact_denoisers(mixture(d=4))


@pytest.fixture(scope="module")
def stats():
    return fs.measure(KINDS["x0"], (4,), levels=12, samples=6, progress=False)


@pytest.mark.parametrize("name", ["ddim", "dpmpp_3m", "unipc", "heun"])
def test_estimates_by_their_definitions(stats, name):
    cost = path_cost(stats, name)
    nodes = [0, 2, 5, 6, 9, 12]
    carried = np.zeros(stats.samples)
    for n in range(len(nodes) - 1):
        history = nodes[max(0, n - cost.solver.history) : n + 2]
        end = history[-1]
        vector = cost.error_vector(history, corrected=n < len(nodes) - 3) * (cost.s[end] if end < 12 else 1.0)
        carried += stats.cross.numpy()[:, end - 1] @ vector
    error = Surrogate.of(stats).run(np.append(cost.s, 0.0)[None, nodes], name).error[0]
    found = error_estimates(stats, cost, nodes)
    assert found.local == pytest.approx(float(cost.of(nodes).sum()), rel=1e-12)
    assert found.coherent == pytest.approx(float(error @ stats.gram.mean(0).numpy() @ error), rel=1e-9)
    assert found.dual_weighted == pytest.approx(float((carried**2).mean()), rel=1e-9)
    assert found.largest == max(found)


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "ipndm", "heun", "unipc"])
def test_coherent_estimate_is_the_error_on_gaussian_data(name):
    """The Jacobian is a multiple of the identity there: the sampler on the surrogate is the sampler."""
    oracle = fs.oracles.Gaussian(0.5, (8,))
    denoiser = exact_denoiser(oracle, 0.01, 20.0)
    stats = fs.measure(denoiser, (8,), levels=200, samples=4, progress=False)
    nodes = [0, 40, 75, 100, 120, 135, 150, 170, 200]
    cost = path_cost(stats, name)
    predicted = error_estimates(stats, cost, nodes).coherent
    noise = noise_of(stats.seeds, (8,)).double()
    samples = fs.sample(denoiser, stats.sigmas[nodes], name, noise)
    actual = float((samples - oracle.flow(noise * 20.0, 20.0, 0.0)).square().sum(1).mean())
    # shares of the Jacobian come from finite differences of 1%: hundredths, of errors that may cancel; so the bound is
    # a part of their sum without cancelling
    assert abs(predicted**0.5 - actual**0.5) < 0.02 * float(np.sqrt(cost.of(nodes)).sum())


def test_dual_weighted_estimate_is_unbiased():
    """On Gaussian data the flow carries the error of every step to the end by ``c / sqrt(c^2 + s^2)``."""
    oracle = fs.oracles.Gaussian(0.5, (32,))
    stats = fs.measure(exact_denoiser(oracle, 0.01, 20.0), (32,), levels=64, samples=200, progress=False)
    cost, nodes = path_cost(stats, "ddim"), [0, 15, 28, 38, 46, 54, 64]
    total = np.zeros(63)
    for start, end in itertools.pairwise(nodes):
        s = cost.s[end] if end < 64 else 0.0
        total += 0.5 / np.hypot(0.5, s) * (s or 1.0) * cost.error_vector([start, end])
    expected = float(total @ cost.gram @ total)
    # a mean of 200 squares of about normal numbers: three standard errors of sqrt(2/200)
    assert error_estimates(stats, cost, nodes).dual_weighted == pytest.approx(expected, rel=3 * (2 / 200) ** 0.5)


def test_without_sensitivity_there_are_two_estimates():
    stats = fs.measure(KINDS["x0"], (4,), levels=12, samples=2, sensitivity=None, progress=False)
    found = error_estimates(stats, path_cost(stats, "ddim", None), [0, 4, 8, 12])
    assert np.isnan(found.dual_weighted)
    assert found.largest == max(found.local, found.coherent)


def test_nodes_nearer_than_the_grid_are_told_apart_by_order(stats):
    """Four levels of the fourfold grid, h = 0.19 / 4 apart at most, where all four nodes are nearest the last."""
    low = float(stats.s[-1])
    sigmas = [float(stats.s[0]), low * 1.003, low * 1.002, low * 1.001, low, 0.0]
    fine = stats.refine(4)
    nodes = [0, *range(fine.levels - 4, fine.levels), fine.levels]
    expected = error_estimates(fine, path_cost(fine, "dpmpp_2m"), nodes).largest
    assert fs.predict_error(stats, sigmas) == pytest.approx(expected, rel=1e-12)


def test_schedules_that_the_measurement_cannot_judge(stats):
    low = float(stats.s[-1])
    with pytest.raises(ValueError, match="sigmas must start within the measured range"):
        fs.predict_error(stats, [low / 2, low / 4, 0.0])
    many = np.geomspace(float(stats.s[0]), low, 46).tolist()
    with pytest.raises(ValueError, match="sigmas has 46 levels above 0, the measurement, refined, only 45"):
        fs.predict_error(stats, [*many, 0.0])
