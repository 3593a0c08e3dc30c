"""A check of a measurement's increments, which takes no model call unless it finds something.

Along a path the outputs of a denoiser change smoothly, so neighbouring increments have similar directions. If a
network adds random numbers to its outputs, from a generator of its own, neighbouring increments have cosines of -1/2.
Where cosines are low, the network is called twice with the same input. This does not apply to networks with integer
timesteps: each timestep may have its own embedding, so their exact outputs may be as rough.

A network that caches outputs of other steps may return a wrong one at a single level. The fourth differences of outputs
around this level are then 1, -4, 6, -4 and 1 times the error. Their norms follow from the Gram matrix. If it reuses
outputs at many levels, wholly or in part, fourth differences are longer than increments at many levels.
"""

from __future__ import annotations

import math
from statistics import median

import torch
from torch import Tensor

from fastsched import validate
from fastsched.measurement.checks.calls import STATE, CheckCalls
from fastsched.measurement.statistics import PathStatistics

#: Nothing is checked if ``log s`` falls by more than this between two levels: exact outputs are then as rough.
WIDE = 0.6

#: The network is called twice if the mean of `WINDOW` successive cosines is below `ROUGH`. This holds for random
#: outputs, and for 6 of 1,122 measurements of exact denoisers over 24 and 48 levels.
WINDOW, ROUGH = 5, 0.1
#: Increments shorter than this fraction of the sum of all lengths may be rounding, and are left out.
SHORT = 1e-3

#: A single output is wrong if its error explains this fraction of the squared fourth differences around it (0.94 to 1
#: for cached outputs, at most 0.90 in 1,200 measurements of exact mixtures) ...
ALONE = 0.93
#: ... and is larger than this fraction of the neighbouring increments ...
OFF = 0.05
#: ... and all paths together have at least this many elements: a few rounded ones may look the same by chance.
ELEMENTS = 32
#: If another state at this level has at least this fraction of the error, the network itself is inexact there, and
#: there is no warning. The fraction was at most 0.03 for cached outputs, and at least 0.88 for errors of a network at
#: one timestep. There was no warning for 1,408 exact networks, some of them rounded, guided or inexact at one timestep,
#: and four trained ones.
KNOWN = 0.25
#: One call computes the output of all paths, so a cached one is wrong in all: the fraction `ALONE` of the median path
#: must exceed this (0.93 to 1 for cached outputs of five networks; 0.45 where one failed in one path of eight).
IN_MOST = 0.75
#: Calls are repeated if this many fourth differences are longer, in squares, than the second number times the mean of
#: the increments around them, to which the third number times the mean of all is added. The least of so many largest
#: was at most 2.6 for 400 exact mixtures, and 3.4 to 42 for networks that reuse outputs for two calls or while their
#: input has changed little. Where rounding to 16 bits is larger than changes it is up to 56.
MANY, LONG, COMMON = 5, 5.0, 0.1
#: With integer timesteps or in 16 bits, two of these that share no output must have a cosine above this: errors of
#: single timesteps, and of rounding, are unrelated. It was at most 0.6 for a network with a table of embeddings;
#: for 56 of 58 networks that reuse outputs, and are rough, it was larger.
ALIKE = 0.65
#: Fourth differences of a sequence around a single wrong element, as multiples of its error, and their squared norm.
FOURTH, SQUARED_FOURTH = (1.0, -4.0, 6.0, -4.0, 1.0), 70


@torch.no_grad()
def check_increments(calls: CheckCalls, stats: PathStatistics) -> None:
    """Check the increments of the first batch, unless all outputs are equal.

    Two more calls if they are rough, and up to ten if one output is wrong, or eleven if many seem to be.

    ValueError if the network gives different outputs for the same input where increments are rough.
    """
    if calls.constant or float(stats.s[stats.s.isfinite()].log().diff().abs().max()) > WIDE:
        return
    _check_repeats(calls, stats)
    if stats.dimension * stats.samples >= ELEMENTS:
        gram = stats.gram.double().mean(0)
        products = _fourth_products(gram)
        level, size = _wrong_output(products, gram.diagonal())
        if level is not None and _wrong_in_most(stats.gram.double(), level):
            _check_single_output(calls, stats, level, size)
            return
        unrelated = stats.process.integer_timesteps or calls.dtype.itemsize < 4
        level = _reusing_level(products, gram.diagonal(), ALIKE if unrelated else 0.0)
        if level is not None:
            _check_reuse(calls, stats, level)


