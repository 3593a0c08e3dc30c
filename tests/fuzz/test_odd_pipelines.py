"""Pipelines with a twist: the statistics of the plain pipeline, or an error that says what is wrong with it."""

import logging
import warnings

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from fuzz.amounts import of_all
from hypothesis import given
from hypothesis import strategies as st
from pipelines import SHAPE, oracle_pipeline

import fastsched as fs
from fastsched.diffusers.conventions import solver_of

SCHEDULERS = {
    "EulerDiscreteScheduler()": EulerDiscreteScheduler,
    "EulerDiscreteScheduler(prediction_type='v_prediction')": lambda: EulerDiscreteScheduler(
        prediction_type="v_prediction"
    ),
    "DDIMScheduler(clip_sample=False)": lambda: DDIMScheduler(clip_sample=False),
    "DPMSolverMultistepScheduler(beta_schedule='scaled_linear')": lambda: DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear"
    ),
    "UniPCMultistepScheduler()": UniPCMultistepScheduler,
    "FlowMatchEulerDiscreteScheduler(shift=3.0)": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
}

#: Arguments that leave what the pipeline computes as it is.
HARMLESS = [
    "{}",
    "{'on_step': lambda i, output: output.clone()}",
    "{'on_step': lambda i, output: (torch.manual_seed(i), output)[1]}",
    "{'on_step': lambda i, output: (torch.rand(3), output)[1]}",
    "{'on_step': lambda i, output: output.contiguous(memory_format=torch.channels_last)}",
    "{'on_step': lambda i, output: output[:, None].squeeze(1)}",
    "{'prompt': 'a cat'}",
    "{'step_arguments': {'generator': torch.Generator()}}",
    "{'output_type': 'latent'}",
]
#: Arguments that make a pipeline that cannot be measured; FROM is a step. What only the first steps do differently may
#: as well depend on the level: a measurement is there once.
WRONG = [
    "{'on_step': lambda i, output: 1.5 * output if i >= FROM else output}",
    "{'on_step': lambda i, output: 1.5 * output if i < FROM else output}",
    "{'on_step': lambda i, output: output + 0.3 * torch.randn(output.shape)}",
    "{'on_step': lambda i, output: output * (float('nan') if i == FROM else 1.0)}",
    "{'on_step': lambda i, output: output[:, :1]}",
    "{'on_step': lambda i, output: output + 0.1 * i}",
    "{'on_step': lambda i, output: output * (0.5 if i < 2 else 1.0)}",
    "{'on_step': lambda i, output: output.where(torch.arange(2).view(2, 1, 1) > 0, 0.0)}",
    "{'on_step': lambda i, output: output.to(torch.float16).to(torch.int32)}",
    "{'step_arguments': {'s_churn': 1.0}}",
    "{'step_arguments': {'eta': 0.5}}",
    "{'prompts': []}",
    "{'prompts': [1]}",
    "{'prompts': 'a cat', 'prompt': 'a dog'}",
    "{'prompts_per_call': 0}",
    "{'change_latents': lambda x: 1.1 * x}",
    "{'change_latents': lambda x: torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:]], 1)}",
    "{'change_latents': lambda x: x + 0.2 * torch.randn(x.shape)}",
    "{'change_latents': lambda x: x.clamp(-0.1, 0.1)}",
    "{'repeat_steps': 2}",
    "{'start_scale': 30.0}",
    "{'start_scale': 1e-4}",
    "{'num_inference_steps': 5}",
    "{'sigmas': [1.0, 0.5]}",
    "{'timesteps': [900, 100]}",
    "{'strength': 0.5}",
    "{'no_such_argument': 1}",
]

PROGRAM = """
pipe = oracle_pipeline({scheduler}, fs.oracles.Gaussian(0.5, SHAPE, 0.3))
stats = fs.diffusers.measure(pipe, levels={levels}, samples={samples}, seed={seed}, images={images}, **{call})
"""


logging.getLogger("diffusers").setLevel(logging.ERROR)


@st.composite
def cases(draw, calls):
    levels = draw(st.integers(4, 8))
    return {
        "scheduler": draw(st.sampled_from(sorted(SCHEDULERS))),
        "call": draw(st.sampled_from(calls)).replace("FROM", str(draw(st.integers(3, levels - 1)))),
        "levels": levels,
        "samples": draw(st.integers(1, 4)),
        "seed": draw(st.integers(0, 3)),
        "images": draw(st.integers(1, 3)),
    }


def run(case):
    """The statistics that a program finds, its pipeline, and the error that it ends with."""
    oracle = fs.oracles.GaussianMixture.random(SHAPE[0] * SHAPE[1] * SHAPE[2], 3, seed=0)
    flat = type("Flat", (), {"denoise": staticmethod(lambda z, s: oracle.denoise(z.flatten(1), s).reshape(z.shape))})
    flat.shape = SHAPE
    pipe = oracle_pipeline(SCHEDULERS[case["scheduler"]](), flat)
    pipe.set_progress_bar_config(disable=True)
    options = {name: case[name] for name in ("levels", "samples", "seed", "images")}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return fs.diffusers.measure(pipe, **options, **eval(case["call"])), pipe, None
    except Exception as error:
        return None, pipe, error


def told(case, why):
    pytest.fail(f"{why}\n--- program\n{PROGRAM.format(**case).strip()}\n---", pytrace=False)


@of_all(0.01)
@given(cases(HARMLESS))
def test_harmless_arguments_change_nothing(case):
    found, pipe, error = run(case)
    if error is not None:
        told(case, f"{type(error).__name__}: {error}")
    plain, _, _ = run({**case, "call": "{}"})
    if not torch.equal(found.gram, plain.gram) or not torch.equal(found.ends, plain.ends):
        told(case, "not the statistics of the plain pipeline")
    schedule = fs.optimal_schedule(found, 3, solver_of(pipe.scheduler, 3) or "ddim")
    used = fs.diffusers.apply(schedule, pipe)
    if float((used.sigmas[1:] >= used.sigmas[:-1]).sum()) > 0:
        told(case, f"the scheduler uses {used.sigmas}")


@of_all(0.01)
@given(cases(WRONG))
def test_what_cannot_be_measured_is_refused(case):
    scheduler_before = None
    found, pipe, error = run(case)
    if error is None:
        told(case, f"no error: {found}")
    if not isinstance(error, (TypeError, ValueError)):
        told(case, f"{type(error).__name__}: {error}")
    if type(pipe.scheduler).__name__ not in case["scheduler"]:
        told(case, f"the pipeline was left with {type(pipe.scheduler).__name__}, {scheduler_before}")
