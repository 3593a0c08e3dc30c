import itertools
import math

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsched import baselines
from fastsched.denoisers.oracles import Gaussian

RANGED = {
    "karras": baselines.karras,
    "exponential": baselines.exponential,
    "linear": baselines.linear,
    "kl_optimal": baselines.kl_optimal,
    "vp_uniform": baselines.vp_uniform,
    "cosine": baselines.cosine,
    "beta": baselines.beta,
}
UNRANGED = {
    "flow_shift": baselines.flow_shift,
    "ays-sd15": baselines.ays,
    "ays-sdxl": lambda steps: baselines.ays(steps, "sdxl"),
    "ays-svd": lambda steps: baselines.ays(steps, "svd"),
}
# A few operations, each within an ulp, on numbers amplified by powers of up to 7.
CLOSE = {"rtol": 1e-12, "atol": 0.0}


def _assert_convention(sigmas, steps):
    assert sigmas.dtype == torch.float64
    assert sigmas.shape == (steps + 1,)
    assert sigmas.isfinite().all()
    assert sigmas[-1] == 0
    assert (sigmas[:-1] > sigmas[1:]).all()


@pytest.mark.parametrize("name", RANGED)
@settings(max_examples=50, deadline=None)
@given(steps=st.integers(1, 200), sigma_min=st.floats(1e-4, 1.0), ratio=st.floats(1.5, 1e6), spare_last=st.booleans())
def test_ranged_schedules_keep_the_convention_and_both_ends(name, steps, sigma_min, ratio, spare_last):
    sigma_max = sigma_min * ratio
    sigmas = RANGED[name](steps, sigma_min, sigma_max, spare_last=spare_last)
    _assert_convention(sigmas, steps)
    assert sigmas[0] == sigma_max
    if not spare_last and steps > 1:
        assert sigmas[-2] == sigma_min
    if spare_last:
        longer = RANGED[name](steps + 1, sigma_min, sigma_max)
        assert torch.equal(sigmas[:-1], longer[:-2])


@pytest.mark.parametrize("name", UNRANGED)
@settings(max_examples=50, deadline=None)
@given(steps=st.integers(1, 500))
def test_other_schedules_keep_the_convention(name, steps):
    _assert_convention(UNRANGED[name](steps), steps)


@pytest.mark.parametrize("name", ["karras", "exponential", "linear", "beta"])
@settings(max_examples=25, deadline=None)
@given(scale=st.floats(1e-3, 1e3), steps=st.integers(1, 30))
def test_scale_free_schedules_scale_with_their_range(name, scale, steps):
    scaled = RANGED[name](steps, 0.01 * scale, 80.0 * scale)
    # Linear levels near sigma_min are small differences of numbers near sigma_max.
    torch.testing.assert_close(scaled, scale * RANGED[name](steps, 0.01, 80.0), rtol=1e-12, atol=1e-14 * 80 * scale)


@settings(max_examples=25, deadline=None)
@given(scale=st.floats(1e-3, 1e3), steps=st.integers(1, 30))
def test_kl_optimal_scales_with_its_range_and_the_data(scale, steps):
    scaled = baselines.kl_optimal(steps, 0.01 * scale, 80.0 * scale, 0.5 * scale)
    torch.testing.assert_close(scaled, scale * baselines.kl_optimal(steps, 0.01, 80.0, 0.5), **CLOSE)


@pytest.mark.parametrize("name", RANGED)
def test_one_step(name):
    for spare_last in (False, True):
        assert RANGED[name](1, 0.002, 80.0, spare_last=spare_last).tolist() == [80.0, 0.0]


def test_karras_by_hand():
    # rho = 2: square roots 3 and 1 of 9 and 1, halfway 2; four nodes at 3, 7/3, 5/3, 1.
    assert baselines.karras(3, 1.0, 9.0, rho=2.0).tolist() == pytest.approx([9, 4, 1, 0])
    assert baselines.karras(4, 1.0, 9.0, rho=2.0).tolist() == pytest.approx([9, 49 / 9, 25 / 9, 1, 0])
    assert baselines.karras(3, 1.0, 9.0, rho=2.0, spare_last=True).tolist() == pytest.approx([9, 49 / 9, 25 / 9, 0])


