"""Checks of a flow model: the size of its data, and what its output holds at the lowest level. No further calls.

The output is ``R = n - x0``, and the state at the lowest level ``x = (1 - t) x0 + t n``. The output holds the part
``<x, n - R> / <x, x>`` of the sample, nearly 1, with ``E <x, n> = t`` per element for any data. Of a prediction of the
noise the part is 0, and so is ``D`` at the highest level. By chance the implied noise ``x + (1 - t) R`` may lie along
``x``.

The bounds were chosen on 2,300 measurements of mixtures with time, sign and prediction right and wrong, and on four
trained networks.
"""

from __future__ import annotations

import math

from torch import Tensor

from fastsched.measurement.checks.calls import CheckCalls
from fastsched.measurement.checks.network import FEWEST_ELEMENTS

#: Largest deviation of the data of a flow model, whose noise has 1. If time runs the other way, data of deviation ``c``
#: seem to have about ``1/c``, and more if some of their directions are narrower: modes in 16 to 256 dimensions, with
#: 0.5 in all, seem to have 4 to 8. Correct networks of images and latents have at most 1.2.
WIDEST_FLOW = 4.0
#: The part of a sample that a velocity must hold at the lowest level: doubtful below the first number, wrong below the
#: second, both less this many times the standard deviation of what chance may take. Of 655 exact networks in 8 to 128
#: dimensions it took at most 0.31 of the sample. Four trained networks hold 0.82 to 1.1, noise predictions made of
#: three of them -0.8 to 0.03. Of 144 exact noise predictions in 8 to 256 dimensions 73 are refused, 69 warned of and 2
#: not noticed, nor is that of the trained network in the plane.
LEAST_PART, CHANCE = (0.5, 0.25), 1.5
#: It is surely wrong only where ``D`` of pure noise, ``x - R``, is smaller than this: 0.02 for predictions of noise.
#: Guidance of 8 and more, which may take as much of the sample from the output, moves it by 0.8 (a trained network).
NOTHING = 0.2
#: That check needs a lowest level below this fraction of the data's deviation.
NEAR_SAMPLE = 0.05


def flow_faults(calls: CheckCalls, s: float, deviation: float, products: Tensor) -> tuple[list[str], bool]:
    """Messages about the data and the outputs, and whether the outputs are surely wrong.

    Args:
        calls: The calls before the measurement.
        s: The lowest level.
        deviation: The standard deviation of the data, as the paths show it.
        products: ``<x, x>``, ``<x, R>`` and ``<R, R>`` of the paths at the lowest level, [3, B].
    """
    found, elements = [], math.prod(calls.shape)
    if elements >= FEWEST_ELEMENTS and deviation > WIDEST_FLOW:
        found.append(f"the network's data have a deviation of {deviation:.3g}, and those of flow models about 1")
    xx, xr, rr = (products.mean(1) / elements).tolist()
    xr *= -math.copysign(1.0, calls.coefficients(s)[1])  # some networks answer x0 - n
    t = s / (1 + s)
    noise = xx + 2 * (1 - t) * xr + (1 - t) ** 2 * rr
    part, chance = (t - xr) / xx, CHANCE * math.sqrt(max(noise, 0.0) / (xx * elements * products.shape[1]))
    doubtful, wrong = (s <= NEAR_SAMPLE * deviation and part < least - chance for least in LEAST_PART)
    if doubtful:
        found.append(
            f"at the lowest level the network's output holds {part:.2g} times the sample, and a velocity 1 times, "
            "as if the network did predict the noise"
        )
    return found, wrong and float(calls.top.denoised[1].square().mean().sqrt()) < NOTHING
