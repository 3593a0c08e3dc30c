"""What the scheduler of fitted schedules refuses: other steps, starts midway, wrong calls, other schedules."""

import warnings

import pytest
import torch

import fastsched as fs

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers
import pipelines
from diffusers import EulerDiscreteScheduler, FluxImg2ImgPipeline, StableDiffusionImg2ImgPipeline
from test_fitted_scheduler import FAMILIES, SD, STEPS, applied, by_loop, fitted_for, noise_of, own_scheduler

from fastsched.diffusers.fitted_scheduler import FittedScheduler


def test_another_number_of_steps_is_refused():
    scheduler = applied("velocity")[0].scheduler
    for arguments in ({"num_inference_steps": 2}, {"sigmas": [1.0, 0.5]}, {"timesteps": [900, 1]}):
        with pytest.raises(ValueError, match=f"num_inference_steps must be {STEPS}, .* got 2"):
            scheduler.set_timesteps(**arguments)
    with pytest.raises(ValueError, match="original_inference_steps: a pipeline that gives this"):
        scheduler.set_timesteps(STEPS, original_inference_steps=50)


def test_noise_for_a_second_run_is_refused_as_what_it_is():
    """As FreeInit adds it."""
    scheduler = applied("velocity")[0].scheduler
    x = by_loop(scheduler, noise_of())
    with pytest.raises(ValueError, match=r"starts again from it \(FreeInit"):
        scheduler.add_noise(x, torch.randn_like(x), torch.tensor([999, 999]))


@pytest.mark.parametrize(
    ("family", "cls"), [("stable_diffusion", StableDiffusionImg2ImgPipeline), ("flux", FluxImg2ImgPipeline)]
)
def test_image_to_image_is_refused(family, cls):
    name, config = FAMILIES[family]
    text, call, output = getattr(pipelines, family)(getattr(diffusers, name)(**config))
    pipe = cls(**{**text.components, **({"requires_safety_checker": False} if family == "stable_diffusion" else {})})
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.register_to_config(shift_factor=0.0)
    fs.diffusers.apply(fitted_for(pipe.scheduler), pipe)
    call = {**call, **output, "image": torch.rand(2, 3, 16, 16), "num_inference_steps": STEPS}
    for strength in (0.5, 1.0) if family == "stable_diffusion" else (0.5,):
        with pytest.raises(ValueError, match="starts from pure noise"):
            pipe(**call, strength=strength)


