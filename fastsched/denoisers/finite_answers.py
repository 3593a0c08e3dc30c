"""Call a denoiser and check that its output is finite, without waiting for the device at every step."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsched.denoisers.denoiser import Denoiser, told_argument
from fastsched.denoisers.late_reading import Verdicts
from fastsched.denoisers.network_errors import not_finite


def finite_denoised(
    denoiser: Denoiser,
    y: Tensor,
    s: Tensor | float,
    dtype: torch.dtype | None,
    verdicts: Verdicts,
    told: Tensor | float | None = None,
) -> Tensor:
    """`Denoiser.denoise`; ``verdicts`` later raise a ValueError that names the level if the output is not finite."""
    denoised = denoiser.denoise(y, s, dtype=dtype, **told_argument(told))
    verdicts.note_finite(
        denoised, lambda: not_finite(denoiser.process, torch.as_tensor(s, dtype=torch.float64, device="cpu"))
    )
    verdicts.settle(wait=False)
    return denoised
