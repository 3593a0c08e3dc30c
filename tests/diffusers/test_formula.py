"""How a pipeline combines what its networks returned, in one tensor or a list of samples."""

from collections import Counter

import pytest
import torch

import fastsched as fs

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers
from diffusers import guiders
from pipelines import SHAPE, OraclePipeline, OracleUNet, oracle_pipeline

from fastsched.diffusers.watching.consistency import Consistency
from fastsched.diffusers.watching.formula import Formula, products_of
from fastsched.diffusers.watching.watch import SeenStep

MIXTURE = fs.oracles.GaussianMixture.random(8, 3, seed=0)


def measured(pipe, **call):
    return fs.diffusers.measure(pipe, levels=24, samples=2, **call)


class InLists(OracleUNet):
    """Takes a list of samples and answers with one, each with a frame axis, as Z-Image's network does."""

    def forward(self, sample, timestep, **_):
        output = super().forward(torch.stack(sample).squeeze(2), timestep, return_dict=False)[0]
        return (list(output.unsqueeze(2).unbind(0)),)


class OfLists(OraclePipeline):
    """A pipeline of such a network: its output is made 0 at the first steps (CFG-Zero*), or its input is replaced."""

    @torch.no_grad()
    def __call__(self, num_inference_steps=50, zero_steps=0, first_row=None):
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(2, *SHAPE)
        for i, t in enumerate(self.scheduler.timesteps):
            given = latents.clone()
            if first_row is not None:
                given[:, :, :1] = first_row
            output = torch.stack(self.unet([*given.unsqueeze(2)], t.expand(2), return_dict=False)[0]).squeeze(2)
            latents = self.scheduler.step(output * (i >= zero_steps), t, latents, return_dict=False)[0]
        return latents


@pytest.mark.parametrize("zero_steps", [1, 2, 3, 6])
def test_what_is_made_of_lists_of_samples_is_watched(zero_steps):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = OfLists(InLists().answer_for(scheduler, MIXTURE), scheduler)
    right = measured(oracle_pipeline(scheduler, MIXTURE))
    assert torch.allclose(measured(pipe).gram, right.gram)
    with pytest.raises(ValueError, match="must not depend on the step's number"):
        measured(pipe, zero_steps=zero_steps)


def test_rows_replaced_in_lists_of_samples_are_in_no_sum():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = OfLists(InLists().answer_for(scheduler, MIXTURE), scheduler)
    assert bool((measured(pipe, first_row=0.5).ends[:, :, :1] == 0).all())


def test_guidance_of_bounded_size_follows_the_latents():
    """Of the factors at levels 0, 0, 1, 2, 3 the first jump that lasts is a change; others follow the level."""

    def judged(*factors):
        consistency, found = Consistency(), None
        for index, factor in enumerate(factors):
            output = torch.tensor([[1.0, 2.0, 4.0]])
            step = SeenStep(Counter(unet=1))
            formula = Formula.of_products(products_of([output], factor * output))
            found = found or consistency.check(index, max(index - 1, 0), step, formula)
        return found

    assert judged(1.0, 1.0, 1.3, 1.6, 2.0) is None
    assert judged(1.0, 1.0, 1.0, 1.0, 1.0) is None
    assert "1.3 instead of 1) than at step 1" in judged(1.0, 1.0, 1.3, 1.3, 1.3)
    assert "1.3 instead of 1) than at step 2" in judged(1.0, 1.0, 1.0, 1.3, 1.3)


class Guided(OraclePipeline):
    """Calls its network with and without a prompt and gives both answers to a guider, whose scale may change."""

    @torch.no_grad()
    def __call__(self, num_inference_steps=50, images=2, scale=lambda i, steps: 5.0):
        self.scheduler.set_timesteps(num_inference_steps)
        latents, prompt = torch.randn(images, *SHAPE), torch.ones(images, 1, 4)
        for i, t in enumerate(self.scheduler.timesteps):
            given = [{"encoder_hidden_states": each, "return_dict": False} for each in (prompt, 0 * prompt)]
            answers = [self.unet(latents, t.expand(images), **each)[0] for each in given]
            self.guider.set_state(step=i, num_inference_steps=num_inference_steps, timestep=t)
            self.guider.prepare_inputs({})
            self.guider.guidance_scale = scale(i, num_inference_steps)
            latents = self.scheduler.step(self.guider.forward(*answers).pred, t, latents, return_dict=False)[0]
        return latents


