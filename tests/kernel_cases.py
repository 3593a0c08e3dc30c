"""Inputs and error bounds that the tests of the ops and of their kernels share."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

EPS = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}  # unit roundoff

# Worst relative error of one product of two split numbers, against |e_p e_q|.
# bf16x3: |l| <= 2^-8 |w|, so l l' is at most 2^-16; storing l in bfloat16 loses 2^-8 |l| on either side.
# tf32x3: |l| <= 2^-11 |w|, so l l' is at most 2^-22; the hardware truncates l, 2^-10 |l| on either side.
PRODUCT_ERROR = {"bf16x3": 3 * 2.0**-16, "tf32x3": 2.0**-22 + 2 * 2.0**-21, "ieee": 2.0**-24}
# Its root mean square when the low parts are spread evenly over their range, and equal on both sides:
# E l^2 = (2^-8)^2 / 3 against E w^2 >= 1, and likewise for tf32x3 (plus the truncation, which has a sign).
PRODUCT_RMS = {"bf16x3": 2.0**-16 / 3, "tf32x3": 2.0**-22 / 3 + 2 * 2.0**-21, "ieee": 2.0**-24}


@dataclass(frozen=True)
class GramCase:
    """One input of `level_increment_gram`."""

    N: int = 16
    B: int = 2
    d: int = 257
    states: str = "levels"  # none | shared | levels
    dtype: torch.dtype = torch.float32
    per_sample: bool = False
    precision: str = "bf16x3"
    apart: float = 1e-1  # distance of adjacent levels, against their size

    def __str__(self) -> str:
        name = f"N{self.N}-B{self.B}-d{self.d}-X_{self.states}-{str(self.dtype).removeprefix('torch.')}"
        name += f"-{self.precision}-apart{self.apart:g}"
        return name + "-per_sample" * self.per_sample

    def but(self, **changes) -> GramCase:
        return replace(self, **changes)

    def inputs(self, device: str = "cpu") -> tuple[Tensor, Tensor | None, Tensor, Tensor, dict]:
        """Return ``R, X, a, c`` and the keyword arguments, levels on a random walk of the given stride."""
        generator = torch.Generator().manual_seed(self.N * 1000003 + self.d)

        def walk() -> Tensor:
            start = torch.randn(self.B, self.d, generator=generator, dtype=torch.float64)
            strides = torch.randn(self.N, self.B, self.d, generator=generator, dtype=torch.float64)
            return start + self.apart * strides.cumsum(0)

        drift = self.apart * torch.arange(self.N, dtype=torch.float64) / self.N
        a, c = 0.7 - 0.3 * drift, 1.0 + drift.sin()
        R, X = walk().to(self.dtype), None
        if self.states != "none":
            X = walk().float()
            X = X[0] if self.states == "shared" else X
        options: dict = {"per_sample": self.per_sample, "precision": self.precision}
        return R.to(device), None if X is None else X.to(device), a, c, options


def terms(R: Tensor, X: Tensor | None, a: Tensor, c: Tensor) -> Tensor:
    """``[N, B, d]``: sums of the absolute values of the terms of an increment, with which its rounding scales."""

    def of(values: Tensor, coefficients: Tensor) -> Tensor:
        values, coefficients = values.double().cpu(), coefficients.view(-1, 1, 1)
        before = torch.cat([torch.zeros_like(values[:1]), values[:-1]])
        step = coefficients - torch.cat([torch.zeros_like(coefficients[:1]), coefficients[:-1]])
        return (coefficients * (values - before)).abs() + (step * before).abs()

    if X is None:
        return of(R, c)
    return of(R, c) + of(X.expand_as(R), a)


def summation_error(d: int, dtype: torch.dtype = torch.float32) -> float:
    """Relative error of a sum of ``d`` products: six standard deviations of a random walk of roundings."""
    return 6 * EPS[dtype] * d**0.5


def gram_scale(t: Tensor) -> Tensor:
    """``[B, N, N]``: ``||t_p|| ||t_q||``, relative to which errors of entries are measured."""
    norms = t.double().cpu().square().sum(-1).sqrt().T
    return norms.unsqueeze(-1) * norms.unsqueeze(-2)
