import numpy as np
import pytest

from fastsched.costs import secants
from fastsched.costs.norms import Norms
from fastsched.costs.secants import Secants


def planted(levels=3, paths=2, vectors=6, seed=0):
    """Secants over vectors that are orthonormal: deviations in the first four, residuals in the last two."""
    generator = np.random.default_rng(seed)
    deviations, residuals = np.zeros((levels, paths, vectors)), np.zeros((levels, paths, vectors))
    deviations[..., :4] = generator.standard_normal((levels, paths, 4))
    residuals[..., 4:] = generator.standard_normal((levels, paths, 2))
    return Secants(np.arange(float(levels)), deviations, residuals, Norms(np.eye(vectors)[None], np.ones(1)))


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 1.75])
def test_answers_by_least_squares_between_levels(t):
    """Deviations and residuals are interpolated linearly in lambda; ``c`` minimises the damped distance."""
    known = planted()
    away = np.random.default_rng(1).standard_normal((5, 6))
    below, part = int(min(t, 1.0)), t - int(min(t, 1.0))
    a = (1 - part) * known.deviations[below] + part * known.deviations[below + 1]
    r = (1 - part) * known.residuals[below] + part * known.residuals[below + 1]
    system = a @ a.T + secants.GRID_DAMPING * np.trace(a @ a.T) / 2 * np.eye(2)
    c = np.linalg.solve(system, a @ away.T).T
    answer, explained = known.answer(0, known.at(np.full(5, t)), away)
    np.testing.assert_allclose(answer, c @ r, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(explained, c @ a, rtol=1e-10, atol=1e-12)


def test_beyond_the_levels_the_nearest_counts():
    known, away = planted(), np.ones((1, 6))
    for outside, nearest in ((-1.0, 0.0), (9.0, 2.0)):
        found, expected = (known.answer(0, known.at(np.array([lam])), away) for lam in (outside, nearest))
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_without_secants_nothing_is_answered():
    none = Secants.none(Norms(np.eye(3)[None], np.ones(1)))
    answer, explained = none.answer(0, none.at(np.array([0.5])), np.ones((1, 3)))
    assert not answer.any()
    assert not explained.any()


def test_norms_by_their_definition():
    generator = np.random.default_rng(0)
    e = generator.standard_normal((3, 4, 7))
    norms = Norms.of_increments(e @ e.transpose(0, 2, 1), 2)
    np.testing.assert_allclose(norms.size, (e[:, :2] ** 2).sum((1, 2)), rtol=1e-12)
    v = generator.standard_normal((5, 4))
    np.testing.assert_allclose(norms.squared(v), ((v @ e) ** 2).sum(2).T, rtol=1e-12)
    own = generator.standard_normal((5, 3, 4))
    np.testing.assert_allclose(norms.squared(own), (np.einsum("cbv,bvd->cbd", own, e) ** 2).sum(2), rtol=1e-12)
    relative = np.einsum("bvd,bwd,cbw,b->cv", e, e, own, 1 / norms.size) / 3
    np.testing.assert_allclose(norms.products(own), relative, rtol=1e-12)
    np.testing.assert_allclose(norms.products(np.repeat(v[:, None], 3, axis=1)), norms.products(v), rtol=1e-12)
    several = generator.standard_normal((5, 3, 4))
    expected = (np.einsum("ckv,bvd->bckd", several, e) ** 2).sum((2, 3)) / norms.size[:, None]
    np.testing.assert_allclose(norms.mean_squared(several), expected.mean(0), rtol=1e-12)


def test_all_samples_have_the_same_coefficients():
    """Those of least squares over the vectors of all samples, one below the other."""
    generator = np.random.default_rng(2)
    e = generator.standard_normal((3, 6, 8))
    norms = Norms(e @ e.transpose(0, 2, 1), np.array([1.0, 2.0, 5.0]))
    a, r, away = (generator.standard_normal(shape) for shape in ((2, 6), (2, 6), (1, 3, 6)))
    known = Secants(np.arange(2.0), np.stack([a, a]), np.stack([r, r]), norms)
    scaled = e / np.sqrt(3 * norms.size)[:, None, None]
    columns = np.concatenate([a @ each for each in scaled], axis=1)
    target = np.concatenate([own @ each for own, each in zip(away[0], scaled, strict=True)])
    square = columns @ columns.T
    c = np.linalg.solve(square + secants.GRID_DAMPING * np.trace(square) / 2 * np.eye(2), columns @ target)
    answer, explained = known.answer(0, known.at(np.array([0.0])), away)
    np.testing.assert_allclose(answer[0], c @ r, rtol=1e-10)
    np.testing.assert_allclose(explained[0], c @ a, rtol=1e-10)
