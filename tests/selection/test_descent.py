import math

import numpy as np
import pytest

from fastsched.selection.descent import descend, log_gaps

TARGET = np.log([6.0, 2.5, 0.4, 0.1])


def convex(levels):
    """Least, 1, at `TARGET`; nodes are coupled."""
    off = np.log(levels[:, 1:-1]) - TARGET[: levels.shape[1] - 2]
    return 1 + (off**2).sum(1) + 0.5 * off.sum(1) ** 2


def recorded(error):
    calls = []

    def function(levels):
        calls.append(levels.copy())
        return error(levels)

    return function, calls


@pytest.mark.parametrize("start", [[9.0, 8.0, 7.0, 6.0], [6.0, 0.2, 0.15, 0.12], [3.0, 2.0, 1.0, 0.5]])
@pytest.mark.parametrize("top", [10.0, math.inf])
def test_descent_finds_a_convex_minimum(start, top):
    levels = np.array([top, *start, 0.0])
    found = descend(convex, levels, 0.01, 10.0, 0.05)
    assert convex(found[None])[0] <= 1.003  # the least is 1
    np.testing.assert_allclose(np.log(found[1:-1]), TARGET, atol=0.04)  # each node alone would cost 0.0024
    assert (found[0], found[-1]) == (top, 0.0)


@pytest.mark.parametrize("unit", [1e-12, 1e12])
def test_the_unit_of_the_error_does_not_matter(unit):
    start = np.array([10.0, 9.0, 8.0, 7.0, 6.0, 0.0])
    calls, found = counted_descent(convex, start)
    in_unit, in_unit_found = counted_descent(lambda levels: unit * convex(levels), start)
    np.testing.assert_allclose(in_unit_found, found, rtol=1e-6)
    assert in_unit == calls


def counted_descent(error, start):
    error, calls = recorded(error)
    found = descend(error, start, 0.01, 10.0, 0.05)
    return len(calls), found


def test_descent_leaves_a_kink_at_its_start():
    """The start is at the bottom of a narrow kink, 0.1 deep, where the gradient leads away from `TARGET`."""
    start = np.array([10.0, 3.0, 1.2, 0.2, 0.05, 0.0])

    def kinked(levels):
        away = np.abs(np.log(levels[:, 1:-1] / start[1:-1])).sum(1)
        return convex(levels) + 0.1 * np.minimum(100 * away, 1.0)

    found = descend(kinked, start, 0.01, 10.0, 0.05)
    assert kinked(found[None])[0] <= 1.103  # the least but for the kink is 1.1
    np.testing.assert_allclose(np.log(found[1:-1]), TARGET, atol=0.04)


def test_descent_tries_only_descending_levels_apart_and_above_the_lowest():
    error, calls = recorded(lambda levels: np.exp(np.log(levels[:, 1:-1]).sum(1)))  # ever lower
    found = descend(error, np.array([10.0, 5.0, 2.0, 1.0, 0.0]), 0.01, 10.0, 0.05)
    tried = np.concatenate(calls)
    assert (np.diff(np.log(tried[:, :-1]), axis=1) < -0.049).all()
    assert tried[:, -2].min() >= 0.01
    assert found[-2] < 0.011
    assert np.log(found[1] / found[3]) == pytest.approx(0.1, rel=0.1)


def test_descent_below_pure_noise_stays_below_ten_times_the_highest():
    start = np.array([math.inf, 30.0, 0.0])
    found = descend(lambda levels: 1 / levels[:, 1], start, 0.01, 10.0, 0.05)
    assert 90 < found[1] < 100


def test_a_start_of_nodes_too_close_is_spread():
    found = descend(convex, np.array([10.0, 2.0, 1.999, 1.998, 1.997, 0.0]), 0.01, 10.0, 0.05)
    np.testing.assert_allclose(np.log(found[1:-1]), TARGET, atol=0.02)


def test_descent_never_raises_the_error():
    def rough(levels):
        found = np.sin(40 * np.log(levels[:, 1:-1])).sum(1) + np.cos(17 * np.log(levels[:, 1:-1])).prod(1)
        return np.exp(found)

    generator = np.random.default_rng(0)
    for _ in range(5):
        levels = np.array([20.0, *np.sort(generator.uniform(0.1, 10.0, 4))[::-1], 0.0])
        found = descend(rough, levels, 0.05, 20.0, 0.0)
        assert rough(found[None])[0] <= rough(levels[None])[0]
        again = descend(rough, levels, 0.05, 20.0, 0.0)
        assert (found == again).all()


@pytest.mark.parametrize("everywhere", [0.0, math.inf, math.nan])
def test_descent_of_an_error_without_a_slope_ends_at_once(everywhere):
    start = np.array([10.0, 5.0, 1.0, 0.0])
    error, calls = recorded(lambda levels: np.full(len(levels), everywhere))
    found = descend(error, start, 0.01, 10.0, 0.05)
    np.testing.assert_array_equal(found, start)
    assert len(calls) < 30


def test_descent_stays_where_there_is_no_room():
    start = np.array([10.0, 9.9, 9.8, 0.0])
    assert (descend(convex, start, 9.7, 10.0, 0.05) == start).all()


@pytest.mark.parametrize("top", [10.0, math.inf])
def test_descent_of_one_and_two_steps(top):
    one = np.array([top, 0.0])
    assert (descend(convex, one, 0.01, 10.0, 0.05) == one).all()
    found = descend(convex, np.array([top, 0.3, 0.0]), 0.01, 10.0, 0.05)
    assert found[1] == pytest.approx(6.0, rel=0.02)


def test_gaps_by_hand():
    up, down = log_gaps(np.array([8.0, 4.0, 1.0, 0.0]), 0.5, 8.0)
    assert up == pytest.approx([math.log(2), math.log(4)])
    assert down == pytest.approx([math.log(4), math.log(2)])  # to the lowest, nearer than 1.5
    up, down = log_gaps(np.array([math.inf, 4.0, 0.0]), 0.01, 8.0)
    assert up == pytest.approx([1.5])  # nearer than ten times the highest
    assert down == pytest.approx([1.5])
    assert log_gaps(np.array([math.inf, 70.0, 0.0]), 0.01, 8.0)[0] == pytest.approx([math.log(80 / 70)])
