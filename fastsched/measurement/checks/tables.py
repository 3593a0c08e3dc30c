"""A check without model calls: that a table of ``alphas_cumprod`` is not its own square root.

Code of diffusion models also keeps ``sqrt(abar_t)``, under a similar name (``sqrt_alphas_cumprod``). Its levels are
plausible, and few paths do not show the mistake in the network's outputs. The table does: networks are trained on few
families of tables, and the square of their root belongs to one of them, while the root itself does not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastsched.denoisers.noise import NoiseProcess, VariancePreserving
from fastsched.measurement.checks.calls import ANYWAY

#: Largest deviation from a straight line, over its range, of a table that belongs to a family: rounding to float32.
STRAIGHT = 1e-4
#: The given table must be this many times as far from all families as its square.
DISTINCT = 3.0
#: A table with fewer timesteps, for example a thinned one, is not checked.
FEWEST_TIMESTEPS = 20
#: The offset ``s`` of the cosine table (Nichol and Dhariwal 2021, equation 17).
COSINE_OFFSET = 0.008


def check_table(process: NoiseProcess) -> None:
    """ValueError if the process has the square roots of a known family of tables instead of a table."""
    if not isinstance(process, VariancePreserving) or len(process.alphas_cumprod) < FEWEST_TIMESTEPS:
        return
    values = torch.tensor(process.alphas_cumprod, dtype=torch.float64, device="cpu")
    squared = _distance(values.square())
    if squared < STRAIGHT and DISTINCT * squared < _distance(values):
        raise ValueError(
            "alphas_cumprod seem to be square roots: their squares are the usual table of a known family, and they are "
            f"not. Pass the cumulative products themselves, the squares of sqrt_alphas_cumprod{ANYWAY}"
        )


def _distance(abar: Tensor) -> float:
    """How far a table [T] is from the nearest family: ``beta``, ``sqrt(beta)`` or the cosine's angle linear in t."""
    # Without the last entry, which zero terminal SNR, and the cosine table's bound on beta, change.
    beta = 1 - abar[:-1] / torch.cat([abar.new_ones(1), abar[:-2]])
    start = math.cos(COSINE_OFFSET / (1 + COSINE_OFFSET) * math.pi / 2)
    angle = (start * abar[:-1].sqrt()).acos()
    return min(_from_line(each) for each in (beta, beta.sqrt(), angle))


def _from_line(values: Tensor) -> float:
    """Largest deviation from the straight line of least squares, over the range of the ``values`` [T]."""
    t = torch.linspace(-1, 1, len(values), dtype=values.dtype, device="cpu")
    centred = values - values.mean()
    line = t * (t @ centred) / (t @ t)
    return float((centred - line).abs().max() / (values[-1] - values[0]).abs())
