"""The closed-form schedules that fastsched is compared with.

Schedules are sampler sigmas [steps + 1] ending in 0. If a process starts from pure noise, curves start at the highest
finite level of the denoiser's grid, and their first node is then moved to pure noise, as
`fastsched.score_optimal_schedule` does. For flow models there are also curves in flow time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import fastsched as fs
from fastsched.denoisers.noise import FlowMatching, NoiseProcess


def curves(process: NoiseProcess, steps: int, data_std: float) -> dict[str, Tensor]:
    """The closed-form schedules, by name. In those named ``_to_zero``, 0 replaces the node at the lowest level."""
    low, high = process.s_min, highest_finite(process)
    found: dict[str, Tensor] = {}
    for suffix, spare in (("", False), ("_to_zero", True)):
        levels = {
            "karras_7": fs.baselines.karras(steps, low, high, 7.0, spare_last=spare),
            "karras_3": fs.baselines.karras(steps, low, high, 3.0, spare_last=spare),
            "exponential": fs.baselines.exponential(steps, low, high, spare_last=spare),
            "kl_optimal": fs.baselines.kl_optimal(steps, low, high, data_std, spare_last=spare),
        }
        found |= {name + suffix: from_start(process, s) for name, s in levels.items()}
        if isinstance(process, FlowMatching):
            times = {
                "karras_7_time": fs.baselines.karras(steps, process.t_min, process.t_max, 7.0, spare_last=spare),
                "exponential_time": fs.baselines.exponential(steps, process.t_min, process.t_max, spare_last=spare),
            }
            found |= {name + suffix: t for name, t in times.items()}
    if isinstance(process, FlowMatching):
        found["linear"] = fs.baselines.flow_shift(steps, 1.0)
        found["flow_shift_3"] = fs.baselines.flow_shift(steps, 3.0)
    else:
        found["linear"] = fs.baselines.linear(steps, low, high)
    return found


def highest_finite(process: NoiseProcess) -> float:
    """The highest level; the second of a grid of 3 if the first is pure noise."""
    return process.s_max if math.isfinite(process.s_max) else float(process.levels(3)[1])


def from_start(process: NoiseProcess, s: Tensor) -> Tensor:
    """Levels ``s`` as sampler sigmas, the first moved to the start of the process."""
    return process.sampler_sigma(torch.cat([s.new_tensor([process.s_max]), s[1:]]))
