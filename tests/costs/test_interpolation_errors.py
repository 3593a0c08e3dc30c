import numpy as np
import pytest
import scipy.interpolate

from fastsched.costs.interpolation_errors import interpolation_errors
from fastsched.costs.norms import Norms

LAM = np.linspace(-3.0, 4.0, 29)


def errors(answers, extra=0):
    """Of ``answers`` [N, d] of one sample, with vectors after the increments that are not to matter."""
    e = np.diff(answers, axis=0)
    e = np.concatenate([e, np.ones((extra, e.shape[1]))])
    return interpolation_errors(LAM, Norms.of_increments((e @ e.T)[None], len(LAM) - 1))[:, 0]


def test_a_cubic_is_interpolated_without_error():
    answers = np.stack([LAM**3 - LAM, 2.0 + LAM**2], axis=1)
    assert errors(answers).max() < 1e-6 * np.abs(answers).max()  # the root of float64's rounding of squares


@pytest.mark.parametrize("extra", [0, 3])
def test_between_the_levels_of_a_smooth_denoiser(extra):
    """Four times what a cubic spline is off by: ``h^4 / 96`` of the fourth derivative against ``h^4 / 384``."""
    answer = lambda lam: np.stack([np.tanh(lam), np.sin(1.5 * lam)], axis=1)
    spline = scipy.interpolate.CubicSpline(LAM, answer(LAM), bc_type="natural")
    between = 0.5 * (LAM[:-1] + LAM[1:])
    off = np.linalg.norm(spline(between) - answer(between), axis=1)[8:-8]
    found = errors(answer(LAM), extra)
    ratio = np.mean(0.5 * (found[1:] + found[:-1])[8:-8]) / np.mean(off)
    assert ratio == pytest.approx(4.0, rel=0.1)


def test_independent_outputs_at_each_level():
    """Of independent answers a cubic is off by ``sqrt(1 + |w|^2)``, as far at any spacing; ``w = (-1, 4, 4, -1)/6``."""
    generator = np.random.default_rng(0)
    found = errors(generator.standard_normal((len(LAM), 400))) / 20.0
    assert float(np.median(found)) == pytest.approx(np.sqrt(1 + 34 / 36), rel=0.1)


def test_few_levels():
    norms = Norms.of_increments(np.eye(3)[None], 3)
    np.testing.assert_array_equal(interpolation_errors(LAM[:4], norms), np.zeros((4, 1)))
    norms = Norms.of_increments(np.eye(5)[None], 5)  # one spacing tells no order: the error at twice the spacing
    assert (interpolation_errors(LAM[:6], norms) > 0).all()
