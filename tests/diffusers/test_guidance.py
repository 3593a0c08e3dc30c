"""Guidance is part of what a pipeline's measurement measures, and must not change during it."""

import pytest
import torch

import fastsched as fs

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers
import pipelines
from pipelines import SHAPE
from test_pipeline_measurement import SAMPLES, SD, denoiser_of, mixture


def part_of(full):
    """The first component of a mixture, as a prompt selects a part of the data."""
    return fs.oracles.GaussianMixture(full.weights[:1], full.means[:1], full.covariances[:1])


def guided_pipeline(scheduler, plain, conditional):
    """Stable Diffusion around two oracles, and what to call it with for four samples."""
    unet = pipelines.OracleUNet().answer_for(scheduler, plain, conditional)
    scheduler.register_to_config(steps_offset=1)  # as the pipeline would, with a warning
    pipe = diffusers.StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    call = {
        "prompt_embeds": torch.ones(4, 1, 1),
        "negative_prompt_embeds": torch.zeros(4, 1, 1),
        "height": 8,
        "width": 8,
        "latents": torch.zeros(4, *SHAPE),  # for their shape alone
    }
    return pipe, call


@pytest.mark.filterwarnings("ignore:.*noise of level.*guided by more than its data allow")  # between unrelated data
def test_guidance_is_part_of_what_is_measured():
    scheduler = diffusers.EulerDiscreteScheduler(**SD)
    plain, conditional, scale = mixture(), mixture(1), 4.0
    pipe, call = guided_pipeline(scheduler, plain, conditional)
    measured = fs.diffusers.measure(pipe, samples=SAMPLES, guidance_scale=scale, **call)
    assert measured.origin.guidance == scale
    guided = denoiser_of(scheduler, (plain, 1 - scale), (conditional, scale))
    direct = fs.measure(guided, SHAPE, samples=SAMPLES, progress=False)
    assert float((measured.gram - direct.gram).norm() / direct.gram.norm()) < 1e-3
    alone = fs.measure(denoiser_of(scheduler, (conditional, 1.0)), SHAPE, samples=SAMPLES, progress=False)
    # The first step may be long or short for nearly the same error, so errors are compared, not levels.
    error = [fs.predict_error(direct, fs.optimal_schedule(stats, 6)) for stats in (direct, measured, alone)]
    assert error[1] < 1.01 * error[0]
    assert error[2] > 2 * error[0]


@pytest.mark.parametrize("step", [8, 40, 60, 93])
@pytest.mark.parametrize(("scale", "then"), [(7.5, 1.5), (1.5, 2.5), (2.0, 1.5)])
def test_guidance_that_changes_during_the_run_is_noticed(scale, then, step):
    """As the guide of diffusers to callbacks does it, at any of the 96 steps but the first seven and the last."""

    def change(pipe, i, timestep, kwargs):
        if i == step:
            pipe._guidance_scale = then
        return kwargs

    conditional = part_of(mixture()) if scale < 7 else mixture(1)  # the latter's sensitivities overflow
    pipe, call = guided_pipeline(diffusers.EulerDiscreteScheduler(**SD), mixture(), conditional)
    with pytest.raises(ValueError, match="must not depend on the step's number"):
        fs.diffusers.measure(pipe, samples=SAMPLES, guidance_scale=scale, callback_on_step_end=change, **call)


@pytest.mark.parametrize("conditional", [part_of(mixture()), mixture(1)], ids=["part", "unrelated"])
@pytest.mark.parametrize("scale", [1.5, 7.5, 30.0])
def test_strong_guidance_is_not_taken_for_a_change(scale, conditional):
    pipe, call = guided_pipeline(diffusers.EulerDiscreteScheduler(**SD), mixture(), conditional)
    assert fs.diffusers.measure(pipe, samples=SAMPLES, guidance_scale=scale, **call).samples == SAMPLES
