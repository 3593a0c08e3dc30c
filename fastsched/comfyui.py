"""Schedules as ComfyUI takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastsched.schedule import Schedule


class ComfyUISigmas(NamedTuple):
    """One schedule, for a text field and for a ``SIGMAS`` socket."""

    text: str  #: for the node ManualSigmas: "14.6146, 3.2, 0.0", plain decimals
    sigmas: Tensor  #: [steps + 1] float32 on the CPU, descending, the last 0


def comfyui_sigmas(schedule: Schedule) -> ComfyUISigmas:
    """``schedule`` in ComfyUI's convention: ``steps + 1`` sigmas, flow times for flow models (already shifted).

    The text holds plain decimals, for ComfyUI's ManualSigmas misreads exponents ("2e-3"), in as few digits as give
    the same float32 values.

    Raises:
        ValueError: If the first sigma is infinite (zero terminal SNR), which ComfyUI's samplers cannot start from.
    """
    sigmas = schedule.sigmas.to(torch.float32)
    if not bool(torch.isfinite(sigmas).all()):
        raise ValueError(
            "sigmas start at inf (zero terminal SNR), which ComfyUI cannot hold; measure on levels that start at a "
            "finite sigma (levels=)"
        )
    text = ", ".join(np.format_float_positional(np.float32(value), trim="0") for value in sigmas.tolist())
    return ComfyUISigmas(text, sigmas)
