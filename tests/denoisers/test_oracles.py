import itertools
import math

import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import torch

from fastsched.denoisers.oracles import Empirical, Gaussian, GaussianMixture, empirical

EPS32 = torch.finfo(torch.float32).eps
EPS64 = torch.finfo(torch.float64).eps
LEVELS = [0.002, 0.3, 80.0]


def _singular_mixture() -> GaussianMixture:
    line = torch.tensor([1.0, -1.0, 0.5])
    covariances = torch.stack([torch.outer(line, line), torch.eye(3) * 0.04])
    return GaussianMixture(torch.tensor([3.0, 1.0]), torch.tensor([[0.0, 0, 0], [1, 1, 1]]), covariances)


ORACLES = {
    "gaussian": Gaussian(0.5, (2, 3), torch.arange(6.0).reshape(2, 3) / 5),
    "mixture": GaussianMixture.random(4, 3, seed=0),
    "singular-mixture": _singular_mixture(),
    "empirical": Empirical(torch.randn(5, 2, 2, generator=torch.Generator().manual_seed(0))),
}
WITH_JACOBIAN = ["gaussian", "mixture", "singular-mixture"]


def _states(oracle, s, n=7, dtype=torch.float64):
    clean = oracle.sample(n, seed=1, dtype=torch.float64)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return (clean + s * noise).to(dtype)


@pytest.mark.parametrize("s", LEVELS)
@pytest.mark.parametrize("name", ORACLES)
def test_score_is_the_gradient_of_the_log_density(name, s):
    oracle, z = ORACLES[name], _states(ORACLES[name], s).requires_grad_()
    (gradient,) = torch.autograd.grad(oracle.log_density(z, s).sum(), z)
    # Rounding of z itself moves the score by eps |z| / s^2.
    atol = 100 * EPS64 * float(z.detach().abs().max()) / s**2
    torch.testing.assert_close(oracle.score(z, s), gradient, rtol=1e-12, atol=atol)


@pytest.mark.parametrize("s", LEVELS)
@pytest.mark.parametrize("name", ORACLES)
def test_denoiser_and_score_obey_tweedie(name, s):
    oracle, z = ORACLES[name], _states(ORACLES[name], s)
    difference = (oracle.denoise(z, s) - z) / s**2
    atol = 100 * EPS64 * float(z.abs().max()) / s**2
    torch.testing.assert_close(oracle.score(z, s), difference, rtol=1e-12, atol=atol)


@pytest.mark.parametrize("s", LEVELS)
@pytest.mark.parametrize("name", WITH_JACOBIAN)
def test_jacobian_is_the_derivative_of_the_denoiser(name, s):
    oracle, z = ORACLES[name], _states(ORACLES[name], s, n=3)
    d = z[0].numel()
    jacobian = oracle.jacobian(z, s)
    for row in range(len(z)):
        whole = torch.func.jacrev(lambda x: oracle.denoise(x, s))(z[row : row + 1])
        atol = 100 * d * EPS64 * float(z.abs().max()) ** 2 / s**2
        torch.testing.assert_close(jacobian[row], whole.reshape(d, d), rtol=1e-10, atol=min(atol, 1e-8))
    assert torch.linalg.eigvalsh(jacobian).min() > -1e-12


@pytest.mark.parametrize("name", WITH_JACOBIAN)
def test_forward_mode_agrees_with_the_jacobian(name):
    oracle, z = ORACLES[name], _states(ORACLES[name], 0.3)
    v = torch.randn(z.shape, generator=torch.Generator().manual_seed(3), dtype=z.dtype)
    _, product = torch.func.jvp(lambda x: oracle.denoise(x, 0.3), (z,), (v,))
    expected = torch.einsum("bij,bj->bi", oracle.jacobian(z, 0.3), v.flatten(1))
    torch.testing.assert_close(product.flatten(1), expected, rtol=1e-10, atol=1e-12)


