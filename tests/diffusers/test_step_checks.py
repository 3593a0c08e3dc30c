"""What pipelines pass to a scheduler's step, and what they must do with their input before it."""

import warnings

import numpy as np
import pytest
import torch

import fastsched as fs

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers
from pipelines import OraclePipeline, OracleUNet, latent_upscaler, oracle_pipeline, stable_diffusion, unconditional

MIXTURE = fs.oracles.GaussianMixture.random(8, 3, seed=0)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_an_argument_of_zero_that_a_scheduler_does_not_take_is_ignored(name):
    """DDIMPipeline gives every scheduler ``eta=0.0``, which only DDIM's takes."""
    torch.manual_seed(0)
    pipe = unconditional(diffusers.DDIMScheduler())[0]
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    schedule = fs.diffusers.fit(pipe, 3, levels=8, samples=1, model_calls=60)
    assert schedule.measured_error is not None
    fs.diffusers.apply(schedule, pipe)
    alone = diffusers.DDPMPipeline(pipe.unet, pipe.scheduler)  # gives no eta
    one, other = (
        each(generator=torch.Generator().manual_seed(0), num_inference_steps=3, output_type="np").images
        for each in (pipe, alone)
    )
    np.testing.assert_array_equal(one, other)
    with pytest.raises(TypeError, match="eta"):
        pipe(eta=0.5, num_inference_steps=3)
    with pytest.raises(ValueError, match=r"eta must be 0, .* got 0\.5"):
        fs.diffusers.measure(pipe, levels=8, samples=1, eta=0.5)


def test_a_pipeline_that_does_not_scale_its_input_is_refused_where_the_scheduler_does():
    pipe = unconditional(diffusers.EulerDiscreteScheduler())[0]
    with pytest.raises(ValueError, match=r"does not call scheduler\.scale_model_input"):
        fs.diffusers.fit(pipe, 3, levels=8, samples=1)


@pytest.mark.parametrize("kind", ["EulerDiscreteScheduler", "EDMEulerScheduler", "DDIMScheduler"])
def test_latents_that_are_scaled_twice_are_refused_where_the_scheduler_scales(kind):
    class Twice(OraclePipeline):
        @torch.no_grad()
        def __call__(self, num_inference_steps=50):
            self.scheduler.set_timesteps(num_inference_steps)
            x = torch.randn(2, 2, 2, 2) * self.scheduler.init_noise_sigma
            for t in self.scheduler.timesteps:
                given = self.scheduler.scale_model_input(self.scheduler.scale_model_input(x, t), t)
                x = self.scheduler.step(self.unet(given, t, return_dict=False)[0], t, x, return_dict=False)[0]
            return x

    scheduler = getattr(diffusers, kind)(**({"clip_sample": False} if kind == "DDIMScheduler" else {}))
    pipe = Twice(OracleUNet().answer_for(scheduler, MIXTURE), scheduler)
    if kind == "DDIMScheduler":
        assert fs.diffusers.measure(pipe, levels=8, samples=2).samples == 2
        return
    with pytest.raises(ValueError, match="scale_model_input twice, on its own result"):
        fs.diffusers.measure(pipe, levels=8, samples=2)


@pytest.mark.parametrize("kind", ["EulerDiscreteScheduler", "DDIMScheduler"])
def test_an_image_that_is_scaled_with_the_latents_is_refused_where_the_scheduler_scales(kind):
    """LDMSuperResolutionPipeline joins latents and image before it calls ``scale_model_input``."""

    class Joined(OraclePipeline):
        @torch.no_grad()
        def __call__(self, num_inference_steps=50):
            self.scheduler.set_timesteps(num_inference_steps)
            x = torch.randn(2, 2, 2, 2) * self.scheduler.init_noise_sigma
            for t in self.scheduler.timesteps:
                given = self.scheduler.scale_model_input(torch.cat([x, torch.ones_like(x)], dim=1), t)
                output = self.unet(given[:, :2], t, return_dict=False)[0] + 0.1 * given[:, 2:]
                x = self.scheduler.step(output, t, x, return_dict=False)[0]
            return x

    scheduler = getattr(diffusers, kind)(**({"clip_sample": False} if kind == "DDIMScheduler" else {}))
    pipe = Joined(OracleUNet().answer_for(scheduler, MIXTURE), scheduler)
    if kind == "DDIMScheduler":
        assert fs.diffusers.measure(pipe, levels=8, samples=2).samples == 2
        return
    with pytest.raises(ValueError, match=r"with shape \[4, 2, 2\] a sample for latents of \[2, 2, 2\]"):
        fs.diffusers.measure(pipe, levels=8, samples=2)


