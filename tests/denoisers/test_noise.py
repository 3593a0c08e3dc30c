import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import vp_table

from fastsched.denoisers.noise import (
    ContinuousVP,
    FlowMatching,
    VarianceExploding,
    VariancePreserving,
    process_from_dict,
)

PROCESSES = {
    "ve": VarianceExploding(0.002, 80.0),
    "vp": VariancePreserving(vp_table()),
    "vp-integer": VariancePreserving(vp_table(), integer_timesteps=True),
    "vp-zero-terminal": VariancePreserving(torch.cat([vp_table()[:-1], torch.zeros(1)])),
    "flow": FlowMatching(),
    "flow-from-s": FlowMatching(0.01, 0.99),
}


@pytest.fixture(params=PROCESSES.values(), ids=PROCESSES.keys())
def process(request):
    return request.param


def test_levels_keep_both_ends_and_descend(process):
    s = process.levels(48)
    assert len(s) == 48
    assert s[0] == process.s_max
    assert s[-1] == process.s_min
    assert bool((s[1:] < s[:-1]).all())


def test_scales_give_the_level(process):
    s = process.levels(32)
    alpha, sigma = process.alpha(s), process.sigma(s)
    torch.testing.assert_close(sigma / alpha, s, rtol=1e-14, atol=0)
    identity = alpha + sigma if process.kind == "flow" else alpha**2 + sigma**2
    if process.kind != "ve":
        torch.testing.assert_close(identity, torch.ones_like(s), rtol=1e-15, atol=0)


def test_sampler_sigma_inverts(process):
    s = torch.cat([process.levels(32), torch.zeros(1, dtype=torch.float64)])
    # t = s/(1+s) near 1 loses 1/(1-t) = 1 + s units in the last place
    torch.testing.assert_close(process.level(process.sampler_sigma(s)), s, rtol=3e-16 * 200, atol=0)


def test_process_survives_a_dictionary(process):
    assert process_from_dict(process.to_dict()) == process


def test_flow_levels_are_times():
    t = torch.tensor([1.0, 0.75, 0.5], dtype=torch.float64)
    assert FlowMatching().level(t).tolist() == [math.inf, 3.0, 1.0]
    assert FlowMatching().timestep(torch.tensor([math.inf, 3.0, 1.0])).tolist() == [1.0, 0.75, 0.5]


def test_timesteps_of_trained_levels_are_their_indices():
    process = VariancePreserving(vp_table())
    t = process.timestep(process.trained_levels)
    torch.testing.assert_close(t, torch.arange(1000, dtype=torch.float64), rtol=0, atol=1e-9)


def test_fractional_timestep_interpolates_log_level():
    process = VariancePreserving(vp_table())
    trained = process.trained_levels
    between = (0.7 * trained[10].log() + 0.3 * trained[11].log()).exp()
    assert float(process.timestep(between.reshape(1))) == pytest.approx(10.3, abs=1e-9)


def test_integer_grid_holds_only_trained_levels():
    process = VariancePreserving(vp_table(), integer_timesteps=True)
    s = process.levels(64)
    assert set(s.tolist()) <= set(process.trained_levels.tolist())
    assert process.timestep(s).tolist() == process.timestep(s).round().tolist()


def test_integer_grid_of_every_timestep_is_all_of_them():
    process = VariancePreserving(vp_table(40), integer_timesteps=True)
    assert process.levels(40).flip(0).tolist() == process.trained_levels.tolist()
    with pytest.raises(ValueError, match=r"levels must be at most 40, .* pass levels=40"):
        process.levels(41)


def test_zero_terminal_snr_starts_at_pure_noise():
    process = PROCESSES["vp-zero-terminal"]
    assert process.s_max == math.inf
    assert float(process.timestep(torch.tensor([math.inf], dtype=torch.float64))) == 999.0


@pytest.mark.parametrize("n", [3, 12, 40])
def test_the_highest_finite_level_follows_pure_noise_in_every_grid(n):
    table = torch.cat([vp_table(40)[:-1], torch.zeros(1)])
    whole, fractional = (VariancePreserving(table, integer_timesteps=flag) for flag in (True, False))
    s = whole.levels(n)
    assert len(set(s.tolist())) == n
    assert s[[0, 1, -1]].tolist() == fractional.levels(n)[[0, 1, -1]].tolist()


@given(low=st.floats(1e-4, 1.0), ratio=st.floats(1.01, 1e6), n=st.integers(2, 100))
def test_ve_grid_is_log_uniform(low, ratio, n):
    s = VarianceExploding(low, low * ratio).levels(n)
    steps = s.log().diff()
    # logs up to 14 in size, each rounded to 2^-52 of itself, a few roundings each
    torch.testing.assert_close(steps, steps.mean().expand(n - 1), rtol=0, atol=2e-14)


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [(0.0, 1.0, "sigma_min must be positive"), (2.0, 1.0, "sigma_min must be below sigma_max"),
     (1e-24, 1e-20, "sigma_max must be within"), (1e18, 1e20, "sigma_max must be within"),
     (0.1, math.inf, "sigma_max must be positive and finite"), (math.nan, 1.0, "sigma_min")],
)  # fmt: skip
def test_bad_sigma_range(low, high, message):
    with pytest.raises(ValueError, match=message):
        VarianceExploding(low, high)


