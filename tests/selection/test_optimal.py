import math

import pytest
import torch
from models import exact_denoiser, exact_denoisers, mixture, vp_table

import fastsched as fs
from fastsched.costs import path_cost
from fastsched.metrics import power_mean
from fastsched.sampling.random_streams import noise_of, sample_seeds
from fastsched.sampling.solvers import SOLVERS, get_solver
from fastsched.selection.dynamic_programming import cheapest_path
from fastsched.selection.optimal import ranked_starts
from fastsched.selection.starts import starting_levels

C = 0.5


def gaussian_cells(levels, steps, polish=True, responses=True):
    """Largest distance, in grid cells of log sigma, between the chosen and the closed-form DDIM schedule."""
    oracle = fs.oracles.Gaussian(C, (64,))
    stats = fs.measure(exact_denoiser(oracle), (64,), levels=levels, samples=4, responses=responses, progress=False)
    if not polish:  # the weighted programme alone
        cost = path_cost(stats, "ddim", weighted=responses)
        s = torch.cat([stats.s, stats.s.new_zeros(1)])
        found = s[cheapest_path(cost, steps)]
    else:
        found = fs.optimal_schedule(stats, steps, "ddim").sigmas
    exact = oracle.optimal_ddim_schedule(steps, 80.0)
    assert (found[0], found[-1]) == (80.0, 0.0)
    cell = math.log(80 / 0.002) / (levels - 1)
    return float((found[1:-1] / exact[1:-1]).log().abs().max()) / cell


@pytest.mark.parametrize(("levels", "steps"), [(64, 5), (64, 16), (128, 8), (256, 8)])
def test_gaussian_ddim_schedule_is_the_closed_form(levels, steps):
    """``s_n = c tan(theta_n)``, ``theta`` equally spaced (Align Your Steps, theorem 3.1), to 1.5 cells."""
    assert gaussian_cells(levels, steps) <= 1.5
    assert gaussian_cells(levels, steps, polish=False) <= 1.5


def test_unweighted_costs_miss_the_closed_form():
    assert gaussian_cells(64, 8, polish=False, responses=False) > 2.5


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "heun", "unipc", "fitted"])
def test_no_start_is_predicted_to_be_better(solver):
    """By the same estimate: neither dynamic programming nor a schedule in common use."""
    denoiser = exact_denoiser(mixture(d=4), 0.01, 40.0)
    stats = fs.measure(denoiser, (4,), levels=24, samples=4, progress=False)
    for steps in (3, 6):
        best = fs.optimal_schedule(stats, steps, solver).predicted_error
        assert best <= fs.optimal_schedule(stats, steps, solver, polish=False).predicted_error
        for maker in (fs.baselines.karras, fs.baselines.exponential, fs.baselines.kl_optimal):
            for spare in (False, True):
                assert best <= fs.predict_error(stats, maker(steps, 0.01, 40.0, spare_last=spare), solver)


def test_six_kinds_of_network_give_one_schedule():
    """The same mixture as six kinds of network, on the same levels; flow models have two more starts."""
    s = torch.exp(torch.arange(math.log(50.0), math.log(0.021), -0.13, dtype=torch.float64))
    first = None
    for kind, denoiser in exact_denoisers(mixture(d=4)).items():
        stats = fs.measure(denoiser, (4,), levels=s, samples=4, progress=False)
        chosen = fs.optimal_schedule(stats, 8, "dpmpp_2m")
        levels = denoiser.process.level(chosen.sigmas)
        if first is None:
            first, least = levels, chosen.predicted_error
        there = fs.predict_error(stats, denoiser.process.sampler_sigma(first), "dpmpp_2m")
        assert there == pytest.approx(least, rel=1e-4), kind
        assert chosen.predicted_error <= 1.0001 * least, kind
        if denoiser.process.kind != "flow":
            assert float((levels[:-1] / first[:-1]).log().abs().max()) <= 1e-3, kind


def test_schedule_belongs_to_its_process():
    kinds = exact_denoisers(mixture())
    for kind, noise, has_timesteps in [("x0", "ve", False), ("epsilon", "vp", True), ("velocity", "flow", True)]:
        stats = fs.measure(kinds[kind], (4,), levels=24, samples=2, progress=False)
        schedule = fs.optimal_schedule(stats, 5)
        assert schedule.noise == noise
        assert (schedule.timesteps is not None) == has_timesteps
        assert schedule.sigmas[0] == stats.sigmas[0]


def test_integer_networks_get_integer_timesteps():
    from models import vp_table

    seen = []

    def network(x, t):
        seen.extend(t.tolist())
        return 0.1 * x

    denoiser = fs.Denoiser.from_epsilon(network, vp_table(), integer_timesteps=True)
    stats = fs.measure(denoiser, (4,), levels=24, samples=2, checks=False, progress=False)
    timesteps = fs.optimal_schedule(stats, 5).timesteps
    assert timesteps.tolist() == timesteps.round().tolist()
    assert all(isinstance(t, int) for t in seen)


