import numpy as np
import pytest
import torch
from models import gaussian

import fastsched as fs
from fastsched.costs import stein_predictor
from fastsched.costs.predictor_cost import conjugate_gradients
from fastsched.costs.states import StateSource

MIXTURE = fs.oracles.GaussianMixture.random(2, 3, seed=0)


@pytest.mark.parametrize("pairs", ["adjacent", "all"])
@pytest.mark.parametrize(("d", "samples"), [(1, 20_000), (16, 3_000), (256, 150)])
def test_gaussian_closed_form(d, samples, pairs):
    oracle, denoiser = gaussian(d)
    s = denoiser.levels(6)
    settings = {"shape": (d,), "sigmas": s, "samples": samples, "dtype": torch.float64, "progress": False}
    data = oracle.sample(samples, seed=1, dtype=torch.float64)
    cost = stein_predictor(denoiser, pairs=pairs, data=data, **settings)
    exact = s[:, None] ** 2 * oracle.stein_predictor(s[:, None], s[None, :])
    i, j = cost.pairs.T
    error = (cost.matrix - exact)[i, j]
    # The score is linear in the state: a mean of |N(0,1)|^2 over at least 2e4 terms, 1%, is all the noise there is.
    assert (error.abs() / exact[i, j]).max() < 0.02
    assert (error.abs() / cost.stderr[i, j]).max() < 3
    assert cost.order == 4
    assert cost.calls.gradient == 2 * samples * len(i)  # two probes


def _brute_force(oracle, z, s_i, s_j):
    """The divergence's integrand at each state [B, 2], from densities and determinants, without any trick."""
    r = s_j / s_i

    def step(state):
        return state + s_i * (s_i - s_j) * oracle.score(state[None], s_i)[0]

    def log_pushed_density(state):  # of F#p_i, at F(state)
        return oracle.log_density(state[None], s_i)[0] - torch.logdet(torch.func.jacrev(step)(state))

    squares = []
    for state in z:
        change = torch.func.jacrev(step)(state)
        expected = r * torch.eye(2, dtype=state.dtype) + (1 - r) * oracle.jacobian(state[None], s_i)[0]
        torch.testing.assert_close(change, expected)
        pushed = torch.linalg.solve(change.T, torch.func.grad(log_pushed_density)(state))
        squares.append((oracle.score(step(state)[None], s_j)[0] - pushed).square().sum())
    return torch.stack(squares)


def _mixture_settings(samples, s_i, s_j):
    return {
        "sigmas": [s_i, s_j],
        "shape": (2,),
        "samples": samples,
        "data": MIXTURE.sample(samples, seed=5, dtype=torch.float64),
        "dtype": torch.float64,
    }


@pytest.mark.parametrize(("s_i", "s_j"), [(2.0, 1.0), (0.8, 0.5), (0.3, 0.05), (1.0, 0.05)])
def test_exact_form_matches_brute_force_state_by_state(s_i, s_j):
    denoiser = fs.Denoiser.from_denoiser(MIXTURE.denoise, 0.01, 10.0)
    settings = _mixture_settings(12, s_i, s_j)
    cost = stein_predictor(denoiser, velocity=None, probes=None, progress=False, **settings)
    source = StateSource(denoiser, **settings)
    _, z, _ = next(source.states(next(source.batches()), 1))
    torch.testing.assert_close(cost.per_sample[:, 0], _brute_force(MIXTURE, z, s_i, s_j), rtol=1e-8, atol=1e-12)
    assert cost.calls == (2 * 12, 2 * 12, 2 * 12)


# The probes' noise, against the cost: 0.3%, 0.6%, 0.4% and 0.3%.
@pytest.mark.parametrize(("s_i", "s_j", "probes"), [(2.0, 1.0, 2), (0.8, 0.5, 4), (0.3, 0.05, 2), (1.0, 0.05, 2)])
def test_probes_are_unbiased(s_i, s_j, probes):
    denoiser = fs.Denoiser.from_denoiser(MIXTURE.denoise, 0.01, 10.0)
    samples = 8_000
    settings = _mixture_settings(samples, s_i, s_j)
    exact = stein_predictor(denoiser, probes=None, progress=False, **settings)
    estimate = stein_predictor(denoiser, probes=probes, progress=False, **settings)
    difference = (estimate.per_sample - exact.per_sample)[:, 0]
    error, stderr = float(difference.mean()), float(difference.std()) / samples**0.5
    assert abs(error) < 3 * stderr
    assert abs(error) < 0.02 * float(exact.adjacent[0])


