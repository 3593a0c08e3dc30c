"""The fitted solver, chosen through a pipeline and run by it."""

import diffusers
import pipelines
import pytest
import torch
from models import mixture

import fastsched as fs
from fastsched.diffusers.pipelines.prompt_calls import PromptCalls
from fastsched.diffusers.pipelines.runner import PipelineRunner

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


class WithGradients(pipelines.OraclePipeline):
    """A loop without ``torch.no_grad()``, of a network with parameters."""

    def __call__(self, num_inference_steps=50):
        self.scheduler.set_timesteps(num_inference_steps)
        x = self.scheduler.init_noise_sigma * torch.randn(2, *pipelines.SHAPE)
        for t in self.scheduler.timesteps:
            output = self.unet(self.scheduler.scale_model_input(x, t), t, return_dict=False)[0]
            x = self.scheduler.step(output + self.unet.anchor, t, x).prev_sample
        return x


@pytest.mark.parametrize("solver", ["ddim", "fitted"])
def test_a_pipeline_that_records_gradients_is_fitted_as_without(solver):
    scheduler = SCHEDULERS["epsilon"]()
    errors = []
    for enabled in (False, True):
        pipe = WithGradients(pipelines.OracleUNet().answer_for(scheduler, mixture(d=8)), scheduler)
        with torch.set_grad_enabled(enabled):
            schedule = fs.diffusers.fit(pipe, 4, solver=solver, levels=12, samples=2, model_calls=100)
        errors.append(schedule.measured_error)
    assert errors[0] == errors[1]


class Previews(pipelines.OraclePipeline):
    """Reads the denoised sample of each step, in an output or a tuple."""

    def __call__(self, num_inference_steps=50, output_type="pil", return_dict=True):
        self.scheduler.set_timesteps(num_inference_steps)
        x, self.previews = self.scheduler.init_noise_sigma * torch.randn(2, *pipelines.SHAPE), []
        for t in self.scheduler.timesteps:
            output = self.unet(self.scheduler.scale_model_input(x, t), t, return_dict=False)[0]
            step = self.scheduler.step(output, t, x, return_dict=return_dict)
            x, preview = (step.prev_sample, step.pred_original_sample) if return_dict else step
            self.previews.append(preview)
        return x


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("solver", ["ddim", "fitted"])
def test_a_pipeline_that_reads_denoised_samples_is_fitted(solver, return_dict):
    scheduler = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear")
    pipe = Previews(pipelines.OracleUNet().answer_for(scheduler, mixture(d=8)), scheduler)
    options = {"levels": 12, "samples": 4, "model_calls": 200, "return_dict": return_dict}
    fs.diffusers.apply(fs.diffusers.fit(pipe, 4, solver=solver, **options), pipe)
    end = pipe(num_inference_steps=4, return_dict=return_dict)
    assert [each.shape for each in pipe.previews] == 4 * [end.shape]
