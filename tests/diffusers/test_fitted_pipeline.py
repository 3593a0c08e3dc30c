"""The fitted solver, chosen through a pipeline and run by it."""

import diffusers
import pipelines
import pytest
import torch
from models import mixture

import fastsched as fs
from fastsched.diffusers.pipeline_runner import PipelineRunner
from fastsched.diffusers.prompt_calls import PromptCalls

SCHEDULERS = {
    "epsilon": lambda: diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False),
    "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_pipeline_is_fitted_with_weights(kind):
    """What the fit reports is what the pipeline gives with the schedule applied; and stock solvers do worse."""
    pipe = pipelines.oracle_pipeline(SCHEDULERS[kind](), mixture(d=8))
    options = {"levels": 24, "samples": 4, "seed": 3, "model_calls": 392, "images": 2}
    fitted = fs.diffusers.fit(pipe, 5, solver="fitted", **options)
    assert fitted.weights is not None
    stats = fs.diffusers.measure(pipe, levels=24, samples=4, seed=3, images=2)
    found = PipelineRunner(pipe, stats, PromptCalls((), 0, 1), {"images": 2})(fitted, 0, 4)
    errors = (found.ends - stats.ends).square().flatten(1).sum(1)
    assert float(fs.metrics.power_mean(errors)) == pytest.approx(fitted.measured_error, rel=1e-2)
    stock = fs.diffusers.fit(pipe, 5, solver="ddim", **options)
    assert fitted.measured_error < stock.measured_error
    fs.diffusers.apply(fitted, pipe)
    assert torch.isfinite(torch.as_tensor(pipe(images=2, num_inference_steps=5))).all()
