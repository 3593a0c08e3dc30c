"""DMN, GITS and OSS against brute force, closed forms, and what their authors' programs printed.

The figures were printed by github.com/scxue/DM-NonUniform (step_optim.py, start "unif", sigma from 80 to 0.002) and
github.com/zju-pi/diff-sampler (gits-main, metric dev, coefficient 1.15, teacher ipndm of 61 levels, 256 warm-up
samples: those of `gits.warm_up_noise`, on the digits network). OSS's are those of github.com/bebebe666/OptimalSteps
(search_OSS_batch and cal_medium, 16 of the same noises, the first step held to the highest level).
"""

import itertools
import math

import numpy as np
import pytest
import torch

import fastsched as fs
from benchmarks.quality import dmn, gits, models, optimal_steps
from fastsched.denoisers.noise import FlowMatching, VarianceExploding
from fastsched.denoisers.oracles import Gaussian, GaussianMixture

VE = VarianceExploding(0.002, 80.0)

AUTHORS_DMN = {
    "sigma": {
        3: [1.07270, 0.236869],
        4: [2.46054, 0.680257, 0.0916619],
        5: [3.06275, 1.11353, 0.373699, 0.0722729],
        6: [4.45590, 1.30252, 0.646176, 0.217599, 0.0520234],
    },
    "sigma_squared": {
        3: [1.36566, 0.316502],
        4: [3.37741, 1.02316, 0.174372],
        5: [4.25811, 1.58830, 0.610735, 0.142967],
        6: [6.20245, 2.03808, 1.05843, 0.437486, 0.117386],
    },
}
#: Least and greatest node at 8 steps over ten starts 1e-12 apart.
AUTHORS_DMN_8 = {
    "sigma": [
        (18.7551, 35.3517),
        (1.8865, 2.8614),
        (0.5551, 0.9234),
        (0.2371, 0.3367),
        (0.0944, 0.1278),
        (0.0424, 0.0574),
        (0.0163, 0.0232),
    ],
    "sigma_squared": [
        (21.5007, 34.1128),
        (1.7654, 2.9106),
        (0.4989, 0.9232),
        (0.2069, 0.4246),
        (0.1190, 0.1874),
        (0.0666, 0.0978),
        (0.0172, 0.0402),
    ],
}
AUTHORS_GITS = {
    4: [80.0, 1.584, 0.6799, 0.2107],
    5: [80.0, 1.8543, 0.9654, 0.3878, 0.1359],
    6: [80.0, 2.1632, 1.1431, 0.5666, 0.2597, 0.0851],
    8: [80.0, 2.5152, 1.3482, 0.8119, 0.47, 0.2597, 0.1079, 0.0395],
    10: [80.0, 3.3686, 1.8543, 1.1431, 0.8119, 0.47, 0.2597, 0.1359, 0.0665, 0.03],
}
AUTHORS_OSS = {
    4: [80.0, 2.0483, 0.8885, 0.2699],
    6: [80.0, 3.0706, 1.5426, 0.8432, 0.3874, 0.1148],
    8: [80.0, 3.9722, 2.0483, 1.3328, 0.8432, 0.4882, 0.2699, 0.0863],
    10: [80.0, 4.6919, 2.5723, 1.7801, 1.2685, 0.8432, 0.5778, 0.3441, 0.1726, 0.0594],
}


@pytest.mark.parametrize("error", dmn.ERRORS)
@pytest.mark.parametrize("steps", [3, 4, 5, 6])
def test_dmn_is_its_authors(error, steps):
    found = dmn.schedule(VE, steps, error)
    expected = torch.tensor(AUTHORS_DMN[error][steps], dtype=torch.float64)
    assert float((found[1:-1].log() - expected.log()).abs().max()) < 1e-3
    assert float(found[0]) == 80.0
    assert float(found[-1]) == 0.0


@pytest.mark.parametrize("error", dmn.ERRORS)
def test_dmn_stops_where_its_authors_does_at_8_steps(error):
    """Their own answers differ by up to 0.85 in log sigma; the mean of ours lies within, no farther off than they."""
    ours = torch.stack([dmn.schedule(VE, 8, error, seed)[1:-1].log() for seed in range(2)]).mean(0)
    low, high = torch.tensor(AUTHORS_DMN_8[error], dtype=torch.float64).log().T
    assert bool((ours > low - 0.2).all())
    assert bool((ours < high + 0.2).all())


def test_dmns_start_decides_from_8_steps_on_alone():
    def apart(steps):
        schedules = [dmn.schedule(VE, steps, "sigma", seed)[1:-1].log() for seed in (0, 1)]
        return float((schedules[0] - schedules[1]).abs().max())

    assert apart(6) < 1e-5
    assert apart(8) > 0.01


