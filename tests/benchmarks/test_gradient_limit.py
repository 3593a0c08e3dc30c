from dataclasses import replace

import pytest
import torch

import fastsched as fs
from benchmarks.quality import gradient_limit, models
from fastsched.denoisers.oracles import GaussianMixture


@pytest.fixture(scope="module")
def denoiser():
    means, covariances = torch.tensor([[1.0, 0.5], [-1.0, 0.0]]), 0.04 * torch.eye(2).expand(2, 2, 2)
    oracle = GaussianMixture(torch.tensor([0.4, 0.6]), means, covariances)
    return fs.Denoiser.from_denoiser(oracle.denoise, 0.01, 20.0)


def noise_like(model, count=8):
    return torch.randn(count, *model.shape, generator=torch.Generator().manual_seed(0))


def test_without_corrections_it_is_dpmpp_2m():
    digits = models.digits()
    sigmas = fs.baselines.exponential(6, 0.002, 80.0)
    sampler = gradient_limit.Sampler.of_schedule(sigmas[:-1], 0.002)
    torch.testing.assert_close(sampler.nodes(), sigmas[:-1])
    ours = sampler.sample(digits.denoiser.denoise, noise_like(digits))
    torch.testing.assert_close(ours, fs.sample(digits.denoiser, sigmas, "dpmpp_2m", noise_like(digits)))


def test_weights_that_sum_to_one_keep_a_constant_denoiser():
    """``x0`` is the constant whatever the corrections."""
    s = torch.tensor([20.0, 3.0, 0.4, 0.05], dtype=torch.float64)
    corrections = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sampler = replace(gradient_limit.Sampler.of_schedule(s, 0.01), corrections=corrections)
    y = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = sampler.sample(lambda y, s: torch.full_like(y, 0.7), y)
    torch.testing.assert_close(found, torch.full_like(found, 0.7))


def test_timesteps_keep_their_derivative():
    process = gradient_limit.differentiable(models.digits_vp().denoiser).process
    plain = models.digits_vp().denoiser.process
    s = torch.tensor([0.03, 0.7, 12.0], dtype=torch.float64, requires_grad=True)
    t = process.timestep(s)
    torch.testing.assert_close(t.detach(), plain.timestep(s))
    t.sum().backward()
    h = 1e-6
    differences = (plain.timestep(s.detach() + h) - plain.timestep(s.detach() - h)) / (2 * h)
    torch.testing.assert_close(s.grad, differences, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["digits", "digits_vp", "patches"])
def test_gradients_are_differences_of_the_loss(name):
    model = models.MODELS[name]()
    denoiser = gradient_limit.differentiable(model.denoiser)
    noise = noise_like(model, 4).double()
    s = denoiser.process.level(torch.tensor([10.0, 1.3, 0.3, 0.06], dtype=torch.float64))
    start = gradient_limit.Sampler.of_schedule(s, denoiser.process.s_min)
    network = model.denoiser.network.double()

    def loss(log_gaps):
        ends = replace(start, log_gaps=log_gaps).sample(replace(denoiser, network=network).denoise, noise)
        return gradient_limit.log_distances(ends, torch.zeros_like(ends)).mean()

    gaps = start.log_gaps.clone().requires_grad_()
    loss(gaps).backward()
    for n in range(len(gaps)):
        move = 1e-4 * torch.eye(len(gaps), dtype=torch.float64)[n]
        difference = float(loss(start.log_gaps + move) - loss(start.log_gaps - move)) / 2e-4
        # Buffers of frequencies and levels stay float32 in part, and timesteps bend at the trained levels.
        assert float(gaps.grad[n]) == pytest.approx(difference, rel=0.02, abs=2e-4)


def test_descent_finds_a_better_sampler(denoiser):
    reference = fs.converged_reference(denoiser, (2,), samples=64, progress=False)
    start = gradient_limit.Sampler.of_schedule(fs.baselines.exponential(5, 0.01, 20.0)[:-1], 0.01)
    found = gradient_limit.descend(denoiser.denoise, start, reference, 60)

    def error(sampler):
        return float(
            gradient_limit.log_distances(sampler.sample(denoiser.denoise, reference.noise), reference.ends).mean()
        )

    assert error(found) < error(start) - 1
    assert bool((found.nodes()[:-1] > found.nodes()[1:]).all())
    assert float(found.nodes()[0]) == pytest.approx(20.0)
