import itertools
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from models import exact_denoisers, vp_table

import fastsched as fs
from fastsched.costs import CostMatrix, ModelCalls, stein_corrector, stein_predictor
from fastsched.denoisers.level_grids import log_uniform
from fastsched.denoisers.noise import VarianceExploding


def _exact_cost(values, s, order):
    """A cost matrix of known entries, one sample."""
    pairs = torch.triu_indices(len(s), len(s), 1).T
    return CostMatrix(
        "exact", VarianceExploding(float(s[-1]), float(s[0])), s, pairs, values[None], order, ModelCalls(0)
    )


def _gaussian_cost(name, levels=80, std=0.5):
    oracle = fs.oracles.Gaussian(std, (1,))
    s = log_uniform(80.0, 0.002, levels)
    i, j = torch.triu_indices(levels, levels, 1)
    closed = oracle.stein_corrector if name == "corrector" else oracle.stein_predictor
    return _exact_cost(s[i] ** 2 * closed(s[i], s[j]), s, 2 if name == "corrector" else 4)


@pytest.mark.parametrize("spare_last", [True, False])
def test_dynamic_programming_is_the_best_of_all_paths(spare_last):
    s = torch.linspace(9.0, 1.0, 9, dtype=torch.float64)
    cost = _exact_cost(torch.rand(36, generator=torch.Generator().manual_seed(0), dtype=torch.float64), s, 2)
    for steps in (1, 2, 3, 5):
        nodes = max(2, steps + spare_last)
        best = min(
            itertools.combinations(range(1, 8), nodes - 2),
            key=lambda inner: sum(float(cost.matrix[a, b]) for a, b in itertools.pairwise((0, *inner, 8))),
        )
        expected = [*s[[0, *best, 8]][:steps].tolist(), 0.0]
        assert fs.select(cost, steps, spare_last=spare_last).sigmas.tolist() == expected


@pytest.mark.parametrize("name", ["corrector", "predictor"])
def test_arc_length_is_the_limit_of_dynamic_programming(name):
    """Where the DP's nodes lie along the cumulative length: 1/K apart, but for long steps and the grid."""
    cost = _gaussian_cost(name, levels=360)
    cumulative = np.concatenate([[0.0], np.cumsum(cost.lengths.numpy())])

    def deviation(steps):
        s = fs.select(cost, steps, method="dynamic_programming").sigmas[:-1].numpy()
        where = np.interp(-np.log(s), -np.log(cost.s.numpy()), cumulative / cumulative[-1])
        return np.abs(where - np.arange(steps) / steps).max()

    assert deviation(24) < 0.05
    assert deviation(24) < deviation(12) < deviation(3)

    def total(sigmas):
        index = [int((cost.s - value).abs().argmin()) for value in sigmas[:-1]] + [len(cost.s) - 1]
        return sum(float(cost.matrix[a, b]) for a, b in itertools.pairwise(index))

    for steps in (3, 6, 12):
        by_arc, by_dp = (fs.select(cost, steps, method=m).sigmas for m in ("arc_length", "dynamic_programming"))
        assert total(by_dp) <= total(by_arc)


def test_quartic_costs_take_the_fourth_root():
    """Constant ``delta``: cost = step^p gives equal steps, for either order."""
    s = torch.linspace(9.0, 1.0, 33, dtype=torch.float64)
    i, j = torch.triu_indices(33, 33, 1)
    for order in (2, 4):
        cost = _exact_cost((s[i] - s[j]) ** order, s, order)
        arc = fs.select(cost, 8, method="arc_length").sigmas
        torch.testing.assert_close(arc[:-1], torch.linspace(9, 2, 8, dtype=torch.float64), rtol=1e-3, atol=0.0)
        dp = fs.select(cost, 8, method="dynamic_programming").sigmas
        torch.testing.assert_close(dp[:-1], torch.linspace(9, 2, 8, dtype=torch.float64))


