import itertools

import numpy as np
import pytest
from models import exact_denoiser

import fastsched as fs
from fastsched.costs import answer_errors
from fastsched.costs.answer_errors import relative_errors, variance_at_end
from fastsched.costs.secants import Secants
from fastsched.metrics import power_mean


def test_squares_add_up_to_the_variance_of_correlated_errors():
    generator = np.random.default_rng(0)
    vectors, lam = generator.standard_normal((6, 3, 4)), generator.uniform(0.01, 2.0, (3, 6)).cumsum(1)
    for length in (0.2, 1.3):
        kernel = np.exp(-np.abs(lam[:, :, None] - lam[:, None]) / length)
        expected = np.einsum("ncv,cnm,mcv->c", vectors, kernel, vectors)
        found = variance_at_end(vectors, lam, length, lambda v: (v**2).sum(1))
        np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("paths", [1, 2, 3])
def test_errors_of_answers_by_leaving_a_path_out(paths):
    """Deviations that are orthogonal explain nothing of each other: the errors are the residuals themselves.

    One sample of five has errors ten times larger: it is not typical.
    """
    sizes = np.array([0.3, 0.6, 0.2])
    deviations, residuals = np.zeros((3, paths, 2 * paths)), np.zeros((3, paths, 2 * paths))
    for m in range(paths):
        deviations[1:, m, m] = 1.0 + m
        residuals[:, m, paths + m] = sizes * (1.0 + m)
    secants = Secants(np.arange(3.0), deviations, residuals, np.eye(2 * paths))
    factors = np.ones((5, 2 * paths))
    factors[2, paths:] = 10.0
    left_out = [[each[:, None] * factors for each in secants.left_out(path)] for path in range(paths)]
    found = relative_errors(left_out, np.zeros((3, 5)))
    np.testing.assert_allclose(found, np.sqrt(answer_errors.LEAVE_ONE_OUT_FACTOR * sizes[[1, 1, 2]]), rtol=1e-12)


def test_what_the_other_path_explains_is_no_error():
    """Two paths that deviate alike but for a small part: the answer to that part alone counts."""
    deviations = np.array([[[1.0, 0.0, 0.0, 0.0], [1.0, 0.1, 0.0, 0.0]]]).repeat(2, 0)
    residuals = np.array([[[0.0, 0.0, 0.5, 0.0], [0.0, 0.0, 0.5, 0.07]]]).repeat(2, 0)
    secants = Secants(np.arange(2.0), deviations, residuals, np.eye(4))
    left_out = [[each[:, None] for each in secants.left_out(path)] for path in range(2)]
    found = relative_errors(left_out, np.zeros((2, 1)))
    expected = np.sqrt(answer_errors.LEAVE_ONE_OUT_FACTOR * 0.7)
    np.testing.assert_allclose(found, expected, rtol=0.02)  # the damping leaves a thousandth


def test_what_the_samples_own_jacobians_answer_is_no_error():
    """Errors are 0.1 and -0.1 times what is left of the deviations of two samples, as their Jacobians differ."""
    left = np.random.default_rng(0).standard_normal((3, 2, 5))
    difference = np.array([[0.1, -0.1]] * 3)
    left_out = [(difference[:, :, None] * left, left)]
    assert relative_errors(left_out, difference).max() < 1e-3  # the fourth root of rounding
    expected = np.sqrt(answer_errors.LEAVE_ONE_OUT_FACTOR * 0.1)
    np.testing.assert_allclose(relative_errors(left_out, np.zeros((3, 2))), expected, rtol=1e-12)


def test_predictions_of_chosen_schedules_are_right_within_a_factor_of_two_and_a_half():
    """Where a descent ends, UniPC in 8 steps, on other noises: root mean square over eight mixtures.

    A descent looks for what is predicted too low: without the variance it was 5.6.
    """
    ratios = []
    for (d, modes), seed in itertools.product([(16, 3), (32, 8)], range(4)):
        denoiser = exact_denoiser(fs.oracles.GaussianMixture.random(d, modes, seed=seed), 0.01, 20.0)
        stats = fs.measure(denoiser, (d,), samples=8, progress=False)
        chosen = fs.optimal_schedule(stats, 8, "unipc")
        reference = fs.converged_reference(denoiser, (d,), samples=64, steps=200, progress=False)
        ends = fs.sample(denoiser, chosen, noise=reference.noise)
        actual = float(power_mean(fs.metrics.squared_distances(ends, reference.ends)))
        assert chosen.predicted_error is not None
        ratios.append(chosen.predicted_error / actual)
    assert np.sqrt(np.mean(np.log(ratios) ** 2)) < np.log(2.5)
