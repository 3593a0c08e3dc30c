import itertools
from dataclasses import replace

import numpy as np
import pytest
from models import exact_denoiser
from test_surrogate import INNER, LEVELS, LinearModel, schedule

import fastsched as fs
from fastsched.costs import answer_errors
from fastsched.costs.answer_errors import relative_errors, variance_at_end
from fastsched.costs.norms import Norms
from fastsched.costs.secants import Secants
from fastsched.metrics import power_mean
from fastsched.sampling.solvers import SOLVERS


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
    gram = np.repeat(np.eye(2 * paths)[None], 5, axis=0)
    gram[2, range(paths, 2 * paths), range(paths, 2 * paths)] = 100.0
    norms = Norms(gram, np.ones(5))
    found = relative_errors(Secants(np.arange(3.0), deviations, residuals, norms), np.zeros((3, 5)))
    np.testing.assert_allclose(found, np.sqrt(answer_errors.LEAVE_ONE_OUT_FACTOR * sizes[[1, 1, 2]]), rtol=1e-12)


def test_what_the_other_path_explains_is_no_error():
    """Two paths that deviate alike but for a small part: the answer to that part alone counts."""
    deviations = np.array([[[1.0, 0.0, 0.0, 0.0], [1.0, 0.1, 0.0, 0.0]]]).repeat(2, 0)
    residuals = np.array([[[0.0, 0.0, 0.5, 0.0], [0.0, 0.0, 0.5, 0.07]]]).repeat(2, 0)
    norms = Norms(np.eye(4)[None], np.ones(1))
    found = relative_errors(Secants(np.arange(2.0), deviations, residuals, norms), np.zeros((2, 1)))
    expected = np.sqrt(answer_errors.LEAVE_ONE_OUT_FACTOR * 0.7)
    np.testing.assert_allclose(found, expected, rtol=0.02)  # the damping leaves a thousandth


def test_what_the_samples_own_jacobians_answer_is_no_error():
    """Residuals are 0.1 times the deviations of one sample, which its Jacobian exceeds the common one by, and -0.1."""
    deviations, residuals = np.zeros((2, 2, 2, 4))
    deviations[:, [0, 1], [0, 1]] = residuals[:, [0, 1], [2, 3]] = 1.0
    vectors = np.stack([np.vstack([np.eye(2), share * np.eye(2)]) for share in (0.1, -0.1)])
    secants = Secants(np.arange(2.0), deviations, residuals, Norms(vectors @ vectors.transpose(0, 2, 1), np.ones(2)))
    assert relative_errors(secants, np.array([[0.1, -0.1]] * 2)).max() < 1e-3  # the fourth root of rounding
    expected = np.sqrt(answer_errors.LEAVE_ONE_OUT_FACTOR * 0.1)
    np.testing.assert_allclose(relative_errors(secants, np.zeros((2, 2))), expected, rtol=1e-12)


def own_jacobian(model):
    """The model's surrogate, whose only sample has a Jacobian of its own."""
    return replace(model.surrogate, own=model.shares[:, None])


class OneWrongAnswer:
    """No secants, and one answer off by a vector of its own, the last."""

    def __init__(self, vectors, wrong):
        self.vectors, self.wrong = vectors + 1, wrong

    def at(self, lam):
        return lam

    def answer(self, evaluation, known, away, offset=None):
        answer = np.zeros_like(away)
        answer[:, -1] = float(evaluation == self.wrong)
        return answer, np.zeros_like(away)


@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize("name", SOLVERS)
def test_an_error_of_an_answer_reaches_the_end_as_if_it_were_made(kind, name):
    model = LinearModel(kind)
    surrogate, levels = model.surrogate, schedule(model, *INNER)[None]
    found = surrogate.run(levels, name, passed_on=True)
    later = len(found.deviations) - 1
    factors = found.end[0, surrogate.vectors :]
    assert later <= len(factors)
    for wrong in range(1, later + 1):
        made = surrogate.run(levels, name, OneWrongAnswer(surrogate.vectors, wrong))
        np.testing.assert_allclose(factors[wrong - 1], made.error[0, -1], rtol=1e-10, atol=1e-14)
    assert not factors[later:].any()


def test_errors_that_are_passed_on_change_nothing_else():
    model = LinearModel("ve")
    surrogate, levels = own_jacobian(model), schedule(model, *INNER)[None]
    plain, found = surrogate.run(levels, "unipc"), surrogate.run(levels, "unipc", passed_on=True)
    np.testing.assert_array_equal(plain.error, found.error)
    np.testing.assert_array_equal(plain.outcome.deviations, found.outcome.deviations)
    assert found.variance.shape == (1, 1)


def test_the_variance_by_its_double_sum():
    model = LinearModel("ve")
    surrogate, levels = own_jacobian(model), schedule(model, *INNER)[None]
    found = surrogate.run(levels, "unipc", passed_on=True)
    lam, factors = surrogate.position(levels[0, 1:-1]), found.end[0, 0, surrogate.vectors :]
    apart = np.abs(lam[:, None] - lam)
    errors = factors * surrogate.answer_errors(lam)
    deviations = found.deviations[1:, 0, 0]  # without secants all of them is unexplained
    products = deviations @ surrogate.norms.gram[0] @ deviations.T
    expected = errors @ (products * np.exp(-apart / answer_errors.CORRELATION_LENGTH)) @ errors
    between = factors * surrogate.path_errors(lam)[:, 0]
    assert between.any()
    expected += between @ np.exp(-apart / surrogate.spacing) @ between
    np.testing.assert_allclose(found.variance[0, 0], expected, rtol=1e-10)


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
