"""A check of a measurement's increments, which takes no model call unless it finds something.

Along a path a denoiser's output moves smoothly: neighbouring increments point the same way. Random numbers that a
network draws at some levels alone, from a generator of its own, add to an output and are gone at the next level, so
increments have cosines of -1/2. There the network is asked the same question twice, except for networks of integer
timesteps, whose outputs may be as rough, with an embedding for each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsched.measurement.check_calls import CheckCalls
from fastsched.measurement.statistics import PathStatistics

#: The network is asked twice where the mean cosine of this many increments in a row and their next is below the second
#: number, as it is of random outputs, and in 6 of 1,122 measurements of exact ones over 24 and 48 levels. Increments
#: shorter than the third number, as a fraction of the length of all, are not looked at, as they may be rounding. Nor is
#: where ``log s`` falls by more than `WIDE` from level to level: there outputs of exact networks turn as much.
WINDOW, ROUGH, SHORT, WIDE = 5, 0.1, 1e-3, 0.6


@torch.no_grad()
def check_increments(ask: CheckCalls, stats: PathStatistics) -> None:
    """Ask the network the same question twice where the increments of the first batch turn to and fro, if anywhere.

    ValueError if the answers differ.
    """
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