@pytest.mark.parametrize("error", dmn.ERRORS)
@pytest.mark.parametrize("steps", [2, 3, 4])
def test_dmn_is_as_good_as_the_best_on_a_grid(error, steps):
    grid = np.geomspace(80, 0.002, 61)
    candidates = np.array([[80, *inner, 0.002] for inner in itertools.combinations(grid[1:-1], steps - 1)])
    found = dmn.schedule(VE, steps, error).numpy().copy()
    found[-1] = 0.002
    assert dmn.bound(found, error) <= 1.001 * dmn.bound(candidates, error).min()


def test_dmns_bound_of_two_steps_is_the_sum_of_ratios():
    s = np.array([[80.0, 3.0, 0.1], [7.0, 2.0, 1.0]])
    ratios = s[:, :-1] / s[:, 1:] - 1  # s_i |rho_{i+1} - rho_i|
    np.testing.assert_allclose(dmn.bound(s), ratios.sum(1))
    np.testing.assert_allclose(dmn.bound(s, "sigma_squared"), (ratios * s[:, :-1] / np.sqrt(1 + s[:, :-1] ** 2)).sum(1))


@pytest.fixture(scope="module")
def digits_gits():
    digits = models.digits()
    return gits.Gits.measure(digits.denoiser, gits.warm_up_noise(0, 256, digits.shape))


@pytest.mark.parametrize("steps", AUTHORS_GITS)
def test_gits_is_its_authors(digits_gits, steps):
    assert digits_gits.model_calls == 60 * 256
    found = digits_gits.schedule(steps)
    # Printed to four places after the point; neighbours on the teacher's grid are at least 0.1 apart in log sigma.
    np.testing.assert_allclose(found[:-1], AUTHORS_GITS[steps], rtol=1e-4, atol=6e-5)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_discounted_path_is_the_best_of_all(steps):
    cost = np.random.default_rng(steps).random((7, 7))
    cost[np.tri(7, dtype=bool)] = np.inf

    def total(path):
        return sum(1.15**n * cost[a, b] for n, (a, b) in enumerate(itertools.pairwise(path)))

    best = min(((0, *inner, 6) for inner in itertools.combinations(range(1, 6), steps - 1)), key=total)
    assert tuple(gits.discounted_path(cost, steps, 1.15)) == best


def test_gits_costs_are_those_of_euler_steps_on_a_gaussian():
    oracle = Gaussian(0.5, (4,))
    noise = gits.warm_up_noise(0, 32, (4,))
    found = gits.Gits.measure(fs.Denoiser.from_denoiser(oracle.denoise, 0.002, 80.0), noise)
    i, j = 20, 30
    s_i, s_j = float(found.s[i]), float(found.s[j])
    step = 1 + (s_j - s_i) * s_i / (0.25 + s_i**2)  # of Euler's method, against the exact flow
    exact = math.sqrt((0.25 + s_j**2) / (0.25 + s_i**2))
    at_start = noise * 80 * math.sqrt((0.25 + s_i**2) / (0.25 + 80**2))
    expected = abs(step - exact) * float(at_start.norm(dim=1).mean())
    assert found.costs["l2"][i, j] == pytest.approx(expected, rel=0.02)
    assert np.abs(found.costs["dev"][np.triu_indices(61, 1)]).max() < 1e-3  # these paths are straight lines to the end


def test_deviation_is_the_distance_from_the_line():
    """One sample in the plane: from (2, 0) to the origin, so that the deviation is the second coordinate's size."""
    s = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
    z = torch.tensor([[[2.0, 0.0]], [[1.0, 0.3]], [[0.0, 0.0]]], dtype=torch.float64)
    denoised = torch.tensor([[[0.2, 1.0]], [[0.0, -0.5]]], dtype=torch.float64)
    cost = gits._deviations(z / s[:, None, None], denoised, s)
    # z + (s_j - s_i) (z - D) / s_i, of which the second coordinates are 0.5, 0.75 and -0.1.
    np.testing.assert_allclose([cost[0, 1], cost[0, 2], cost[1, 2]], [0.5 - 0.3, 0.75, 0.1], atol=1e-12)


