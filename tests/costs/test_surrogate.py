import itertools

import numpy as np
import pytest
import scipy.interpolate
import torch
from models import exact_denoiser, exact_denoisers, mixture

import fastsched as fs
from fastsched.costs.prediction import squared_errors
from fastsched.costs.surrogate import Outcome, Surrogate, jacobian_shares, natural_spline, quadratic_forms, typical
from fastsched.denoisers.noise import FlowMatching, VarianceExploding, VariancePreserving
from fastsched.measurement.deviated_paths import PURE_NOISE_GAP
from fastsched.sampling.solvers import SOLVERS

LEVELS = {
    "ve": (VarianceExploding(0.05, 20.0), np.geomspace(20.0, 0.05, 9)),
    "vp": (VariancePreserving([0.99, 0.5, 0.01]), np.geomspace(9.9, 0.101, 7)),
    "flow": (FlowMatching(0.05), np.array([np.inf, *np.geomspace(100.0, 0.06, 9)])),
    "vp-zero-terminal": (VariancePreserving([0.99, 0.5, 0.01, 0.0]), np.array([np.inf, *np.geomspace(9.9, 0.101, 7)])),
}
#: Schedules off the grid, for levels from `LEVELS`.
INNER = [7.3, 2.9, 1.4, 0.8, 0.31]


class LinearModel:
    """A denoiser as the surrogate has it, in 3 dimensions, otherwise: splines are SciPy's, integrals Gauss's."""

    def __init__(self, kind, seed=0):
        self.process, self.s = LEVELS[kind]
        generator = np.random.default_rng(seed)
        self.denoised = generator.standard_normal((len(self.s), 3)).cumsum(0)
        self.shares = generator.uniform(0.0, 1.0, len(self.s))
        with np.errstate(divide="ignore"):
            self.lam = -np.log(self.s)
        self.pure = bool(np.isinf(self.s[0]))
        if self.pure:
            self.lam[0] = self.lam[1] - PURE_NOISE_GAP
        self.spline = scipy.interpolate.CubicSpline(self.lam, self.denoised, bc_type="natural")
        self.start = generator.standard_normal(3)
        self.visited = []

    @property
    def surrogate(self):
        return Surrogate(self.process, self.s, self.shares, 0.0)

    @property
    def increments(self):
        return np.diff(self.denoised, axis=0)

    def position(self, s):
        return float(np.clip(-np.log(s) if np.isfinite(s) else -np.inf, self.lam[0], self.lam[-1]))

    def state(self, s):
        """``y`` on the path: the integral of ``D drho``, ``drho = e^lam dlam``, from the first level."""
        if np.isinf(s):
            return self.start
        if self.pure and s >= self.s[1]:  # one trapezoid in rho from pure noise
            return self.start + (self.denoised[0] + self.spline(self.position(s))) / (2 * s)
        y = self.state(self.s[1]) if self.pure else self.start
        points, weights = np.polynomial.legendre.leggauss(12)  # exact to rounding for cubics times e^lam
        edges = [lam for lam in self.lam[int(self.pure) :] if lam < -np.log(s)] + [-np.log(s)]
        for low, high in itertools.pairwise(edges):
            x = (low + high) / 2 + (high - low) / 2 * points
            y = y + (high - low) / 2 * (weights * np.exp(x)) @ self.spline(x)
        return y

    def denoise(self, y, s):
        away = s * (y - self.state(s)) if np.isfinite(s) else 0.0 * y
        self.visited.append((s, away))
        share = np.interp(self.position(s), self.lam, self.shares)
        return self.spline(self.position(s)) + share * away

    def denoiser(self):
        """As a network of its process."""

        def x0(x, condition):
            s = float(condition[0])
            if self.process.kind == "vp":  # the condition is a timestep, linear in log s; the last may be pure noise
                abar = np.array(self.process.alphas_cumprod)
                finite = np.log((1 - abar[abar > 0]) / abar[abar > 0]) / 2
                s = float(np.exp(np.interp(s, range(len(finite)), finite))) if s < len(abar) - 1 else np.inf
            scale = s if self.process.kind == "ve" else 1 / np.sqrt(1 + s**-2.0)
            return torch.from_numpy(self.denoise(x[0].numpy() / scale, s))[None]

        def velocity(x, t):
            t = float(t[0])
            s = t / (1 - t) if t < 1 else np.inf
            return (x - torch.from_numpy(self.denoise(x[0].numpy() / t, s))[None]) / t

        if self.process.kind == "flow":
            return fs.Denoiser(velocity, self.process, "velocity")
        return fs.Denoiser(x0, self.process, "x0")


def schedule(model, *inner):
    return np.array([model.s[0], *inner, 0.0])


