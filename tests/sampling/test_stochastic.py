import math

import numpy as np
import pytest
import torch
from models import exact_denoisers

import fastsched as fs
from fastsched.sampling.stochastic import sample_stochastic

STD = 0.5
ORACLE = fs.oracles.Gaussian(STD, (4,))
DENOISER = fs.Denoiser.from_denoiser(ORACLE.denoise, 0.02, 20.0)
WIDE = fs.oracles.Gaussian(STD, (64,))  # many elements of few samples, each of which has a stream of its own


def _noise(n, d=4, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _streams(seed, samples):
    """Where the noise of each sample's steps comes from: Philox, keyed by the seed and the sample."""
    return [np.random.Generator(np.random.Philox(key=2 * (seed * 2**32 + n) + 1)) for n in range(samples)]


def _k_diffusion_steps(solver, sigmas, z, streams):
    """The published updates in sigma, eta = 1, as k-diffusion writes them."""
    old, h_last = None, None
    for s, s_next in zip(sigmas.tolist(), sigmas[1:].tolist(), strict=False):
        denoised = ORACLE.denoise(z, s)
        if s_next == 0:
            return denoised
        fresh = torch.tensor(np.stack([stream.standard_normal(4, dtype=np.float32) for stream in streams])).to(z)
        if solver == "ancestral":
            up = min(s_next, (s_next**2 * (s**2 - s_next**2) / s**2) ** 0.5)
            down = (s_next**2 - up**2) ** 0.5
            z = z + (z - denoised) / s * (down - s) + fresh * up
            continue
        h = math.log(s / s_next)
        z = s_next / s * math.exp(-h) * z - math.expm1(-2 * h) * denoised
        if old is not None:
            z = z + 0.5 * -math.expm1(-2 * h) * (h / h_last) * (denoised - old)
        z = z + fresh * s_next * math.sqrt(-math.expm1(-2 * h))
        old, h_last = denoised, h
    return z


@pytest.mark.parametrize("solver", ["sde_dpmpp_2m", "ancestral"])
def test_matches_the_published_updates(solver):
    sigmas = fs.baselines.karras(7, 0.02, 20.0)
    for ending in (sigmas, sigmas[:-1]):
        got = sample_stochastic(DENOISER, ending, solver, _noise(5), seed=3)
        expected = _k_diffusion_steps(solver, ending, 20.0 * _noise(5), _streams(3, 5))
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    for settings in ({}, {"seed": 3}):
        got = fs.sample(DENOISER, sigmas, solver, _noise(5), **settings)
        assert torch.equal(got, sample_stochastic(DENOISER, sigmas, solver, _noise(5), **settings))


@pytest.mark.parametrize("solver", ["sde_dpmpp_2m", "ancestral"])
def test_a_sample_depends_on_its_seed_and_not_on_its_batch(solver):
    sigmas = fs.baselines.karras(5, 0.02, 20.0)
    whole = fs.sample(DENOISER, sigmas, solver, _noise(6), seed=2**30)
    torch.testing.assert_close(fs.sample(DENOISER, sigmas, solver, _noise(6)[:2], seed=2**30), whole[:2])
    assert (fs.sample(DENOISER, sigmas, solver, _noise(6), seed=2**30 + 1) - whole).abs().min() > 0
    same_start = fs.sample(DENOISER, sigmas, solver, _noise(1).expand(2, 4), seed=1)
    assert (same_start[0] - same_start[1]).abs().min() > 0


def test_schedules_know_stochastic_solvers(tmp_path):
    schedule = fs.Schedule([20.0, 1.0, 0.3, 0.0], "ancestral")
    assert (schedule.solver, schedule.model_calls) == ("ancestral", 3)
    schedule.save(tmp_path / "s.json")
    assert fs.Schedule.load(tmp_path / "s.json").solver == "ancestral"
    expected = fs.sample(DENOISER, schedule.sigmas, "ancestral", _noise(3), seed=5)
    assert torch.equal(fs.sample(DENOISER, schedule, noise=_noise(3), seed=5), expected)
    cost = fs.costs.klub(DENOISER, shape=(4,), sigmas=DENOISER.levels(12), samples=4, progress=False)
    assert fs.select(cost, 5, solver="sde_dpmpp_2m").solver == "sde_dpmpp_2m"


def test_a_deterministic_solver_refuses_a_seed_and_a_deterministic_method_a_stochastic_solver():
    with pytest.raises(ValueError, match="seed must be None for ddim, got 3"):
        fs.sample(DENOISER, [1.0, 0.0], "euler", _noise(2), seed=3)
    with pytest.raises(ValueError, match="solver must be deterministic here, got 'ancestral'"):
        fs.optimal_schedule(fs.measure(DENOISER, (4,), levels=6, samples=1, progress=False), 2, "ancestral")
    with pytest.raises(ValueError, match="did you mean 'ancestral'"):
        fs.Schedule([1.0, 0.0], "ancestrl")
    with pytest.raises(ValueError, match=r"seed must be within \[0, 2\^31\)"):
        fs.sample(DENOISER, [1.0, 0.0], "ancestral", _noise(2), seed=-1)


@pytest.mark.parametrize(("solver", "ode"), [("sde_dpmpp_2m", "dpmpp_2m"), ("ancestral", "ddim")])
def test_without_noise_they_are_the_ode_solvers(solver, ode):
    sigmas = fs.baselines.karras(7, 0.02, 20.0)
    got = sample_stochastic(DENOISER, sigmas, solver, _noise(5), eta=0.0)
    torch.testing.assert_close(got, fs.sample(DENOISER, sigmas, ode, _noise(5)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("eta", [0.4, 1.0])
@pytest.mark.parametrize("solver", ["sde_dpmpp_2m", "ancestral"])
def test_samples_follow_the_data(solver, eta):
    sigmas = fs.baselines.exponential(400, 0.02, 20.0)
    denoiser = fs.Denoiser.from_denoiser(WIDE.denoise, 0.02, 20.0)
    samples = sample_stochastic(denoiser, sigmas, solver, _noise(320, 64), eta=eta, seed=1)
    # 20,480 elements: the deviation of a standard deviation is 1 / sqrt(40,000) = 0.5% of it; first-order steps of
    # 0.017 in log s leave a per cent.
    assert float(samples.std()) == pytest.approx(STD, rel=0.03)
    assert float(samples.mean()) == pytest.approx(0.0, abs=4 * STD / 20_000**0.5)


@pytest.mark.parametrize("solver", ["sde_dpmpp_2m", "ancestral"])
def test_flow_models_start_from_pure_noise(solver):
    sigmas = torch.linspace(1.0, 0.0, 201, dtype=torch.float64)
    samples = sample_stochastic(exact_denoisers(WIDE)["velocity"], sigmas, solver, _noise(320, 64))
    assert float(samples.std()) == pytest.approx(STD, rel=0.05)


def test_a_schedule_in_flow_times_is_for_flow_models():
    schedule = fs.Schedule([1.0, 0.5, 0.0], "ancestral", "flow")
    with pytest.raises(ValueError, match="sigmas must be for the noise process of this model"):
        sample_stochastic(DENOISER, schedule, "ancestral", _noise(2))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="did you mean 'ancestral'"):
        sample_stochastic(DENOISER, [1.0, 0.0], "ancestrl", _noise(2))
    with pytest.raises(ValueError, match="eta must be within"):
        sample_stochastic(DENOISER, [1.0, 0.0], "ancestral", _noise(2), eta=2.0)
    broken = fs.Denoiser.from_denoiser(lambda z, s: z / 0, 0.02, 20.0)
    with pytest.raises(ValueError, match="NaN or inf at sigma = 1"):
        sample_stochastic(broken, [1.0, 0.0], "ancestral", _noise(2))
