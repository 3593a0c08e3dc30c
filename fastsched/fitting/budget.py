"""How a fit divides its model calls between the measurement and the runs that follow.

About half of the calls measure; with 100 calls or fewer, nearly all do. Up to 400 calls, the calls that responses take
(`fastsched.measurement.deviated_paths`) lowered the error more than the same calls spent on samples; above 400, only
plans with responses were tried. For each total, two to six plans were compared on five to seven denoisers, with the
fitted solver, and at 400 and 800 calls also with DPM-Solver++(2M). `PLANS` has the plan with the least typical and mean
error together. At 1,500 calls it has the plan of the benchmark: fewer levels and more samples are better for some
denoisers and worse for others. ``docs/choosing.md`` shows what more calls gain, and why the default is 800.

Samples with few elements, such as points in the plane, give few equations to determine up to a hundred levels and
weights. So for up to four elements there are twice as many samples, without responses. The typical and mean errors of
the fitted solver then had these ratios to those of plans with responses (2 to 4 elements, three to seven networks, 18
to 112 fits each; with 800 calls, fits of decoupled levels; with 60, three samples in place of two):

    ==========  ====  ====  ====  ====  ====  =====  =====
    calls         60   100   200   300   800  1,500  3,000
    typical     0.37  0.23  0.31  0.41  0.26   0.62   0.74
    mean        0.36  0.26  0.39  0.45  0.39   0.91   0.80
    ==========  ====  ====  ====  ====  ====  =====  =====

Stock solvers had 0.71 and 0.61 of the errors with 200 calls, 0.75 and 0.68 with 800, and gained nothing with 1,500, so
from there on they keep responses. The mean errors of data of 8 and 16 elements gained nothing with 100 and 300.

A pipeline measures at least one path for each prompt. With more prompts than planned paths there are fewer levels, so
that again about half of the calls measure. For 6 and 8 prompts and 800 calls this gave 0.64 and 0.68 of the typical
error of 48 levels, whose measurement leaves few calls to tune; for 16 prompts, fits of 900, 1,600 and 3,200 calls had
1.5, 1 and 0.43 times the same error (12 fits each: mixtures of Gaussians in 64 dimensions, another for each prompt).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from fastsched import validate
from fastsched.denoisers.level_grids import MOST_LEVELS
from fastsched.measurement.checks.network import CHECK_CALLS
from fastsched.measurement.deviated_paths import deviated_paths, query_count
from fastsched.sampling.solvers import FITTED

#: Default number of model calls of a fit, the measurement included.
TOTAL = 800

#: The default for each path that must be measured, one at least for each prompt of a pipeline, where this is more.
PER_PATH = 100


@dataclass(frozen=True)
class Plan:
    """The measurement of a fit."""

    total: int  #: the model calls of the fit, the measurement included, counted per sample
    levels: int  #: levels of a path
    samples: int  #: paths, if responses are measured


PLANS = (
    Plan(60, 14, 2),
    Plan(80, 18, 2),
    Plan(100, 20, 2),
    Plan(200, 28, 2),
    Plan(300, 24, 3),
    Plan(400, 24, 4),
    Plan(800, 48, 4),
    Plan(1500, 48, 8),
    Plan(2300, 48, 12),
    Plan(3000, 48, 16),
)

#: Samples of at most so many elements are measured without responses, and twice as many of them; for stock solvers only
#: if the fit has fewer calls than `MOST_WITHOUT_RESPONSES`.
FEW_ELEMENTS, MOST_WITHOUT_RESPONSES = 4, 1500


def measuring_calls(levels: int, samples: int, *, responses: bool = True) -> int:
    """Network evaluations of the measured paths, without the checks of the network."""
    return samples * query_count(levels, deviated_paths(levels) if responses else ())


def takes_responses(total: int, elements: int, solver: str) -> bool:
    """Whether a fit of ``total`` calls measures responses, for samples with this number of elements."""
    return elements > FEW_ELEMENTS or (solver != FITTED and total >= MOST_WITHOUT_RESPONSES)


def default_total(least: int) -> int:
    """The calls of a fit by default, where at least this many paths are measured."""
    return max(TOTAL, PER_PATH * least)


def planned(
    total: int,
    steps: int,
    levels: int | Tensor | Sequence[float] | None = None,
    samples: int | range | None = None,
    calls: Callable[[int | Tensor, int | range], int] = lambda levels, samples: 0,
    *,
    least: int = 1,
    responses: bool = True,
) -> tuple[int | Tensor, int | range]:
    """Levels and samples, as in `fastsched.measure`, of a fit of ``total`` calls; given values are kept.

    There are at least ``steps + 1`` levels, and as many samples as the plan's calls allow for these levels.
    ``calls(levels, samples)`` returns the calls of the measurement, which measures ``least`` samples or more;
    ``responses`` says whether it has responses. ValueError if both are None and ``total`` is below the smallest plan's,
    the measurement takes more calls than ``total``, or there are more steps than a network has levels.
    """
    if levels is None and samples is None and total < PLANS[0].total:
        raise ValueError(
            f"model_calls must be at least {PLANS[0].total}, the measurement included, got {total}; or give levels and "
            "samples, or stats"
        )
    if levels is None and steps > MOST_LEVELS - 2:  # a network is measured at more levels than there are steps
        raise ValueError(f"steps must be at most {MOST_LEVELS - 2:,}, got {steps:,}")
    plan = next((each for each in reversed(PLANS) if each.total <= total), PLANS[0])
    usual = plan.levels
    if least > plan.samples and not isinstance(samples, range):
        half = total // (4 * max(least, samples or 1)) // 2 * 2  # a pipeline's path takes two calls a level
        usual = min(usual, max(PLANS[0].levels, half))
    grid = max(usual, steps + 2 - steps % 2) if levels is None else validate.levels("levels", levels)
    if samples is None:
        count = len(grid) if isinstance(grid, Tensor) else grid
        samples = max(1, measuring_calls(plan.levels, plan.samples) // measuring_calls(count, 1))
        if not responses:  # of samples of few elements, whose checks may take twice the calls
            samples = max(1, min(2 * samples, (total - 2 * CHECK_CALLS) // count))
    calls_left(total, calls(grid, samples))
    return grid, samples


def calls_left(total: int, measuring: int) -> int:
    """The model calls, of ``total``, that ``measuring`` leaves to rank and tune schedules; ValueError if below 0."""
    if measuring > total:
        raise ValueError(
            f"measuring takes {measuring:,} model calls and model_calls allows {total:,} in all; allow more, or take "
            "fewer levels or samples (a pipeline takes one at least for each prompt)"
        )
    return total - measuring
