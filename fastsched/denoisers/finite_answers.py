"""Call a denoiser and check noise and outputs, without waiting for the device at every step."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsched import validate
from fastsched.denoisers.deferred_checks import DeferredChecks
from fastsched.denoisers.denoiser import Denoiser
from fastsched.denoisers.network_errors import not_finite

#: Noise of a root mean square above the first number, over at least so many elements, is not standard normal; nor is
#: noise below the third, over so many. That of ``torch.rand`` has 0.58; speech models reduce theirs to 0.67.
LARGE, ELEMENTS, SMALL, MORE_ELEMENTS = 3.0, 8, 0.6, 64
#: A run that starts below this fraction of the highest level may start from a noisy sample, which can be of any size.
NEAR_TOP = 0.5


def finite_denoised(
    denoiser: Denoiser,
    y: Tensor,
    s: Tensor | float,
    dtype: torch.dtype | None,
    deferred: DeferredChecks,
    **other_level: Tensor,
) -> Tensor:
    """`Denoiser.denoise`; ``deferred`` later raises a ValueError that names the level if the output is not finite."""
    denoised = denoiser.denoise(y, s, dtype=dtype, **other_level)
    deferred.add_finite(
        denoised, lambda: not_finite(denoiser.process, torch.as_tensor(s, dtype=torch.float64, device="cpu"))
    )
    deferred.run(wait=False)
    return denoised


def noise_check(noise: Tensor, s: float, denoiser: Denoiser) -> DeferredChecks:
    """A deferred check that warns if noise at the first level ``s`` of a run seems scaled already, or too small."""
    deferred = DeferredChecks()

    def check(size: Tensor) -> None:
        hint = ""
        if float(size) > LARGE:
            hint = "is it scaled by the first sigma? It is scaled here, so pass it unscaled"
        elif float(size) < SMALL and noise.numel() >= MORE_ELEMENTS:
            hint = "torch.randn draws such noise, torch.rand does not"
        if hint:
            validate.warn(
                f"noise must be standard normal, but its root mean square is {float(size):.3g}: {hint}; the samples "
                "are likely to be wrong"
            )

    if noise.numel() >= ELEMENTS and s >= NEAR_TOP * denoiser.process.s_max:
        deferred.add(noise.float().square().mean().sqrt(), check)
    return deferred
