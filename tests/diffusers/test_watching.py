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

from fastsched.denoisers.late_reading import Verdicts
from fastsched.diffusers.step_checks import check_first_latents

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


def test_a_list_that_one_network_returns_and_another_empties_is_compared():
    """As a ControlNet's, of which HunyuanDiT takes one residual after another."""

    class Control(torch.nn.Module):
        def forward(self, sample):
            return ([torch.zeros_like(sample)],)

    class Controlled(OracleUNet):
        def forward(self, sample, timestep, residuals, **rest):
            return super().forward(sample + residuals.pop(), timestep, **rest)

    scheduler = euler()
    pipe = OraclePipeline(Controlled().answer_for(scheduler, mixture()), scheduler)
    control, unet = Control(), pipe.unet
    vars(pipe)["control"] = control
    vars(pipe)["unet"] = lambda sample, *args, **rest: unet(sample, *args, residuals=control(sample)[0], **rest)
    pipe.unet.dtype, vars(pipe)["network"] = unet.dtype, unet
    assert torch.equal(measured(pipe).gram, measured(oracle_pipeline(euler(), mixture())).gram)


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


def test_a_change_of_one_element_of_the_latents_is_noticed():
    def overwrite(latents):
        latents[0, 0, 0, 0] = 0.5
        return latents

    with pytest.raises(ValueError, match="changed the latents between steps 0 and 1, 1 of 64 elements"):
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
        with pytest.raises(ValueError, match="first latents have size"):
            measured(oracle_pipeline(scheduler, mixture()), start_scale=scale)


def first_latents(latents):
    verdicts = Verdicts()
    check_first_latents(latents, verdicts)
    verdicts.settle()


@pytest.mark.parametrize("seed", range(20))
def test_first_latents_of_few_elements_are_not_refused(seed):
    torch.manual_seed(seed)
    for shape in ((1,), (1, *SHAPE), (2, 4, 8, 8)):
        for _ in range(50):
            check_first_latents(torch.randn(shape), Verdicts())
    for scale in (0.5, 2.0):
        with pytest.raises(ValueError, match="first latents"):
            first_latents(scale * torch.randn(2, 4, 8, 8))


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


# Pipelines that are measured


class DoublingPipeline(OraclePipeline):
    """As guided DiT: its latents are two copies of a half, of which the loop keeps the first."""

    @torch.no_grad()
    def __call__(self, num_inference_steps=50, images=2, stronger=1.0, output_type="latent"):
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.cat([torch.randn(images, *SHAPE)] * 2)
        for t in self.scheduler.timesteps:
            half = latents[:images]
            output = self.unet(torch.cat([half, half]), t.expand(2 * images), return_dict=False)[0]
            output[images:] *= stronger
            latents = self.scheduler.step(output, t, torch.cat([half, half])).prev_sample
        return latents[:images]


def test_a_pipeline_that_doubles_its_batch_is_measured_on_one_half():
    scheduler = diffusers.DDIMScheduler(**SD, clip_sample=False)
    plain = measured(oracle_pipeline(scheduler, mixture()))
    pipe = DoublingPipeline(OracleUNet().answer_for(scheduler, mixture()), scheduler)
    stats = measured(pipe)
    assert torch.equal(stats.seeds, plain.seeds)
    torch.testing.assert_close(stats.gram, plain.gram)
    torch.testing.assert_close(stats.response_gram, plain.response_gram)
    assert stats.model_calls == plain.model_calls
    with pytest.raises(ValueError, match="different outputs for the two halves"):
        measured(pipe, stronger=1.5)


def test_a_pipeline_that_doubles_its_batch_is_run_as_another_one():
    scheduler = diffusers.DDIMScheduler(**SD, clip_sample=False)
    plain = oracle_pipeline(scheduler, mixture())
    doubling = DoublingPipeline(OracleUNet().answer_for(scheduler, mixture()), scheduler)
    schedules = [fs.diffusers.fit(pipe, 5, levels=LEVELS, samples=4) for pipe in (plain, doubling)]
    assert torch.equal(schedules[0].sigmas, schedules[1].sigmas)
    assert schedules[0].measured_error == pytest.approx(schedules[1].measured_error)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_dit_is_measured_and_fitted_with_and_without_guidance(scale):
    torch.manual_seed(0)
    pipe, call = quiet(pipelines.dit(diffusers.DDIMScheduler(clip_sample=False)))
    stats = measured(pipe, guidance_scale=scale, **call)
    assert (stats.samples, stats.shape) == (2, (4, 8, 8))
    assert fs.diffusers.fit(pipe, 4, stats=stats, guidance_scale=scale, **call).measured_error is not None


def test_dit_that_drops_labels_in_training_mode_is_refused():
    torch.manual_seed(0)
    pipe, call = quiet(pipelines.dit(diffusers.DDIMScheduler(clip_sample=False)))
    pipe.transformer.train()
    for run in (measured, lambda pipe, **call: fs.diffusers.fit(pipe, 4, levels=LEVELS, samples=2, **call)):
        with pytest.raises(ValueError, match=r"draws random numbers: call pipe\.transformer\.eval"):
            run(pipe, guidance_scale=4.0, **call)
    pipe.transformer.eval()
    measured(pipe, guidance_scale=4.0, **call)


