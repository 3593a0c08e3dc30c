"""How a fit divides its model calls between the measurement and the runs that follow.

About half of the calls measure; of 100 and fewer, nearly all. Up to 400 calls, responses
(`fastsched.measurement.deviated_paths`) were worth more than the samples that their calls would buy; above that only
plans with responses were tried. Of two to six plans at each total, `PLANS` has the one of least error, typical and mean
together: to 300 calls of the fitted solver (DPM-Solver++(2M) agrees, but was not tried at 100), on six or seven
denoisers and seeds 900 to 902; at 400 and 800 of both solvers, on six and seeds 20 and 21; but at 1,500, where fewer
levels and more samples serve some denoisers better and others worse, it has the benchmark's. All were
chosen when the fitted solver's weights were drawn to those of DPM-Solver++(2M). Its error now, of five denoisers and
three seeds, against that of 1,500 (``benchmarks.quality.cost_curve``):

=====  ======
calls  fitted
=====  ======
60     5.8
100    2.8
200    2.5
300    2.3
400    1.7
800    1.4
=====  ======

So the default is 800. The plans for 2,300 and 3,000 calls are of five denoisers and seed 20, against 8 samples with as
many calls in all.

Samples of few elements, such as points of the plane, are few equations to tune up to a hundred levels and weights by.
There the calls of responses may serve better for twice as many samples. Errors, typical and mean, against those with
responses (geometric means over cells of solvers and steps, and over two to five seeds):

=====  ============================================  ==========
calls  data                                          errors
=====  ============================================  ==========
200    two in the plane, two of 8 elements           0.84, 0.78
400    three in the plane                            0.6, 0.7
800    three in the plane, 14 cells                  0.62, 0.65
800    a mixture of 4 elements                       0.60, 0.72
800    a mixture of 8 elements                       0.91, 0.90
1,500  two in the plane, 57 cells                    1.0, 1.2
1,500  digits and patches                            1.7, 1.7
=====  ============================================  ==========

At 100 and 200 calls single networks lose, up to twice the error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fastsched.measurement.deviated_paths import deviated_paths, queries

#: All calls of a fit by default, the measurement included.
TOTAL = 800


@dataclass(frozen=True)
class Plan:
    """How a measurement is made for ``total`` calls in all, counted per sample.

    Attributes:
        total: The calls.
        levels: Levels of a path.
        samples: Paths with responses.
        few_elements: Elements of a sample up to which there are no responses, and about twice as many paths.
    """

    total: int
    levels: int
    samples: int
    few_elements: int = 0


PLANS = (
    Plan(60, 14, 2),
    Plan(80, 18, 2),
    Plan(100, 20, 2),
    Plan(200, 28, 2),
    Plan(300, 24, 3),
    Plan(400, 24, 4, few_elements=4),
    Plan(800, 48, 4, few_elements=4),
    Plan(1500, 48, 8),
    Plan(2300, 48, 12),
    Plan(3000, 48, 16),
)


def measuring_calls(levels: int, samples: int, *, responses: bool = True) -> int:
    """Network evaluations that paths take, without the network's checks."""
    return samples * len(queries(levels, deviated_paths(levels) if responses else ()))


def takes_responses(total: int, elements: int) -> bool:
    """Whether a fit of ``total`` calls measures responses, for samples of so many elements."""
    return elements > _plan(total).few_elements


def _plan(total: int) -> Plan:
    return next((each for each in reversed(PLANS) if each.total <= total), PLANS[0])


def planned(
    total: int,
    steps: int,
    levels: int | Tensor | None = None,
    samples: int | range | None = None,
    calls: Callable[[int | Tensor, int | range], int] = lambda levels, samples: 0,
    *,
    responses: bool = True,
) -> tuple[int | Tensor, int | range]:
    """Levels and samples to measure, where they are not given.

    Args:
        total: Calls of the whole fit.
        steps: Steps of the schedule, which need one level more.
        levels: As in `fastsched.measure`; chosen when None.
        samples: As in `fastsched.measure`; chosen when None: as many as the plan's calls allow on these levels.
        calls: What a measurement takes.
        responses: Whether it measures responses.

    Raises:
        ValueError: If both are to be chosen and the calls are fewer than the smallest plan's, or the measurement takes
            more than there are.
    """
    if levels is None and samples is None and total < PLANS[0].total:
        raise ValueError(
            f"model_calls must be at least {PLANS[0].total}, the measurement included, got {total}; or give levels and "
            "samples, or stats"
        )
    plan = _plan(total)
    if levels is None:
        levels = max(plan.levels, steps + 2 - steps % 2)
    if samples is None:
        count = len(levels) if isinstance(levels, Tensor) else levels
        samples = max(1, measuring_calls(plan.levels, plan.samples) // measuring_calls(count, 1, responses=responses))
    calls_left(total, calls(levels, samples))
    return levels, samples


def calls_left(total: int, measuring: int) -> int:
    """Model calls of a fit that its measurement leaves to rank and tune schedules.

    Args:
        total: Calls of the whole fit.
        measuring: Calls of its measurement.

    Raises:
        ValueError: If the measurement takes more than there are.
    """
    if measuring > total:
        raise ValueError(
            f"measuring takes {measuring:,} model calls and model_calls allows {total:,} in all; allow more, or take "
            "fewer levels or samples"
        )
    return total - measuring
