"""The cost of a step against the step itself, taken on the measured path by brute force."""

import itertools

import numpy as np
import pytest
from models import exact_denoiser, exact_denoisers, mixture

import fastsched as fs
from fastsched.costs import path_cost
from fastsched.costs.step_cost import error_weight
from fastsched.costs.surrogate import Surrogate
from fastsched.measurement import memory
from fastsched.sampling.random_streams import noise_of
from fastsched.sampling.sampler import nodes_of
from fastsched.sampling.solvers import SOLVERS, step_scale

LEVELS = 10
KINDS = exact_denoisers(mixture())


@pytest.fixture(scope="module", params=["x0", "velocity"], ids=["ve", "flow"])
def stats(request):
    return fs.measure(KINDS[request.param], (4,), levels=LEVELS, samples=3, progress=False)


def path_of(s, denoised):
    """``y_k - y_0`` of the path that takes ``D`` as piecewise linear in ``lambda``, by quadrature, [N, d]."""
    rho = 1 / s
    y = [np.zeros_like(denoised[0])]
    for q in range(len(s) - 1):
        a, b = rho[q], rho[q + 1]
        if a == 0:
            y.append(y[-1] + (b - a) * (denoised[q] + denoised[q + 1]) / 2)
            continue
        points, weights = np.polynomial.legendre.leggauss(20)
        lam = (np.log(b) - np.log(a)) / 2 * points + (np.log(b) + np.log(a)) / 2
        part = (lam - np.log(a)) / np.log(b / a)
        values = denoised[q] + part[:, None] * (denoised[q + 1] - denoised[q])
        jacobian = np.exp(lam) * (np.log(b) - np.log(a)) / 2
        y.append(y[-1] + (weights * jacobian) @ values)
    return np.stack(y)


def step_error(cost, nodes, y, denoised, levels):
    """``z`` after one step of the solver from the path's own states and outputs, less the path's ``z``.

    A denoiser asked off the path, at a predicted state, returns the path's output and its share of the departure.
    """
    solver, s = cost.solver, cost.s
    *history, k = nodes
    j = history[-1]
    lam = [n.lam for n in levels]
    known, end = [levels[n] for n in history[::-1]], levels[k]
    scale = step_scale(solver, levels[j], end)

    def at(node, values):
        return np.array([np.interp(node.lam, lam, column) for column in values.T])

    def slope(node, state, output):
        return output if solver.variable == "rho" else state - output / node.tau

    def step(rule, slopes):
        mean = sum(b * value for b, value in zip(rule(known, end), slopes, strict=True))
        return y[j] + scale * mean if solver.variable == "rho" else (1 - scale) * y[j] + scale * mean

    def ask(node, state, on_path):
        share = np.interp(node.lam, lam, cost.jacobian)
        return at(node, denoised) + share * (state - on_path) / node.rho

    slopes = [slope(levels[n], y[n], denoised[n]) for n in history[::-1]]
    if solver.stage is not None:
        node = solver.stage(levels[j], end)
        guess = y[j] + (node.rho - levels[j].rho) * denoised[j]
        # the departure that the cost counts: each segment's share of the Euler error that the stage has covered
        covered = np.clip((node.lam - np.array(lam[:-1])) / np.diff(lam), 0, 1)
        covered[:j] = 0
        departure = (covered * (cost._node_rho - node.rho)) @ np.diff(denoised, axis=0)
        slopes = [slope(node, guess, ask(node, guess, guess - departure)), *slopes]
    after = step(solver.weights, slopes)
    if solver.corrector is not None:
        after = step(solver.corrector, [ask(end, after, y[k]), *slopes])
    return (after - y[k]) * s[k]


def random_path(stats, seed):
    """Outputs whose increments have a known Gram, and the states of their path, in y with a common start."""
    rng = np.random.default_rng(seed)
    denoised = rng.standard_normal((stats.levels, 4)).cumsum(0)
    start = rng.standard_normal(4)
    return denoised, start + path_of(stats.s.numpy(), denoised)