def _check_reuse(calls: CheckCalls, stats: PathStatistics, level: int) -> None:
    """ValueError if outputs around a ``level`` depend on the call before.

    States of one noise, as on a path, are asked for in order, and after a call far from them in reverse order.
    """
    around = [float(each) for each in stats.s[level - 2 : level + 3]]
    states = [(stats.ends[:1].view(1, *stats.shape) / s + calls.noise(2), s) for s in around]
    outputs = [calls.raw(*state)[0] for state in states]
    calls.raw(calls.noise(3), calls.top.level)
    again = (calls.raw(*state)[0] for state in reversed(states))
    if any(calls.differs(found, own) for found, own in zip(again, reversed(outputs), strict=True)):
        raise ValueError(
            f"the network gives different outputs for the same input around level {around[-3]:.3g}, as if it reused "
            f"those of earlier calls: {STATE}"
        )


def _reusing_level(products: Tensor, squares: Tensor, least: float) -> int | None:
    """The level around which outputs are roughest, if they are rough at many levels as if some were reused, or None.

    ``products`` are those of the fourth differences [N-4, N-4], ``squares`` those of the increments [N-1], and
    ``least`` is a cosine that two of the differences must exceed (`ALIKE`).
    """
    if len(products) < MANY:
        return None
    near = squares.unfold(0, len(FOURTH) - 1, 1).mean(1) + COMMON * squares.mean()
    excess = products.diagonal() / near.clamp_min(1e-30)
    lengths = products.diagonal().clamp_min(1e-30).sqrt()
    alike = (products / lengths / lengths[:, None]).abs().triu(len(FOURTH))
    long = excess > LONG
    if int(long.sum()) < MANY or float(alike[long][:, long].max()) < least:
        return None
    return int(excess.argmax()) + 2


def _check_single_output(calls: CheckCalls, stats: PathStatistics, level: int, size: float) -> None:
    """Warn if the output of a ``level`` is wrong by ``size``, and that of another state at this level is not."""
    around = [float(each) for each in stats.s[level - 2 : level + 3]]
    z = stats.ends[:1].view(1, *stats.shape) + around[2] * calls.noise(2)
    outputs = [(s, calls.denoised(z.double(), s)) for s in around]
    error = torch.stack([weight * own for weight, (_, own) in zip(FOURTH, outputs, strict=True)]).sum(0) / max(FOURTH)
    exact = float(error.norm()) < KNOWN * size
    if exact or any(calls.differs(calls.denoised(z.double(), s), own) for s, own in reversed(outputs)):
        validate.warn(
            f"at level {around[2]:.3g} the network's output did not fit those at the neighbouring levels, but did when "
            "it was called again: it may keep a state between its calls (a cache that reuses earlier outputs?); "
            "disable this, or schedules are worse"
        )


def _fourth_products(gram: Tensor) -> Tensor:
    """The inner products of the outputs' fourth differences [N-4, N-4], from the increments' Gram matrix [N-1, N-1]."""
    fourth = torch.eye(len(gram), dtype=gram.dtype, device="cpu").diff(n=3, dim=0)  # third differences of increments
    return fourth @ gram @ fourth.T


def _wrong_output(products: Tensor, squares: Tensor) -> tuple[int | None, float]:
    """The level whose output is wrong, or None, and its error's size; arguments as in `_reusing_level`."""
    worst: tuple[float, int | None, float] = (ALONE, None, 0.0)
    for k in range(2, len(products) - 2):  # the row of level k + 2
        explained, total = _explained(products, k)
        squared_error, beside = explained / SQUARED_FOURTH, float(squares[k + 1 : k + 3].mean())
        if explained > worst[0] * total and squared_error > OFF**2 * beside:
            worst = explained / total, k + 2, math.sqrt(squared_error)
    return worst[1:]


def _explained(products: Tensor, k: int) -> tuple[float, float]:
    """What an error of level ``k + 2`` explains of the squared fourth differences around it, and their sum."""
    near, weights = products[k - 2 : k + 3, k - 2 : k + 3], products.new_tensor(FOURTH)
    return float(weights @ near @ weights) / SQUARED_FOURTH, float(near.trace())


def _wrong_in_most(grams: Tensor, level: int) -> bool:
    """Whether the output of a ``level`` is wrong in most paths, from their Gram matrices [B, N-1, N-1]."""
    parts = [_explained(_fourth_products(own), level - 2) for own in grams]
    return median(explained / max(total, 1e-30) for explained, total in parts) > IN_MOST


def _check_repeats(calls: CheckCalls, stats: PathStatistics) -> None:
    """Call the network twice with the same input where increments are rough, if anywhere."""
    cosines = _cosines(stats.gram)
    if calls.denoiser.process.integer_timesteps or len(cosines) < WINDOW:
        return
    means = cosines.unfold(0, WINDOW, 1).mean(1)
    if float(means.min()) >= ROUGH:
        return
    k = int(means.argmin()) + WINDOW // 2 + 1
    s = calls.known(float(stats.s[k]))
    y = stats.ends[:1].view(1, *stats.shape) / s + calls.noise(2)
    if calls.differs(calls.raw(y, s)[0], calls.raw(y, s)[0]):
        raise ValueError(
            f"the network gives different outputs for the same input around level {s:.3g}: it is random there, "
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
