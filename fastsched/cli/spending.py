"""The cost of a command in model calls, which is printed before the command runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import typer

from fastsched.cli.shell import note

if TYPE_CHECKING:
    from torch import Tensor

    from fastsched.denoisers.denoiser import Denoiser
    from fastsched.measurement.statistics import PathStatistics


def measuring_calls(
    model: Denoiser, levels: int | Tensor, samples: int, responses: bool, *, checks: bool = True
) -> int:
    """The model calls of a denoiser's measurement, counted per sample; ``checks`` adds those of the network checks."""
    from fastsched.fitting import budget
    from fastsched.measurement.measuring import measured_levels
    from fastsched.measurement.network_checks import CHECK_CALLS

    paths = budget.measuring_calls(len(measured_levels(model, levels)), samples, responses=responses)
    return paths + CHECK_CALLS * (checks and samples > 0)


def least_samples(pipe: Any, prompts: list[str] | None, arguments: dict[str, Any]) -> int:
    """The least number of samples of a pipeline's measurement, one for each prompt and image."""
    from fastsched.diffusers.prompt_calls import PromptCalls

    return PromptCalls.of(pipe, prompts, arguments, None).minimum_samples


def calibrating(least: int) -> Callable[[Any, Any], int]:
    """The model calls of a pipeline's measurement of given levels and samples."""
    from fastsched.diffusers.pipeline_measurement import calibration_calls

    return partial(calibration_calls, least=least)


def repeating_calls(model: Denoiser, stats: PathStatistics) -> int:
    """The model calls of following the paths of statistics once more; none if the file has their increments."""
    try:
        calls = measuring_calls(model, stats.s, stats.samples, bool(stats.deviated), checks=False)
    except ValueError as error:
        raise ValueError(f"stats are of another noise process than this model's: {error}") from None
    return calls if stats.increments is None else 0


def say(cost: str, dry_run: bool) -> None:
    """Print what a command costs; with ``dry_run`` the command then ends."""
    note(f"model calls (a batch of 4 counts as 4): {cost}")
    if dry_run:
        raise typer.Exit


def say_fitting(
    measuring: Callable[[Any, Any], int],
    options: dict[str, Any],
    dry_run: bool,
    repeating: Callable[[Any], int] = lambda stats: 0,
) -> int:
    """Print the cost of a fit: of its measurement, new or repeated for given statistics, and of its runs.

    Returns:
        The calls that the progress bar counts; repeating a measurement is not among them.
    """
    from fastsched.fitting.budget import TOTAL, calls_left
    from fastsched.fitting.loop import MODEL_CALLS

    given, stats = options["model_calls"], options["stats"]
    if stats is not None:
        later = MODEL_CALLS if given is None else given
        calls = repeating(stats) if later else 0
    else:
        calls = measuring(options["levels"], options["samples"])
        later = calls_left(TOTAL if given is None else given, calls)
    say(f"{calls:,} to measure, at most {later:,} to run and tune schedules", dry_run)
    return later if stats is not None else calls + later


def say_comparing(reference: int, runs: int, dry_run: bool) -> None:
    """Print the cost of a comparison, and the part of the converged samples."""
    least = "fewer with --samples or --reference-steps"
    say(f"{reference + runs:,}, of which {reference:,} for the converged samples ({least})", dry_run)
