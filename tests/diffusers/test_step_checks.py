"""What pipelines pass to a scheduler's step, and what they must do with their input before it."""

import numpy as np
import pytest
import torch

import fastsched as fs

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers
from pipelines import unconditional


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_an_argument_of_zero_that_a_scheduler_does_not_take_is_ignored(name):
    """DDIMPipeline gives every scheduler ``eta=0.0``, which only DDIM's takes."""
    torch.manual_seed(0)
    pipe = unconditional(diffusers.DDIMScheduler())[0]
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    schedule = fs.diffusers.fit(pipe, 3, levels=8, samples=1, model_calls=60)
    assert schedule.measured_error is not None
    fs.diffusers.apply(schedule, pipe)
    alone = diffusers.DDPMPipeline(pipe.unet, pipe.scheduler)  # gives no eta
    one, other = (
        each(generator=torch.Generator().manual_seed(0), num_inference_steps=3, output_type="np").images
        for each in (pipe, alone)
    )
    np.testing.assert_array_equal(one, other)
    with pytest.raises(TypeError, match="eta"):
        pipe(eta=0.5, num_inference_steps=3)
    with pytest.raises(ValueError, match=r"eta=0\.5, which changes what a step does"):
        fs.diffusers.measure(pipe, levels=8, samples=1, eta=0.5)


def test_a_pipeline_that_does_not_scale_its_input_is_refused_where_the_scheduler_does():
    pipe = unconditional(diffusers.EulerDiscreteScheduler())[0]
    with pytest.raises(ValueError, match=r"does not call scheduler\.scale_model_input"):
        fs.diffusers.fit(pipe, 3, levels=8, samples=1)