def test_tuned_gits_is_the_best_of_its_settings():
    flow = models.flow()
    noise = gits.warm_up_noise(0, 32, flow.shape)
    paths = {teacher: gits.Gits.measure(flow.denoiser, noise, teacher=teacher) for teacher in ("ipndm", "dpmpp_2m")}
    reference = fs.converged_reference(flow.denoiser, flow.shape, samples=32, seed=7, progress=False)
    tuning = gits.GitsTuning(flow.denoiser, paths, reference)
    best, calls = tuning.schedule("dpmpp_2m", 5)
    others = [p.schedule(5, m, d) for p in paths.values() for m in gits.METRICS for d in gits.DISCOUNTS]
    assert len(others) == 16
    assert tuning._error(best, "dpmpp_2m") == min(tuning._error(other, "dpmpp_2m") for other in others)
    different = len({tuple(other.tolist()) for other in others})
    assert calls == 2 * 60 * 32 + reference.model_calls + different * 5 * 32


@pytest.fixture(scope="module")
def digits_oss():
    digits = models.digits()
    return optimal_steps.OptimalSteps.measure(digits.denoiser, gits.warm_up_noise(0, 16, digits.shape), 10)


@pytest.mark.parametrize("steps", AUTHORS_OSS)
def test_oss_is_its_authors(digits_oss, steps):
    # Printed to four places after the point; neighbours on the teacher's grid are at least 0.02 apart in log sigma.
    np.testing.assert_allclose(digits_oss.schedule(steps)[:-1], AUTHORS_OSS[steps], rtol=1e-4, atol=6e-5)


@pytest.mark.parametrize("process", ["ve", "flow"])
def test_oss_is_its_greedy_search_written_out(process):
    """Against the definition in loops, state by state, in the coordinates of flow matching."""
    modes = torch.tensor([[1.0, 0.0, 0.5], [-1.0, 0.5, 0.0]])
    oracle = GaussianMixture(torch.tensor([0.4, 0.6]), modes, 0.04 * torch.eye(3).expand(2, 3, 3))
    denoiser = fs.Denoiser.from_denoiser(oracle.denoise, 0.02, 20.0) if process == "ve" else models.flow().denoiser
    noise = gits.warm_up_noise(0, 4, (3,) if process == "ve" else (2,))
    most, levels = 4, 12
    found = optimal_steps.OptimalSteps.measure(denoiser, noise, most, levels=levels)
    t = denoiser_times(denoiser, levels)
    for b, eps in enumerate(noise):
        assert found.before[:, b].tolist() == greedy(denoiser, eps[None], t, most)
    assert found.model_calls(3) == 4 * (12 + 1 + 2 * 12)


def denoiser_times(denoiser, levels):
    if isinstance(denoiser.process, FlowMatching):
        return [1 - k / levels for k in range(levels)] + [0.0]
    s = fs.baselines.karras(levels, denoiser.process.s_min, denoiser.process.s_max)
    return (s / (1 + s)).tolist()


def greedy(denoiser, eps, t, most):
    """The positions before, [most][levels + 1], by Euler steps ``x + (t_j - t_i) (x - D) / t_i``."""

    def velocity(x, i):
        level = torch.tensor(t[i] / (1 - t[i]) if t[i] < 1 else math.inf, dtype=torch.float64)
        return (x - denoiser.denoise(x / t[i], level)) / t[i]

    x, teacher = eps * t[0], []
    for i in range(len(t) - 1):
        teacher.append(x)
        x = x + (t[i + 1] - t[i]) * velocity(x, i)
    teacher.append(x)
    states, best, before, rows = {0: eps * t[0]}, [math.inf] * len(t), [0] * len(t), []
    for _ in range(most):
        reached = dict(states)
        for i, state in states.items():
            if i == len(t) - 1:
                continue
            v = velocity(state, i)
            for j in range(i + 1, len(t)):
                end = state + (t[j] - t[i]) * v
                cost = float((end - teacher[j]).square().mean())
                if cost < best[j] * (1 - 1e-6):
                    best[j], before[j], reached[j] = cost, i, end
        states = reached
        rows.append(list(before))
    return rows


def test_oss_schedules_are_medians_of_paths():
    digits = models.digits()
    found = optimal_steps.OptimalSteps.measure(digits.denoiser, gits.warm_up_noise(0, 4, digits.shape), 6, levels=60)
    position = found.before[2, :, 60]
    last_of_three = sorted(position.tolist())
    sigmas = found.schedule(3)
    middle = -(-(last_of_three[1] + last_of_three[2]) // 2)
    assert float(sigmas[2]) == float(found.s[middle])
    for steps in range(1, 7):
        sigmas = found.schedule(steps)
        assert len(sigmas) == steps + 1
        assert float(sigmas[0]) == 80.0
        assert float(sigmas[-1]) == 0.0
        assert bool((sigmas[:-1] > sigmas[1:]).all())
