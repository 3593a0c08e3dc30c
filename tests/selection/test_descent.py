import math

import numpy as np
import pytest

from fastsched.selection.descent import coordinate_descent, descend, log_gaps

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


def test_coordinate_descent_finds_a_convex_minimum():
    target = [0, 7, 11, 30, 41, 60]
    found = coordinate_descent(lambda nodes, n: (nodes[n] - target[n]) ** 2, [0, 1, 2, 3, 4, 60])
    assert found == target


@pytest.mark.parametrize("start", [[9.0, 8.0, 7.0, 6.0], [6.0, 0.2, 0.15, 0.12], [3.0, 2.0, 1.0, 0.5]])
@pytest.mark.parametrize("top", [10.0, math.inf])
def test_descent_finds_a_convex_minimum(start, top):
    levels = np.array([top, *start, 0.0])
    [(found, value)] = descend(convex, [levels], 0.01, 10.0)
    assert value == convex(found[None])[0] <= convex(levels[None])[0]
    # no move of 5% of a gap lowers the error any more: within half of one of the minimum, but for the coupling of nodes
    gaps = np.maximum(*log_gaps(found, 0.01, 10.0))
    assert (np.abs(np.log(found[1:-1]) - TARGET) < 0.05 * gaps.max()).all()
    assert (found[0], found[-1]) == (top, 0.0)


def test_descents_side_by_side_are_those_alone():
    starts = [[9.0, 8.0, 7.0, 6.0], [6.0, 0.2, 0.15, 0.12], [3.0, 2.0, 1.0, 0.5]]
    levels = [np.array([10.0, *start, 0.0]) for start in starts]
    error, calls = recorded(convex)
    together = descend(error, levels, 0.01, 10.0)
    alone = []
    for each, (found, value) in zip(levels, together, strict=True):
        own, own_calls = recorded(convex)
        [(expected, least)] = descend(own, [each], 0.01, 10.0)
        np.testing.assert_array_equal(found, expected)
        assert value == least
        alone.append(len(own_calls))
    assert len(calls) == max(alone) < sum(alone)


def test_descent_tries_only_descending_levels_above_the_lowest():
    error, calls = recorded(lambda levels: np.log(levels[:, 1:-1]).sum(1))  # ever lower
    [(found, _)] = descend(error, [np.array([10.0, 5.0, 2.0, 1.0, 0.0])], 0.01, 10.0)
    tried = np.concatenate(calls)
    assert (np.diff(tried, axis=1) < 0).all()
    assert tried[:, -2].min() >= 0.01
    assert found[-2] < 0.011


def test_descent_below_pure_noise_stays_below_ten_times_the_highest():
    [(found, _)] = descend(lambda levels: -levels[:, 1], [np.array([math.inf, 30.0, 0.0])], 0.01, 10.0)
    left = np.prod([(1 - share) ** 3 for share in (0.4, 0.2, 0.1, 0.05)])  # of the gap, after three moves of each share
    assert found[1] == pytest.approx(100 * (30 / 100) ** left, rel=1e-12)


def test_descent_never_raises_the_error():
    """Of a rough function: the value returned is that of the levels returned, and the least of all that were tried."""
    values = []

    def rough(levels):
        found = np.sin(40 * np.log(levels[:, 1:-1])).sum(1) + np.cos(17 * np.log(levels[:, 1:-1])).prod(1)
        values.extend(found)
        return found

    generator = np.random.default_rng(0)
    for _ in range(5):
        levels = np.array([20.0, *np.sort(generator.uniform(0.1, 10.0, 4))[::-1], 0.0])
        values.clear()
        [(found, value)] = descend(rough, [levels], 0.05, 20.0)
        assert value == min(values) <= values[0]
        assert value == pytest.approx(rough(found[None])[0], abs=1e-12)
        [(again, _)] = descend(rough, [levels], 0.05, 20.0)
        assert (found == again).all()


def test_descent_does_not_go_where_the_error_is_infinite():
    def fenced(levels):
        return np.where(levels[:, 1] > 7.0, convex(levels), np.inf)

    [(found, value)] = descend(fenced, [np.array([10.0, 9.0, 3.0, 0.5, 0.2, 0.0])], 0.01, 10.0)
    assert 7.0 < found[1] < 7.5  # the minimum, 6, is beyond the fence
    assert value == convex(found[None])[0]


def test_descent_leaves_a_start_of_infinite_error():
    fenced = lambda levels: np.where(levels[:, 1] < 7.0, convex(levels), np.inf)
    [(found, value)] = descend(fenced, [np.array([10.0, 7.5, 3.0, 0.5, 0.2, 0.0])], 0.01, 10.0)
    assert value == convex(found[None])[0]
    nowhere = np.array([10.0, 5.0, 1.0, 0.0])
    [(found, value)] = descend(lambda levels: np.full(len(levels), np.inf), [nowhere], 0.01, 10.0)
    assert (found == nowhere).all()
    assert value == math.inf


@pytest.mark.parametrize("top", [10.0, math.inf])
def test_descent_of_one_and_two_steps(top):
    one = np.array([top, 0.0])
    [(found, value)] = descend(lambda levels: np.full(len(levels), 3.0), [one], 0.01, 10.0)
    assert (found == one).all()
    assert value == 3.0
    [(found, _)] = descend(convex, [np.array([top, 0.3, 0.0])], 0.01, 10.0)
    assert found[1] == pytest.approx(6.0, rel=0.15)


def test_gaps_by_hand():
    up, down = log_gaps(np.array([8.0, 4.0, 1.0, 0.0]), 0.5, 8.0)
    assert up == pytest.approx([math.log(2), math.log(4)])
    assert down == pytest.approx([math.log(4), math.log(2)])  # to the lowest, nearer than 1.5
    up, down = log_gaps(np.array([math.inf, 4.0, 0.0]), 0.01, 8.0)
    assert up == pytest.approx([1.5])  # nearer than ten times the highest
    assert down == pytest.approx([1.5])
    assert log_gaps(np.array([math.inf, 70.0, 0.0]), 0.01, 8.0)[0] == pytest.approx([math.log(80 / 70)])