@pytest.mark.parametrize("estimator", [stein_corrector, stein_predictor], ids=["corrector", "predictor"])
def test_fixed_point_makes_all_steps_cost_the_same(estimator):
    oracle = fs.oracles.Gaussian(0.5, (16,))
    denoiser = fs.Denoiser.from_denoiser(oracle.denoise, 0.05, 20.0)
    data = oracle.sample(64, seed=1, dtype=torch.float64)
    settings = {"shape": (16,), "samples": 64, "data": data, "dtype": torch.float64, "progress": False}
    start = fs.baselines.karras(8, 0.05, 20.0)[:-1]
    refined = fs.refine_schedule(partial(estimator, denoiser, **settings), start, iterations=20, tolerance=0.01)
    assert refined.converged
    assert refined.variations[0] > 3 * 0.01
    closed = oracle.stein_corrector if estimator is stein_corrector else oracle.stein_predictor
    s = refined.sigmas
    exact = (s[:-1] ** 2 * closed(s[:-1], s[1:])) ** (1 / refined.cost.order)
    # One set of 64 states for all levels: its norm, common to all steps, is the only noise.
    assert float(exact.std() / exact.mean()) < 0.015
    assert refined.sigmas[0] == 20.0
    assert float(refined.sigmas[-1]) == pytest.approx(0.05)
    assert len(refined.variations) >= 2
    assert refined.model_calls == refined.cost.model_calls * len(refined.variations)


def test_a_network_of_integer_timesteps_is_refined_over_levels_that_it_knows():
    oracle, table = fs.oracles.Gaussian(0.5, (4,)), vp_table(20)
    network = exact_denoisers(oracle, table)["epsilon"].network
    denoiser = fs.Denoiser.from_epsilon(lambda x, t: network(x, t.float()), table, integer_timesteps=True)
    known = denoiser.process.trained_levels.flip(0)
    settings = {"shape": (4,), "samples": 16, "data": oracle.sample(16, seed=1), "progress": False}
    # The lowest levels cost little, so that levels move together at the upper end, which holds few timesteps.
    refined = fs.refine_schedule(partial(stein_corrector, denoiser, **settings), known[[0, 12, 14, 15, 17, 19]])
    assert bool(torch.isin(refined.sigmas, known).all())
    assert (refined.sigmas[0], refined.sigmas[-1]) == (known[0], known[-1])
    assert min(refined.variations) < 0.5 * refined.variations[0]


def _refusing():
    """A denoiser that must not be called."""

    def network(z, s):
        raise AssertionError("it was called before the arguments were checked")

    return fs.Denoiser.from_denoiser(network, 0.05, 20.0)


def test_bad_arguments_are_named():
    cost = _gaussian_cost("corrector", levels=6)
    with pytest.raises(ValueError, match="steps must be at most 5 on 6 levels"):
        fs.select(cost, 6)
    for choose in (partial(fs.select, cost), partial(fs.score_optimal_schedule, _refusing(), shape=(4,))):
        with pytest.raises(ValueError, match="solver must be one without weights of its own, got 'fitted'"):
            choose(2, solver="fitted")
    few = fs.Denoiser.from_epsilon(_refusing().network, vp_table(20), integer_timesteps=True)
    with pytest.raises(ValueError, match="steps must be at most 20, the network's number of timesteps, got 21"):
        fs.score_optimal_schedule(few, 21, shape=(4,), levels=20)
    with pytest.raises(ValueError, match="did you mean 'arc_length'"):
        fs.select(cost, 2, method="arclength")
    neighbours = CostMatrix("exact", cost.process, cost.s, cost.pairs[:5], cost.per_sample[:, :5], 2, cost.calls)
    with pytest.raises(ValueError, match="estimate it with pairs='all'"):
        fs.select(neighbours, 2, method="dynamic_programming")
    with pytest.raises(ValueError, match="tolerance must be positive"):
        fs.refine_schedule(lambda sigmas: cost, [2.0, 1.0], tolerance=0.0)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("s", lambda cost: cost.s.flip(0)),
        ("pairs", lambda cost: cost.pairs + 1),  # of a level that is not there
        ("pairs", lambda cost: cost.pairs.flip(1)),
        ("pairs", lambda cost: cost.pairs.double()),
        ("per_sample", lambda cost: cost.per_sample[:, 1:]),
        ("per_sample", lambda cost: cost.per_sample[:0]),
    ],
)
def test_costs_changed_by_hand_must_be_of_one_form(name, changed):
    cost = _gaussian_cost("corrector", levels=6)
    with pytest.raises(ValueError, match=f"^{name} must "):
        replace(cost, **{name: changed(cost)})


