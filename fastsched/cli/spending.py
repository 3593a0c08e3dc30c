"""The cost of a command in model calls, which is printed before the command runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fastsched.cli import inputs
from fastsched.cli.shell import note

if TYPE_CHECKING:
    from torch import Tensor

    from fastsched.denoisers.denoiser import Denoiser


def measuring_calls(model: Denoiser, levels: int | Tensor, samples: int, responses: bool) -> int:
    """The model calls of a denoiser's measurement and the checks of its network, counted per sample."""
    from fastsched.fitting import budget
    from fastsched.measurement.checks.network import CHECK_CALLS
    from fastsched.measurement.measuring import measured_levels

    paths = budget.measuring_calls(len(measured_levels(model, levels)), samples, responses=responses)
    return paths + CHECK_CALLS * (samples > 0)


def calibrating(
    pipe: Any, prompts: list[str] | None, arguments: dict[str, Any]
) -> tuple[int, Callable[[Any, Any], int]]:
    """The least number of samples of a pipeline's measurement, and its model calls for given levels and samples."""
    from fastsched.diffusers.pipelines.measurement import calibration_calls
    from fastsched.diffusers.pipelines.prompt_calls import PromptCalls

    least = PromptCalls.of(pipe, prompts, arguments, None).minimum_samples  # one for each prompt and image
    return least, partial(calibration_calls, least=least)


def denoiser_fit_calls(model: Denoiser, steps: int, options: dict[str, Any]) -> tuple[int, int]:
    """The model calls of a fit's measurement, and how many of them its checkpoint lacks; after the fit's own checks.

    Following the paths of given statistics once more, which is done unless their file holds increments, is not counted
    in the fit's total.
    """
    from fastsched.fitting import budget
    from fastsched.fitting.denoiser_fit import prepared_fit
    from fastsched.fitting.loop import MODEL_CALLS, affordable
    from fastsched.measurement.checks.network import CHECK_CALLS
    from fastsched.sampling.fitted import chosen_solver

    stats, given, solver = options["stats"], options["model_calls"], chosen_solver(options["solver"])
    settings = {name: value for name, value in options.items() if name not in ("shape", "solver", "model_calls")}
    total = budget.TOTAL if given is None else given
    found = prepared_fit(model, options["shape"], steps, solver, total, None, **settings, checks=True)
    if found is not None:
        run, batches, known = found
        count = len(batches.seeds)
        left = count - (0 if known is None else known.samples)
        return run.calls * count + CHECK_CALLS, run.calls * left + CHECK_CALLS * (left > 0)
    later = MODEL_CALLS if given is None else given
    if stats.increments is not None or steps == 1 or not affordable(solver.model_calls(steps), stats.samples, later):
        return 0, 0
    left = stats.samples - inputs.known_samples(options["checkpoint"])
    return 0, budget.measuring_calls(stats.levels, left, responses=bool(stats.deviated))


def pipeline_fit_calls(calls: Callable[[Any, Any], int], options: dict[str, Any]) -> tuple[int, int]:
    """`denoiser_fit_calls` of a pipeline, whose measurement takes ``calls(levels, samples)``."""
    if options["stats"] is not None:
        return 0, 0
    whole = calls(options["levels"], options["samples"])
    return whole, whole - calls(options["levels"], range(inputs.known_samples(options["checkpoint"])))


def say(cost: str, dry_run: bool) -> None:
    """Print what a command costs; with ``dry_run`` the command then ends."""
    note(f"model calls (a batch of 4 counts as 4): {cost}")
    if dry_run:
        raise typer.Exit


def say_fitting(whole: int, left: int, options: dict[str, Any], dry_run: bool) -> int:
    """Print the cost of a fit: ``left`` calls of the ``whole`` measurement, and its runs.

    Returns:
        The calls that the progress bar counts; repeating a measurement is not among them.
    """
    from fastsched.fitting.budget import TOTAL, calls_left
    from fastsched.fitting.loop import MODEL_CALLS
    from fastsched.sampling.files import runs_beside

    given, new, checkpoint = options["model_calls"], options["stats"] is None, options["checkpoint"]
    usual = TOTAL if new else MODEL_CALLS
    later = calls_left(usual if given is None else given, whole)
    kept = checkpoint is not None and Path(runs_beside(checkpoint)).is_file()
    less = ", less the runs in the checkpoint" if kept else ""
    left = max(0, left)  # a checkpoint of another call, which the fit refuses, may hold more
    say(f"{left:,} to measure, at most {later:,} to run and tune schedules{less}", dry_run)
    return later + left * new


def say_comparing(reference: int, runs: int, dry_run: bool) -> None:
    """Print the cost of a comparison, and the part of the converged samples."""
    least = "fewer with --samples or --reference-steps"
    say(f"{reference + runs:,}, of which {reference:,} for the converged samples ({least})", dry_run)
