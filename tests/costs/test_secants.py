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
    return Secants(np.arange(float(levels)), deviations, residuals, np.eye(vectors))


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
    answer, explained = Secants.none(3).answer(0, Secants.none(3).at(np.array([0.5])), np.ones((1, 3)))
    assert not answer.any()
    assert not explained.any()


def test_norms_by_their_definition():
    generator = np.random.default_rng(0)
    e = generator.standard_normal((3, 4, 7))
    norms = Norms.of_increments(e @ e.transpose(0, 2, 1), 2)
    np.testing.assert_allclose(norms.size, (e[:, :2] ** 2).sum((1, 2)), rtol=1e-12)
    v = generator.standard_normal((5, 4))
    np.testing.assert_allclose(norms.squared(v), ((v @ e) ** 2).sum(2).T, rtol=1e-12)
    several = generator.standard_normal((5, 3, 4))
    expected = (np.einsum("ckv,bvd->bckd", several, e) ** 2).sum((2, 3)) / norms.size[:, None]
    np.testing.assert_allclose(norms.mean_squared(several), expected.mean(0), rtol=1e-12)
