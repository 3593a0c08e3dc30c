"""Pipelines with a twist: measured rightly, or refused with the reason; none is measured as what it is not."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

import fastsched as fs

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers
import pipelines
from pipelines import SHAPE, OraclePipeline, OracleUNet, oracle_pipeline

from fastsched.denoisers.deferred_checks import DeferredChecks
from fastsched.diffusers.watching.first_latents import check_first_latents, check_neighbours

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEVELS = 24
STEP_NUMBER = "must not depend on the step's number"


def euler():
    return diffusers.EulerDiscreteScheduler(**SD)


def flow_unipc():
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    return diffusers.UniPCMultistepScheduler(**flow)


def mixture(seed=0):
    return fs.oracles.GaussianMixture.random(8, 3, seed=seed)


def quiet(built):
    pipe, call, _ = built
    pipe.set_progress_bar_config(disable=True)
    return pipe, call


def measured(pipe, **call):
    return fs.diffusers.measure(pipe, levels=LEVELS, samples=2, **call)


# Arguments of step


@pytest.mark.parametrize("arguments", [{"per_token_timesteps": torch.ones(2, 4)}, {"s_churn": 0.5}, {"eta": 1.0}])
def test_an_argument_of_step_that_changes_its_meaning_is_refused(arguments):
    with pytest.raises(ValueError, match=f"calls step with {next(iter(arguments))}="):
        measured(oracle_pipeline(euler(), mixture()), step_arguments=arguments)


def test_an_argument_of_step_at_its_default_is_allowed():
    defaults = {"s_churn": 0.0, "s_noise": 1.0, "generator": torch.Generator(), "variance_noise": None}
    plain = measured(oracle_pipeline(euler(), mixture()))
    assert torch.equal(measured(oracle_pipeline(euler(), mixture()), step_arguments=defaults).gram, plain.gram)


# Latents that the pipeline owns


@pytest.mark.parametrize("count", [1, 2, 32])
def test_changed_elements_of_the_latents_are_noticed_and_counted(count):
    def overwrite(latents):
        latents.view(-1)[:count] = 9.0
        return latents

    with pytest.raises(ValueError, match=f"changed the latents between steps 0 and 1, {count} of 64 elements"):
        measured(oracle_pipeline(euler(), mixture()), images=8, change_latents=overwrite)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_latents_that_are_scaled_a_little_between_steps_are_noticed(dtype):
    pipe = oracle_pipeline(euler(), mixture(), dtype=dtype)
    for rounded in (torch.float16, torch.bfloat16):
        change = lambda latents, rounded=rounded: latents.to(rounded).to(latents.dtype)
        assert measured(pipe, images=8, change_latents=change).samples == 8
    with pytest.raises(ValueError, match="changed the latents between steps 0 and 1"):
        measured(pipe, images=8, change_latents=lambda latents: latents * 1.005)


@pytest.mark.parametrize("scheduler", [euler(), diffusers.FlowMatchEulerDiscreteScheduler()])
def test_first_latents_of_another_size_than_the_process_s_are_refused(scheduler):
    """As those of Cosmos-Predict2, which drives a flow scheduler with EDM's sigmas, up to 80."""
    for scale in (80.0, 0.1):
        with pytest.raises(ValueError, match=r"first latents have size .* scales them by a formula"):
            measured(oracle_pipeline(scheduler, mixture()), start_scale=scale)


def first_latents(latents):
    deferred = DeferredChecks()
    check_first_latents(latents, deferred)
    deferred.run()


@pytest.mark.parametrize("seed", range(20))
def test_first_latents_of_few_elements_are_not_refused(seed):
    torch.manual_seed(seed)
    for shape in ((1,), (1, *SHAPE), (2, 4, 8, 8)):
        for _ in range(50):
            check_first_latents(torch.randn(shape), DeferredChecks())
    for scale in (0.5, 2.0):
        with pytest.raises(ValueError, match="first latents"):
            first_latents(scale * torch.randn(2, 4, 8, 8))


class RepeatedFrames(OraclePipeline):
    """As AnimateDiff with FreeNoise: a channel of its first latents is a copy of another."""

    @torch.no_grad()
    def __call__(self, num_inference_steps=50, images=2, repeated=True, output_type="latent"):
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(images, *SHAPE)
        latents[:, 1] = latents[:, 0] if repeated else 0.0
        latents[:, 0] *= 1.0 if repeated else 2**0.5
        for t in self.scheduler.timesteps:
            output = self.unet(latents, t.expand(images), return_dict=False)[0]
            latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
        return latents


