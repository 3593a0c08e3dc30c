"""Pipelines in bfloat16 on a GPU, one of each family: measured, fitted, and run with what was fitted."""

import pytest
import torch

import fastsched as fs

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers
import pipelines

from fastsched.selection.starts import even_schedule

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}

FAMILIES = {
    "stable-diffusion": lambda: pipelines.stable_diffusion(diffusers.DPMSolverMultistepScheduler(**SD)),
    "stable-diffusion-xl": lambda: pipelines.stable_diffusion_xl(diffusers.EulerDiscreteScheduler(**SD)),
    "stable-diffusion-3": lambda: pipelines.stable_diffusion_3(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)),
    "flux": lambda: pipelines.flux(diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)),
    "wan": lambda: pipelines.wan(diffusers.UniPCMultistepScheduler(**FLOW)),
    "dit": lambda: pipelines.dit(diffusers.DPMSolverMultistepScheduler()),
}


def on(value, device, dtype):
    """Tensors of a pipeline's arguments where its network is."""
    if isinstance(value, torch.Tensor):
        return value.to(device, dtype if value.is_floating_point() else value.dtype)
    return value


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("solver", [None, "fitted"])
def test_a_pipeline_in_bfloat16(family, solver):
    torch.manual_seed(0)
    pipe, call, ending = FAMILIES[family]()
    call = {name: on(value, "cuda", torch.bfloat16) for name, value in call.items()}
    pipe.to("cuda", torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    schedule = fs.diffusers.fit(pipe, 4, solver=solver, levels=16, samples=2, model_calls=100, **call)
    assert schedule.steps == 4
    assert (schedule.sigmas.diff() < 0).all()
    assert schedule.sigmas[-1] == 0
    fs.diffusers.apply(schedule, pipe)
    images = pipe(num_inference_steps=4, generator=torch.Generator("cuda").manual_seed(0), **call, **ending)[0]
    assert torch.as_tensor(images).isfinite().all()


def test_steps_of_a_fitted_schedule_are_those_of_the_cpu():
    """Also where products may be in TF32; only the first step may wait, for its factors."""
    own = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    process = fs.diffusers.CalibrationScheduler.from_scheduler(own).convention.process
    schedule, noise = even_schedule(process, 8, "fitted"), torch.randn(2, 4, 8, 8)
    torch.backends.cuda.matmul.allow_tf32 = True
    ends = []
    for device in ("cpu", "cuda"):
        scheduler = fs.diffusers.FittedScheduler.from_schedule(schedule, own)
        scheduler.set_timesteps(8, device=device)
        x = noise.to(device)
        for n, t in enumerate(scheduler.timesteps):
            output = torch.tanh(0.9 * x)
            torch.cuda.set_sync_debug_mode("error" if n else "default")
            x = scheduler.step(output, t, x, return_dict=False)[0]
            torch.cuda.set_sync_debug_mode("default")
        ends.append(x.cpu())
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-5)
