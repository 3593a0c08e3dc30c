"""Calls of a pipeline with the same prompts: their arguments, and what the network is given in each."""

import numpy as np
import pytest
import torch

import fastsched as fs

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers
from pipelines import SHAPE, OraclePipeline, OracleUNet

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def mixture(seed=0):
    return fs.oracles.GaussianMixture.random(8, 3, seed=seed)


class Conditioned(OracleUNet):
    """A network that is given a condition beside the latents."""

    def forward(self, sample, timestep, condition, return_dict=True):
        return (super().forward(sample, timestep)[0] + 0.01 * condition.clamp(-9, 9).mean(),)


class TellsItsNetwork(OraclePipeline):
    """Gives its network what ``condition`` returns of the number of the call, the prompt and the number of steps."""

    @torch.no_grad()
    def __call__(self, prompt=None, num_inference_steps=50):
        self.prompts.append(prompt)
        condition = self.condition(len(self.prompts), prompt, num_inference_steps).expand(2, 3)
        self.scheduler.set_timesteps(num_inference_steps)
        x = torch.randn(2, *SHAPE)
        for t in self.scheduler.timesteps:
            output = self.unet(self.scheduler.scale_model_input(x, t), t, condition, return_dict=False)[0]
            x = self.scheduler.step(output, t, x, return_dict=False)[0]
        return x


CONDITIONS = {
    "the call": (lambda call, prompt, steps: torch.tensor(float(call)), True),
    "the steps": (lambda call, prompt, steps: torch.tensor(float(steps)), True),
    "chance": (lambda call, prompt, steps: torch.tensor(np.random.default_rng(call).normal()), True),
    "a seed": (lambda call, prompt, steps: torch.randn(3), False),
    "the prompt": (lambda call, prompt, steps: torch.tensor(float(ord(prompt))), False),
    "a mask": (lambda call, prompt, steps: torch.tensor([0.0, -torch.inf, 0.0]), False),
}


@pytest.mark.parametrize("of", CONDITIONS)
def test_what_differs_between_calls_with_the_same_prompt_is_warned_of_once(of, recwarn):
    scheduler = diffusers.DPMSolverMultistepScheduler(**SD)
    pipe = TellsItsNetwork(Conditioned().answer_for(scheduler, mixture()), scheduler)
    pipe.condition, differs = CONDITIONS[of]
    fs.diffusers.fit(pipe, 4, levels=12, samples=4, prompts=["a", "b"], model_calls=200, progress=False)
    assert len(pipe.prompts) > 4
    told = [str(each.message) for each in recwarn if "another call of the pipeline" in str(each.message)]
    assert len(told) == differs
    assert all(each.startswith("unet.condition was different") for each in told)


class TellsNegativePrompts(TellsItsNetwork):
    """Gives its network its negative prompt, of which every prompt has one of its own."""

    def __call__(self, prompt=None, negative_prompt=None, num_inference_steps=50):
        self.condition = lambda *call: torch.tensor(float(ord(negative_prompt)))
        return super().__call__(prompt, num_inference_steps)


def test_equal_prompts_with_other_negative_prompts_are_other_calls(recwarn):
    scheduler = diffusers.DPMSolverMultistepScheduler(**SD)
    pipe = TellsNegativePrompts(Conditioned().answer_for(scheduler, mixture()), scheduler)
    options = {"prompts": ["a", "a"], "negative_prompt": ["A", "z"], "model_calls": 200, "progress": False}
    fs.diffusers.fit(pipe, 4, levels=12, samples=4, **options)
    assert len(pipe.prompts) > 4
    assert not [each for each in recwarn if "another call of the pipeline" in str(each.message)]


class WritesIntoArguments(OraclePipeline):
    """Changes what it is called with: a tensor, an array, a list and a dictionary."""

    @torch.no_grad()
    def __call__(self, num_inference_steps=50, image=None, array=None, weights=None, options=None):
        image.mul_(2)
        array += 1
        condition = 0.01 * (image.mean() + array.mean() + weights[0].pop() + options.pop("scale"))
        self.conditions.append(float(condition))
        return super().__call__(num_inference_steps=num_inference_steps, on_step=lambda i, output: output + condition)


def test_a_pipeline_that_writes_into_its_arguments_has_the_same_ones_in_every_call():
    scheduler = diffusers.DPMSolverMultistepScheduler(**SD)
    pipe = WritesIntoArguments(OracleUNet().answer_for(scheduler, mixture()), scheduler)
    pipe.conditions = []
    call = {"image": torch.ones(3), "array": np.ones(3), "weights": ([1.0, 2.0],), "options": {"scale": 4.0}}
    options = {"levels": 12, "samples": 4, "progress": False}
    fs.diffusers.fit(pipe, 4, model_calls=150, **options, **call)
    assert len(pipe.conditions) > 4
    assert pipe.conditions == [pytest.approx(0.1)] * len(pipe.conditions)
    assert call["image"].tolist() == [1.0] * 3
    assert (call["array"].tolist(), call["weights"], call["options"]) == ([1.0] * 3, ([1.0, 2.0],), {"scale": 4.0})