def test_natural_spline_is_scipys():
    generator = np.random.default_rng(0)
    x, values = generator.uniform(0.1, 2.0, 9).cumsum(), generator.standard_normal((9, 4))
    expected = scipy.interpolate.CubicSpline(x, values, bc_type="natural").c[::-1]  # highest power first there
    np.testing.assert_allclose(natural_spline(x, values), expected, rtol=1e-11, atol=1e-11)


def test_natural_spline_of_three_points():
    x, values = np.array([0.0, 1.0, 3.0]), np.array([[0.0], [1.0], [0.0]])
    expected = scipy.interpolate.CubicSpline(x, values, bc_type="natural").c[::-1]
    np.testing.assert_allclose(natural_spline(x, values), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", LEVELS)
def test_path_against_quadrature(kind):
    model = LinearModel(kind)
    top = 30 * model.s[1] if model.pure else model.s[0]
    s = np.array([*np.geomspace(top, model.s[-1], 23)[:-1], model.s[2], model.s[-1]])
    state, denoised = model.surrogate.path(s)
    first = 0.0 if model.pure else 1 / model.s[0]
    for n, level in enumerate(s):
        constant = (1 / level - first) * model.denoised[0]
        expected = model.state(level) - model.start - constant
        np.testing.assert_allclose(state[n] @ model.increments, expected, rtol=1e-10, atol=1e-11)
        expected = model.spline(model.position(level)) - model.denoised[0]
        np.testing.assert_allclose(denoised[n] @ model.increments, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("kind", ["ve", "flow", "vp-zero-terminal"])
def test_run_is_the_sampler_on_that_very_denoiser(kind, name):
    model = LinearModel(kind)
    levels = schedule(model, *INNER)
    sigmas = model.process.sampler_sigma(torch.from_numpy(levels))
    end = fs.sample(model.denoiser(), sigmas, name, torch.from_numpy(model.start)[None])[0].numpy()
    outcome = model.surrogate.run(levels[None], name)
    # flow times keep 1 + s units of rounding of a level
    np.testing.assert_allclose(outcome.error[0] @ model.increments, end - model.denoised[-1], rtol=0, atol=1e-8)
    # the first evaluation is on the path; each deviation is carried to the end by the shares, level by level
    keep = np.append(model.s[1:], 0.0) / model.s
    amplitudes = [np.prod((keep + (1 - keep) * model.shares)[k:]) for k in range(len(model.s))]
    assert outcome.deviations.shape[1] == len(model.visited) - 1
    for found, (s, away) in zip(outcome.deviations[0], model.visited[1:], strict=True):
        carried = np.interp(model.position(s), model.lam, amplitudes) * away
        np.testing.assert_allclose(found @ model.increments, carried, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", SOLVERS)
def test_schedules_together_are_those_one_by_one(name):
    model = LinearModel("flow")
    levels = np.stack([schedule(model, *np.array(INNER) * factor) for factor in (0.9, 1.0, 1.7)])
    together = model.surrogate.run(levels, name)
    for n in range(3):
        alone = model.surrogate.run(levels[n : n + 1], name)
        np.testing.assert_allclose(together.error[n], alone.error[0], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(together.deviations[n], alone.deviations[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", LEVELS)
def test_one_step_ends_where_the_path_begins(kind):
    """``z = D_0``: short of the path's end by all increments, and no state is off the path."""
    model = LinearModel(kind)
    outcome = model.surrogate.run(schedule(model)[None], "dpmpp_2m")
    np.testing.assert_allclose(outcome.error, -np.ones((1, len(model.s) - 1)), atol=1e-15)
    assert not outcome.deviations.any()


@pytest.mark.parametrize("name", SOLVERS)
def test_gaussian_data_are_sampled_as_by_the_sampler(name):
    """Closed forms throughout: levels dense enough that the spline of the path is the path."""
    c, top = 0.5, 20.0
    s = np.geomspace(top, 0.02, 301)
    path = np.sqrt((c**2 + s**2) / (c**2 + top**2)) * top  # z of noise 1
    denoised = c**2 / (c**2 + s**2) * path
    surrogate = Surrogate(VarianceExploding(0.02, top), s, c**2 / (c**2 + s**2), 0.0)
    levels = np.array([top, *INNER, 0.0])
    denoiser = exact_denoiser(fs.oracles.Gaussian(c, (1,)), 0.02, top)
    end = float(fs.sample(denoiser, torch.from_numpy(levels), name, torch.ones(1, 1, dtype=torch.float64)))
    found = float(surrogate.run(levels[None], name).error[0] @ np.diff(denoised))
    # h = 0.023: shares are read off straight lines, wrong by h^2 / 8 of their second derivative, at most 0.4
    assert found == pytest.approx(end - denoised[-1], abs=10 * 0.4 * 0.023**2 / 8 * c)


@pytest.mark.parametrize(("sensitivity", "bound"), [("jvp", 1e-5), ("finite-difference", 1e-4)])
def test_shares_of_gaussian_data(sensitivity, bound):
    """``J = c^2 / (c^2 + s^2)`` times the identity, to float32's rounding (over the 1% of a finite difference)."""
    c = 0.5
    denoiser = exact_denoiser(fs.oracles.Gaussian(c, (8,)), 0.01, 20.0)
    stats = fs.measure(denoiser, (8,), levels=32, samples=4, sensitivity=sensitivity, progress=False)
    shares, spread = jacobian_shares(stats)
    exact = c**2 / (c**2 + stats.s[1:].numpy() ** 2)
    around = [exact[max(k - 1, 0) : k + 2] for k in range(31)]  # neighbours, each of the same weight
    np.testing.assert_allclose(shares[1:], [pooled.mean() for pooled in around], rtol=0, atol=bound)
    assert spread == pytest.approx(float(np.sqrt(np.mean([pooled.var() for pooled in around]))), abs=bound)


def test_shares_by_least_squares():
    """Its definition written out, for a Jacobian that is no multiple of the identity."""
    stats = fs.measure(exact_denoisers(mixture())["x0"], (4,), levels=12, samples=5, sensitivity="jvp", progress=False)
    shares, spread = jacobian_shares(stats)
    s, cross = np.append(stats.s.numpy(), 0.0), stats.cross.numpy()

    def rows(k):
        """Both sides of ``<J w, e_q> ~ j x_q`` at level k, each sample's over the norm of its ``x``."""
        keep, window = s[k + 1] / s[k], range(max(0, k - 8), k)
        x = np.array([[cross[b, k, q] for q in window] for b in range(5)])
        before = np.array([[cross[b, k - 1, q] for q in window] for b in range(5)])
        norm = np.linalg.norm(x, axis=1, keepdims=True)
        return (x / norm).ravel(), ((before - keep * x) / (1 - keep) / norm).ravel()

    left = []
    for k in range(1, 12):
        around = [rows(m) for m in range(max(k - 1, 1), min(k + 1, 11) + 1)]
        x, y = (np.concatenate(side) for side in zip(*around, strict=True))
        found = float(np.clip(np.linalg.lstsq(x[:, None], y, rcond=None)[0][0], 0.0, 1.0))
        assert shares[k] == pytest.approx(found, abs=1e-9)
        left.append(float(((y - found * x) ** 2).sum() / (x**2).sum()))
    assert spread == pytest.approx(float(np.sqrt(np.mean(left))), rel=1e-6)
    assert spread > 0.05  # no multiple of the identity


def test_shares_without_sensitivity():
    stats = fs.measure(
        exact_denoisers(mixture())["velocity"], (4,), levels=8, samples=2, sensitivity=None, progress=False
    )
    shares, spread = jacobian_shares(stats)
    c = stats.data_std
    np.testing.assert_allclose(shares[1:], c**2 / (c**2 + stats.s[1:].numpy() ** 2), rtol=1e-12)
    assert (shares[0], spread) == (0.0, 1.0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("sensitivity", ["finite-difference", None])
def test_constant_denoiser_shares_nothing(sensitivity):
    denoiser = fs.Denoiser.from_denoiser(lambda z, s: torch.zeros_like(z), 0.01, 20.0)
    stats = fs.measure(denoiser, (3,), levels=8, samples=2, sensitivity=sensitivity, progress=False)
    assert not jacobian_shares(stats)[0].any()
    assert fs.optimal_schedule(stats, 4, weight=None if sensitivity is None else "geometric").predicted_error == 0.0


def test_quadratic_forms_by_einsum():
    generator = np.random.default_rng(0)
    e, vectors = generator.standard_normal((3, 5, 9)), generator.standard_normal((2, 4, 5))
    gram = e @ e.transpose(0, 2, 1)
    expected = np.einsum("cvp,bpq,cvq->cb", vectors, gram, vectors)
    np.testing.assert_allclose(quadratic_forms(gram, vectors), expected, rtol=1e-12)
    outcome = Outcome(vectors[:, 0], vectors[:, 1:])
    sizes = np.square(np.einsum("cvp,bpd->cbvd", vectors, e)).sum(3)
    expected = sizes[:, :, 0] + 0.3**2 * sizes[:, :, 1:].sum(2)
    np.testing.assert_allclose(squared_errors(gram, outcome, 0.3), expected, rtol=1e-12)
    assert typical(np.array([[1.0, 4.0], [9.0, 9.0]])) == pytest.approx([2.0, 9.0])
    assert float(quadratic_forms(-gram, vectors).max()) == 0.0
