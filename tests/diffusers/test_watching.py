"""Pipelines with a twist: measured rightly, or refused with the reason; none is measured as what it is not."""

import random

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


def test_a_change_of_one_element_of_the_latents_is_noticed():
    def overwrite(latents):
        latents[0, 0, 0, 0] = 0.5
        return latents

    with pytest.raises(ValueError, match="changed the latents between steps 0 and 1, 1 of 64 elements"):
        measured(oracle_pipeline(euler(), mixture()), images=8, change_latents=overwrite)


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


@pytest.mark.parametrize("window", [(5, 43), (0, 20), (30, 48), (1, 47), (2, 48), (10, 12), (0, 1), (1, 2)])
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
    stats = measured(pipe, **call)
    start, end = window
    with pytest.raises(ValueError, match=r"controlnet\.conditioning_scale.*" + STEP_NUMBER):
        fs.diffusers.fit(pipe, 5, stats=stats, control_guidance_start=start, control_guidance_end=end, **call)
    assert fs.diffusers.fit(pipe, 5, stats=stats, **call).measured_error is not None


# What depends on the steps before


def test_a_cache_of_diffusers_is_refused_before_a_call():
    torch.manual_seed(0)
    pipe, call = quiet(pipelines.flux(diffusers.FlowMatchEulerDiscreteScheduler()))
    calls = []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.2))
    for run in (measured, lambda pipe, **call: fs.diffusers.fit(pipe, 4, levels=8, samples=2, **call)):
        with pytest.raises(ValueError, match=r"pipe\.transformer uses a cache.*pipe\.transformer\.disable_cache\(\)"):
            run(pipe, **call)
    assert not calls
    pipe.transformer.disable_cache()
    assert measured(pipe, **call).samples == 2


@pytest.mark.parametrize("mark", ["_is_cached", "enable_teacache"])
def test_marks_of_other_caches_are_known(mark):
    pipe = oracle_pipeline(euler(), mixture())
    setattr(pipe.unet, mark, True)
    with pytest.raises(ValueError, match=f"pipe.unet uses a cache \\({mark}"):
        measured(pipe)


def test_a_network_that_skips_layers_at_some_steps_is_refused():
    class Skipping(OracleUNet):
        """Reuses its last output at every third step, but for a layer."""

        def answer_for(self, *args):
            self.layers = torch.nn.ModuleList(torch.nn.Identity() for _ in range(4))
            self.turn = 0
            return super().answer_for(*args)

        def forward(self, sample, *args, **kwargs):
            self.turn += 1
            for layer in self.layers[: 1 if self.turn % 3 == 0 else 4]:
                layer(sample)
            return super().forward(sample, *args, **kwargs)

    scheduler = euler()
    pipe = OraclePipeline(Skipping().answer_for(scheduler, mixture()), scheduler)
    with pytest.raises(ValueError, match="unet ran 1 of its layers, and 4 at another"):
        measured(pipe)


class Warming(OracleUNet):
    """Answers its first calls by a part of its answer, as a cache that is filled late does."""

    def answer_for(self, scheduler, oracle, calls, part):
        self.left, self.part = calls, part
        return super().answer_for(scheduler, oracle)

    def forward(self, sample, timestep, **kwargs):
        self.left -= 1
        output = super().forward(sample, timestep, **kwargs)[0]
        return (output * self.part if self.left >= 0 else output,)


@pytest.mark.parametrize("scheduler", [euler(), diffusers.FlowMatchEulerDiscreteScheduler()], ids=["vp", "flow"])
@pytest.mark.parametrize("part", [0.3, 0.5])
@pytest.mark.parametrize("calls", [2, 3])  # the first is that of the pipeline's own latents, of which nothing is used
def test_a_network_that_answers_its_first_calls_otherwise_is_refused(scheduler, part, calls):
    pipe = OraclePipeline(Warming().answer_for(scheduler, mixture(), calls, part), scheduler)
    with pytest.raises(ValueError, match=f"between levels {calls - 2} and {calls - 1}.*a cache that is filled late"):
        measured(pipe)
    assert measured(pipe).samples == 2


def test_nothing_of_the_watch_is_left_behind():
    pipe = oracle_pipeline(euler(), mixture())
    measured(pipe)
    with pytest.raises(ValueError, match="changed the latents"):
        measured(pipe, change_latents=lambda latents: latents + 1)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.unet.modules())


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


# Weights


def test_a_scheduler_that_a_callback_replaces_is_named():
    pipe = oracle_pipeline(euler(), mixture())

    def on_step(i, output):
        if i == 5:
            pipe.scheduler = euler()
        return output

    with pytest.raises(ValueError, match="put a EulerDiscreteScheduler in the scheduler's place"):
        measured(pipe, on_step=on_step)


class Weighted(OracleUNet):
    """Its answers follow a weight, and the scale of a layer, as LoRA's do."""

    def __init__(self):
        super().__init__()
        self.gain, self.layer = torch.nn.Parameter(torch.ones(1)), torch.nn.Identity()
        self.layer.scaling = {"default": 1.0}
        self.register_buffer("shift", torch.ones(1))
        self.knob = 1.0

    def forward(self, *args, **kwargs):
        factor = self.gain * self.shift * self.knob * self.layer.scaling["default"]
        return (factor * super().forward(*args, **kwargs)[0],)


def in_a_window(change):
    """Calls ``change`` with 1.3 at step 10 and with 1 at step 20."""

    def on_step(unet, i, output):
        if i in (10, 20):
            change(unet, 1.3 if i == 10 else 1.0)
        return output

    return on_step


def set_data(unet, value):
    unet.gain.data = torch.full((1,), value)


CHANGES = {
    "in place": lambda unet, value: unet.gain.data.fill_(value),
    "data": set_data,
    "parameter": lambda unet, value: setattr(unet, "gain", torch.nn.Parameter(torch.full((1,), value))),
    "buffer": lambda unet, value: unet.shift.fill_(value),
    "attribute": lambda unet, value: setattr(unet, "knob", value),
    "scale of LoRA": lambda unet, value: unet.layer.scaling.update(default=value),
}


@pytest.mark.parametrize("name", CHANGES)
def test_weights_that_a_callback_changes_and_changes_back_are_noticed(name):
    scheduler = euler()
    pipe = OraclePipeline(Weighted().answer_for(scheduler, mixture()), scheduler)
    plain = measured(pipe)
    assert plain.samples == 2
    on_step = in_a_window(CHANGES[name])
    with pytest.raises(ValueError, match=r"unet\.(weights|settings)\S* was different from that at the first step"):
        measured(pipe, on_step=lambda i, output: on_step(pipe.unet, i, output))
