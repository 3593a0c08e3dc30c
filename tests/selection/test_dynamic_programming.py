import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import exact_denoisers, mixture

import fastsched as fs
from fastsched.costs import path_cost
from fastsched.selection.arc_length import equal_arc_length
from fastsched.selection.dynamic_programming import cheapest_path, first_order_path, second_order_path

KINDS = exact_denoisers(mixture())


@pytest.fixture(scope="module")
def stats():
    return fs.measure(KINDS["x0"], (4,), levels=9, samples=3, progress=False)


def every_path(last, steps):
    return ((0, *inner, last) for inner in itertools.combinations(range(1, last), steps - 1))


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpmpp_2m"])
def test_dynamic_programming_finds_the_best_of_all_paths(stats, solver):
    cost = path_cost(stats, solver)
    for steps in range(1, 9):
        best = min(every_path(9, steps), key=lambda path: float(cost.of(path).sum()))
        assert tuple(cheapest_path(cost, steps)) == best


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_first_order_path_against_all_paths(seed):
    cost = np.random.default_rng(seed).exponential(size=(7, 7))
    total = lambda path: sum(cost[a, b] for a, b in itertools.pairwise(path))
    for steps in range(1, 7):
        path = first_order_path(cost, steps)
        assert tuple(path) in every_path(6, steps)
        assert total(path) == pytest.approx(min(map(total, every_path(6, steps))), rel=1e-12)


def best_of_all_paths(first, cost, edges):
    """The total and the levels of the cheapest path of ``edges`` edges; ``(inf, [])`` if there is none.

    Among equally cheap paths it is the one that is smallest when read from its end: that is what the smallest index at
    every argmin of the dynamic programming gives.
    """
    best = math.inf, []
    for path in every_path(len(first) - 1, edges):
        total = float(first[path[1]])
        for triple in zip(path, path[1:], path[2:], strict=False):
            total += float(cost[triple])
        if total < math.inf and (total, path[::-1]) < (best[0], tuple(best[1][::-1])):
            best = total, list(path)
    return best


def random_costs(M, seed, kind):
    """Costs of first and of later edges: ``real``, ``ties`` (0, 1 or 2), or ``forbidden`` (a third of them inf)."""
    generator = np.random.default_rng(seed)
    if kind == "ties":
        return tuple(generator.integers(0, 3, (M,) * k).astype(float) for k in (1, 3))
    first, cost = (generator.random((M,) * k) for k in (1, 3))
    if kind == "forbidden":
        cost[generator.random(cost.shape) < 1 / 3] = np.inf
    return first, cost


@pytest.mark.parametrize("M", range(2, 9))
@pytest.mark.parametrize("kind", ["real", "ties", "forbidden"])
def test_second_order_path_against_all_paths(M, kind):
    compared = 0
    for seed, edges in itertools.product(range(10), range(1, M)):
        first, cost = random_costs(M, seed, kind)
        _, path = best_of_all_paths(first, cost, edges)
        if path:  # else every path is forbidden
            compared += 1
            assert second_order_path(first, cost, edges) == path
    assert compared >= 10


def test_best_of_all_paths_by_hand():
    first, cost = np.array([np.nan, 1.0, 4.0, 10.0]), np.full((4, 4, 4), np.inf)
    cost[0, 1, 2], cost[0, 1, 3], cost[0, 2, 3], cost[1, 2, 3] = 1.0, 6.0, 3.0, 2.0
    # 0 1 3 and 0 2 3 both cost 7: the smaller level before the last one wins.
    expected = [(10.0, [0, 3]), (7.0, [0, 1, 3]), (4.0, [0, 1, 2, 3]), (math.inf, [])]
    assert [best_of_all_paths(first, cost, edges) for edges in range(1, 5)] == expected


def test_second_order_path_reads_nothing_outside_its_edges():
    M = 7
    first, cost = random_costs(M, 0, "real")
    poisoned_first, poisoned = first.copy(), np.full_like(cost, np.nan)
    poisoned_first[0] = np.nan
    for triple in itertools.combinations(range(M), 3):
        poisoned[triple] = cost[triple]
    for edges in range(1, M):
        assert second_order_path(poisoned_first, poisoned, edges) == second_order_path(first, cost, edges)


@pytest.mark.parametrize("solver", ["ddim", "heun"])
def test_cost_never_rises_with_one_more_step(stats, solver):
    cost = path_cost(stats, solver, weighted=False)
    totals = [float(cost.of(cheapest_path(cost, steps)).sum()) for steps in range(1, 9)]
    assert (np.diff(totals) <= 1e-12 * totals[0]).all()


def test_steps_out_of_range(stats):
    cost = path_cost(stats, "ddim")
    with pytest.raises(ValueError, match="at most 8 on 9 levels, got 9; measure with more, if the network knows more"):
        cheapest_path(cost, 9)
    for steps in (0, -1):
        with pytest.raises(ValueError, match="steps must be at least 1"):
            cheapest_path(cost, steps)
    with pytest.raises(TypeError, match="steps must be a whole number"):
        cheapest_path(cost, 2.5)


def test_equal_arc_length_of_a_known_length():
    """Length ``log(c^2 + s^2)`` from 0: the levels are uniform in it."""
    s = torch.logspace(2, -2, 400, dtype=torch.float64)
    length = torch.log(0.25 + s**2)
    chosen = equal_arc_length(s, -length.diff(), 11)
    found = torch.log(0.25 + chosen**2)
    torch.testing.assert_close(found.diff(), found.diff().mean().expand(10), rtol=1e-3, atol=0)
    assert (chosen[0], chosen[-1]) == (s[0], s[-1])


@given(st.integers(0, 10_000), st.integers(2, 30))
@settings(deadline=None)
def test_equal_arc_length_descends_and_keeps_the_ends(seed, n):
    rng = np.random.default_rng(seed)
    s = torch.from_numpy(np.sort(rng.uniform(0.01, 100, 20))[::-1].copy())
    lengths = torch.from_numpy(rng.exponential(size=19) * rng.integers(0, 2, 19))
    lengths[rng.integers(19)] += 1.0
    chosen = equal_arc_length(s, lengths, n)
    assert bool((chosen.diff() < 0).all())
    assert (chosen[0], chosen[-1]) == (s[0], s[-1])


@pytest.mark.parametrize(
    ("lengths", "message"),
    [([1.0], r"increments must have shape \[2\]"), ([1.0, -1.0], "non-negative"), ([0.0, 0.0], "not all 0"),
     ([1.0, float("nan")], "finite")],
)  # fmt: skip
def test_equal_arc_length_refuses(lengths, message):
    with pytest.raises(ValueError, match=message):
        equal_arc_length(torch.tensor([3.0, 2.0, 1.0]), torch.tensor(lengths), 3)
