"""Checks of a pipeline's measurement, without a further call: did its network compute one function throughout?"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsched.diffusers.watching.step_checks import UNMEASURABLE
from fastsched.measurement.deviated_paths import asked_levels
from fastsched.measurement.statistics import PathStatistics

#: `check_beginning`: how many times faster ``D`` may move between two early levels than at the next three (denoisers
#: reach 6.4, random weights 22); the least ratio of these levels to the data's deviation; the least size of the grid.
JUMP, ABOVE, FEWEST_LEVELS = 40.0, 3.0, 12

#: A single output is wrong if its error explains this fraction of the squared second differences around it, ...
ALONE = 0.8
#: ... is larger than this fraction of the neighbouring increments, ...
OFF = 0.05
#: ... and is missing at another visit of its level: its cosine with how far the response there is from those beside it
#: is below this, and their ratio within these bounds.
MISSING, RATIO = -0.9, (-1.3, -0.7)
#: That must be so at two levels, in samples that have as many elements together. Of 120 measurements of guided mixtures
#: in 8 dimensions, 4 or 8 samples a call, it was so at one level in 4 and at two in none; in 55 exact networks and the
#: small ones of the tests with random weights at none.
FEWEST_WRONG, ELEMENTS = 2, 32
#: Second differences around a single wrong element, as multiples of its error.
SECOND = (1.0, -2.0, 1.0)

#: What to do about a network with a state.
RESET = f"Reset that in every call, or disable it; as it is, {UNMEASURABLE}"


def check_function(stats: PathStatistics) -> None:
    """Check that a network computed the same function in all calls of a measurement.

    Raises:
        ValueError: If its first calls were different, or its outputs at two or more levels.
    """
    check_beginning(stats)
    wrong = [f"{float(stats.s[k]):.3g}" for k in wrong_outputs(stats)]
    if len(wrong) >= FEWEST_WRONG and stats.dimension * stats.samples >= ELEMENTS:
        raise ValueError(
            f"at levels {', '.join(wrong)} the network's output fitted neither those at the neighbouring levels nor "
            f"that of the next call at this level: does it keep a state between its calls (a cache, a counter)? {RESET}"
        )


def check_beginning(stats: PathStatistics) -> None:
    """Check that a network computed the same function in the first calls of a measurement as in later ones.

    At levels well above the data's deviation, ``D`` is a linear function of ``1 / s``, equal to the mean of the data at
    0. So its speed ``|D_k - D_{k-1}| / (1/s_k - 1/s_{k-1})`` is nearly the same at all the first levels. It is much
    higher between two levels if the network changes there.

    Raises:
        ValueError: If the speed is much higher at one of the first levels.
    """
    speed = stats.gram.diagonal(dim1=1, dim2=2).mean(0).sqrt() / (1 / stats.s).diff()
    above = int((stats.s > ABOVE * stats.data_std).sum())
    for k in range(min(3, above - 3) if stats.levels >= FEWEST_LEVELS else 0):
        times = float(speed[k] / speed[k + 1 : k + 4].max())
        if times > JUMP:
            raise ValueError(
                f"between levels {k} and {k + 1} the denoised sample moves {times:.3g} times as fast as at the levels "
                "that follow: are the network's first calls different (a cache that is filled late, a counter)? "
                f"{RESET}"
            )


def wrong_outputs(stats: PathStatistics) -> list[int]:
    """Levels at which the network's output on the reference path, and not that on a deviated one, is wrong.

    The second differences of outputs around a single wrong one are 1, -2 and 1 times its error. The response of a
    deviated path at this level, the difference of its output and the wrong one, has the same error with the other sign.
    """
    gram, n = stats.vector_gram.double().mean(0), stats.levels
    increments, weights = torch.eye(n - 1, len(gram), dtype=gram.dtype, device="cpu"), gram.new_tensor(SECOND)
    seconds = increments.diff(dim=0)  # row k - 1 is that of level k
    asked, found = [*asked_levels(n)], []
    for at, k in enumerate(asked[:-1]):
        near = seconds[k - 2 : k + 1]
        if at == 0 or len(near) < 3:
            continue
        error = weights @ near / 6
        square, total = float(error @ gram @ error), float((near @ gram @ near.T).trace())
        beside = float(gram.diagonal()[k - 2 : k + 2].mean())
        if 6 * square > ALONE * total and square > OFF**2 * beside:
            places = [n - 1 + path * len(asked) + at for path in range(len(stats.deviated))]
            if any(_missing(gram, error, square, place) for place in places):
                found.append(k)
    return found


def _missing(gram: Tensor, error: Tensor, square: float, place: int) -> bool:
    """Whether the response ``place`` differs from those before and after it by the negative of ``error``."""
    away = torch.zeros_like(error)
    away[[place - 1, place, place + 1]] = away.new_tensor([-0.5, 1.0, -0.5])
    along, size = float(error @ gram @ away), float(away @ gram @ away)
    return RATIO[0] < along / square < RATIO[1] and along < MISSING * (square * size) ** 0.5