def test_batch_norm_in_training_mode_is_refused_and_keeps_its_statistics():
    torch.manual_seed(0)
    pipe, call = quiet(pipelines.stable_diffusion(diffusers.EulerDiscreteScheduler()))
    norm = pipe.unet.eval().conv_norm_out = torch.nn.BatchNorm2d(8)
    with pytest.raises(ValueError, match=r"with an active BatchNorm2d: call pipe\.unet\.eval"):
        measured(pipe, **call)
    assert norm.running_mean.tolist() == [0.0] * 8
    norm.eval()
    measured(pipe, **call)


@pytest.mark.parametrize("boundary_ratio", [0.9, 0.5])
@pytest.mark.parametrize("scale", [{}, {"guidance_scale_2": 2.0}], ids=["", "another guidance"])
def test_two_networks_in_turn_are_measured_and_fitted(boundary_ratio, scale):
    torch.manual_seed(0)
    pipe, call = quiet(pipelines.wan_of_two_experts(flow_unipc(), boundary_ratio))
    stats = measured(pipe, keep_increments=True, **call, **scale)
    assert stats.samples == 2
    assert fs.diffusers.fit(pipe, 4, stats=stats, model_calls=40, **call, **scale).measured_error is not None


def test_a_change_of_one_of_two_networks_is_noticed():
    torch.manual_seed(0)
    pipe, call = quiet(pipelines.wan_of_two_experts(flow_unipc(), 0.9))

    def change(pipe, i, timestep, kwargs):
        pipe.transformer.gradient_checkpointing = i > 10
        return {}

    with pytest.raises(ValueError, match=r"transformer\.settings was different from that at the first step"):
        measured(pipe, callback_on_step_end=change, **call)


def test_a_latent_consistency_model_is_measured():
    torch.manual_seed(0)
    pipe, call = quiet(pipelines.latent_consistency())
    assert measured(pipe, **call).samples == 2
    schedule = fs.diffusers.fit(pipe, 4, solver="ddim", audition=False, levels=LEVELS, samples=1, **call)
    assert schedule.steps == 4


def test_inpainting_is_measured_from_pure_noise_where_the_network_takes_the_mask():
    torch.manual_seed(0)
    pipe, call = quiet(pipelines.inpainting(euler()))
    stats = measured(pipe, strength=1.0, **call)
    assert stats.samples == 2
    assert torch.equal(measured(pipe, **call).gram, stats.gram)  # the pipeline's own default is 0.9999
    assert fs.diffusers.fit(pipe, 4, stats=stats, **call).measured_error is not None
    for strength in (0.8, 0.9999, "1"):
        with pytest.raises(ValueError, match=r"strength must be left out or 1\.0"):
            measured(pipe, strength=strength, **call)
    pipe, call = quiet(pipelines.inpainting(euler(), channels=4))
    with pytest.raises(ValueError, match=r"at every step \(inpainting.*text-to-image"):
        measured(pipe, **call)


def test_image_to_image_is_refused_with_what_would_do():
    torch.manual_seed(0)
    pipe, call = quiet(pipelines.stable_diffusion(euler()))
    made = diffusers.StableDiffusionImg2ImgPipeline(
        **{**pipe.components, "safety_checker": None}, requires_safety_checker=False
    )
    made.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="measure the text-to-image pipeline of the same model"):
        measured(made, image=torch.rand(2, 3, 16, 16), **call)


class OneBuffer(OracleUNet):
    """Returns the same tensor at every call, as a CUDA graph does, and writes into its input."""

    def forward(self, sample, *args, **kwargs):
        output = super().forward(sample.clone(), *args, **kwargs)[0]
        sample.add_(0)  # at least as much as to bump its version
        if not hasattr(self, "buffer"):
            self.buffer = torch.empty_like(output)
        return (self.buffer.copy_(output),)


def test_outputs_may_come_in_the_same_buffer():
    scheduler = euler()
    plain = measured(oracle_pipeline(scheduler, mixture()))

    class Direct(OraclePipeline):
        @torch.no_grad()
        def __call__(self, num_inference_steps=50):
            self.scheduler.set_timesteps(num_inference_steps)
            x = torch.randn(2, *SHAPE)
            for t in self.scheduler.timesteps:
                given = self.scheduler.scale_model_input(x, t)
                x = self.scheduler.step(self.unet(given, t, return_dict=False)[0], t, x).prev_sample

    stats = measured(Direct(OneBuffer().answer_for(scheduler, mixture()), scheduler))
    assert torch.equal(stats.gram, plain.gram)
    assert torch.equal(stats.response_gram, plain.response_gram)


def test_levels_can_be_given():
    zero_snr = {**SD, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "clip_sample": False}
    pipe = oracle_pipeline(diffusers.DDIMScheduler(**zero_snr), mixture())
    stats = measured(pipe)
    assert torch.isinf(stats.s[0])
    finite = fs.diffusers.measure(pipe, levels=stats.s[1:], samples=2)
    torch.testing.assert_close(finite.s, stats.s[1:])
    assert torch.isfinite(fs.optimal_schedule(finite, 6, "ddim").sigmas).all()
    with pytest.raises(ValueError, match="at different integer timesteps"):
        fs.diffusers.measure(pipe, levels=torch.tensor([3.0, 2.0, 1.9999, 1.0]), samples=2)
    with pytest.raises(ValueError, match="levels must strictly descend"):
        fs.diffusers.measure(pipe, levels=torch.tensor([3.0, 4.0, 1.0]), samples=2)
