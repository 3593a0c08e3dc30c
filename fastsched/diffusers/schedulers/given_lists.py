"""Warn of lists of sigmas or timesteps that a pipeline's call gives to a scheduler with an applied schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastsched import validate
from fastsched.sampling.schedule import Schedule

#: What the times of LTX and Mochi fall by in the first half, by their linear-quadratic schedule.
LINEAR = 0.025


def warn_of_list(schedule: Schedule, asked: Mapping[str, Any], own: Callable[[], Tensor], used: Tensor) -> None:
    """Warn if a call gives a list, which is not used. Pipelines of flow models always give one (`_usual`): no warning.

    Args:
        schedule: The applied schedule.
        asked: Arguments of ``set_timesteps``.
        own: Returns the timesteps of the list.
        used: The timesteps of the schedule.
    """
    name = next((name for name in ("sigmas", "timesteps") if asked.get(name) is not None), None)
    if name is None or (schedule.noise == "flow" and _usual(asked[name])):
        return
    given, taken = own().cpu().double(), used.cpu().double()
    if len(given) != len(taken) or float((given - taken).abs().max()) > 1.0:
        validate.warn(
            f"{name} of this call is not used, because a schedule of {schedule.steps} steps is applied to the "
            "scheduler; for a call with a list of its own give the pipeline its own scheduler again",
        )


def _usual(listed: Any) -> bool:
    """Whether flow times or timesteps are such as pipelines make themselves.

    These are evenly spaced, fall by `LINEAR` in the first half (LTX, Mochi), are evenly spaced and then shifted
    (ACE-Step), or are, after the first one, evenly spaced in log-SNR (Stable Audio 3) or quantiles of a logit-normal
    distribution (Ideogram 4).
    """
    times = torch.as_tensor(listed, dtype=torch.float64).cpu()
    times = times / times[0]
    linear = abs(float(1 - times[len(times) // 2]) - LINEAR) < 1e-3
    even = times.diff()  # rounded by CogView4
    if linear or bool(((even - even.mean()).abs() <= 0.02 * even.mean().abs() + 1e-3).all()):
        return True
    logits, known = times[1:].logit(), list[tuple[Tensor, Tensor]]()
    for steps in (len(times), len(times) + 1):  # the runs of a fit leave out the last one
        left = 1 - torch.arange(len(times), device="cpu") / steps
        known += [(1 / times, 1 / left), (logits, left[1:]), (logits, torch.special.ndtri(left[1:]))]
    return any(len(one) > 2 and _proportional(one.diff(), other.diff()) for one, other in known)


def _proportional(one: Tensor, other: Tensor) -> bool:
    ratios = one / other
    return bool(((ratios - ratios.mean()).abs() <= 0.02 * ratios.mean().abs()).all())
