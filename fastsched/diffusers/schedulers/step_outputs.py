"""What ``step`` of a scheduler returns."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import get_args

from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor


@dataclass
class StepOutput(SchedulerOutput):
    """The next state, and the denoised sample ``D`` of the step under both names that it has in diffusers."""

    pred_original_sample: Tensor | None = None
    denoised: Tensor | None = None


def gives_denoised(kind: type) -> bool:
    """Whether ``step`` of a class also gives ``D``, as those of DDIM and Euler do, and those of DPM-Solver do not."""
    outputs = get_args(inspect.signature(kind.step).return_annotation)
    return any("pred_original_sample" in getattr(output, "__annotations__", ()) for output in outputs)
