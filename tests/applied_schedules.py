"""Schedulers of every kind, and an uneven schedule that is applied to them."""

import torch

import fastsched as fs
from fastsched.diffusers.conventions import describe

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = {
    "arguments": ("EulerDiscreteScheduler", SD),
    "assigned": ("DPMSolverMultistepScheduler", SD),
    "stepped": ("DDIMScheduler", {**SD, "clip_sample": False}),
    "two calls a step": ("HeunDiscreteScheduler", SD),
    "midpoints": ("KDPM2DiscreteScheduler", SD),
    "first-order end by history": ("LMSDiscreteScheduler", SD),
    "first-order end by orders": ("DEISMultistepScheduler", SD),
    "unipc": ("UniPCMultistepScheduler", SD),
    "angles": ("IPNDMScheduler", {}),
    "edm": ("EDMDPMSolverMultistepScheduler", {}),
    "flow": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "flow, two calls": ("FlowMatchHeunDiscreteScheduler", {}),
}
STEPS = 6


class Pipe:
    def __init__(self, scheduler):
        self.scheduler = scheduler


def uneven(process, steps=STEPS):
    """A schedule at trained levels that is no scheduler's default."""
    levels = process.levels(4 * steps)[[0, *(k * (k + 6) // 4 + 2 for k in range(1, steps))]]
    return fs.Schedule.from_levels(process, torch.cat([levels, levels.new_zeros(1)]), "ddim")


def applied_to(scheduler):
    pipe = Pipe(scheduler)
    schedule = uneven(describe(scheduler).process)
    fs.diffusers.apply(schedule, pipe)
    return pipe.scheduler, schedule
