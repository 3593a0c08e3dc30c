"""Every convention of time and sign against the closed form of a Gaussian."""

import pytest
import torch
from models import batch_shape

import fastsched as fs
from fastsched.denoisers.noise import ContinuousVP, process_from_dict

C, MEAN = 0.6, 0.3


def denoised(x, alpha, sigma):
    """``E[x0 | x]`` for data N(MEAN, C^2)."""
    return MEAN + C**2 * alpha / (C**2 * alpha**2 + sigma**2) * (x - alpha * MEAN)


def velocity(data_at, sign):
    def network(x, t):
        t = batch_shape(t, x)
        sigma = t if data_at == 0 else 1 - t
        x0 = denoised(x, 1 - sigma, sigma)
        towards_noise = (x - x0) / sigma  # eps - x0
        return sign * (towards_noise if data_at == 0 else -towards_noise)

    return network


def score(sub_vp):
    def network(x, t):
        t = batch_shape(t, x)
        alpha = torch.exp(-(t**2) * 19.9 / 4 - t * 0.1 / 2)
        variance = (1 - alpha**2) ** 2 if sub_vp else 1 - alpha**2
        return -(x - alpha * MEAN) / (alpha**2 * C**2 + variance)

    return network


DENOISERS = {
    "data at 0": fs.Denoiser.from_velocity(velocity(0, 1)),
    "data at 0, negative": fs.Denoiser.from_velocity(velocity(0, -1), sign=-1),
    "data at 1": fs.Denoiser.from_velocity(velocity(1, 1), data_at=1),
    "data at 1, negative": fs.Denoiser.from_velocity(velocity(1, -1), data_at=1, sign=-1),
    "VP score": fs.Denoiser.from_vp_score(score(False)),
    "sub-VP score": fs.Denoiser.from_vp_score(score(True), sub_vp=True),
}


@pytest.mark.parametrize("name", DENOISERS)
def test_the_denoiser_is_the_posterior_mean(name):
    denoiser = DENOISERS[name]
    s = denoiser.levels(12)[1:]
    z = (C**2 + s[:, None] ** 2).sqrt() * torch.randn(
        11, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    # s = 1/alpha - alpha of the smallest t cancels to 1e-16 / s_min
    torch.testing.assert_close(
        denoiser(z, s), denoised(z, torch.ones_like(s[:, None]), s[:, None]), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("name", DENOISERS)
def test_sampling_reaches_the_flow_of_the_gaussian(name):
    denoiser = DENOISERS[name]
    noise = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    levels = denoiser.levels(300)
    sigmas = denoiser.process.sampler_sigma(torch.cat([levels, levels.new_zeros(1)]))
    found = fs.sample(denoiser, sigmas, "dpmpp_2m", noise)
    first = float(levels[0])
    scale = 1.0 if first == float("inf") else first / (C**2 + first**2) ** 0.5
    shift = 0.0 if first == float("inf") else MEAN / (C**2 + first**2) ** 0.5
    expected = MEAN + C * (noise * scale - shift)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)  # second order in steps of 0.04 in log s


@pytest.mark.parametrize("sub_vp", [False, True])
def test_times_and_levels_of_the_sde_agree(sub_vp):
    process = ContinuousVP(sub_vp=sub_vp)
    t = torch.linspace(1e-3, 1, 50, dtype=torch.float64)
    alpha = torch.exp(-(t**2) * 19.9 / 4 - t * 0.1 / 2)
    sigma = 1 - alpha**2 if sub_vp else (1 - alpha**2).sqrt()
    s = sigma / alpha
    torch.testing.assert_close(process.timestep(s), t, rtol=1e-9, atol=0)
    torch.testing.assert_close(process.alpha(s), alpha, rtol=1e-9, atol=0)
    torch.testing.assert_close(process.sigma(s), sigma, rtol=1e-9, atol=0)
    assert (process.s_min, process.s_max) == pytest.approx((float(s[0]), float(s[-1])), rel=1e-9)


@pytest.mark.parametrize("name", DENOISERS)
def test_processes_survive_being_written(name):
    process = DENOISERS[name].process
    assert process_from_dict(process.to_dict()) == process


def test_the_network_is_told_its_own_time():
    schedule = fs.Schedule.from_levels(DENOISERS["data at 1"].process, torch.tensor([1.0, 0.25, 0.0]).double(), "ddim")
    assert schedule.sigmas.tolist() == pytest.approx([0.5, 0.2, 0.0])
    assert schedule.timesteps.tolist() == pytest.approx([0.5, 0.8])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"data_at": 2}, "data_at must be 0 or 1"), ({"sign": 0}, "sign must be 1"), ({"t_max": 1.5}, "t_min and t_max")],
)
def test_bad_velocity_settings(options, message):
    with pytest.raises(ValueError, match=message):
        fs.Denoiser.from_velocity(lambda x, t: x, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"beta_min": 0.0}, "beta_min must be positive"), ({"beta_max": 0.05}, "beta_min and beta_max"),
     ({"t_min": 2.0}, "t_min and t_max")],
)  # fmt: skip
def test_bad_sde_settings(options, message):
    with pytest.raises(ValueError, match=message):
        fs.Denoiser.from_vp_score(lambda x, t: x, **options)