def test_an_estimate_must_return_a_cost():
    with pytest.raises(TypeError, match=r"what estimate\(sigmas=...\) returns must be of class CostMatrix"):
        fs.refine_schedule(lambda sigmas: sigmas, [2.0, 1.0])


@pytest.mark.parametrize("kind", ["adjacent", "all"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "cost must be finite, but has NaN or inf at the step from sigma 2;"),
        (math.inf, "cost must be finite, but has NaN or inf at the step from sigma 2;"),
        (0.0, "cost must be above 0 at a step"),
        (-1.0, "cost must be above 0 at a step"),
    ],
)
def test_costs_that_choose_nothing_are_refused(kind, value, message):
    oracle = fs.oracles.Gaussian(0.5, (4,))
    denoiser = fs.Denoiser.from_denoiser(oracle.denoise, 0.05, 20.0)
    cost = stein_corrector(denoiser, shape=(4,), sigmas=[4.0, 2.0, 1.0, 0.5], samples=2, pairs=kind, progress=False)
    costs = cost.per_sample.clone()
    costs[:, (cost.pairs[:, 0] > 0) | (value <= 0)] = value
    with pytest.raises(ValueError, match=message):
        fs.select(replace(cost, per_sample=costs), 2)
    with pytest.raises(ValueError, match=message):
        fs.refine_schedule(lambda sigmas: replace(cost, per_sample=costs), cost.sigmas)


def test_a_cost_beyond_float32_is_refused():
    denoiser = fs.Denoiser.from_denoiser(fs.oracles.Gaussian(0.5, (4,)).denoise, 1e-30, 1.0)
    with pytest.raises(ValueError, match="cost must be finite"):
        fs.score_optimal_schedule(denoiser, 4, shape=(4,), levels=8, samples=2, progress=False)


def test_writing_into_the_tables_of_a_cost_does_not_change_its_schedule():
    cost = _gaussian_cost("corrector", levels=12)
    before = fs.select(cost, 4)
    for name in ("matrix", "s", "sigmas", "adjacent", "lengths", "per_sample", "stderr"):
        getattr(cost, name).fill_(1.0)
    given = torch.rand(1, 66, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    other = replace(cost, per_sample=given)
    expected = fs.select(other, 4)
    given.fill_(1.0)
    assert fs.select(cost, 4) == before
    assert fs.select(other, 4) == expected != before


def test_an_estimate_that_does_not_use_the_sigmas_it_is_given_is_refused():
    """It gave the levels to start from, as if they had been refined."""
    denoiser = exact_denoisers(fs.oracles.Gaussian(0.5, (2,)))["x0"]
    estimate = partial(stein_corrector, denoiser, shape=(2,), samples=2, progress=False)
    fixed, start = [40.0, 10.0, 1.0, 0.1], [40.0, 8.0, 1.0, 0.1]
    for wrong in (lambda sigmas: estimate(sigmas=fixed), lambda sigmas: estimate(sigmas=sigmas[:-1])):
        with pytest.raises(ValueError, match="returns must be the cost of these sigmas, and for all calls"):
            fs.refine_schedule(wrong, start)
    fs.refine_schedule(estimate, start)
