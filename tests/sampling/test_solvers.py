"""Each solver's step, taken apart and put together from its published formula."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from models import exact_denoiser, exact_denoisers, mixture
from scipy import integrate

import fastsched as fs
from fastsched.sampling.fitted import chosen_solver
from fastsched.sampling.multistep import Node
from fastsched.sampling.solvers import SOLVERS, get_solver, solver_name

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


def four_step_ipndm(sigmas, order=4):
    z, slopes = NOISE * sigmas[0], []
    for s, t in itertools.pairwise(sigmas):
        slopes = [slope(z, s), *slopes][:order]
        if t == 0:
            return z + (t - s) * slopes[0]
        table = {1: [1], 2: [3, -1], 3: [23, -16, 5], 4: [55, -59, 37, -9]}[len(slopes)]
        z = z + (t - s) * sum(b * d for b, d in zip(table, slopes, strict=True)) / sum(table)
    return z


def k_diffusion_dpm_2(sigmas):
    z = NOISE * sigmas[0]
    for s, t in itertools.pairwise(sigmas):
        d = slope(z, s)
        if t == 0:
            return z + (t - s) * d
        middle = torch.exp((torch.log(s) + torch.log(t)) / 2)
        z = z + (t - s) * slope(z + (middle - s) * d, middle)
    return None


def dpm_solver_pp_2s(sigmas):
    z = NOISE * sigmas[0]
    for s, t in itertools.pairwise(sigmas):
        d = ORACLE.denoise(z, s)
        if t == 0:
            return d
        h = torch.log(s) - torch.log(t)
        middle = torch.exp(torch.log(s) - h / 2)
        guess = middle / s * z - torch.expm1(-h / 2) * d
        z = t / s * z - torch.expm1(-h) * ORACLE.denoise(guess, middle)
    return None


def dpm_solver_pp_3m(sigmas, lowered=False):
    """As diffusers writes it, ``multistep_dpm_solver_third_order_update``; ``lowered`` as ``lower_order_final``."""
    z, outputs = NOISE * sigmas[0], []
    lam = -torch.log(sigmas)
    for n, (s, t) in enumerate(itertools.pairwise(sigmas)):
        outputs = [ORACLE.denoise(z, s), *outputs][:3]
        if t == 0:
            return outputs[0]
        h = lam[n + 1] - lam[n]
        outputs = outputs[:2] if lowered and n == len(sigmas) - 3 else outputs
        z = t / s * z - torch.expm1(-h) * outputs[0]
        if len(outputs) == 2:
            r = (lam[n] - lam[n - 1]) / h
            z = z - 0.5 * torch.expm1(-h) * (outputs[0] - outputs[1]) / r
        if len(outputs) == 3:
            r0, r1 = (lam[n] - lam[n - 1]) / h, (lam[n - 1] - lam[n - 2]) / h
            d0, d1 = (outputs[0] - outputs[1]) / r0, (outputs[1] - outputs[2]) / r1
            first = d0 + r0 / (r0 + r1) * (d0 - d1)
            second = (d0 - d1) / (r0 + r1)
            decay = torch.expm1(-h)
            z = z + (decay / h + 1) * first - ((decay + h) / h**2 - 0.5) * second
    return None


def lagrange(x, positions, n, measure):
    others = positions[:n] + positions[n + 1 :]
    return math.prod((measure(x) - other) / (positions[n] - other) for other in others)


def adams_bashforth(sigmas, order, measure, lowered=False):
    """Slopes interpolated as a polynomial (in sigma or its logarithm), integrated by quadrature."""
    z, known = NOISE * sigmas[0], []
    for s, t in itertools.pairwise(sigmas):
        known = [(float(s), slope(z, s)), *known][: 2 if lowered and t == sigmas[-2] else order]
        if t == 0:
            return z + (t - s) * known[0][1]
        weights = []
        at = [measure(level) for level, _ in known]
        for n in range(len(known)):
            basis = partial(lagrange, positions=at, n=n, measure=measure)
            weights.append(integrate.quad(basis, float(s), float(t), epsrel=1e-13, epsabs=0)[0])
        z = z + sum(w * d for w, (_, d) in zip(weights, known, strict=True))
    return None


def uni_pc(sigmas, order, variant, lowered=False):
    """UniPC as its authors and diffusers write it: matrices R and b, predictor and corrector."""
    lam = -torch.log(sigmas)
    outputs, z, before = [], NOISE * sigmas[0], None

    def update(start, n, m0, others, at_end=None):
        h = lam[n + 1] - lam[n]
        ratios = [(lam[n - 1 - m] - lam[n]) / h for m in range(len(others))] + [torch.tensor(1.0)]
        size = -h if variant == "bh1" else torch.expm1(-h)
        rows, right, factorial = [], [], 1
        phi = torch.expm1(-h) / -h - 1
        for p in range(1, len(ratios) + 1):
            rows.append(torch.stack([r.double() ** (p - 1) for r in ratios]))
            right.append(phi * factorial / size)
            factorial *= p + 1
            phi = phi / -h - 1 / factorial
        matrix, right = torch.stack(rows), torch.stack(right)
        differences = [(m - m0) / r for m, r in zip(others, ratios, strict=False)]
        if at_end is None:
            count = len(others)
            a = torch.tensor([0.5]) if count == 1 else torch.linalg.solve(matrix[:-1, :-1], right[:-1])
            a = a[:count]
        else:
            a = torch.tensor([0.5]) if not others else torch.linalg.solve(matrix, right)
            differences = [*differences, at_end - m0]
        total = sum((w * d for w, d in zip(a, differences, strict=True)), torch.zeros(()))
        return sigmas[n + 1] / sigmas[n] * start - torch.expm1(-h) * m0 - size * total

    for n in range(len(sigmas) - 1):
        now = ORACLE.denoise(z, sigmas[n])
        if sigmas[n + 1] == 0:
            return now
        if n > 0:
            z = update(before, n - 1, outputs[0], outputs[1:order], now)
        outputs = [now, *outputs][: 2 if lowered and n == len(sigmas) - 3 else order]
        before, z = z, update(z, n, outputs[0], outputs[1:])
    return None


PUBLISHED = {
    "ddim": karras_euler,
    "euler": karras_euler,
    "heun": karras_heun,
    "dpm_2": k_diffusion_dpm_2,
    "dpmpp_2s": dpm_solver_pp_2s,
    "dpmpp_2m": dpm_solver_pp_2m,
    "dpmpp_3m": dpm_solver_pp_3m,
    "dpmpp_3m_lowered": partial(dpm_solver_pp_3m, lowered=True),
    "ipndm": four_step_ipndm,
    "ipndm_3": partial(four_step_ipndm, order=3),
    "ipndm_2": partial(four_step_ipndm, order=2),
    "lms": partial(adams_bashforth, order=4, measure=float),
    "deis_2": partial(adams_bashforth, order=2, measure=math.log),
    "deis_3": partial(adams_bashforth, order=3, measure=math.log),
    "deis_3_lowered": partial(adams_bashforth, order=3, measure=math.log, lowered=True),
    "unipc": partial(uni_pc, order=2, variant="bh2"),
    "unipc_3": partial(uni_pc, order=3, variant="bh2"),
    "unipc_3_lowered": partial(uni_pc, order=3, variant="bh2", lowered=True),
    "unipc_bh1": partial(uni_pc, order=2, variant="bh1"),
    "unipc_bh1_3": partial(uni_pc, order=3, variant="bh1"),
    "unipc_bh1_3_lowered": partial(uni_pc, order=3, variant="bh1", lowered=True),
}


def test_every_solver_has_its_published_algorithm():
    assert set(SOLVERS) <= set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_sample_is_the_published_algorithm(name):
    torch.testing.assert_close(fs.sample(DENOISER, SIGMAS, name, NOISE), PUBLISHED[name](SIGMAS), **TOLERANCE)


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
        for rule in filter(None, (solver.weights, solver.corrector)):
            assert float(sum(rule(nodes[:count][::-1], nodes[count]))) == pytest.approx(1.0, abs=1e-13)


def along_grid(name, n):
    # every grid ends at the same small level, so that the step to zero does not limit the order
    return fs.sample(DENOISER, torch.cat([DENOISER.levels(n + 1), torch.zeros(1)]), name, NOISE)


@pytest.fixture(scope="module")
def converged():
    return along_grid("heun", 1500)


# ipndm ignores that steps are unequal, which leaves second order whatever its own; third orders are limited by their
# second-order warm-up at 60 steps, from which about 2.5 remains.
ORDERS = {name: 1 if name == "ddim" else 2 for name in SOLVERS}


@pytest.mark.parametrize(("name", "order"), ORDERS.items())
def test_order_of_convergence(name, order, converged):
    """Halving every step divides the error by about 2^order."""
    coarse, fine = ((along_grid(name, n) - converged).square().mean().sqrt() for n in (60, 120))
    assert float(coarse / fine) > 0.8 * 2**order


def test_where_the_fitted_solver_is_allowed_it_is_suggested():
    with pytest.raises(ValueError, match="did you mean 'fitted'"):
        chosen_solver("fited")


@pytest.mark.parametrize("choose", [chosen_solver, get_solver])
@pytest.mark.parametrize(
    "name", ["euler_ancestral", "Euler a", "EulerAncestralDiscreteScheduler", "DPM++ 2M SDE Karras"]
)
def test_a_stochastic_solver_by_another_name_is_not_suggested_where_it_is_refused(choose, name):
    with pytest.raises(ValueError, match="solver must be deterministic here"):
        choose(name)
    with pytest.raises(ValueError, match=r"did you mean '(ancestral|sde_dpmpp_2m)'"):
        solver_name(name)


def test_a_misspelt_stochastic_solver_is_not_suggested_where_it_is_refused():
    with pytest.raises(ValueError, match="solver must be one of") as refusal:
        chosen_solver("ancestrall")
    assert "ancestral'" not in str(refusal.value)


def test_unknown_solver_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'dpmpp_2m'"):
        get_solver("dpm++_2m")
    with pytest.raises(ValueError, match="solver must be one of"):
        get_solver(3)