@pytest.mark.parametrize("steps", [10, 15, 30])
def test_starts_of_a_network_of_few_timesteps_descend(steps):
    """Ranking needs finite errors, and uniform timesteps repeat if there are fewer of them than steps."""
    table = vp_table()[50::100]
    stats = fs.measure(exact_denoisers(mixture(), table)["v"], (4,), samples=2, progress=False)
    starts = ranked_starts(stats, steps, get_solver("dpmpp_2m"))
    assert all(math.isfinite(start.predicted_error) for start in starts)


def test_starts_of_a_part_of_the_levels_descend():
    denoiser = exact_denoisers(mixture())["v"]
    stats = fs.measure(denoiser, (4,), levels=denoiser.levels(48)[20:], samples=2, progress=False)
    for steps in (2, 5):
        assert all(
            (levels[1:] < levels[:-1]).all() for levels in starting_levels(stats, steps, get_solver("ddim")).values()
        )


def test_scaling_the_data_scales_the_schedule():
    base = exact_denoiser(fs.oracles.Gaussian(C, (16,)), 0.002, 80.0)
    scaled = fs.Denoiser.from_denoiser(lambda z, s: 4 * base.network(z / 4, s / 4), 0.008, 320.0)
    one, four = (
        fs.optimal_schedule(fs.measure(denoiser, (16,), levels=48, samples=2, progress=False), 8)
        for denoiser in (base, scaled)
    )
    torch.testing.assert_close(four.sigmas, 4 * one.sigmas, rtol=1e-6, atol=0)


def test_predicted_error_is_near_the_actual_one():
    """On a mixture, with 16 steps, over noises not seen: to a factor of three."""
    oracle = mixture(d=8)
    denoiser = exact_denoiser(oracle, 0.01, 40.0)
    stats = fs.measure(denoiser, (8,), levels=64, samples=32, progress=False)
    schedule = fs.optimal_schedule(stats, 16, "dpmpp_2m")
    noise = noise_of(sample_seeds(5, 200), (8,))
    converged = fs.sample(denoiser, torch.cat([denoiser.levels(600), torch.zeros(1)]), "dpmpp_2m", noise)
    actual = float(power_mean((fs.sample(denoiser, schedule, noise=noise) - converged).square().sum(1)))
    assert schedule.predicted_error is not None
    assert 1 / 3 < schedule.predicted_error / actual < 3


def zero_terminal_denoiser(oracle):
    """The oracle's v over a table that ends in pure noise."""
    from models import batch_shape, vp_table

    table = torch.cat([vp_table()[:-1], torch.zeros(1, dtype=torch.float64)])
    trained = ((1 - table) / table).sqrt()

    def v(x, t):
        low = t.double().floor().clamp(0, len(table) - 3).long()
        part = t.double() - low
        s = (trained[low].log() * (1 - part) + trained[low + 1].log() * part).exp()
        s = torch.where(t >= len(table) - 1, 1e12, s)
        alpha, sigma = (1 + s**2).rsqrt(), (1 + s**-2).rsqrt()
        x0 = oracle.denoise(x / batch_shape(alpha, x), s.to(x.dtype))
        return (batch_shape(alpha, x) * x - x0) / batch_shape(sigma, x)

    return fs.Denoiser.from_v(v, table)


@pytest.fixture(scope="module")
def zero_terminal():
    denoiser = zero_terminal_denoiser(fs.oracles.Gaussian(C, (4,)))
    return denoiser, fs.measure(denoiser, (4,), levels=16, samples=2, progress=False)


@pytest.mark.parametrize("steps", [1, 8, 15])
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_starts_from_pure_noise(zero_terminal, solver, steps):
    denoiser, stats = zero_terminal
    schedule = fs.optimal_schedule(stats, steps, solver)
    assert schedule.sigmas[0] == math.inf
    assert math.isfinite(schedule.predicted_error)
    samples = fs.sample(denoiser, schedule, noise=noise_of(stats.seeds, (4,)))
    if steps == 8:  # near the path's end, whose deviation is 0.5
        assert float((samples - stats.ends).square().mean()) < 0.1 * C**2


def test_half_precision_outputs_leave_a_sane_schedule():
    """A denoised image rounded to bfloat16 changes by nothing or a whole unit between neighbouring levels."""

    def rounded(z, s):
        return ((C**2 / (C**2 + s**2)).reshape(-1, 1) * z.float()).to(torch.bfloat16)

    denoiser = fs.Denoiser.from_denoiser(rounded, 0.002, 80.0)
    stats = fs.measure(denoiser, (16,), dtype=torch.bfloat16, progress=False)
    noise = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    exact = fs.oracles.Gaussian(C, (16,))
    ends = exact.flow(noise * 80.0, 80.0, 0.0)
    wide = exact_denoiser(exact)

    def error(sigmas):
        return float((fs.sample(wide, sigmas, "ddim", noise) - ends).square().sum(1).mean())

    for polish in (True, False):
        found = fs.optimal_schedule(stats, 6, "ddim", polish=polish)
        assert error(found.sigmas) < 2 * error(exact.optimal_ddim_schedule(6, 80.0))