def test_empirical_is_differentiable_in_forward_mode():
    oracle, z = ORACLES["empirical"], _states(ORACLES["empirical"], 0.3, n=1)
    v = torch.ones_like(z)
    _, product = torch.func.jvp(lambda x: oracle.denoise(x, 0.3), (z,), (v,))
    jacobian = torch.func.jacrev(lambda x: oracle.denoise(x, 0.3))(z).reshape(4, 4)
    torch.testing.assert_close(product.flatten(), jacobian @ v.flatten(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("s", LEVELS)
@pytest.mark.parametrize("name", ORACLES)
def test_float32_is_accurate_at_both_ends(name, s):
    oracle, z = ORACLES[name], _states(ORACLES[name], s, dtype=torch.float32)
    d = z[0].numel()
    # Each logit is a sum of about d terms of size up to about d; D moves by the logits' error times the data's size.
    tolerance = 4 * d**2 * EPS32
    for method, scale in (("denoise", 1.0), ("score", 1 / s)):
        exact = getattr(oracle, method)(z.double(), s)
        ours = getattr(oracle, method)(z, s).double()
        # Where data have no width along some direction, rounding of z itself moves the score by eps |z| / s^2.
        thin = method == "score" and name in ("empirical", "singular-mixture")
        rounding = EPS32 * float(z.abs().max()) / s**2 if thin else 0.0
        bound = tolerance * max(scale, float(exact.abs().max())) + 2 * rounding
        assert (ours - exact).abs().max() < bound


@pytest.mark.parametrize("name", ORACLES)
def test_one_level_a_sample(name):
    oracle, levels = ORACLES[name], torch.tensor([0.002, 0.3, 80.0], dtype=torch.float64)
    z = _states(oracle, 1.0, n=3)
    for method in ("denoise", "score", "log_density", *(["jacobian"] if name in WITH_JACOBIAN else [])):
        together = getattr(oracle, method)(z, levels)
        apart = torch.cat([getattr(oracle, method)(z[i : i + 1], float(levels[i])) for i in range(3)])
        torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-12 * float(apart.abs().max()))


@pytest.mark.parametrize("mean", [0.1, 1e39])
def test_the_mean_of_gaussian_samples_is_not_rounded_to_float32(mean):
    gaussian = Gaussian(1e-12, (2,), mean)
    found = gaussian.sample(3, seed=0, dtype=torch.float64)
    torch.testing.assert_close(found, torch.full_like(found, mean), rtol=0, atol=max(1e-11, 1e-15 * mean))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ORACLES)
