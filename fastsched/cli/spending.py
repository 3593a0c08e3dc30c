"""The cost of a command in model calls, which is said before it is spent."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastsched.cli.shell import note

if TYPE_CHECKING:
    from torch import Tensor

    from fastsched.denoisers.denoiser import Denoiser
    from fastsched.measurement.statistics import PathStatistics


def number(samples: int | range) -> int:
    """How many samples."""
    return len(samples) if isinstance(samples, range) else samples


def measuring_calls(model: Denoiser, levels: int | Tensor, samples: int, responses: bool) -> int:
    """The model calls of a denoiser's measurement, counted per sample."""
    from fastsched.measurement.measuring import measured_levels, measurement_of

    return samples * measurement_of(model, measured_levels(model, levels), responses=responses).calls


def repeating_calls(model: Denoiser, stats: PathStatistics) -> int:
    """The model calls of following measured paths again: a file does not hold the increments that tuning needs."""
    return measuring_calls(model, stats.s, stats.samples, bool(stats.deviated))


def say_measuring(calls: int, later: int | None = None) -> None:
    """Say the cost of a measurement, and the most that is spent ``later`` on running schedules."""
    fitting = "" if later is None else f", at most {later:,} to run and tune schedules"
    note(f"model calls, counted per sample: {calls:,} to measure{fitting}")


def say_fitting(
    measuring: Callable[[Any, Any], int], options: dict[str, Any], repeating: Callable[[Any], int] = lambda stats: 0
) -> None:
    """Say the cost of a fit: of its measurement, made now or followed again, and of the runs."""
    from fastsched.fitting.budget import TOTAL, calls_left
    from fastsched.fitting.loop import MODEL_CALLS

    given, stats = options["model_calls"], options["stats"]
    if stats is not None:
        later = MODEL_CALLS if given is None else given
        say_measuring(repeating(stats) if later else 0, later)
        return
    calls = measuring(options["levels"], options["samples"])
    say_measuring(calls, calls_left(TOTAL if given is None else given, calls))


def say_comparing(reference: int, runs: int) -> None:
    """Say the cost of a comparison: of the converged samples, and of the schedules."""
    note(
        f"model calls, counted per sample: {reference + runs:,}, of which {reference:,} for the converged samples "
        "(fewer with --samples or --reference-steps)"
    )