def test_a_run_that_ends_early_for_a_refiner_is_warned_of():
    """Its latents would have the scale sqrt(alpha^2 + sigma^2) = 1, where Euler's have sigma."""
    torch.manual_seed(0)
    pipe, call, _ = pipelines.stable_diffusion_xl(EulerDiscreteScheduler(**SD))
    pipe.set_progress_bar_config(disable=True)
    fs.diffusers.apply(fitted_for(pipe.scheduler), pipe)
    options = {"num_inference_steps": STEPS, "output_type": "latent", **call}
    with pytest.warns(UserWarning, match=rf"ends after \d of {STEPS} steps .*leave denoising_end out"):
        pipe(denoising_end=0.5, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe(**options)
        assert len(pipe.scheduler.timesteps[:1].repeat(2)) == 2  # the first timestep, for a batch


def test_at_strength_1_a_flow_model_starts_from_noise_alone():
    text, call, output = pipelines.flux(diffusers.FlowMatchEulerDiscreteScheduler())
    pipe = FluxImg2ImgPipeline(**text.components)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.register_to_config(shift_factor=0.0)
    fs.diffusers.apply(fitted_for(pipe.scheduler), pipe)
    images = [image.expand(2, 3, 16, 16) for image in (torch.zeros(1), torch.ones(1))]
    call |= {**output, "num_inference_steps": STEPS, "strength": 1.0}
    one, two = (pipe(**call, image=each, generator=torch.Generator().manual_seed(0)).images for each in images)
    assert torch.equal(one, two)


def test_what_a_fitted_schedule_lacks_is_named_with_what_to_do():
    own = own_scheduler("epsilon, integer timesteps")
    scheduler = FittedScheduler.from_schedule(fitted_for(own), own)
    with pytest.raises(AttributeError, match=r"has no alphas_cumprod, which DDIMScheduler has: .* of a stock solver"):
        scheduler.alphas_cumprod  # noqa: B018 - only read
    with pytest.raises(AttributeError, match="'FittedScheduler' object has no attribute 'no_such'"):
        scheduler.no_such  # noqa: B018 - only read
    assert not hasattr(scheduler, "sigma_min")


def test_wrong_calls_of_step_are_refused():
    scheduler = applied("velocity")[0].scheduler
    x = noise_of()
    with pytest.raises(ValueError, match="call set_timesteps before each run"):
        scheduler.step(x, None, x)
    scheduler.set_timesteps(STEPS)
    with pytest.raises(ValueError, match="model_output must have the shape"):
        scheduler.step(x[:2], None, x)
    with pytest.raises(ValueError, match="eta must be 0"):
        scheduler.step(x, None, x, eta=0.5)
    assert torch.equal(scheduler.timesteps[-STEPS:], scheduler.timesteps + 0)
    with pytest.raises(ValueError, match="starts midway"):
        scheduler.timesteps[1 - STEPS :]
    with pytest.raises(ValueError, match="begin_index must be 0, got 2"):
        scheduler.set_begin_index(2)
    scheduler.step(x, None, x)
    with pytest.raises(ValueError, match="sample must keep its shape"):
        scheduler.step(x[:2], None, x[:2])
    for _ in range(STEPS - 1):
        scheduler.step(x, None, x)
    with pytest.raises(ValueError, match=f"{STEPS + 1} times in a run of {STEPS} steps"):
        scheduler.step(x, None, x)


def test_an_edm_pipeline_that_does_not_scale_its_input_is_told_that_its_scheduler_needs_it():
    scheduler = applied("EDM")[0].scheduler
    scheduler.set_timesteps(STEPS)
    with pytest.raises(ValueError, match="which this schedule needs; EDMEulerScheduler needs it too"):
        scheduler.step(noise_of(), scheduler.timesteps[0], noise_of())


def test_schedules_that_do_not_fit_are_refused():
    scheduler = EulerDiscreteScheduler(**SD)
    fitted = fitted_for(scheduler)
    stock = fs.Schedule(fitted.sigmas, "ddim", "vp")
    with pytest.raises(ValueError, match="must be for the fitted solver"):
        FittedScheduler.from_schedule(stock, scheduler)
    with pytest.raises(TypeError, match=r"must be of class Schedule"):
        FittedScheduler.from_schedule([1.0, 0.0], scheduler)
    with pytest.raises(ValueError, match="for a 'flow' noise process"):
        FittedScheduler.from_schedule(fitted, diffusers.FlowMatchEulerDiscreteScheduler())
    beyond = fs.Schedule(2 * fitted.sigmas, "fitted", "vp", weights=fitted.weights)
    with pytest.raises(ValueError, match="was trained from"):
        FittedScheduler.from_schedule(beyond, scheduler)
    with pytest.raises(ValueError, match="config has no weights"):
        FittedScheduler.from_config(scheduler.config)
    with pytest.raises(ValueError, match=r"fastsched\.diffusers\.apply"):
        fs.diffusers.export(fitted, scheduler)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (((), {"s_churn": 0.5}), "s_churn=0.5"),
        (((0.5,), {}), "s_churn=0.5"),
        (((), {"s_noise": 1.1}), "s_noise=1.1"),
        (((), {"variance_noise": torch.ones(2)}), "variance_noise=a tensor"),
        (((), {"use_clipped_model_output": True}), "use_clipped_model_output=True"),
    ],
)
def test_an_argument_of_step_that_changes_its_meaning_is_refused(arguments, named):
    """Those at the defaults of the pipeline's own class, in its order or by name, change nothing."""
    scheduler = FittedScheduler.from_schedule(fitted_for(EulerDiscreteScheduler(**SD)), EulerDiscreteScheduler(**SD))
    scheduler.set_timesteps(STEPS)
    x = torch.randn(2, 4, 8, 8)
    with pytest.raises(ValueError, match=f"calls step with {named}.*the fitted solver has one step"):
        scheduler.step(x, scheduler.timesteps[0], x, *arguments[0], **arguments[1])
    usual = scheduler.step(x, scheduler.timesteps[0], x, 0.0, 0.0, s_noise=1.0, variance_noise=None).prev_sample
    scheduler.set_timesteps(STEPS)
    assert torch.equal(usual, scheduler.step(x, scheduler.timesteps[0], x).prev_sample)