def test_results_keep_the_dtype_of_the_state(name, dtype):
    oracle = ORACLES[name]
    z = _states(oracle, 0.3, dtype=dtype)
    ours = oracle.denoise(z, 0.3)
    assert ours.dtype == oracle.score(z, 0.3).dtype == oracle.log_density(z, 0.3).dtype == dtype
    # Half precision is float32 inside, so only the result is rounded.
    exact = oracle.denoise(z.float(), 0.3)
    torch.testing.assert_close(ours, exact.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("name", ORACLES)
def test_empty_batch(name):
    oracle = ORACLES[name]
    z = torch.zeros(0, *oracle.shape)
    assert oracle.denoise(z, 1.0).shape == z.shape
    assert oracle.score(z, torch.zeros(0)).shape == z.shape
    assert oracle.log_density(z, 1.0).shape == (0,)


@pytest.mark.parametrize("s", [0.2, 3.0])
def test_mixture_denoiser_by_quadrature(s):
    mixture = GaussianMixture.random(1, 3, seed=4)
    parts = [
        (float(w), float(m), math.sqrt(float(c)))
        for w, m, c in zip(mixture.weights, mixture.means[:, 0], mixture.covariances[:, 0, 0], strict=True)
    ]

    def joint(x, z):
        prior = sum(w * math.exp(-0.5 * ((x - m) / c) ** 2) / (c * math.sqrt(2 * math.pi)) for w, m, c in parts)
        return prior * math.exp(-0.5 * ((z - x) / s) ** 2) / (s * math.sqrt(2 * math.pi))

    for z in (-1.5, 0.1, 2.0):
        options = {"points": [m for _, m, _ in parts], "limit": 500, "epsabs": 1e-13}
        density = scipy.integrate.quad(lambda x, z=z: joint(x, z), -8, 8, **options)[0]
        first = scipy.integrate.quad(lambda x, z=z: x * joint(x, z), -8, 8, **options)[0]
        second = scipy.integrate.quad(lambda x, z=z: x * x * joint(x, z), -8, 8, **options)[0]
        state = torch.tensor([[z]], dtype=torch.float64)
        mean = first / density
        assert float(mixture.log_density(state, s)) == pytest.approx(math.log(density), abs=1e-8)
        assert float(mixture.denoise(state, s)) == pytest.approx(mean, abs=1e-8)
        covariance = second / density - mean**2
        assert float(mixture.jacobian(state, s)) == pytest.approx(covariance / s**2, abs=1e-7 / s**2)


def test_mixture_denoiser_by_sampling():
    mixture, s = GaussianMixture.random(3, 4, seed=5), 0.7
    z = _states(mixture, s, n=4)
    points = mixture.sample(100_000, seed=6, dtype=torch.float64)
    weights = torch.softmax(-torch.cdist(z, points).square() / (2 * s * s), 1)
    exact = mixture.denoise(z, s)
    # Self-normalised importance sampling; its standard error by the delta method.
    spread = (weights[..., None] * (points - exact[:, None])).square().sum(1).sqrt()
    assert ((weights @ points - exact).abs() < 5 * spread).all()
    # The same points as a data set are the same estimate.
    torch.testing.assert_close(Empirical(points).denoise(z, s), weights @ points, rtol=1e-9, atol=1e-9)


def test_one_component_is_a_gaussian():
    gaussian = Gaussian(0.5, (3,), torch.tensor([1.0, -2.0, 0.0]))
    mixture = GaussianMixture(torch.tensor([7.0]), gaussian.mean[None], 0.25 * torch.eye(3)[None])
    for s in LEVELS:
        z = _states(gaussian, s)
        for method in ("denoise", "score", "log_density", "jacobian"):
            ours, theirs = getattr(mixture, method)(z, s), getattr(gaussian, method)(z, s)
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_one_datum_is_a_point_mass():
    datum = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    oracle = Empirical(datum)
    for s in LEVELS:
        z = _states(oracle, s)
        torch.testing.assert_close(oracle.denoise(z, s), datum.expand_as(z))
        normal = torch.distributions.Normal(datum, s).log_prob(z).flatten(1).sum(1)
        torch.testing.assert_close(oracle.log_density(z, s), normal, rtol=1e-12, atol=1e-9)


def test_empirical_does_not_depend_on_its_chunks(monkeypatch):
    oracle, z = ORACLES["empirical"], _states(ORACLES["empirical"], 0.3)
    whole = oracle.denoise(z, 0.3)
    monkeypatch.setattr(empirical, "_CHUNK_ELEMENTS", 1)
    torch.testing.assert_close(oracle.denoise(z, 0.3), whole, rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", ["gaussian", "mixture", "singular-mixture"])
def test_samples_have_the_right_moments(name):
    oracle, n = ORACLES[name], 20_000
    x = oracle.sample(n, seed=8, dtype=torch.float64).flatten(1)
    if name == "gaussian":
        mean, covariance = oracle.mean.flatten().double(), 0.25 * torch.eye(6, dtype=torch.float64)
    else:
        mean = oracle.weights @ oracle.means
        second = oracle.covariances + oracle.means[:, :, None] * oracle.means[:, None, :]
        covariance = torch.einsum("m,mij->ij", oracle.weights, second) - torch.outer(mean, mean)
    products = (x - mean)[:, :, None] * (x - mean)[:, None, :]
    for sampled, expected in ((x, mean), (products, covariance)):
        error = sampled.std(0) / math.sqrt(n)
        assert ((sampled.mean(0) - expected).abs() < 5 * error + 1e-12).all()


def test_samples_repeat_with_their_seed():
    for oracle in ORACLES.values():
        assert oracle.sample(3, seed=0).dtype == torch.float32
        assert torch.equal(oracle.sample(3, seed=0), oracle.sample(3, seed=0))
        assert not torch.equal(oracle.sample(30, seed=0), oracle.sample(30, seed=1))
    drawn = ORACLES["empirical"].sample(50, seed=0)
    assert (drawn[:, None] == ORACLES["empirical"].data).flatten(2).all(2).any(1).all()


def test_flow_solves_the_probability_flow_ode():
    gaussian = Gaussian(0.5, (2,), 0.3)
    z = torch.tensor([[40.0, -3.0]], dtype=torch.float64)

    def slope(s, state):
        return -s * gaussian.score(torch.from_numpy(state)[None], s)[0].numpy()

    solved = scipy.integrate.solve_ivp(slope, (80.0, 0.002), z[0].numpy(), rtol=1e-10, atol=1e-12)
    ours = gaussian.flow(z, 80.0, 0.002)
    np.testing.assert_allclose(ours[0].numpy(), solved.y[:, -1], rtol=1e-7)
    assert torch.equal(gaussian.flow(z, 80.0, torch.tensor([80.0])), z)
    assert gaussian.flow(z, 80.0, 0.0).isfinite().all()


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_optimal_ddim_schedule_by_search(steps):
    gaussian, s_max = Gaussian(0.5, (1,)), 80.0
    ours = gaussian.optimal_ddim_schedule(steps, s_max)
    assert ours.shape == (steps + 1,)
    assert float(ours[0]) == pytest.approx(s_max, rel=1e-12)
    assert float(ours[-1]) == 0.0

    def final_error(log_interior):
        sigmas = [s_max, *np.exp(log_interior), 0.0]
        z = torch.ones(1, 1, dtype=torch.float64)
        exact = float(gaussian.flow(z, s_max, 0.0))
        for s, t in itertools.pairwise(sigmas):
            z = z + (t - s) * (z - gaussian.denoise(z, s)) / s
        return ((float(z) - exact) / exact) ** 2

    if steps == 1:
        return
    start = np.log(np.geomspace(20.0, 0.1, steps - 1))
    options = {"xatol": 1e-7, "fatol": 1e-18, "maxiter": 20_000, "maxfev": 20_000}
    found = scipy.optimize.minimize(final_error, start, method="Nelder-Mead", options=options)
    # Near a minimum a value known to 1e-16 fixes the place to about its square root.
    np.testing.assert_allclose(np.exp(found.x), ours[1:-1].numpy(), rtol=1e-5)


def _expectation(gaussian, s, integrand):
    """E over z ~ p_s of integrand(z), by quadrature; z is [n, 1]."""
    reach = 12 * math.hypot(gaussian.std, s)
    grid = torch.linspace(-reach, reach, 20_001, dtype=torch.float64)[:, None]
    values = torch.exp(gaussian.log_density(grid, s)) * integrand(grid)
    return float(scipy.integrate.simpson(values.detach().numpy(), x=grid[:, 0].numpy()))


@pytest.mark.parametrize(("s_i", "s_j"), [(80.0, 40.0), (1.0, 0.3), (0.01, 0.002), (0.5, 1.0)])
def test_stein_costs_by_quadrature(s_i, s_j):
    line, cube = Gaussian(0.5, (1,)), Gaussian(0.5, (2, 3))

    def corrector(z):
        return (line.score(z, s_j) - line.score(z, s_i))[:, 0].square()

    def predictor(z):
        def euler(x):
            return x + s_i * (s_i - s_j) * line.score(x, s_i)

        derivative = torch.func.jvp(euler, (z,), (torch.ones_like(z),))[1]
        # The step is linear: the score of its image is the old score over the derivative.
        return (line.score(euler(z), s_j) - line.score(z, s_i) / derivative)[:, 0].square()

    expected = _expectation(line, s_i, corrector)
    assert float(cube.stein_corrector(s_i, s_j)) == pytest.approx(6 * expected, rel=1e-9)
    expected = _expectation(line, s_i, predictor)
    assert float(cube.stein_predictor(s_i, s_j)) == pytest.approx(6 * expected, rel=1e-6)


def test_stein_costs_broadcast():
    gaussian, grid = Gaussian(0.5, (2,)), torch.tensor([3.0, 2.0, 1.0])
    for cost in (gaussian.stein_corrector, gaussian.stein_predictor):
        matrix = cost(grid[:, None], grid[None, :])
        assert matrix.shape == (3, 3)
        assert matrix.dtype == torch.float64
        assert (matrix.diagonal() == 0).all()
        assert float(matrix[0, 2]) == pytest.approx(float(cost(3.0, 1.0)))


def test_corrector_length_sums_the_corrector_cost():
    gaussian = Gaussian(0.5, (2, 3))
    grid = torch.logspace(math.log10(0.01), math.log10(80), 4001, dtype=torch.float64)
    middle = (grid[1:] * grid[:-1]).sqrt()
    pieces = middle * gaussian.stein_corrector(grid[1:], grid[:-1]).sqrt()
    expected = gaussian.corrector_length(80.0) - gaussian.corrector_length(0.01)
    # First order in the cell, log(8000) / 4000.
    torch.testing.assert_close(pieces.sum(), expected, rtol=math.log(8000) / 4000, atol=0)
    assert float(gaussian.corrector_length(0.0)) == 0.0


def test_fisher_rao_length_is_the_information_of_the_level():
    line, plane = Gaussian(0.5, (1,)), Gaussian(0.5, (4,))

    def speed(s):
        def information(z):
            levels = torch.full((len(z),), s, dtype=torch.float64)
            ones = torch.ones_like(levels)
            return torch.func.jvp(lambda level: line.log_density(z, level), (levels,), (ones,))[1].square()

        return math.sqrt(_expectation(line, s, information))

    expected = scipy.integrate.quad(speed, 0.1, 5.0, epsrel=1e-9)[0]
    ours = plane.fisher_rao_length(5.0) - plane.fisher_rao_length(0.1)
    assert float(ours) == pytest.approx(math.sqrt(4) * expected, rel=1e-7)


def _mixture(**changes):
    parts = {"weights": torch.ones(2), "means": torch.zeros(2, 3), "covariances": torch.eye(3).expand(2, 3, 3)}
    return GaussianMixture(**{**parts, **changes})


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Gaussian(0.0, (2,)), ValueError, "std must be positive"),
        (lambda: Gaussian(math.nan, (2,)), ValueError, "std must be positive"),
        (lambda: Gaussian(1.0, ()), ValueError, "shape must have at least one entry"),
        (lambda: Gaussian(1.0, (2, 0)), ValueError, "shape must be at least 1"),
        (lambda: Gaussian(1.0, (2,), torch.zeros(3)), ValueError, "mean has shape"),
        (lambda: Gaussian(1.0, (2,), math.inf), ValueError, "mean must be finite"),
        (lambda: Gaussian(1.0, (2,)).optimal_ddim_schedule(0, 1.0), ValueError, "steps must be at least 1"),
        (lambda: Gaussian(1.0, (2,)).optimal_ddim_schedule(3, -1.0), ValueError, "s_max must be positive"),
        (lambda: Gaussian(1.0, (2,)).flow(torch.zeros(1, 2), 1.0, -1.0), ValueError, "s_to must be positive"),
        (lambda: _mixture(means=torch.zeros(2)), ValueError, "means has shape"),
        (lambda: _mixture(weights=torch.ones(3)), ValueError, "weights has shape"),
        (lambda: _mixture(weights=torch.tensor([1.0, -1.0])), ValueError, "weights must be positive"),
        (lambda: _mixture(weights=torch.tensor([1.0, math.nan])), ValueError, "weights must be finite"),
        (lambda: _mixture(covariances=torch.ones(2, 3)), ValueError, "covariances has shape"),
        (lambda: _mixture(covariances=torch.ones(2, 3, 3).tril()), ValueError, "covariances must be symmetric"),
        (lambda: _mixture(covariances=-torch.eye(3).expand(2, 3, 3)), ValueError, "covariances must be positive"),
        (lambda: GaussianMixture.random(0, 2, seed=0), ValueError, "d must be at least 1"),
        (lambda: GaussianMixture.random(2, 0, seed=0), ValueError, "components must be at least 1"),
        (lambda: GaussianMixture.random(2, 2, seed=0, spread=1e308), ValueError, "spread must have a finite square"),
        (lambda: GaussianMixture.random(2, 2, seed=0, std=1e200), ValueError, "std must have a finite square"),
        (lambda: Empirical(torch.zeros(0, 2)), ValueError, "data must hold at least one sample"),
        (lambda: Empirical(torch.zeros(3)), ValueError, "data must be .B, .shape., got shape"),
        (lambda: Empirical(torch.zeros(3, 2, dtype=torch.int64)), TypeError, "data must be a floating"),
        (lambda: Empirical(torch.full((3, 2), math.nan)), ValueError, "data must be finite"),
    ],
)
def test_bad_distributions_are_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize("name", ORACLES)
def test_bad_calls_are_refused(name):
    oracle = ORACLES[name]
    z = torch.zeros(2, *oracle.shape)
    for s in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="s must be positive"):
            oracle.denoise(z, s)
    for s in (torch.ones(3), torch.ones(2, 1)):
        with pytest.raises(ValueError, match="s has shape"):
            oracle.score(z, s)
    with pytest.raises(ValueError, match="z has shape"):
        oracle.denoise(z[..., :1], 1.0)
    with pytest.raises(ValueError, match="z has shape"):
        oracle.denoise(z[0], 1.0)
    with pytest.raises(TypeError, match="z must be a floating"):
        oracle.denoise(z.long(), 1.0)
    with pytest.raises(ValueError, match="n must be at least 1"):
        oracle.sample(0, seed=0)
