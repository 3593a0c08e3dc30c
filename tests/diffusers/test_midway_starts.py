"""Pipelines that start an applied schedule midway: from an image, a video, or another pipeline's latents."""

import pytest
import torch

import fastsched as fs

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers
import pipelines
from applied_schedules import SCHEDULERS, SD, applied_to, uneven
from diffusers import (
    AnimateDiffVideoToVideoPipeline,
    FluxImg2ImgPipeline,
    LatentConsistencyModelImg2ImgPipeline,
    MotionAdapter,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from PIL import Image

from fastsched.diffusers.conventions import describe
from fastsched.diffusers.schedulers.exporter import plain_copy


def network_timesteps(pipe):
    """A list of the timesteps that the pipeline's network is given."""
    seen = []
    network = getattr(pipe, "unet", None) or pipe.transformer
    network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(
            float(torch.as_tensor(kwargs["timestep"] if "timestep" in kwargs else args[1]).max())
        ),
        with_kwargs=True,
    )
    return seen


@pytest.mark.parametrize("kind", ["arguments", "assigned", "stepped", "two calls a step", "midpoints"])
@pytest.mark.parametrize("steps", [8, 50])
def test_denoising_start_goes_on_where_denoising_end_has_stopped(kind, steps):
    name, config = SCHEDULERS[kind]
    torch.manual_seed(0)
    base, call, _ = pipelines.stable_diffusion_xl(getattr(diffusers, name)(**config))
    schedule = uneven(describe(base.scheduler).process, 8)
    fs.diffusers.apply(schedule, base)
    parts = {"vae": base.vae, "unet": base.unet, "scheduler": base.scheduler}
    refiner = pipelines.assembled(StableDiffusionXLImg2ImgPipeline, **parts, add_watermarker=False)
    seen = network_timesteps(base)
    call = {**call, "num_inference_steps": steps, "output_type": "latent"}
    whole = base(**call, generator=torch.Generator().manual_seed(0))[0]
    every = list(seen)
    seen.clear()
    latents = base(**call, denoising_end=0.4, generator=torch.Generator().manual_seed(0))[0]
    ended = len(seen)
    end = refiner(**call, denoising_start=0.4, image=latents)[0]
    first = seen[ended]
    assert seen[ended:] == every[-len(seen[ended:]) :]  # the steps of the schedule itself
    assert first in every[::2] if base.scheduler.order == 2 else seen == every  # and not from within one
    if base.scheduler.order == 1:
        close = 1e-4 if kind != "assigned" else 0.5  # which uses what it computed in the step before
        torch.testing.assert_close(end, whole, rtol=close, atol=close)
        assert torch.equal(refiner(**call, denoising_start=0.9999, image=latents)[0], latents)  # no step is left
    seen.clear()
    refiner(**call, strength=0.5, image=latents)  # the next call counts as before
    assert seen[0] < every[0]


@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
def test_latent_consistency_starts_from_an_image_where_strength_tells(strength):
    torch.manual_seed(0)
    text, call, _ = pipelines.latent_consistency()
    parts = {"vae": text.vae, "unet": text.unet, "scheduler": text.scheduler}
    pipe = pipelines.assembled(LatentConsistencyModelImg2ImgPipeline, **parts, requires_safety_checker=False)
    seen = network_timesteps(pipe)
    call |= {"image": torch.rand(1, 3, 16, 16), "strength": strength, "num_inference_steps": 4, "output_type": "latent"}
    pipe(**call)
    without = list(seen)
    schedule = uneven(describe(pipe.scheduler).process)
    fs.diffusers.apply(schedule, pipe)
    seen.clear()
    pipe(**call)
    assert seen[0] == without[0]
    assert seen[2:] == [t for t in schedule.timesteps.tolist() if t < seen[1]]


def test_a_video_that_keeps_its_number_of_steps_starts_where_strength_tells():
    torch.manual_seed(0)
    text, call, _ = pipelines.stable_diffusion(diffusers.DDIMScheduler(**SD, clip_sample=False))
    blocks = {"block_out_channels": (8, 16), "motion_layers_per_block": 1, "motion_norm_num_groups": 4}
    parts = {"vae": text.vae, "unet": text.unet, "scheduler": text.scheduler}
    adapter = MotionAdapter(motion_num_attention_heads=2, **blocks)
    pipe = pipelines.assembled(AnimateDiffVideoToVideoPipeline, motion_adapter=adapter, **parts)
    seen = network_timesteps(pipe)
    call = {"prompt_embeds": call["prompt_embeds"][:1], "guidance_scale": 1.0, "height": 16, "width": 16}
    call |= {"video": [Image.new("RGB", (16, 16))] * 2, "strength": 0.5, "enforce_inference_steps": True}
    call |= {"num_inference_steps": 10, "output_type": "latent"}
    pipe(**call)
    first = seen[0]
    fs.diffusers.apply(uneven(describe(pipe.scheduler).process), pipe)
    seen.clear()
    pipe(**call)
    assert seen[0] == first


