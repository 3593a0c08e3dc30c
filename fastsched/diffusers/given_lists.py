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
        used: Those that are used.
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

    These are evenly spaced, fall by `LINEAR` in the first half (LTX, Mochi), or are evenly spaced in log-SNR after the
    first one (Stable Audio 3).
    """
    times = torch.as_tensor(listed, dtype=torch.float64).cpu()
    times = times / times[0]
    even = lambda gaps: bool(((gaps - gaps.mean()).abs() <= 0.02 * gaps.mean().abs() + 1e-3).all())  # rounded: CogView4
    linear = abs(float(1 - times[len(times) // 2]) - LINEAR) < 1e-3
    return even(times.diff()) or linear or (len(times) > 3 and even(times[1:].logit().diff()))