def test_first_latents_with_copies_of_some_parts_are_warned_of():
    scheduler = diffusers.DDIMScheduler(**SD, clip_sample=False)
    pipe = RepeatedFrames(OracleUNet().answer_for(scheduler, mixture()), scheduler)
    with pytest.warns(UserWarning, match=r"are copies of others \(FreeNoise"):
        stats = measured(pipe)
    assert torch.equal(stats.gram, measured(oracle_pipeline(scheduler, mixture())).gram)
    measured(pipe, repeated=False)  # constant parts are no copies of noise
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        first_latents(torch.randn(2, 4, 16, 64, 64).to(dtype))
        first_latents(torch.randn(1, 4000, 4).to(dtype))


def test_first_latents_that_hold_an_image_are_refused():
    """As Kandinsky 6's super-resolution starts, from an image and noise of size 1 together."""
    torch.manual_seed(0)
    for shape, dimension in (((1, 4, 64, 64), 3), ((1, 2, 32, 32, 8), 2)):
        image, deferred = torch.randn(shape).repeat_interleave(2, dimension), DeferredChecks()
        check_neighbours(torch.randn_like(image), None, deferred)
        deferred.run()
        check_neighbours(0.714 * image + 0.7 * torch.randn_like(image), None, deferred)
        with pytest.raises(ValueError, match=r"neighbours .* correlated, by 0\.[23].*an image"):
            deferred.run()


# What depends on the step's number


@pytest.mark.parametrize("window", [(0.1, 0.9), (0.0, 0.9), (0.02, 1.0), (0.3, 0.6), (0.5, 1.0)])
def test_control_within_a_window_is_refused(window):
    torch.manual_seed(0)
    pipe, call = quiet(pipelines.controlled(euler()))
    start, end = window
    with pytest.raises(ValueError, match=r"controlnet\.conditioning_scale.*" + STEP_NUMBER):
        fs.diffusers.measure(pipe, samples=2, control_guidance_start=start, control_guidance_end=end, **call)


@pytest.mark.parametrize("window", [(0.01, 0.2), (0.1, 0.9), (0.4, 0.6)])
def test_skip_layer_guidance_is_refused(window):
    torch.manual_seed(0)
    pipe, call = quiet(pipelines.stable_diffusion_3(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)))
    start, stop = window
    skipping = {"skip_layer_guidance_start": start, "skip_layer_guidance_stop": stop, "skip_guidance_layers": [0]}
    with pytest.raises(ValueError, match="networks were called.*" + STEP_NUMBER):
        measured(pipe, **call, **skipping)


