import itertools

import numpy as np
import pytest
import scipy.interpolate
import torch
from models import exact_denoiser, exact_denoisers, mixture

import fastsched as fs
from fastsched.costs.norms import Norms
from fastsched.costs.prediction import squared_errors
from fastsched.costs.secants import Secants
from fastsched.costs.surrogate import Outcome, Surrogate
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
        e = self.increments
        norms = Norms.of_increments((e @ e.T)[None], len(e))
        return Surrogate(self.process, self.s, norms, self.shares, Secants.none(len(e)))

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
def test_run_is_the_sampler_on_a_denoiser_that_the_surrogate_fits_exactly(kind, name):
    model = LinearModel(kind)
    levels = schedule(model, *INNER)
    sigmas = model.process.sampler_sigma(torch.from_numpy(levels))
    end = fs.sample(model.denoiser(), sigmas, name, torch.from_numpy(model.start)[None])[0].numpy()
    outcome = model.surrogate.run(levels[None], name).outcome
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
    together = model.surrogate.run(levels, name).outcome
    for n in range(3):
        alone = model.surrogate.run(levels[n : n + 1], name).outcome
        np.testing.assert_allclose(together.error[n], alone.error[0], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(together.deviations[n], alone.deviations[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", LEVELS)
def test_one_step_ends_where_the_path_begins(kind):
    """``z = D_0``: short of the path's end by all increments, and no state is off the path."""
    model = LinearModel(kind)
    outcome = model.surrogate.run(schedule(model)[None], "dpmpp_2m").outcome
    np.testing.assert_allclose(outcome.error, -np.ones((1, len(model.s) - 1)), atol=1e-15)
    assert not outcome.deviations.any()


@pytest.mark.parametrize("name", SOLVERS)
def test_gaussian_data_are_sampled_as_by_the_sampler(name):
    """Closed forms throughout: levels dense enough that the spline of the path is the path."""
    c, top = 0.5, 20.0
    s = np.geomspace(top, 0.02, 301)
    path = np.sqrt((c**2 + s**2) / (c**2 + top**2)) * top  # z of noise 1
    denoised = c**2 / (c**2 + s**2) * path
    e = np.diff(denoised)[:, None]
    norms = Norms.of_increments((e @ e.T)[None], len(e))
    surrogate = Surrogate(VarianceExploding(0.02, top), s, norms, c**2 / (c**2 + s**2), Secants.none(len(e)))
    levels = np.array([top, *INNER, 0.0])
    denoiser = exact_denoiser(fs.oracles.Gaussian(c, (1,)), 0.02, top)
    end = float(fs.sample(denoiser, torch.from_numpy(levels), name, torch.ones(1, 1, dtype=torch.float64)))
    found = float(surrogate.run(levels[None], name).outcome.error[0] @ np.diff(denoised))
    # h = 0.023: shares are read off straight lines, wrong by h^2 / 8 of their second derivative, at most 0.4
    assert found == pytest.approx(end - denoised[-1], abs=10 * 0.4 * 0.023**2 / 8 * c)


def test_scalar_jacobian_and_amplitude_of_gaussian_data():
    """``J = c^2 / (c^2 + s^2)`` times the identity; a deviation is at the end ``c / sqrt(c^2 + s^2)`` of its size."""
    c = 0.5
    denoiser = exact_denoiser(fs.oracles.Gaussian(c, (8,)), 0.01, 20.0)
    stats = fs.measure(denoiser, (8,), levels=64, samples=4, progress=False)
    surrogate, s = Surrogate.of(stats), stats.s.numpy()
    exact = c**2 / (c**2 + s**2)
    asked = list(range(2, 64, 2))
    found = surrogate.scalar_jacobian(s)
    np.testing.assert_allclose(found[asked], exact[asked], rtol=1e-3, atol=1e-4)  # float32 states
    h = np.log(20.0 / 0.01) / 63  # straight lines over two cells of a curve that bends by at most 0.4
    np.testing.assert_allclose(found[3:62], exact[3:62], rtol=0, atol=0.4 * (2 * h) ** 2 / 8 + 1e-3)
    # the product over levels is Euler's, wrong by the order of h
    np.testing.assert_allclose(surrogate.amplitude(s), c / np.sqrt(c**2 + s**2), rtol=h)


def test_without_responses_errors_are_passed_on_as_for_gaussian_data():
    denoiser = exact_denoisers(mixture())["velocity"]
    stats = fs.measure(denoiser, (4,), levels=8, samples=2, responses=False, progress=False)
    c = stats.data_std
    found = Surrogate.of(stats)
    np.testing.assert_allclose(found.jacobian[1:], c**2 / (c**2 + stats.s[1:].numpy() ** 2), rtol=1e-12)
    assert found.secants.paths == 0


def test_secants_reproduce_the_measured_responses(measured_mixture):
    """The surrogate's own deviated paths: what they were answered at the asked levels is what they were told."""
    stats, surrogate = measured_mixture, Surrogate.of(measured_mixture)
    secants = surrogate.secants
    for g in range(1, len(secants.lam)):
        away = secants.deviations[g]
        answer, explained = secants.answer(0, secants.at(np.repeat(secants.lam[g], len(away))), away)
        size = float(np.sqrt(np.einsum("mv,vu,mu->m", away, secants.metric, away).max()))
        for found, expected in ((answer, secants.residuals[g]), (explained, away)):
            left = found - expected
            norm = np.sqrt(np.einsum("mv,vu,mu->m", left, secants.metric, left).max())
            # damping 1e-3 of the mean square: what it leaves of a direction that is small beside the other, at most all
            assert norm < 0.1 * size
    assert surrogate.vectors == stats.levels - 1 + stats.response_gram.shape[1]


@pytest.mark.parametrize("responses", [True, False])
def test_constant_denoiser_has_no_error(responses):
    denoiser = fs.Denoiser.from_denoiser(lambda z, s: torch.zeros_like(z), 0.01, 20.0)
    stats = fs.measure(denoiser, (3,), levels=8, samples=2, responses=responses, checks=False, progress=False)
    assert not Surrogate.of(stats).jacobian.any()
    assert fs.optimal_schedule(stats, 4).predicted_error == pytest.approx(0.0, abs=1e-200)


def test_squared_errors_by_einsum():
    generator = np.random.default_rng(0)
    e, vectors = generator.standard_normal((3, 5, 9)), generator.standard_normal((2, 4, 5))
    norms = Norms(e @ e.transpose(0, 2, 1), np.array([1.0, 2.0, 4.0]))
    expected = np.einsum("cp,bpq,cq->cb", vectors[:, 0], norms.gram, vectors[:, 0])
    np.testing.assert_allclose(norms.squared(vectors[:, 0]), expected, rtol=1e-12)
    outcome = Outcome(vectors[:, 0], vectors[:, 1:])
    sizes = np.einsum("cvp,bpq,cvq->cb", vectors[:, 1:], norms.gram, vectors[:, 1:])
    relative = (sizes / norms.size).mean(1)
    np.testing.assert_allclose(
        squared_errors(norms, outcome, 0.3), expected + 0.3**2 * relative[:, None] * norms.size, rtol=1e-12
    )
    assert float(Norms(-norms.gram, norms.size).squared(vectors[:, 0]).max()) == 0.0


@pytest.fixture(scope="module")
def measured_mixture():
    return fs.measure(exact_denoisers(mixture())["x0"], (4,), levels=16, samples=5, progress=False)
