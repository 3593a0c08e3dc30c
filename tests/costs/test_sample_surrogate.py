"""The surrogate whose samples have scalar Jacobians of their own."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from models import exact_denoiser, mixture
from test_surrogate import INNER, LEVELS, LinearModel, schedule

import fastsched as fs
from fastsched.costs import answer_errors
from fastsched.costs.norms import Norms
from fastsched.costs.sample_surrogate import SampleSurrogate
from fastsched.costs.surrogate import Surrogate
from fastsched.sampling.solvers import SOLVERS, get_solver


def of_model(model):
    """The model's surrogate, whose only sample has its Jacobian for its own."""
    return SampleSurrogate(model.surrogate, model.shares[:, None], 3)


def test_each_sample_has_its_own_scalar_jacobian():
    """Gaussian data of one deviation where the first element is positive, and of another where it is not."""
    c = lambda z: torch.where(z[:, :1] > 0, 0.3, 1.2)
    denoiser = fs.Denoiser.from_denoiser(lambda z, s: c(z) ** 2 / (c(z) ** 2 + s[:, None] ** 2) * z, 0.01, 20.0)
    stats = fs.measure(denoiser, (8,), levels=64, samples=4, checks=False, progress=False)
    exact = c(stats.ends).numpy().T ** 2 / (c(stats.ends).numpy().T ** 2 + stats.s.numpy()[:, None] ** 2)
    assert len(np.unique(exact[0])) == 2
    found, asked = SampleSurrogate.of(stats), list(range(2, 64, 2))
    np.testing.assert_allclose(found.own[asked], exact[asked], rtol=2e-3, atol=3e-4)  # float32 states
    assert (found.shared.jacobian[asked] > found.own[asked].min(1)).all()
    assert (found.shared.jacobian[asked] < found.own[asked].max(1)).all()


def test_without_responses_all_samples_have_the_jacobian_of_gaussian_data():
    stats = fs.measure(exact_denoiser(mixture()), (4,), levels=8, samples=2, responses=False, progress=False)
    found = SampleSurrogate.of(stats)
    exact = stats.data_std**2 / (stats.data_std**2 + stats.s.numpy() ** 2)
    np.testing.assert_allclose(found.own, np.stack([exact, exact], axis=1), rtol=1e-12)
    np.testing.assert_allclose(found.answer_errors, np.sqrt(exact * (1 - exact)), rtol=1e-12)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_sample_is_that_of_the_surrogate_with_its_jacobian(name):
    """Two samples, without secants."""
    model, generator = LinearModel("flow"), np.random.default_rng(0)
    shares = np.stack([model.shares, 0.5 * model.shares], axis=1)
    e = generator.standard_normal((2, len(model.s) - 1, 3))
    gram, levels = e @ e.transpose(0, 2, 1), schedule(model, *INNER)[None]
    norms = Norms.of_increments(gram, gram.shape[1])
    surrogate = replace(model.surrogate, norms=norms)
    both = SampleSurrogate(surrogate, shares, 3).run(levels, get_solver(name))
    for b in range(2):
        alone = replace(surrogate, jacobian=shares[:, b]).run(levels, name)
        np.testing.assert_allclose(both.squared_error[:, b], norms.squared(alone.error)[:, b], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", ["ddim", "heun", "unipc"])
def test_equal_jacobians_give_the_shared_surrogate(name):
    """With secants: what they explain is answered as before, and what they leave by the samples' Jacobians."""
    stats = fs.measure(exact_denoiser(mixture(d=16), 0.01, 20.0), (16,), levels=24, samples=3, progress=False)
    shared = Surrogate.of(stats)
    alike = SampleSurrogate(shared, np.stack([shared.jacobian] * stats.samples, axis=1), 16)
    levels = np.append(stats.s.numpy(), 0.0)[None, [0, 4, 9, 13, 18, -1]]
    expected = shared.norms.squared(shared.run(levels, name).error)
    np.testing.assert_allclose(alike.run(levels, get_solver(name)).squared_error, expected, rtol=1e-4)  # float32 gram


def test_coordinates_have_the_products_of_the_known_vectors():
    stats = fs.measure(exact_denoiser(mixture()), (4,), levels=12, samples=3, progress=False)
    found = SampleSurrogate.of(stats)
    assert found.roots.shape[2] == 4
    gram = np.einsum("vbr,wbr->bvw", found.roots, found.roots)
    np.testing.assert_allclose(gram, found.shared.norms.gram, rtol=0, atol=1e-6 * found.shared.norms.gram.max())
    increments = np.random.default_rng(0).standard_normal((5, 11))
    products = np.einsum("cv,bvw,cw->cb", increments, stats.gram.numpy(), increments)
    np.testing.assert_allclose((found.coordinates(increments) ** 2).sum(2), products, rtol=1e-5)


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
    surrogate, levels = of_model(model), schedule(model, *INNER)[None]
    found = surrogate.run(levels, get_solver(name))
    factors = found.end[0, 0, surrogate.roots.shape[2] :]
    for wrong in range(1, len(factors) + 1):
        made = model.surrogate.run(levels, name, OneWrongAnswer(model.surrogate.vectors, wrong))
        np.testing.assert_allclose(factors[wrong - 1], made.error[0, -1], rtol=1e-10, atol=1e-14)


def test_the_variance_by_its_double_sum():
    model = LinearModel("ve")
    surrogate, levels = of_model(model), schedule(model, *INNER)[None]
    found, plain = surrogate.run(levels, get_solver("unipc")), model.surrogate.run(levels, "unipc")
    lam, factors = model.surrogate.position(levels[0, 1:-1]), found.end[0, 0, surrogate.roots.shape[2] :]
    apart = np.abs(lam[:, None] - lam)
    errors = factors * np.interp(lam, model.surrogate.lam, surrogate.answer_errors)
    deviations = plain.deviations[1:, 0]  # without secants all of them is unexplained
    products = deviations @ model.surrogate.norms.gram[0] @ deviations.T
    expected = errors @ (products * np.exp(-apart / answer_errors.CORRELATION_LENGTH)) @ errors
    between = factors * np.interp(lam, model.surrogate.lam, surrogate.path_errors[:, 0])
    assert between.any()
    expected += between @ np.exp(-apart / model.surrogate.spacing) @ between
    np.testing.assert_allclose(found.variance[0, 0], expected, rtol=1e-8)


def test_one_step_has_no_variance():
    model = LinearModel("ve")
    assert not of_model(model).run(schedule(model)[None], get_solver("ddim")).variance.any()
