import itertools

import numpy as np
import pytest
import torch
from models import exact_denoiser, exact_denoisers, mixture

import fastsched as fs
from fastsched.costs import path_cost
from fastsched.measurement import noise_of
from fastsched.polish import coordinate_descent, error_estimates, polish
from fastsched.solvers import SOLVERS

KINDS = exact_denoisers(mixture(d=4))


@pytest.fixture(scope="module")
def stats():
    return fs.measure(KINDS["x0"], (4,), levels=12, samples=6, progress=False)


@pytest.mark.parametrize("name", ["ddim", "dpmpp_3m", "unipc", "heun"])
def test_estimates_by_their_definitions(stats, name):
    cost = path_cost(stats, name)
    nodes = [0, 2, 5, 6, 9, 12]
    total, carried = np.zeros(11), np.zeros(stats.samples)
    for n in range(len(nodes) - 1):
        history = nodes[max(0, n - cost.solver.history) : n + 2]
        end = history[-1]
        vector = cost.error_vector(history, corrected=n < len(nodes) - 3) * (cost.s[end] if end < 12 else 1.0)
        total += np.sqrt(cost.weight[end]) * vector
        carried += stats.cross.numpy()[:, end - 1] @ vector
    found = error_estimates(stats, cost, nodes)
    assert found.local == pytest.approx(float(cost.of(nodes).sum()), rel=1e-12)
    assert found.coherent == pytest.approx(float(total @ cost.gram @ total), rel=1e-9)
    assert found.dual_weighted == pytest.approx(float((carried**2).mean()), rel=1e-9)
    assert found.largest == max(found)
    assert found.total == pytest.approx(sum(found))


# unipc goes on with slopes of predicted states, which the estimate counts within a step but not in those after it
@pytest.mark.parametrize(
    ("name", "part"), [("ddim", 0.15), ("dpmpp_2m", 0.15), ("ipndm", 0.15), ("heun", 0.15), ("unipc", 0.3)]
)
def test_coherent_estimate_is_the_error_on_gaussian_data(name, part):
    """All errors of a path are parallel there: the estimate with cross terms is the sampler's own error."""
    oracle = fs.oracles.Gaussian(0.5, (8,))
    denoiser = exact_denoiser(oracle, 0.01, 20.0)
    stats = fs.measure(denoiser, (8,), levels=200, samples=4, progress=False)
    nodes = [0, 40, 75, 100, 120, 135, 150, 170, 200]
    cost = path_cost(stats, name)
    predicted = error_estimates(stats, cost, nodes).coherent
    noise = noise_of(stats.seeds, (8,)).double()
    samples = fs.sample(denoiser, stats.sigmas[nodes], name, noise)
    actual = float((samples - oracle.flow(noise * 20.0, 20.0, 0.0)).square().sum(1).mean())
    # A solver carries errors on by its own step, the estimate by the flow: they differ as a step differs from the flow,
    # by a tenth or so here, of errors that may cancel; so the bound is a part of their sum without cancelling.
    assert abs(predicted**0.5 - actual**0.5) < part * float(np.sqrt(cost.of(nodes)).sum())


def test_dual_weighted_estimate_is_unbiased():
    """Against the coherent one on Gaussian data, where they agree but for the probes' noise."""
    oracle = fs.oracles.Gaussian(0.5, (32,))
    stats = fs.measure(exact_denoiser(oracle, 0.01, 20.0), (32,), levels=64, samples=200, progress=False)
    nodes = [0, 15, 28, 38, 46, 54, 64]
    found = error_estimates(stats, path_cost(stats, "ddim"), nodes)
    # a mean of 200 squares of about normal numbers: three standard errors of sqrt(2/200)
    assert found.dual_weighted == pytest.approx(found.coherent, rel=3 * (2 / 200) ** 0.5)


def test_without_sensitivity_there_are_two_estimates():
    stats = fs.measure(KINDS["x0"], (4,), levels=12, samples=2, sensitivity=None, progress=False)
    found = error_estimates(stats, path_cost(stats, "ddim", None), [0, 4, 8, 12])
    assert np.isnan(found.dual_weighted)
    assert found.largest == max(found.local, found.coherent)


def test_coordinate_descent_finds_a_convex_minimum():
    target = [0, 7, 11, 30, 41, 60]
    found = coordinate_descent(
        lambda nodes: sum((a - b) ** 2 for a, b in zip(nodes, target, strict=True)), [0, 1, 2, 3, 4, 60]
    )
    assert found == target


@pytest.mark.parametrize("name", SOLVERS)
def test_polish_never_raises_the_objective(stats, name):
    cost = path_cost(stats, name)
    start = [0, 3, 6, 9, 12]
    after = polish(stats, cost, start)
    assert error_estimates(stats, cost, after).total <= error_estimates(stats, cost, start).total
    assert all(a < b for a, b in itertools.pairwise(after))
    assert (after[0], after[-1]) == (0, 12)


@pytest.mark.parametrize("kind", ["x0", "velocity", "epsilon"])
def test_polished_schedules_lower_the_prediction(kind):
    stats = fs.measure(KINDS[kind], (4,), levels=24, samples=4, progress=False)
    plain = fs.optimal_schedule(stats, 6, polish=False)
    polished = fs.optimal_schedule(stats, 6, polish=True)
    assert fs.predict_error(stats, polished) <= fs.predict_error(stats, plain) * 1.5
    assert polished.sigmas[0] == plain.sigmas[0]


def test_polish_keeps_integer_timesteps():
    denoiser = fs.Denoiser.from_epsilon(lambda x, t: 0.1 * x, torch.linspace(0.999, 0.005, 200), integer_timesteps=True)
    stats = fs.measure(denoiser, (4,), levels=20, samples=2, progress=False)
    t = fs.optimal_schedule(stats, 5, polish=True).timesteps
    assert t.tolist() == t.round().tolist()