def test_a_timestep_that_the_pipeline_rounds_is_refused_with_that_reason():
    """SkyReelsV2DiffusionForcingPipeline keeps its timesteps in a table of whole numbers."""

    class Rounded(OraclePipeline):
        @torch.no_grad()
        def __call__(self, num_inference_steps=50):
            self.scheduler.set_timesteps(num_inference_steps)
            x = torch.randn(2, 2, 2, 2)
            for t in self.scheduler.timesteps.long():
                x = self.scheduler.step(self.unet(x, t, return_dict=False)[0], t, x, return_dict=False)[0]
            return x

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = Rounded(OracleUNet().answer_for(scheduler, MIXTURE), scheduler)
    with pytest.raises(ValueError, match=r"the pipeline rounds scheduler\.timesteps, or does not call"):
        fs.diffusers.measure(pipe, levels=12, samples=2)


def test_a_pipeline_that_computes_with_the_scale_of_the_states_is_refused():
    """Stock classes keep the states' own scale, so an applied schedule of theirs is right there."""
    torch.manual_seed(0)
    pipe, call, output = latent_upscaler(diffusers.EulerDiscreteScheduler(prediction_type="sample"))
    with pytest.raises(ValueError, match=r"computes with scale_model_input\(sigma\)"):
        fs.diffusers.measure(pipe, levels=8, samples=2, **call)
    sigmas = torch.tensor([10.0, 1.0, 0.0])
    fs.diffusers.apply(fs.Schedule(sigmas, "ddim", "vp"), pipe)
    assert bool(pipe(**call, **output, num_inference_steps=2).images.isfinite().all())
    weights = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    fs.diffusers.apply(fs.Schedule(sigmas, "fitted", "vp", weights=weights), pipe)
    with pytest.raises(ValueError, match=r"computes with scale_model_input\(sigma\)"):
        pipe(**call, **output, num_inference_steps=2)


def test_clipping_that_is_not_measured_is_warned_of():
    """The oracle's data reach 3; pixels would stay within 1."""
    wide, narrow = (fs.oracles.GaussianMixture.random(8, 3, seed=0, spread=spread, std=0.1) for spread in (1.0, 0.2))
    for settings in ({"clip_sample": True}, {"clip_sample": False, "thresholding": True}):
        scheduler = diffusers.DDIMScheduler(**settings)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("default")  # the same text is shown once
            fs.diffusers.measure(oracle_pipeline(scheduler, wide), levels=12, samples=4)  # in two calls
        (warning,) = [str(each.message) for each in found if "clips" in str(each.message)]
        assert "and more than 1% of the paths' ends" in warning
        assert fs.diffusers.measure(oracle_pipeline(scheduler, narrow), levels=12, samples=2).samples == 2


def test_noise_that_is_not_measured_is_refused():
    """StableDiffusionPipeline gives ``eta`` only to schedulers whose ``step`` names it."""
    torch.manual_seed(0)
    pipe, call, _ = stable_diffusion(diffusers.DDIMScheduler(clip_sample=False))
    with pytest.raises(ValueError, match=r"eta must be 0, .* got 1.0"):
        fs.diffusers.measure(pipe, levels=12, samples=2, eta=1.0, **call)
    with pytest.raises(ValueError, match=r"eta must be 0, .* got 1.0"):  # without runs too
        fs.diffusers.fit(pipe, 4, levels=12, samples=2, audition=False, eta=1.0, **call)


class InSections(OraclePipeline):
    """Makes sections of a video, each by a run of its own (FramePack), and then resets its scheduler (WanAnimate)."""

    @torch.no_grad()
    def __call__(self, num_inference_steps=50, sections=1, noised=False):
        made = []
        for _ in range(sections):
            made.append(super().__call__(num_inference_steps=num_inference_steps))
            if noised:  # as FreeInit, which starts again from its own result
                self.scheduler.scale_noise(made[-1], self.scheduler.timesteps[:1], torch.randn_like(made[-1]))
            self.scheduler.set_timesteps(num_inference_steps)
        return torch.cat(made)


@pytest.mark.parametrize("noised", [False, True])
def test_of_several_runs_in_a_call_the_first_is_measured_and_tried(noised):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    right = fs.diffusers.measure(oracle_pipeline(scheduler, MIXTURE), levels=12, samples=2, keep_increments=True)
    pipe = InSections(OracleUNet().answer_for(scheduler, MIXTURE), scheduler)
    one = fs.diffusers.measure(pipe, levels=12, samples=2, keep_increments=True)
    with pytest.warns(UserWarning, match="runs its loop several times in a call .* only the first run is measured"):
        two = fs.diffusers.measure(pipe, levels=12, samples=2, keep_increments=True, sections=2, noised=noised)
    assert torch.equal(one.gram, right.gram)
    assert torch.equal(two.gram, right.gram)
    assert two.model_calls == right.model_calls
    found = fs.diffusers.fit(pipe, 4, stats=one, model_calls=60)
    with pytest.warns(UserWarning, match="runs its loop several times"):
        other = fs.diffusers.fit(pipe, 4, stats=two, model_calls=60, sections=2, noised=noised)
    assert torch.equal(found.sigmas, other.sigmas)
