from dataclasses import dataclass

import numpy as np
import pytest

from fastsched.costs.norms import Norms
from fastsched.costs.prediction import squared_errors
from fastsched.costs.surrogate import Outcome
from fastsched.fitting.gauss_newton import lowered, quadratic
from fastsched.metrics import power_mean


@dataclass(frozen=True)
class Linear:
    """Errors ``e + J x`` over orthonormal vectors; deviations ``d + K x`` at one evaluation."""

    e: np.ndarray
    jacobian: np.ndarray  # [P, V]
    d: np.ndarray
    change: np.ndarray  # [P, V]
    norms: Norms
    penalty: float = 0.7

    @classmethod
    def drawn(cls, parameters, vectors, samples, deviations=1.0):
        rng = np.random.default_rng(5)
        roots = rng.standard_normal((samples, vectors, vectors))
        norms = Norms(roots @ roots.transpose(0, 2, 1), rng.uniform(0.5, 2.0, samples))
        draw = rng.standard_normal
        d, change = deviations * draw(vectors), deviations * draw((parameters, vectors))
        return cls(draw(vectors), draw((parameters, vectors)), d, change, norms)

    def outcome(self, x):
        return Outcome(self.e + x @ self.jacobian, (self.d + x @ self.change)[:, None])

    def squared_errors(self, outcome):
        return squared_errors(self.norms, outcome, self.penalty)

    def predicted(self, x):
        return power_mean(self.squared_errors(self.outcome(x)))


def test_one_sample_is_a_least_squares_problem():
    model = Linear.drawn(parameters=3, vectors=6, samples=1, deviations=0.0)
    bound = np.full(3, np.inf)
    x = lowered(model, np.zeros(3), -bound, bound)
    root = np.linalg.cholesky(model.norms.gram[0])
    exact, *_ = np.linalg.lstsq((model.jacobian @ root).T, -model.e @ root, rcond=None)
    np.testing.assert_allclose(x, exact, atol=0.05)  # the last steps gain less than a thousandth
    assert model.predicted(x[None])[0] <= 1.002 * model.predicted(exact[None])[0]


def test_the_gradient_is_that_of_the_logarithm_of_the_power_mean():
    model = Linear.drawn(parameters=4, vectors=7, samples=5)
    x = np.array([0.3, -0.2, 0.5, 0.1])
    gradient, hessian = quadratic(model, x, np.arange(4))
    moved = 1e-5 * np.eye(4)
    numeric = (np.log(model.predicted(x + moved)) - np.log(model.predicted(x - moved))) / 2e-5
    np.testing.assert_allclose(2 * gradient, numeric, rtol=1e-4)  # central differences of 1e-5
    assert (np.linalg.eigvalsh(hessian) > 0).all()


@pytest.mark.parametrize("samples", [1, 6])
def test_bounds_hold_and_the_error_never_rises(samples):
    model = Linear.drawn(parameters=4, vectors=7, samples=samples)
    start, low, high = np.zeros(4), np.full(4, -0.1), np.full(4, 0.1)
    low[2] = high[2] = 0.0
    x = lowered(model, start, low, high)
    assert (low <= x).all()
    assert (x <= high).all()
    assert x[2] == 0.0
    error = model.predicted(x[None])[0]
    assert error < model.predicted(start[None])[0]
    again = lowered(model, x, low, high)
    assert model.predicted(again[None])[0] <= error * (1 + 1e-12)


def test_nothing_finite_to_solve_leaves_the_start():
    model = Linear.drawn(parameters=2, vectors=3, samples=2)
    model.jacobian[0, 0] = np.nan
    x = lowered(model, np.zeros(2), np.full(2, -1.0), np.full(2, 1.0))
    assert (x == 0).all()
