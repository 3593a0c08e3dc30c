"""How a fit divides its model calls between the measurement and the runs that follow.

About half of the calls measure; of 100 and fewer, nearly all. Up to 400 calls, responses
(`fastsched.measurement.deviated_paths`) were worth more than the samples that their calls would buy; above that only
plans with responses were tried. Of two to six plans at each total, `PLANS` has the one of least error, typical and mean
together, on five to seven denoisers: to 300 calls of the fitted solver, at 400 and 800 of DPM-Solver++(2M) too. At
1,500, where fewer levels and more samples serve some denoisers better and others worse, it has the benchmark's. What
more calls buy, and why the default is 800, is in ``docs/choosing.md``.

Samples of few elements, such as points of the plane, are few equations to tune up to a hundred levels and weights by.
There the calls of responses may serve better for twice as many samples. With 400 and 800 calls, data of 2 and of 4
elements then had 0.6 of the typical error and 0.7 of the mean error (geometric means over solvers, steps and two to
five seeds), and data of 8 elements 0.9 of both. With 100 and 200 calls single networks lose, up to twice the error;
with 1,500 the plane gains nothing, and digits and patches have 1.7 times the error.
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
    """Levels and samples, as in `fastsched.measure`, of a fit of ``total`` calls; those given stay.

    Steps need one level more, and there are as many samples as the plan's calls allow on the levels. A measurement,
    with ``responses`` or without, takes ``calls(levels, samples)``.

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
    """Model calls of a fit of ``total`` that ``measuring`` leaves to rank and tune schedules.

    Raises:
        ValueError: If the measurement takes more than there are.
    """
    if measuring > total:
        raise ValueError(
            f"measuring takes {measuring:,} model calls and model_calls allows {total:,} in all; allow more, or take "
            "fewer levels or samples"
        )
    return total - measuring
