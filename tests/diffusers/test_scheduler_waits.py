"""Schedulers of ours step without making the host wait for the device."""

import pytest
import torch
from waiting_device import DEVICE, waiting_device

import fastsched as fs

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers

from fastsched.diffusers.pipelines.start_from_noise import StartFromNoise
from fastsched.diffusers.schedulers.overrides import Timesteps
from fastsched.diffusers.watching.watch import PipelineWatch

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = [
    diffusers.EulerDiscreteScheduler(**SD),
    diffusers.DPMSolverMultistepScheduler(),
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    diffusers.EDMEulerScheduler(),
]


@pytest.fixture
def plain_timesteps(monkeypatch):
    """Timesteps of the waiting device cannot be of a second class of their own."""
    monkeypatch.setattr(Timesteps, "of", lambda timesteps, *_: timesteps)


class Pipe:
    """What a watch needs of a pipeline."""

    class Network(torch.nn.Module):
        def forward(self, sample, timestep, encoder_hidden_states):
            return 0.5 * sample

    def __init__(self):
        self.unet, self.guidance_scale = self.Network(), 5.0


def watched_loop(scheduler, watch, pipe, waits, latents):
    """A pipeline's loop of guided steps; returns how many waits there were at each step."""
    embeddings, counts = torch.ones(2, 3, device=DEVICE), []
    for t in scheduler.timesteps:
        before = len(waits.seen)
        given = scheduler.scale_model_input(latents, t)
        output = pipe.unet(given, t, embeddings)
        watch.called("unet", (given, t, embeddings), {}, output)
        latents = scheduler.step(output, t, latents, return_dict=False)[0]
        counts.append(len(waits.seen) - before)
    return counts


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda scheduler: type(scheduler).__name__)
def test_a_measurement_waits_at_its_second_step_and_its_end(scheduler, plain_timesteps):
    """At the second the noise has been copied, and a doubled batch and elements that the pipeline keeps are asked for.

    The last two hold the results.
    """
    pipe = Pipe()
    watch = PipelineWatch(pipe)
    calibration = fs.diffusers.CalibrationScheduler.from_scheduler(scheduler, watch=watch)
    with waiting_device() as waits, torch.no_grad():
        calibration.set_timesteps(24, device=DEVICE)
        latents = calibration.init_noise_sigma * torch.randn(2, 2, 2, 2)
        counts = watched_loop(calibration, watch, pipe, waits, latents.to(DEVICE))
    assert sum(counts[:2]) <= 3
    assert counts[2:-2] == [0] * 20
    assert sum(counts[-2:]) <= 10
    assert calibration.statistics.samples == 2


def test_a_run_of_a_schedule_waits_once_for_a_doubled_batch(plain_timesteps):
    scheduler = diffusers.EulerDiscreteScheduler(**SD)
    process = fs.diffusers.CalibrationScheduler.from_scheduler(scheduler).convention.process
    levels = process.levels(6)
    weights = torch.eye(6, dtype=torch.float64)
    schedule = fs.Schedule.from_levels(process, torch.cat([levels, levels.new_zeros(1)]), "fitted", weights=weights)
    fitted, pipe = fs.diffusers.FittedScheduler.from_schedule(schedule, scheduler), Pipe()
    watch = PipelineWatch(pipe)
    with waiting_device() as waits, torch.no_grad():
        owned = torch.zeros(2, 2, 2, dtype=torch.bool)
        run = StartFromNoise(fitted, torch.arange(2), schedule, watch, lambda calls: None, owned)
        fitted.set_timesteps(7, device=DEVICE)  # one step returns the noise
        counts = watched_loop(fitted, watch, pipe, waits, torch.randn(2, 2, 2, 2).to(DEVICE))
        assert counts[0] <= 2  # the noise, and the timesteps once more
        assert counts[1] <= 1
        assert counts[2:] == [0] * 5
        assert len(run.evaluations().s) == 6


def test_the_step_of_a_fitted_scheduler_does_not_wait(plain_timesteps):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    process = fs.diffusers.CalibrationScheduler.from_scheduler(scheduler).convention.process
    levels = process.levels(5)
    weights = torch.eye(5, dtype=torch.float64)
    schedule = fs.Schedule.from_levels(process, torch.cat([levels, levels.new_zeros(1)]), "fitted", weights=weights)
    fitted, pipe = fs.diffusers.FittedScheduler.from_schedule(schedule, scheduler), Pipe()
    with waiting_device() as waits, torch.no_grad():
        fitted.set_timesteps(5, device=DEVICE)
        assert watched_loop(fitted, PipelineWatch(pipe), pipe, waits, torch.randn(1, 2, 2, 2).to(DEVICE)) == [0] * 5
