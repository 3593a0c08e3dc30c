"""A check of a measurement's increments, which takes no model call unless it finds something.

Along a path a denoiser's output moves smoothly: neighbouring increments point the same way. Random numbers that a
network draws at some levels alone, from a generator of its own, add to an output and are gone at the next level, so
increments have cosines of -1/2. There the network is asked the same question twice, except for networks of integer
timesteps, whose outputs may be as rough, with an embedding for each.

An answer from another step, as caches of steps give, is an output off its path at one level alone. The second
differences of increments are then 1, -4, 6, -4 and 1 times its distance from the path, which the Gram matrix shows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastsched import validate
from fastsched.measurement.check_calls import CheckCalls
from fastsched.measurement.statistics import PathStatistics

#: The network is asked twice where the mean cosine of this many increments in a row and their next is below the second
#: number, as it is of random outputs, and in 6 of 1,122 measurements of exact ones over 24 and 48 levels. Increments
#: shorter than the third number, as a fraction of the length of all, are not looked at, as they may be rounding. Nor is
#: where ``log s`` falls by more than `WIDE` from level to level: there outputs of exact networks turn as much.
WINDOW, ROUGH, SHORT, WIDE = 5, 0.1, 1e-3, 0.6

#: One output is off its path if it explains more than the first number of the differences around it (0.94 to 1 of wrong
#: answers, at most 0.90 in 1,200 measurements of exact mixtures), lies off by more than the second number times the
#: increments beside it, and all paths have more elements than the third (few may look alike when rounded). If another
#: state shows the fourth number of it, the network is so at this level: wrong answers of one call show at most 0.03,
#: errors of a network at one timestep at least 0.88. There is no warning for 1,408 exact networks, some of them
#: rounded, guided or with such errors, nor for four trained ones.
ALONE, OFF, ELEMENTS, KNOWN = 0.93, 0.05, 32, 0.25
#: Fourth differences of a sequence around one element that is off.
FOURTH = (1.0, -4.0, 6.0, -4.0, 1.0)


@torch.no_grad()
def check_increments(ask: CheckCalls, stats: PathStatistics) -> None:
    """Check the increments of the first batch; two more calls if they turn to and fro, up to ten if one is off.

    ValueError if the network answers the same question differently where they turn to and fro.
    """
    _check_turns(ask, stats)
    _check_single_outputs(ask, stats)


def _check_single_outputs(ask: CheckCalls, stats: PathStatistics) -> None:
    """Warn if the output of one level alone is off the path, and not for another state of this level."""
    if stats.dimension * stats.samples < ELEMENTS or float(stats.s[stats.s.isfinite()].log().diff().abs().max()) > WIDE:
        return
    level, distance = _off_the_path(stats.gram.double().mean(0))
    if level is None:
        return
    around = [float(each) for each in stats.s[level - 2 : level + 3]]
    z = stats.ends[:1].view(1, *stats.shape) + around[2] * ask.noise(2)
    asked = [(s, ask.denoised(z.double(), s)) for s in around]
    off = torch.stack([weight * own for weight, (_, own) in zip(FOURTH, asked, strict=True)]).sum(0) / max(FOURTH)
    smooth = float(off.norm()) < KNOWN * distance
    if smooth or any(ask.differs(ask.denoised(z.double(), s), own) for s, own in reversed(asked)):
        validate.warn(
            f"at level {around[2]:.3g} the network's answer was off those at the levels beside it, and not when "
            "it was asked again: it may keep a state between its calls (a cache that reuses earlier answers?); disable "
            "this, or schedules are worse"
        )


def _off_the_path(gram: Tensor) -> tuple[int | None, float]:
    """The level whose output alone is off the path, and by how much, from the increments' Gram matrix [N-1, N-1]."""
    weights = gram.new_tensor(FOURTH)
    fourth = gram.new_zeros(max(0, len(gram) - 3), len(gram))  # differences of outputs as sums of increments
    for row in range(len(fourth)):
        fourth[row, row : row + 4] = -weights.cumsum(0)[:4]
    products = fourth @ gram @ fourth.T
    worst: tuple[float, int | None, float] = (ALONE, None, 0.0)
    for k in range(2, len(products) - 2):  # the row of level k + 2
        near = products[k - 2 : k + 3, k - 2 : k + 3]
        squared, all_of_it = float(weights @ near @ weights) / 70, float(near.trace())
        beside = float(gram.diagonal()[k + 1 : k + 3].mean())
        if squared > worst[0] * all_of_it and squared / 70 > OFF**2 * beside:
            worst = squared / all_of_it, k + 2, math.sqrt(squared / 70)
    return worst[1:]


def _check_turns(ask: CheckCalls, stats: PathStatistics) -> None:
    """Ask the network the same question twice where increments turn to and fro, if anywhere."""
    cosines = _cosines(stats.gram)
    if ask.denoiser.process.integer_timesteps or len(cosines) < WINDOW:
        return
    if float(stats.s[stats.s.isfinite()].log().diff().abs().max()) > WIDE:
        return
    means = cosines.unfold(0, WINDOW, 1).mean(1)
    if float(means.min()) >= ROUGH:
        return
    k = int(means.argmin()) + WINDOW // 2 + 1
    s = ask.known(float(stats.s[k]))
    y = stats.ends[:1].view(1, *stats.shape) / s + ask.noise(2)
    if ask.differs(ask.raw(y, s)[0], ask.raw(y, s)[0]):
        raise ValueError(
            f"the network answers the same question differently every time around level {s:.3g}: it is random there, "
            "or keeps a state (dropout left on? a random generator of its own?); call network.eval(), or fix its "
            "random numbers"
        )


def _cosines(gram: Tensor) -> Tensor:
    """Cosines of neighbouring increments, from their Gram matrices [B, N-1, N-1]; 1 beside short ones."""
    squares = gram.diagonal(dim1=1, dim2=2).double().mean(0)
    products = gram.diagonal(1, dim1=1, dim2=2).double().mean(0)
    lengths = squares.sqrt()
    long = torch.minimum(lengths[1:], lengths[:-1]) > SHORT * lengths.sum()
    return torch.where(long, products / (lengths[1:] * lengths[:-1]), 1.0)