@pytest.mark.parametrize(("name", "weighted"), [*((name, False) for name in SOLVERS), ("dpmpp_2m", True)])
def test_error_vector_is_the_error_of_the_step(stats, name, weighted):
    solver = SOLVERS[name]
    cost = path_cost(stats, solver, weighted=weighted)
    levels = nodes_of(stats.process, stats.s)
    every = list(itertools.combinations(range(LEVELS), solver.history + 2))
    for seed, nodes in enumerate(every[:: 1 + len(every) // 45]):  # of long steps there are hundreds
        denoised, y = random_path(stats, seed)
        expected = step_error(cost, nodes, y, denoised, levels)
        found = stats.s.numpy()[nodes[-1]] * cost.error_vector(nodes) @ np.diff(denoised, axis=0)
        # float64 rounding, amplified by y (up to rho = 50 times the outputs) that cancel in the slopes
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", SOLVERS)
def test_tables_agree_with_single_steps(stats, name, weighted):
    cost = path_cost(stats, name, weighted=weighted)
    n = cost.levels
    pairs = cost.pairs
    for j, k in itertools.combinations(range(n + 1), 2):
        assert pairs[j, k] == pytest.approx(cost.step([j, k]), rel=1e-9, abs=1e-14)
    assert np.isinf(pairs[np.tri(n + 1, dtype=bool)]).all()
    np.testing.assert_allclose(cost.first, pairs[0], rtol=1e-9, atol=1e-14)
    if cost.solver.history == 0:
        return
    triples = cost.triples
    for i, j, k in itertools.combinations(range(n + 1), 3):
        assert triples[i, j, k] == pytest.approx(cost.step([i, j, k]), rel=1e-9, abs=1e-14)
    ordered = np.zeros(triples.shape, dtype=bool)
    for i, j, k in itertools.combinations(range(n + 1), 3):
        ordered[i, j, k] = True
    assert np.isinf(triples[~ordered]).all()


def test_of_uses_the_whole_history(stats):
    cost = path_cost(stats, "ipndm", weighted=False)
    nodes = [0, 1, 3, 4, 6, 8, LEVELS]
    expected = [
        cost.step(part) for part in ([0, 1], [0, 1, 3], [0, 1, 3, 4], [0, 1, 3, 4, 6], [1, 3, 4, 6, 8], [8, LEVELS])
    ]
    np.testing.assert_allclose(cost.of(nodes), expected, rtol=1e-14)


def test_costs_are_the_error_of_real_single_steps():
    """On a fine grid the path is the true one: a cost is what ``fs.sample`` errs by in one step from it."""
    oracle = fs.oracles.Gaussian(0.5, (8,))
    denoiser = exact_denoiser(oracle, 0.01, 20.0)
    stats = fs.measure(denoiser, (8,), levels=200, samples=4, responses=False, progress=False)
    cost = path_cost(stats, "ddim", weighted=False)
    noise = noise_of(stats.seeds, (8,)).double()
    s = stats.s
    for j, k in [(0, 60), (60, 120), (100, 110), (150, 199)]:
        z = oracle.flow(noise * s[0], float(s[0]), float(s[j]))
        step = z + (s[k] - s[j]) * (z - oracle.denoise(z, float(s[j]))) / s[j]
        exact = oracle.flow(noise * s[0], float(s[0]), float(s[k]))
        expected = float((step - exact).square().sum(1).mean())
        assert cost.pairs[j, k] == pytest.approx(expected, rel=0.02)  # a path of 200 levels errs by 0.3%, squared


def test_weights_are_the_squared_amplitudes_of_a_deviation(stats):
    """What becomes of an error: by the scalar Jacobian, level by level from the end."""
    surrogate = Surrogate.of(stats)
    s, j = stats.s.numpy(), surrogate.jacobian
    keep = np.append(s[1:], 0.0) / s
    expected = [np.prod((keep + (1 - keep) * j)[k:]) ** 2 for k in range(LEVELS)]
    np.testing.assert_allclose(error_weight(stats), [*expected, 1.0], rtol=1e-9)
    np.testing.assert_allclose(path_cost(stats, "ddim").weight, [*expected, 1.0], rtol=1e-9)
    assert path_cost(stats, "ddim", weighted=False).weight.tolist() == [1.0] * (LEVELS + 1)


def test_more_levels_than_memory_holds_are_refused(monkeypatch):
    """Before the calls of a fit; a measurement, which needs less, is kept."""
    stats = fs.measure(KINDS["x0"], (4,), levels=100, samples=1, progress=False)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 5_000_000)
    with pytest.raises(MemoryError, match=r"a search over 100 levels .* lower levels"):
        fs.optimal_schedule(stats, 5)
    assert fs.optimal_schedule(stats, 5, "ddim").steps == 5
    calls = []
    counted = fs.Denoiser.from_denoiser(lambda z, s: calls.append(1) or z, 0.02, 80.0)
    with pytest.raises(MemoryError, match="a search over 100 levels"):
        fs.fit(counted, (4,), 5, levels=100, samples=1, progress=False)
    assert not calls
