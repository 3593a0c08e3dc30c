"""Decoupled levels with samplers of k-diffusion's form."""

import copy
import dataclasses
import math

import pytest
import torch
from models import exact_denoisers, mixture, told_lower

import fastsched as fs
from fastsched.sampling.k_diffusion import sample_fitted

ORACLE = mixture(d=4)
KINDS = ("epsilon", "velocity")


def sample_euler(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Euler's method in the form of k-diffusion."""
    for n in range(len(sigmas) - 1):
        denoised = model(x, sigmas[n] * x.new_ones(len(x)), **(extra_args or {}))
        x = denoised + sigmas[n + 1] / sigmas[n] * (x - denoised)
    return x


def given(kind, solver="ddim"):
    """A denoiser, a schedule with finite sigmas, and the denoiser as a model of k-diffusion."""
    denoiser = exact_denoisers(ORACLE)[kind]
    schedule = told_lower(denoiser, 5, solver, "denoiser")
    process = denoiser.process

    def model(x, sigma, shift=0.0):
        s = process.level(sigma.double())
        assert x.dtype == torch.float64
        return denoiser.denoise(x / sigma.reshape(-1, 1), s) + shift

    return denoiser, schedule, model


@pytest.mark.parametrize("kind", KINDS)
def test_a_sampler_with_its_own_sigmas_gives_the_samples_of_fs_sample(kind):
    denoiser, schedule, model = given(kind)
    noise = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sigmas = schedule.sigmas
    if not math.isfinite(float(denoiser.process.level(sigmas[:1]))):
        model = _finite_at_pure_noise(model, denoiser)
    told = fs.decoupled_model(model, schedule)
    found = sample_euler(told, noise * sigmas[0], sigmas.float().double())  # as samplers round them
    torch.testing.assert_close(found, fs.sample(denoiser, schedule, noise=noise), rtol=1e-5, atol=1e-5)
    plain = sample_euler(model, noise * sigmas[0], sigmas)
    assert float((plain - found).norm()) > 1e-2 * float(found.norm())
    shifted = sample_euler(told, noise * sigmas[0], sigmas, {"shift": 1.0})
    assert float((shifted - found).norm()) > 1e-2 * float(found.norm())


def _finite_at_pure_noise(model, denoiser):
    """At time 1 of a flow the level is infinite, and the state is the noise."""

    def asked(x, sigma, **options):
        return (
            denoiser.denoise(x, math.inf) + options.get("shift", 0.0)
            if float(sigma[0]) == 1.0
            else model(x, sigma, **options)
        )

    return asked


def test_the_fitted_solver_uses_such_a_model():
    denoiser, schedule, model = given("epsilon")
    weights = torch.eye(5, dtype=torch.float64)
    weights[2, :3] = torch.tensor([0.1, -0.4, 1.3])
    schedule = dataclasses.replace(schedule, solver="fitted", weights=weights)
    noise = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    told, sigmas = fs.decoupled_model(model, schedule), schedule.sigmas
    found = sample_fitted(told, noise * sigmas[0], sigmas, weights=weights, disable=True)
    torch.testing.assert_close(found, fs.sample(denoiser, schedule, noise=noise), rtol=1e-9, atol=1e-9)
    of_schedule = sample_fitted(model, noise * sigmas[0], schedule, disable=True)
    torch.testing.assert_close(of_schedule, found, rtol=0, atol=0)
    with pytest.raises(ValueError, match="schedule has only decoupled timesteps"):
        sample_fitted(model, noise, dataclasses.replace(schedule, decoupled="timestep"), disable=True)


def test_other_attributes_are_those_of_the_model():
    class Model:
        name = "inner"

        def __call__(self, x, sigma):
            return x

    _, schedule, _ = given("epsilon")
    told = fs.decoupled_model(Model(), schedule)
    assert copy.deepcopy(told).name == "inner"
    with pytest.raises(AttributeError):
        _ = told.other


def test_sigmas_that_the_schedule_does_not_have_are_refused():
    _, schedule, model = given("epsilon")
    told = fs.decoupled_model(model, schedule)
    between = (schedule.sigmas[1:2] * schedule.sigmas[2:3]).sqrt()
    with pytest.raises(ValueError, match="none of the schedule's"):
        told(torch.zeros(1, 4, dtype=torch.float64), between)
    with pytest.raises(ValueError, match="none of the schedule's"):
        told(torch.zeros(2, 4, dtype=torch.float64), schedule.sigmas[1:3])


@pytest.mark.parametrize("sigma", [[math.nan], [14.0, math.nan], []], ids=["NaN", "NaN beside a level", "none"])
def test_sigmas_that_are_no_numbers_are_refused(sigma):
    _, schedule, model = given("epsilon")
    told = fs.decoupled_model(model, dataclasses.replace(schedule, sigmas=[14.0, *schedule.sigmas.tolist()[1:]]))
    with pytest.raises(ValueError, match=r"sigma.*give it schedule\.sigmas"):
        told(torch.zeros(len(sigma), 4, dtype=torch.float64), torch.tensor(sigma, dtype=torch.float64))


@pytest.mark.parametrize("sigma", [torch.tensor([14, 14]), 14.0], ids=["whole numbers", "a float"])
def test_sigmas_are_floating_point_tensors(sigma):
    """The network's sigma would be rounded to a whole number."""
    _, schedule, model = given("epsilon")
    told = fs.decoupled_model(model, dataclasses.replace(schedule, sigmas=[14.0, *schedule.sigmas.tolist()[1:]]))
    with pytest.raises(TypeError, match="sigma must be a floating-point tensor"):
        told(torch.zeros(2, 4, dtype=torch.float64), sigma)


def test_schedules_that_need_no_such_model_or_another_are_refused():
    _, schedule, model = given("epsilon")
    with pytest.raises(ValueError, match="no decoupled levels: use the model itself"):
        fs.decoupled_model(model, dataclasses.replace(schedule, network_sigmas=None))
    with pytest.raises(ValueError, match="only decoupled timesteps"):
        fs.decoupled_model(model, dataclasses.replace(schedule, decoupled="timestep"))
    with pytest.raises(TypeError, match="model"):
        fs.decoupled_model(3, schedule)
    with pytest.raises(TypeError, match="schedule"):
        fs.decoupled_model(model, schedule.sigmas)
