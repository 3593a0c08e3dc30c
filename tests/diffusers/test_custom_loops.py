"""Pipelines with loops of their own, as people write them: measured rightly, or refused with the reason."""

import pytest
import torch

import fastsched as fs

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers
from pipelines import SHAPE, OracleUNet

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPS = 48  # of a measurement on half as many levels


class CustomPipeline(diffusers.DiffusionPipeline):
    """Guided sampling; ``guide`` makes a step's output from its number and the network's two outputs."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def network(self, *given):
        return self.unet(*given)

    @torch.no_grad()
    def __call__(self, num_inference_steps=50, guide=None):
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(2, *SHAPE) * self.scheduler.init_noise_sigma
        prompts = torch.tensor([0.0, 0.0, 1.0, 1.0])[:, None]
        for i, t in enumerate(self.scheduler.timesteps):
            scaled = self.scheduler.scale_model_input(latents, t)
            output = guide(i, *self.network(torch.cat([scaled] * 2), t, prompts)[0].chunk(2))
            latents = self.scheduler.step(output, t, latents).prev_sample
        return latents


def custom_pipeline(kind=CustomPipeline, scheduler="EulerDiscreteScheduler"):
    scheduler = getattr(diffusers, scheduler)(**SD)
    networks = (fs.oracles.GaussianMixture.random(8, 3, seed=seed) for seed in (0, 1))
    return kind(OracleUNet().answer_for(scheduler, *networks), scheduler)


def measured(pipe, **call):
    return fs.diffusers.measure(pipe, levels=STEPS // 2, samples=2, progress=False, **call)


def assert_alike(one, other):
    """Up to float32's rounding, which strong guidance multiplies."""
    assert float((one.gram - other.gram).abs().max()) < 1e-4 * float(other.gram.abs().max())


def guided(i, plain, prompted):
    return plain + 4 * (prompted - plain)


@pytest.mark.parametrize("window", [(0, STEPS), (5, 43), (0, 20), (20, 30)])
def test_guidance_that_is_computed_in_place_of_an_output_is_watched(window):
    def in_place(i, plain, prompted):
        return prompted.sub_(plain).mul_(4 if window[0] <= i < window[1] else 1).add_(plain)

    pipe = custom_pipeline()
    if window == (0, STEPS):
        assert_alike(measured(pipe, guide=in_place), measured(pipe, guide=guided))
        return
    with pytest.raises(ValueError, match="must not depend on the step's number"):
        measured(pipe, guide=in_place)


@pytest.mark.parametrize("window", [(0, STEPS), (5, 43), (20, 30)])
def test_a_hook_on_the_network_s_output_is_watched(window):
    pipe, calls = custom_pipeline(), []

    def stronger(module, given, output):
        calls.append(1)
        return (output[0] * (1.2 if window[0] < len(calls) <= window[1] else 1.0),)

    plain = measured(pipe, guide=lambda i, *outputs: 1.2 * guided(i, *outputs))
    pipe.unet.register_forward_hook(stronger)
    if window == (0, STEPS):
        assert_alike(measured(pipe, guide=guided), plain)
        return
    with pytest.raises(ValueError, match="must not depend on the step's number"):
        measured(pipe, guide=guided)


@pytest.mark.parametrize("way", ["forward", "list"])
def test_a_network_whose_calls_are_not_seen_is_measured_with_a_warning(way):
    class Unseen(CustomPipeline):
        def network(self, *given):
            return self.unet.forward(*given) if way == "forward" else self.networks[0](*given)

    seen, pipe = measured(custom_pipeline(), guide=guided), custom_pipeline(Unseen)
    if way == "list":
        pipe.networks, pipe.unet = [pipe.unet], None
    with pytest.warns(UserWarning, match="no call of the pipeline's networks is seen"):
        assert_alike(measured(pipe, guide=guided), seen)
