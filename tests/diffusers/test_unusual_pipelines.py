"""Pipelines with a twist that are measured all the same: doubled batches, several networks, masks, one buffer."""

import copy

import pytest
import torch

import fastsched as fs

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers
import pipelines
from pipelines import SHAPE, OraclePipeline, OracleUNet, oracle_pipeline
from test_watching import LEVELS, SD, euler, flow_unipc, measured, mixture, quiet


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


@pytest.mark.parametrize("kind", [diffusers.EulerDiscreteScheduler, diffusers.KDPM2DiscreteScheduler])
def test_dit_is_refused_with_a_scheduler_that_needs_larger_latents(kind):
    """It leaves out the factor ``init_noise_sigma``, so it would sample from latents of the wrong size."""
    torch.manual_seed(0)
    pipe, call = quiet(pipelines.dit(kind(**SD)))
    with pytest.raises(ValueError, match=r"multiply its first latents by scheduler.init_noise_sigma.*\(14.6\)"):
        measured(pipe, **call)
    stable, call = quiet(pipelines.stable_diffusion(kind(**SD)))
    measured(stable, **call)


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


@pytest.mark.parametrize(("boundary_ratio", "scale"), [(0.9, {}), (0.5, {"guidance_scale_2": 2.0})])
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
    with pytest.raises(ValueError, match=r"strength 1 too .* the text-to-image pipeline of the same model, or if"):
        measured(made, image=torch.rand(2, 3, 16, 16), **call)


def test_a_flow_model_that_starts_from_an_image_s_noise_alone_is_measured():
    """As FLUX Fill, which has no text-to-image pipeline, starts by ``scale_noise`` at time 1."""
    torch.manual_seed(0)
    text, call = quiet(pipelines.flux(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)))
    from_image = diffusers.FluxImg2ImgPipeline(**text.components)
    from_image.set_progress_bar_config(disable=True)
    text.vae.register_to_config(shift_factor=0.0)
    image = {"image": torch.rand(2, 3, 16, 16)}
    stats = measured(from_image, **image, **call)
    assert torch.equal(stats.gram, measured(text, **call).gram)
    for solver in ("ddim", "fitted"):
        found = fs.diffusers.fit(from_image, 4, solver=solver, stats=stats, model_calls=40, **image, **call)
        assert found.measured_error is not None


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
            x = self.scheduler.init_noise_sigma * torch.randn(2, *SHAPE)
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


class Prefilling(OraclePipeline):
    """Calls its network before the run, as GLM-Image does to keep the keys and values of a given image."""

    @torch.no_grad()
    def __call__(self, num_inference_steps=50, images=2, output_type="latent"):
        self.unet(torch.zeros(1, *SHAPE), torch.tensor(7))
        return super().__call__(None, num_inference_steps, images, output_type=output_type)


def test_a_network_may_be_called_before_the_run():
    plain, pipe = (kind(OracleUNet().answer_for(euler(), mixture()), euler()) for kind in (OraclePipeline, Prefilling))
    before, stats = measured(plain), measured(pipe)
    assert torch.equal(stats.gram, before.gram)
    found = [fs.diffusers.fit(each, 4, stats=own, model_calls=40) for each, own in ((plain, before), (pipe, stats))]
    assert torch.equal(found[0].sigmas, found[1].sigmas)
    assert found[0].measured_error == found[1].measured_error is not None


class AnyStep(OraclePipeline):
    """Leaves out steps of length 0, as AnyFlow, and tells its network where a step goes if ``mean``."""

    @torch.no_grad()
    def __call__(self, num_inference_steps=50, images=2, output_type="latent", mean=0.0):
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(images, *SHAPE)
        for i, t in enumerate(self.scheduler.timesteps):
            r = self.scheduler.sigmas[i + 1] * self.scheduler.config.num_train_timesteps
            if t != r:
                output = self.unet(latents, t)[0] * (1 + mean * r / 1000)
                latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
        return latents


class WithoutLast(OraclePipeline):
    """Leaves out the last timestep, which would be that of sigma 0, as LTXI2VLongMultiPromptPipeline does."""

    @torch.no_grad()
    def __call__(self, num_inference_steps=50, images=2, output_type="latent"):
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(images, *SHAPE)
        for t in self.scheduler.timesteps[:-1]:
            latents = self.scheduler.step(self.unet(latents, t)[0], t, latents, return_dict=False)[0]
        return latents


@pytest.mark.parametrize(
    ("kind", "scheduler"),
    [
        (AnyStep, diffusers.FlowMapEulerDiscreteScheduler(shift=3.0)),
        (WithoutLast, diffusers.LTXEulerAncestralRFScheduler(eta=0.0)),
    ],
)
def test_pipelines_that_leave_out_steps_to_nowhere_are_measured_and_fitted(kind, scheduler):
    pipe = kind(OracleUNet().answer_for(scheduler, mixture()), scheduler)
    stats = measured(pipe)
    assert torch.equal(stats.gram, measured(oracle_pipeline(scheduler, mixture())).gram)
    assert fs.diffusers.fit(pipe, 4, solver="ddim", stats=stats, model_calls=40).measured_error is not None


class FromSigmas(OraclePipeline):
    """Multiplies its first latents by the scheduler's first sigma, not by ``init_noise_sigma``."""

    @torch.no_grad()
    def __call__(self, num_inference_steps=50, images=2, output_type="latent", factor=1.0):
        self.scheduler.set_timesteps(num_inference_steps)
        latents = factor * torch.randn(images, *SHAPE) * self.scheduler.sigmas[0]
        for t in self.scheduler.timesteps:
            output = self.unet(self.scheduler.scale_model_input(latents, t), t)[0]
            latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
        return latents


def test_a_pipeline_may_know_the_size_of_its_first_latents_from_the_sigmas():
    pipes = [kind(OracleUNet().answer_for(euler(), mixture()), euler()) for kind in (FromSigmas, OraclePipeline)]
    stats = [measured(pipe) for pipe in pipes]
    assert torch.equal(stats[0].gram, stats[1].gram)
    found = [fs.diffusers.fit(pipe, 4, stats=each, model_calls=40) for pipe, each in zip(pipes, stats, strict=True)]
    assert found[0].measured_error == found[1].measured_error is not None
    with pytest.raises(ValueError, match="multiply its first latents"):
        measured(pipes[0], factor=0.1)


def test_a_network_that_is_told_where_a_step_goes_is_refused_as_a_flow_map():
    scheduler = diffusers.FlowMapEulerDiscreteScheduler(shift=3.0)
    with pytest.raises(ValueError, match="flow map"):
        measured(AnyStep(OracleUNet().answer_for(scheduler, mixture()), scheduler), mean=0.5)


def test_a_pipeline_that_copies_its_schedulers_attributes_is_refused_with_the_reason():
    """As StableDiffusionPanoramaPipeline does, for each of its views."""
    pipe = oracle_pipeline(euler(), mixture())

    def restore(latents):
        vars(pipe.scheduler).update(copy.deepcopy(vars(pipe.scheduler)))
        return latents

    for copied in (restore, lambda latents: (latents, copy.deepcopy(pipe.scheduler))[0]):  # or TextToVideoZeroPipeline
        with pytest.raises(ValueError, match="OraclePipeline copies its scheduler's attributes"):
            measured(pipe, change_latents=copied)
        assert type(pipe.scheduler) is diffusers.EulerDiscreteScheduler