@pytest.mark.parametrize("strength", [0.4, 0.7])
def test_the_latents_have_the_noise_that_the_network_is_told_of(strength):
    """LTX slices the sigmas, by which it adds noise, and then the timesteps."""
    torch.manual_seed(0)
    pipe, call, output = pipelines.ltx_conditioned(diffusers.FlowMatchEulerDiscreteScheduler())
    fs.diffusers.apply(uneven(describe(pipe.scheduler).process), pipe)
    noise, prepare = [], pipe.prepare_latents
    pipe.prepare_latents = lambda *args, **given: noise.append(float(given["sigma"])) or prepare(*args, **given)
    told = []
    callback = lambda pipe, step, t, given: told.append(float(t) / 1000) or {}
    call |= {"video": [Image.new("RGB", (64, 64))] * 9, "denoise_strength": strength, "num_inference_steps": 20}
    pipe(**call, **output, callback_on_step_end=callback)
    assert noise[0] == pytest.approx(told[0])
    timesteps = pipe.scheduler.timesteps
    assert len(pipe.scheduler.sigmas[20:]) == 0 < len(pipe.scheduler.sigmas[2:])
    assert pipe.scheduler.timesteps is timesteps  # they are only read


def image_to_image(name):
    """A pipeline of the same components as a text-to-image one, with an applied schedule."""
    if name == "stable-diffusion":
        pipe, call, _ = pipelines.stable_diffusion(diffusers.DPMSolverMultistepScheduler(**SD))
        kind, extra = StableDiffusionImg2ImgPipeline, {"safety_checker": None, "requires_safety_checker": False}
    elif name == "stable-diffusion-ddim":
        pipe, call, _ = pipelines.stable_diffusion(diffusers.DDIMScheduler(**SD, clip_sample=False))
        kind, extra = StableDiffusionImg2ImgPipeline, {"safety_checker": None, "requires_safety_checker": False}
    elif name == "stable-diffusion-3":
        pipe, call, _ = pipelines.stable_diffusion_3(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
        kind, extra = StableDiffusion3Img2ImgPipeline, {}
    else:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        pipe, call, _ = pipelines.flux(scheduler)
        kind, extra = FluxImg2ImgPipeline, {}
    pipe.vae.register_to_config(shift_factor=0.0)
    schedule = uneven(describe(pipe.scheduler).process, 8)
    fs.diffusers.apply(schedule, pipe)
    made = kind(**{**pipe.components, **extra})
    made.set_progress_bar_config(disable=True)
    return made, call, schedule


@pytest.mark.parametrize("name", ["stable-diffusion", "stable-diffusion-ddim", "stable-diffusion-3", "flux"])
@pytest.mark.parametrize("strength", [0.4, 0.6, 0.9])
def test_image_to_image_pipelines_start_as_noisy_as_without_a_schedule(name, strength):
    torch.manual_seed(0)
    pipe, call, schedule = image_to_image(name)
    seen = network_timesteps(pipe)
    call = {**call, "image": torch.rand(2, 3, 16, 16), "strength": strength, "output_type": "latent"}
    pipe(**call)
    with_schedule, applied = list(seen), pipe.scheduler
    pipe.scheduler = plain_copy(applied)
    seen.clear()
    pipe(**call)
    assert with_schedule[0] == pytest.approx(seen[0], rel=1e-5)
    assert 1 <= len(with_schedule) <= schedule.steps
    assert len(with_schedule) < len(seen)


def test_a_start_of_unknown_strength_in_a_list_of_another_length_is_refused():
    scheduler, schedule = applied_to(diffusers.FlowMatchEulerDiscreteScheduler())
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0.05, schedule.steps).tolist())
    assert 0 < len(scheduler.timesteps[2:]) < schedule.steps
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0.05, 20).tolist())
    with pytest.raises(ValueError, match=f"pass num_inference_steps={schedule.steps}"):
        scheduler.timesteps[2:]
