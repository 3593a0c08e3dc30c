"""Each solver's step, taken apart and put together from its published formula."""

import itertools

import numpy as np
import pytest
import torch
from models import exact_denoiser, exact_denoisers, mixture

import fastsched as fs
from fastsched.solvers import SOLVERS, Node, get_solver

ORACLE = mixture(d=3)
DENOISER = exact_denoiser(ORACLE)
SIGMAS = torch.tensor([40.0, 11.0, 4.0, 1.3, 0.6, 0.2, 0.05, 0.0], dtype=torch.float64)
NOISE = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
#: Rounding of some tens of operations in float64, on states up to 1e2 times the samples.
TOLERANCE = {"rtol": 1e-11, "atol": 1e-11}


def slope(z, s):
    return (z - ORACLE.denoise(z, s)) / s


def karras_euler(sigmas):
    z = NOISE * sigmas[0]
    for s, t in itertools.pairwise(sigmas):
        z = z + (t - s) * slope(z, s)
    return z


def karras_heun(sigmas):
    z = NOISE * sigmas[0]
    for s, t in itertools.pairwise(sigmas):
        d = slope(z, s)
        guess = z + (t - s) * d
        z = guess if t == 0 else z + (t - s) * (d + slope(guess, t)) / 2
    return z


def dpm_solver_pp_2m(sigmas):
    z, old = NOISE * sigmas[0], None
    for n, (s, t) in enumerate(itertools.pairwise(sigmas)):
        d = ORACLE.denoise(z, s)
        h = torch.log(s) - torch.log(t)
        if old is None or t == 0:
            z = t / s * z - torch.expm1(-h) * d
        else:
            r = (torch.log(sigmas[n - 1]) - torch.log(s)) / h
            z = t / s * z - torch.expm1(-h) * ((1 + 1 / (2 * r)) * d - old / (2 * r))
        old = d
    return z


def four_step_ipndm(sigmas):
    z, slopes = NOISE * sigmas[0], []
    for s, t in itertools.pairwise(sigmas):
        slopes = [slope(z, s), *slopes][:4]
        if t == 0:
            return z + (t - s) * slopes[0]
        table = {1: [1], 2: [3, -1], 3: [23, -16, 5], 4: [55, -59, 37, -9]}[len(slopes)]
        z = z + (t - s) * sum(b * d for b, d in zip(table, slopes, strict=True)) / sum(table)
    return z


@pytest.mark.parametrize(
    ("name", "published"),
    [("ddim", karras_euler), ("euler", karras_euler), ("heun", karras_heun), ("dpmpp_2m", dpm_solver_pp_2m),
     ("ipndm", four_step_ipndm)],
)  # fmt: skip
def test_sample_is_the_published_algorithm(name, published):
    torch.testing.assert_close(fs.sample(DENOISER, SIGMAS, name, NOISE), published(SIGMAS), **TOLERANCE)


def test_flow_euler_is_ddim():
    denoiser = exact_denoisers(ORACLE)["velocity"]
    t = torch.tensor([1.0, 0.9, 0.6, 0.3, 0.1, 0.0], dtype=torch.float64)
    x = NOISE
    for a, b in itertools.pairwise(t):
        x = x + (b - a) * denoiser.raw_output(x, a / (1 - a))
    torch.testing.assert_close(fs.sample(denoiser, t, "euler", NOISE), x, rtol=1e-9, atol=1e-9)


def test_flow_heun_averages_velocities():
    denoiser = exact_denoisers(ORACLE)["velocity"]
    t = torch.tensor([1.0, 0.9, 0.6, 0.3, 0.1, 0.0], dtype=torch.float64)
    x = NOISE
    for a, b in itertools.pairwise(t):
        v = denoiser.raw_output(x, a / (1 - a))
        guess = x + (b - a) * v
        x = guess if b == 0 else x + (b - a) * (v + denoiser.raw_output(guess, b / (1 - b))) / 2
    torch.testing.assert_close(fs.sample(denoiser, t, "heun", NOISE), x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SOLVERS)
def test_weights_sum_to_one(name):
    solver = SOLVERS[name]
    nodes = [Node(1 / s, -np.log(s), s) for s in (9.0, 5.0, 3.0, 2.0, 1.0)]
    for count in range(1, solver.history + 2):
        weights = solver.weights(nodes[:count][::-1], nodes[count])
        assert float(sum(weights)) == pytest.approx(1.0, abs=1e-15)


def along_grid(name, n):
    # every grid ends at the same small level, so that the step to zero does not limit the order
    return fs.sample(DENOISER, torch.cat([DENOISER.levels(n + 1), torch.zeros(1)]), name, NOISE)


@pytest.fixture(scope="module")
def converged():
    return along_grid("heun", 1500)


# ipndm: third order and more on equal steps; its weights ignore that these grow, which leaves second order
@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("heun", 2), ("dpmpp_2m", 2), ("ipndm", 2)])
def test_order_of_convergence(name, order, converged):
    """Halving every step divides the error by about 2^order."""
    coarse, fine = ((along_grid(name, n) - converged).square().mean().sqrt() for n in (60, 120))
    assert float(coarse / fine) > 0.8 * 2**order


def test_unknown_solver_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'dpmpp_2m'"):
        get_solver("dpm++_2m")
    with pytest.raises(ValueError, match="solver must be one of"):
        get_solver(3)