def test_path_states_and_velocities():
    oracle, denoiser = gaussian(16)
    s = denoiser.levels(24)[4:12:3]
    settings = {"shape": (16,), "sigmas": s, "samples": 1_000, "dtype": torch.float64, "progress": False}
    for pairs in ("adjacent", "all"):
        for velocity, place in (("noisier", 0), ("cleaner", 1), (None, None)):
            cost = stein_predictor(denoiser, pairs=pairs, velocity=velocity, **settings)
            i, j = cost.pairs.T
            speed = 1.0 if place is None else s[cost.pairs[:, place]]
            exact = speed**2 * oracle.stein_predictor(s[i], s[j])
            # 16,000 squares, 1.1%, and the spread of the path's states, right to 0.6%: 1.2% in a square.
            assert (cost.matrix[i, j] / exact - 1).abs().max() < 3 * 0.011 + 0.012


def test_more_probes_less_noise():
    settings = {"shape": (2,), "sigmas": [0.8, 0.5], "samples": 500, "dtype": torch.float64, "progress": False}
    settings |= {"data": MIXTURE.sample(500, seed=5, dtype=torch.float64)}
    denoiser = fs.Denoiser.from_denoiser(MIXTURE.denoise, 0.01, 10.0)
    exact = stein_predictor(denoiser, probes=None, **settings).per_sample
    few, many = (stein_predictor(denoiser, probes=n, **settings).per_sample for n in (2, 16))
    assert (many - exact).std() < 0.5 * (few - exact).std()
    assert float((many - exact).mean()) == pytest.approx(0.0, abs=4 * float((many - exact).std()) / 500**0.5)


def test_batches_do_not_change_the_estimate():
    settings = {"shape": (2,), "sigmas": [2.0, 1.0, 0.5], "samples": 7, "pairs": "all", "dtype": torch.float64}
    denoiser = fs.Denoiser.from_denoiser(MIXTURE.denoise, 0.01, 10.0)
    data = MIXTURE.sample(9, seed=1)
    whole = stein_predictor(denoiser, data=data, progress=False, **settings)
    parts = stein_predictor(denoiser, data=data, progress=False, batch_size=3, **settings)
    torch.testing.assert_close(parts.per_sample, whole.per_sample, rtol=1e-6, atol=1e-9)


def test_fourth_order_in_the_step():
    """Halving the step divides the Gaussian's cost by 16, up to the next order."""
    oracle, denoiser = gaussian(64)
    settings = {"shape": (64,), "samples": 50, "velocity": None, "dtype": torch.float64, "progress": False}
    settings["data"] = oracle.sample(50, seed=1, dtype=torch.float64)
    costs = (stein_predictor(denoiser, sigmas=[1.0, 1.0 - step], **settings) for step in (0.02, 0.01))
    coarse, fine = (float(cost.adjacent[0]) for cost in costs)
    assert coarse / fine == pytest.approx(16, rel=0.06)


def test_conjugate_gradients_solve_and_say_where_they_did_not():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(5, 6, 6, generator=generator, dtype=torch.float64)
    matrix = root @ root.mT + 0.1 * torch.eye(6)
    matrix[4] = -matrix[4]
    right = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    right[3] = 0
    product = lambda v: (matrix @ v[..., None])[..., 0]
    solution, converged = conjugate_gradients(product, right, 1e-9, 60)
    assert converged.tolist() == [True, True, True, True, False]
    torch.testing.assert_close(solution[:3], torch.linalg.solve(matrix[:3], right[:3, :, None])[..., 0])
    assert torch.equal(solution[3], torch.zeros(6, dtype=torch.float64))
    assert np.isfinite(solution.numpy()).all()
    assert not conjugate_gradients(product, right, 1e-9, 2)[1][:3].any()


def test_unconverged_solves_are_reported_and_bad_arguments_named():
    _, denoiser = gaussian(4)
    settings = {"shape": (4,), "sigmas": [2.0, 1.0], "samples": 3, "progress": False}
    backwards = fs.Denoiser.from_denoiser(lambda z, s: -9.0 * z, 0.1, 10.0)
    with (
        pytest.warns(UserWarning, match="no denoiser of its noise process"),
        pytest.warns(UserWarning, match="did not reach a residual"),
    ):
        stein_predictor(backwards, **settings)
    with pytest.raises(ValueError, match="probes must be at least 2"):
        stein_predictor(denoiser, probes=1, **settings)
    with pytest.raises(ValueError, match="did you mean 'adjacent'"):
        stein_predictor(denoiser, pairs="adjacnt", **settings)
