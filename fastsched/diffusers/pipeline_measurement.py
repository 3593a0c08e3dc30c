"""Measure a pipeline by its own loop."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from fastsched import validate
from fastsched.diffusers.calibration import CalibrationScheduler
from fastsched.diffusers.conventions import check_pipe
from fastsched.measurement.statistics import PathStatistics

#: Arguments of a pipeline's call that decide its steps.
STEPPING = ("num_inference_steps", "timesteps", "sigmas", "strength")


def measure(
    pipe: Any,
    *,
    levels: int = 48,
    samples: int = 4,
    prompts: str | Sequence[str] | None = None,
    seed: int = 0,
    keep_increments: bool = False,
    **call_kwargs: Any,
) -> PathStatistics:
    """Measure what ``pipe(**call_kwargs)`` computes, guidance, adapters, prompt and all, by the pipeline's own loop.

    A `CalibrationScheduler` takes the place of the pipeline's scheduler for as many calls of the pipeline as it takes
    to measure the samples; the old scheduler is back afterwards, whatever happens. Images are left as latents where the
    pipeline can. Cost: ``2 levels`` steps a call, each of as many network calls as the pipeline makes a step.

    Args:
        pipe: A pipeline whose ``scheduler`` fastsched knows (docs/schedulers.md).
        levels: How many noise levels (32 to 64 serve).
        samples: At least how many paths; a call measures as many as it makes images.
        prompts: One prompt for each call, in turn; a schedule is for a model, so several unlike ones serve best. None
            if the pipeline takes none, or ``call_kwargs`` hold it.
        seed: Of the noises and probes; the pipeline's own latents are not used.
        keep_increments: As in `fastsched.measure`: what `fit` needs to tune, ``levels - 1`` latents a sample.
        **call_kwargs: What the pipeline is called with: ``guidance_scale``, ``height``, ``control_image``, ...

    Returns:
        The statistics, on the CPU, for `fastsched.optimal_schedule` and the like. A guided step counts as one call.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If an argument is out of range, the scheduler is not one that fastsched knows, or the pipeline's
            loop does not follow its scheduler; the message says why.

    Example:
        >>> stats = fs.diffusers.measure(pipe, prompts=["a cat", "a city at night"], guidance_scale=7.5)
        >>> schedule = fs.optimal_schedule(stats, steps=8, solver="dpmpp_2m")
        >>> fs.diffusers.apply(schedule, pipe)
    """
    levels = validate.positive_int("levels", levels, minimum=3)
    samples = validate.positive_int("samples", samples)
    seed = validate.positive_int("seed", seed, minimum=0)
    check_call(pipe, prompts, call_kwargs)
    parts: list[PathStatistics] = []
    while sum(part.samples for part in parts) < samples:
        before = sum(part.samples for part in parts)
        calibration = CalibrationScheduler.from_scheduler(
            pipe.scheduler, seed=seed, samples_before=before, keep_increments=keep_increments
        )
        with scheduler_replaced(pipe, calibration):
            call(pipe, 2 * levels, prompt_of(prompts, len(parts)), call_kwargs)
        parts.append(calibration.statistics)
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.merge(part)
    return whole


@contextlib.contextmanager
def scheduler_replaced(pipe: Any, scheduler: Any) -> Iterator[None]:
    """Put ``scheduler`` into ``pipe``, and the old one back at the end, whatever happens in between."""
    old = pipe.scheduler
    try:
        pipe.scheduler = scheduler
        yield
    finally:
        pipe.scheduler = old


def call(pipe: Any, steps: int, prompt: str | None, call_kwargs: dict[str, Any]) -> Any:
    """Call ``pipe`` for so many steps, to latents only where it can.

    Raises:
        ValueError: If the pipeline asks of its scheduler what only another class has.
    """
    accepted = inspect.signature(type(pipe).__call__).parameters
    arguments = {"num_inference_steps": steps, **call_kwargs}
    if prompt is not None:
        arguments["prompt"] = prompt
    if "output_type" in accepted:
        arguments.setdefault("output_type", "latent")
    try:
        return pipe(**arguments)
    except (AttributeError, TypeError) as error:
        if "CalibrationScheduler" not in str(error):
            raise
        raise ValueError(
            f"{type(pipe).__name__} asks of its scheduler what a measurement cannot give ({error}); measure its "
            "network (fastsched.measure)"
        ) from error


def prompt_of(prompts: str | Sequence[str] | None, turn: int) -> str | None:
    """The prompt of the ``turn``-th call."""
    if prompts is None or isinstance(prompts, str):
        return prompts
    return prompts[turn % len(prompts)]


def check_call(pipe: Any, prompts: str | Sequence[str] | None, call_kwargs: dict[str, Any]) -> None:
    """Check what a pipeline is to be called with.

    Raises:
        TypeError: If ``pipe`` has no scheduler, or ``prompts`` are not strings.
        ValueError: If the arguments decide the steps, or name the prompt twice or never.
    """
    check_pipe(pipe)
    for name in STEPPING:
        if name in call_kwargs:
            raise ValueError(f"{name} must be left out: the steps of the call are those of the measurement")
    if prompts is None:
        return
    if not isinstance(prompts, (str, list, tuple)) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError(f"prompts must be a string or a list of strings, got {prompts!r}")
    if len(prompts) == 0:
        raise ValueError("prompts must hold at least one prompt, or be None")
    if "prompt" in call_kwargs:
        raise ValueError("prompt must be left out where prompts are given")