@pytest.mark.parametrize("values", [[0.9, 0.95], [0.9], [1.0, 0.5], [0.5, -0.1], [0.9, 0.0, 0.0]])
def test_bad_alphas_cumprod(values):
    with pytest.raises(ValueError, match="alphas_cumprod"):
        VariancePreserving(values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_cosine_table_that_ends_in_a_rounded_zero_is_refused(dtype):
    table = (torch.arange(1, 101, dtype=dtype) / 100 * math.pi / 2).cos().square()
    with pytest.raises(ValueError, match=r"alphas_cumprod ends in .* 0 up to rounding"):
        VariancePreserving(table)
    assert VariancePreserving(table[:-1]).s_max < 100
    table[-1] = 0
    assert math.isinf(VariancePreserving(table).s_max)


@pytest.mark.parametrize("half", [lambda table: table.half(), lambda table: table.half().numpy()])
def test_a_table_in_16_bits_is_refused(half):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    table = (1 - betas).cumprod(0)
    VariancePreserving(table.float())
    with pytest.raises(ValueError, match=r"alphas_cumprod must be in float32 or float64: 16 bits round .* the betas"):
        VariancePreserving(half(table))


def test_a_table_that_starts_at_one_is_shown():
    with pytest.raises(ValueError, match=r"not the betas; got 1 to 0\.5"):  # alphas_cumprod_prev of many repositories
        VariancePreserving([1.0, 0.9, 0.5])


@pytest.mark.parametrize(("t_min", "t_max"), [(0.0, 1.0), (0.5, 0.4), (0.1, 1.1)])
def test_bad_flow_times(t_min, t_max):
    with pytest.raises(ValueError, match="t_min"):
        FlowMatching(t_min, t_max)


@pytest.mark.parametrize("sub_vp", [False, True])
@pytest.mark.parametrize(("beta_max", "t_max"), [(200.0, 1.0), (3000.0, 1.0), (20.0, 1e3), (20.0, 1e200)])
def test_sde_whose_levels_overflow_is_refused(sub_vp, beta_max, t_max):
    with pytest.raises(ValueError, match="beta_max and t_max must"):
        ContinuousVP(beta_max=beta_max, t_max=t_max, sub_vp=sub_vp)


@pytest.mark.parametrize(
    ("process", "name"),
    [
        (lambda: VarianceExploding(1e-40, 1.0), "sigma_min"),
        (lambda: FlowMatching(t_min=1e-40), "t_min"),
        (lambda: ContinuousVP(t_min=1e-100), "t_min"),
    ],
)
def test_levels_below_float32_are_refused(process, name):
    with pytest.raises(ValueError, match=f"{name} must give a lowest level"):
        process()


def test_flow_sigmas_above_one_are_refused():
    with pytest.raises(ValueError, match=r"sigmas of a flow model are times within \[0, 1\], got 80"):
        FlowMatching().level(torch.tensor([80.0]))


def test_unknown_kind():
    with pytest.raises(ValueError, match="noise process kind"):
        process_from_dict({"kind": "vpp"})


TWO_LEVELS = VariancePreserving([0.5, 0.0])


@pytest.mark.parametrize("name", ["vp", "vp-integer", "vp-zero-terminal"])
def test_timesteps_against_interpolation(name):
    """NumPy's, of the timestep over ``log s``; ends are held, pure noise is the last timestep."""
    process = PROCESSES[name]
    trained = process.trained_levels.numpy()
    finite = trained[np.isfinite(trained)]
    s = np.concatenate([np.geomspace(finite[0] / 3, finite[-1] * 3, 301), trained, [0.0, np.inf]])
    with np.errstate(divide="ignore"):
        expected = np.interp(np.log(s), np.log(finite), np.arange(len(finite)))
    expected[np.isinf(s)] = len(trained) - 1
    found = process.timestep(torch.from_numpy(s)).numpy()
    if process.integer_timesteps:
        assert (found == found.round()).all()
        # halves may round either way
        assert np.abs(found - expected).max() <= 0.5 + 1e-9
    else:
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)
    assert process.timestep(torch.tensor(1.0)).shape == ()
    assert process.timestep(torch.ones(2, 3)).shape == (2, 3)


def test_timesteps_beside_pure_noise_alone():
    """One finite level and pure noise."""
    assert TWO_LEVELS.timestep(torch.tensor([0.0, 0.5, 1.0, 7.0, math.inf])).tolist() == [0.0, 0.0, 0.0, 0.0, 1.0]


def test_timestep_inside_forward_mode():
    process = PROCESSES["vp"]

    def through(x):
        assert process.timestep(torch.tensor([0.5])).ndim == 1
        return x * process.timestep(torch.tensor([2.0, 3.0], dtype=torch.float64))

    x = torch.ones(2, dtype=torch.float64)
    value, change = torch.func.jvp(through, (x,), (x,))
    torch.testing.assert_close(value, change, rtol=0, atol=0)


def test_nearest_levels_are_the_nearest(process):
    """By brute force over all that are trained, in ``log s``; where any level is known it is the level itself."""
    s = torch.cat([process.levels(17) * 1.003, torch.tensor([0.0, process.s_min / 2], dtype=torch.float64)])
    found = process.nearest(s)
    if not getattr(process, "integer_timesteps", False):
        assert torch.equal(found, s)
        return
    for level, near in zip(s.tolist(), found.tolist(), strict=True):
        trained = process.trained_levels.tolist()
        expected = level if level == 0 else min(trained, key=lambda other: abs(math.log(other / level)))
        assert near == expected
    assert process.nearest(s.reshape(1, -1)).shape == (1, 19)
    assert torch.equal(process.nearest(found), found)


def test_nearest_of_pure_noise_is_itself():
    table = torch.cat([vp_table()[:-1], torch.zeros(1)])
    process = VariancePreserving(table, integer_timesteps=True)
    s = torch.tensor([math.inf, 1e6, 0.0], dtype=torch.float64)
    assert process.nearest(s).tolist() == [math.inf, float(process.trained_levels[-2]), 0.0]