def guided(guider, scheduler=None):
    scheduler = scheduler or diffusers.DDIMScheduler(clip_sample=False)
    other = fs.oracles.GaussianMixture.random(8, 3, seed=1)
    pipe = Guided(OracleUNet().answer_for(scheduler, MIXTURE, other), scheduler)
    pipe.guider = guider
    return pipe


GUIDERS = {
    "plain": lambda: guiders.ClassifierFreeGuidance(),
    "bounded": lambda: guiders.AdaptiveProjectedGuidance(adaptive_projected_guidance_rescale=1.0),
    "projected": lambda: guiders.AdaptiveProjectedGuidance(eta=0.0),
    "rescaled": lambda: guiders.ClassifierFreeGuidance(guidance_rescale=0.7),
    "scaled": lambda: guiders.ClassifierFreeZeroStarGuidance(zero_init_steps=0),
}


@pytest.mark.parametrize("name", GUIDERS)
@pytest.mark.parametrize(("kind", "images"), [("DDIMScheduler", 1), ("FlowMatchEulerDiscreteScheduler", 2)])
def test_guidance_whose_coefficients_follow_the_latents_is_measured(name, images, kind):
    settings = {"clip_sample": False} if kind == "DDIMScheduler" else {}
    pipe = guided(GUIDERS[name](), getattr(diffusers, kind)(**settings))
    assert fs.diffusers.measure(pipe, levels=48, samples=2, images=images).samples == 2


@pytest.mark.parametrize("name", GUIDERS)
@pytest.mark.parametrize("images", [1, 2])
def test_guidance_that_follows_the_step_s_number_is_refused_whatever_its_coefficients(name, images):
    with pytest.raises(ValueError, match=r"combined with other coefficients|combined in another way"):
        measured(guided(GUIDERS[name]()), images=images, scale=lambda i, steps: 7.0 - 4.0 * i / steps)


@pytest.mark.parametrize("window", [(0, 1), (1, 2), (0, 2), (2, 3), (0, 10), (12, 40), (10, 12), (20, 24), (26, 30)])
@pytest.mark.parametrize("images", [1, 2])
def test_guidance_within_a_window_is_refused_where_the_network_is_always_called_twice(window, images):
    scale = lambda i, steps: 5.0 if window[0] <= i < window[1] else 3.0
    with pytest.raises(ValueError, match="combined with other coefficients"):
        measured(guided(GUIDERS["plain"]()), images=images, scale=scale)


def test_guidance_that_a_level_ends_early_is_measured_on_as_many_levels_as_the_refusal_asks_for():
    """As with a large ``pag_adaptive_scale``."""
    pipe = guided(GUIDERS["plain"]())
    scale = lambda i, steps: 5.0 if pipe.scheduler.timesteps[i] > 960 else 3.0
    with pytest.raises(ValueError, match=r"combined with other coefficients.*more levels show it"):
        fs.diffusers.measure(pipe, levels=24, samples=2, scale=scale)
    assert fs.diffusers.measure(pipe, levels=128, samples=2, scale=scale).samples == 2


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("scheduler", [None, diffusers.FlowMatchEulerDiscreteScheduler()], ids=["vp", "flow"])
def test_first_steps_without_an_output_are_refused_whatever_the_coefficients(steps, scheduler):
    """A velocity of 0 leaves the latents of a flow as they are."""
    with pytest.raises(ValueError, match=r"combined with other coefficients|combined in another way"):
        measured(guided(guiders.ClassifierFreeZeroStarGuidance(zero_init_steps=steps), scheduler), images=2)


def test_guidance_with_a_memory_is_refused():
    with pytest.raises(ValueError, match=r"(answered|combined).*on earlier steps \(momentum of guidance"):
        measured(guided(guiders.AdaptiveProjectedGuidance(adaptive_projected_guidance_momentum=-0.75)), images=1)