def test_karras_middle_node_of_the_usual_range():
    middle = float(baselines.karras(3, 0.002, 80.0)[1])
    assert middle == pytest.approx(((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7, rel=1e-12)
    assert middle == pytest.approx(2.5152, abs=1e-3)


def test_karras_tends_to_its_limits():
    torch.testing.assert_close(baselines.karras(5, 0.1, 8.0, rho=1.0), baselines.linear(5, 0.1, 8.0), **CLOSE)
    # The distance to the limit is of order log(ratio)^2 / (8 rho).
    far = baselines.karras(5, 0.1, 8.0, rho=1e6)
    torch.testing.assert_close(far, baselines.exponential(5, 0.1, 8.0), rtol=3e-6, atol=0)


def test_exponential_and_linear_by_hand():
    assert baselines.exponential(4, 0.1, 100.0).tolist() == pytest.approx([100, 10, 1, 0.1, 0])
    assert baselines.linear(3, 1.0, 5.0).tolist() == pytest.approx([5, 3, 1, 0])
    assert baselines.linear(2, 1.0, 5.0, spare_last=True).tolist() == pytest.approx([5, 3, 0])


def test_kl_optimal_by_hand():
    # Angles of 60 and 30 degrees, halfway 45.
    low, high = math.tan(math.pi / 6), math.tan(math.pi / 3)
    assert baselines.kl_optimal(3, low, high).tolist() == pytest.approx([high, 1, low, 0])
    assert baselines.kl_optimal(3, 2 * low, 2 * high, 2.0)[1] == pytest.approx(2)


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_kl_optimal_tends_to_the_gaussian_optimum(steps):
    optimum = Gaussian(0.5, (1,)).optimal_ddim_schedule(steps, 80.0)
    ours = baselines.kl_optimal(steps, 1e-9, 80.0, 0.5, spare_last=True)
    # The last angle is 2e-9 instead of 0; near sigma_max the tangent stretches angles by 1 / cos^2 / tan = 160.
    torch.testing.assert_close(ours, optimum, rtol=160 * 2e-9, atol=0)


def test_vp_uniform_by_hand():
    def level(t):
        return math.sqrt(math.exp(19.9 * t * t / 2 + 0.1 * t) - 1)

    assert level(1.0) == pytest.approx(152.17, abs=0.01)
    assert level(1e-3) == pytest.approx(0.010486, abs=1e-6)
    expected = [level(1 + u * (1e-3 - 1)) for u in (0, 0.25, 0.5, 0.75, 1)]
    ours = baselines.vp_uniform(5, level(1e-3), level(1.0))
    assert ours.tolist() == pytest.approx([*expected, 0], rel=1e-10)


def test_cosine_by_hand():
    def level(t):
        return math.sqrt(1 / math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 - 1)

    expected = [level(t) for t in (0.9, 0.7, 0.5, 0.3, 0.1)]
    assert baselines.cosine(5, level(0.1), level(0.9)).tolist() == pytest.approx([*expected, 0], rel=1e-10)


def test_beta_against_scipy():
    ours = baselines.beta(5, 0.1, 10.0)
    quantiles = scipy.stats.beta.ppf([1, 0.75, 0.5, 0.25, 0], 0.6, 0.6)
    assert ours.tolist() == pytest.approx([*(0.1 + 9.9 * quantiles), 0], rel=1e-9)
    assert float(ours[2]) == pytest.approx(5.05)  # the median of a symmetric distribution
    torch.testing.assert_close(
        baselines.beta(6, 0.1, 10.0, 1.0, 1.0), baselines.linear(6, 0.1, 10.0), rtol=1e-9, atol=0
    )


def test_beta_refuses_levels_that_coincide():
    with pytest.raises(ValueError, match="steps=400 levels"):
        baselines.beta(400, 0.002, 80.0, 0.05, 0.05)


def test_flow_shift_by_hand():
    assert baselines.flow_shift(4).tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert baselines.flow_shift(4, 1.0).tolist() == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert baselines.flow_shift(1).tolist() == [1, 0]
    with pytest.raises(ValueError, match="shift must leave"):
        baselines.flow_shift(4, 2**64)


def test_flow_shift_mu_by_hand():
    assert baselines.flow_shift_mu(256) == pytest.approx(0.5)
    assert baselines.flow_shift_mu(4096) == pytest.approx(1.15)
    assert baselines.flow_shift_mu(2176) == pytest.approx(0.825)  # halfway
    # Flux writes its shift as e^mu / (e^mu + 1/t - 1).
    mu, t = 1.15, 0.25
    ours = baselines.flow_shift(4, math.exp(mu))
    assert float(ours[3]) == pytest.approx(math.exp(mu) / (math.exp(mu) + 1 / t - 1))


@pytest.mark.parametrize(
    ("model", "first", "last"), [("sd15", 14.615, 0.152), ("sdxl", 14.615, 0.113), ("svd", 700.0, 0.034)]
)
def test_ays_tables(model, first, last):
    table = baselines.ays(10, model)
    assert table[0] == pytest.approx(first)
    assert table[-2] == pytest.approx(last)
    doubled = baselines.ays(20, model)
    torch.testing.assert_close(doubled[::2], table, **CLOSE)
    for i, (left, right) in enumerate(itertools.pairwise(table[:-1].tolist())):
        assert float(doubled[2 * i + 1]) == pytest.approx(math.sqrt(left * right), rel=1e-12)
    assert baselines.ays(1, model).tolist() == pytest.approx([first, 0])


@pytest.mark.parametrize("name", RANGED)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0.1, 1.0), "steps must be at least 1, got 0"),
        ((-3, 0.1, 1.0), "steps must be at least 1, got -3"),
        ((5, 0.0, 1.0), "sigma_min must be positive"),
        ((5, -0.1, 1.0), "sigma_min must be positive"),
        ((5, math.nan, 1.0), "sigma_min must be positive and finite"),
        ((5, 0.1, math.inf), "sigma_max must be positive and finite"),
        ((5, 1.0, 1.0), "sigma_min must be below sigma_max"),
        ((5, 2.0, 1.0), "sigma_min must be below sigma_max"),
    ],
)
def test_bad_ranges_are_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        RANGED[name](*arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: baselines.karras(5, 0.1, 1.0, rho=0.0), "rho must be positive"),
        (lambda: baselines.kl_optimal(5, 0.1, 1.0, data_std=-1.0), "data_std must be positive"),
        (lambda: baselines.vp_uniform(5, 0.1, 1.0, beta_min=0.0), "beta_min must be positive"),
        (lambda: baselines.vp_uniform(5, 0.1, 1.0, 3.0, 2.0), "beta_min must be below beta_max"),
        (lambda: baselines.beta(5, 0.1, 1.0, alpha=0.0), "alpha must be positive"),
        (lambda: baselines.beta(5, 0.1, 1.0, beta=math.nan), "beta must be positive"),
        (lambda: baselines.flow_shift(0), "steps must be at least 1"),
        (lambda: baselines.flow_shift(4, 0.0), "shift must be positive"),
        (lambda: baselines.flow_shift_mu(0), "tokens must be at least 1"),
        (lambda: baselines.flow_shift_mu(9, base_tokens=5, max_tokens=5), "max_tokens must differ"),
        (lambda: baselines.ays(0), "steps must be at least 1"),
        (lambda: baselines.ays(10, "sd3"), "model must be one of 'sd15', 'sdxl', 'svd', got 'sd3'"),  # type: ignore[arg-type]  # wrong on purpose
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_extreme_shifts_descend_or_are_refused():
    with pytest.raises(ValueError, match="shift must leave 3 times apart in float64"):
        baselines.flow_shift(3, 1e300)
    assert baselines.flow_shift(3, 1e-300).tolist() == pytest.approx([1.0, 2e-300, 5e-301, 0.0])


def test_a_schedule_has_no_gradient():
    sigma_min = torch.tensor(0.1, requires_grad=True)
    assert not baselines.linear(3, sigma_min, 10.0).requires_grad