@pytest.mark.parametrize("kind", ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"])
def test_dynamic_guidance_is_refused(kind):
    torch.manual_seed(0)
    pipe, call = quiet(pipelines.cogvideox(getattr(diffusers, kind)()))
    assert measured(pipe, **call).samples == 2
    with pytest.raises(ValueError, match=r"pipe\._guidance_scale.*" + STEP_NUMBER):
        measured(pipe, use_dynamic_cfg=True, **call)


@pytest.mark.parametrize(
    "window", [(5, 43), (0, 20), (30, 48), (1, 47), (2, 48), (10, 12), (0, 1), (1, 2), (0, 3), (2, 3)]
)
@pytest.mark.parametrize("scheduler", [euler(), diffusers.FlowMatchEulerDiscreteScheduler()], ids=["vp", "flow"])
def test_another_use_of_the_networks_output_within_a_window_is_noticed(window, scheduler):
    stronger = lambda i, output: output * (1.3 if window[0] <= i < window[1] else 1.0)
    with pytest.raises(ValueError, match=STEP_NUMBER):
        measured(oracle_pipeline(scheduler, mixture()), on_step=stronger)


@pytest.mark.parametrize("window", [(0, 1), (0, 10), (12, 40)])
def test_a_nonlinear_use_of_the_networks_output_within_a_window_is_noticed(window):
    bounded = lambda i, output: output.clamp(-1.5, 1.5) if window[0] <= i < window[1] else output
    with pytest.raises(ValueError, match="combined in another way.*" + STEP_NUMBER):
        measured(oracle_pipeline(euler(), mixture()), images=8, on_step=bounded)
    always = measured(oracle_pipeline(euler(), mixture()), images=8, on_step=lambda i, output: output.clamp(-1.5, 1.5))
    assert always.samples == 8


@pytest.mark.parametrize("steps", [2, 3])
def test_guidance_after_the_first_steps_is_noticed_by_its_calls(steps):
    scheduler = euler()
    pipe = oracle_pipeline(scheduler, mixture())

    def more_calls(i, output):
        if i >= steps:
            pipe.unet(torch.zeros(2, *SHAPE), scheduler.timesteps[0])
        return output

    with pytest.raises(ValueError, match=f"at step {steps}, the networks were called.*" + STEP_NUMBER):
        measured(pipe, on_step=more_calls)


def test_another_formula_is_named():
    pipe = oracle_pipeline(euler(), mixture())
    with pytest.raises(ValueError, match=r"combined with other coefficients \(1 instead of 1\.5\) than at step 11"):
        measured(pipe, on_step=lambda i, output: output * (1.5 if i == 11 else 1.0))


@pytest.mark.parametrize("window", [(6, 43), (20, 30), (1, 48), (2, 48)])
def test_a_callback_that_changes_embeddings_within_a_window_is_noticed(window):
    """The first is symmetric about the middle of the run, so that every level is visited twice alike."""
    torch.manual_seed(0)
    pipe, call = quiet(pipelines.stable_diffusion(euler()))
    embeddings = torch.cat([call["negative_prompt_embeds"], call["prompt_embeds"]])

    def change(pipe, i, timestep, kwargs):
        kwargs["prompt_embeds"] = embeddings * (0.5 if window[0] <= i + 1 <= window[1] else 1.0)
        return kwargs

    inputs = ["latents", "prompt_embeds"]
    with pytest.raises(ValueError, match=r"unet\.encoder_hidden_states was different.*" + STEP_NUMBER):
        measured(pipe, callback_on_step_end=change, callback_on_step_end_tensor_inputs=inputs, **call)


@pytest.mark.parametrize("window", [(0.0, 0.5), (0.4, 0.8)])
def test_control_within_a_window_is_noticed_when_the_statistics_come_from_elsewhere(window):
    torch.manual_seed(0)
    pipe, call = quiet(pipelines.controlled(euler()))
    stats = replace(measured(pipe, **call), origin=None)
    start, end = window
    with pytest.raises(ValueError, match=r"controlnet\.conditioning_scale.*" + STEP_NUMBER):
        fs.diffusers.fit(pipe, 5, stats=stats, control_guidance_start=start, control_guidance_end=end, **call)
    assert fs.diffusers.fit(pipe, 5, stats=stats, **call).measured_error is not None


# Random numbers


def test_every_run_draws_the_same_conditioning_from_the_generator():
    pipe = oracle_pipeline(euler(), mixture())
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    schedule = fs.diffusers.fit(pipe, 4, levels=8, samples=4, generator=generator, conditioning=0.1)
    assert len(pipe.draws) > 3  # two to measure, more to compare
    assert all(torch.equal(draw, pipe.draws[0]) for draw in pipe.draws)
    assert torch.equal(generator.get_state(), before)
    assert schedule.measured_error is not None
    measured(pipe, generator=[generator, torch.Generator()][0], conditioning=0.1)
    assert torch.equal(pipe.draws[-1], pipe.draws[0])


def test_every_run_draws_the_same_from_the_global_random_numbers_which_are_restored():
    pipe = oracle_pipeline(euler(), mixture())
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002 - the state that is to be kept
    expected = [torch.rand(1), random.random(), np.random.rand()]  # noqa: NPY002 - as above
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002 - as above
    stats = measured(pipe, conditioning=0.1)
    assert [torch.rand(1), random.random(), np.random.rand()] == expected  # noqa: NPY002 - as above
    fs.diffusers.fit(pipe, 4, stats=stats, conditioning=0.1)
    assert len(pipe.draws) > 1
    assert all(torch.equal(draw, pipe.draws[0]) for draw in pipe.draws)


# Prompts


@pytest.mark.parametrize(("images", "samples", "calls"), [(4, 4, 3), (1, 2, 3), (2, 8, 4), (1, 5, 5)])
def test_all_prompts_are_used_whatever_the_batch(images, samples, calls):
    pipe = oracle_pipeline(euler(), mixture())
    stats = fs.diffusers.measure(pipe, levels=8, samples=samples, images=images, prompts=["a", "b", "c"])
    assert set(pipe.prompts) == {"a", "b", "c"}
    assert len(pipe.prompts) == calls
    assert stats.samples == calls * images
