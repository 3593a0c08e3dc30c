"""What a step of our schedulers launches does not grow."""

import pytest
import torch
from launches import Launches

import fastsched as fs

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers

from fastsched.diffusers.watching.watch import PipelineWatch

D = 65536
STATE = 2 * D


class Pipe:
    """What a watch needs of a pipeline."""

    class Network(torch.nn.Module):
        def forward(self, sample, timestep, encoder_hidden_states):
            return 0.9 * sample

    def __init__(self):
        self.unet = self.Network()


def counted(scheduler, watch=None, pipe=None):
    """Runs a loop in bfloat16; returns the launches of `step`, and where each step began."""
    launches, marks = Launches(), []
    x, embeddings = torch.randn(1, 16, D // 16).to(torch.bfloat16), torch.ones(1, 3)
    for t in scheduler.timesteps:
        output = 0.9 * x
        if watch is not None:
            watch.called("unet", (x, t, embeddings), {}, output)
        marks.append(len(launches.seen))
        with launches:
            x = scheduler.step(output, t, x, return_dict=False)[0]
    return launches, marks


def test_a_step_of_a_fitted_schedule():
    own = diffusers.FlowMatchEulerDiscreteScheduler()
    process = fs.diffusers.CalibrationScheduler.from_scheduler(own).convention.process
    s = torch.cat([process.levels(12), torch.zeros(1, dtype=torch.float64)])
    weights = torch.ones(12, 12, dtype=torch.float64).tril()
    schedule = fs.Schedule.from_levels(process, s, "fitted", weights=weights / weights.sum(1, keepdim=True))
    scheduler = fs.diffusers.FittedScheduler.from_schedule(schedule, own)
    scheduler.set_timesteps(12)
    launches, marks = counted(scheduler)
    found = launches.per_step(marks[4:11], STATE)
    # limits are rounded means
    assert all(each < most + 0.5 for each, most in zip(found, (6, 6, 34), strict=True)), found


@pytest.mark.filterwarnings("ignore:the network's outputs come in bfloat16")
@pytest.mark.parametrize(
    ("watched", "reference", "deviated"), [(False, (45, 31, 114), (35, 23, 71)), (True, (60, 43, 168), (64, 34, 123))]
)
def test_a_step_of_a_measurement(watched, reference, deviated):
    pipe = Pipe()
    watch = PipelineWatch(pipe) if watched else None
    scheduler = fs.diffusers.CalibrationScheduler.from_scheduler(
        diffusers.FlowMatchEulerDiscreteScheduler(), watch=watch
    )
    scheduler.set_timesteps(96)
    launches, marks = counted(scheduler, watch, pipe)
    for part, limits in ((marks[6:47], reference), (marks[51:92], deviated)):
        found = launches.per_step(part, STATE)
        assert all(each < most + 0.5 for each, most in zip(found, limits, strict=True)), found
