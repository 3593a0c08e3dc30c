"""Measure a pipeline through its own loop."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from fastsched import validate
from fastsched.diffusers.calibration import CalibrationScheduler
from fastsched.diffusers.conventions import check_pipe
from fastsched.measurement.statistics import PathStatistics

#: Arguments of a pipeline's call that determine its steps.
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
    """Measure what ``pipe(**call_kwargs)`` computes, including guidance, adapters and prompt, through its own loop.

    A `CalibrationScheduler` takes the place of the pipeline's scheduler, and the pipeline is called until all samples
    are measured. The old scheduler is restored afterwards, also after an error. Images stay latents if the pipeline
    supports it. Cost: ``2 levels`` steps a call of the pipeline, each of as many network calls as the pipeline makes.

    Args:
        pipe: A pipeline with a supported ``scheduler`` (docs/schedulers.md).
        levels: How many noise levels; 32 to 64 are enough.
        samples: How many paths at least; one call of the pipeline measures as many as it makes images.
        prompts: One prompt for each call, in turn. A schedule is for a model, not for a prompt, so several different
            ones are best. None if the pipeline takes no prompt, or ``call_kwargs`` holds it.
        seed: Seed of the noise and the probes; the pipeline's own latents are not used.
        keep_increments: As in `fastsched.measure`; `fit` needs them to tune. They take ``levels - 1`` latents a sample.
        **call_kwargs: Arguments of the pipeline's call: ``guidance_scale``, ``height``, ``control_image``, ...

    Returns:
        The statistics, on the CPU, for `fastsched.optimal_schedule` and others. A guided step counts as one call.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, the scheduler is not supported, or the pipeline's loop does not
            follow its scheduler; the message says why.

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
    """Put ``scheduler`` into ``pipe``, and restore the old one at the end, also after an error."""
    old = pipe.scheduler
    try:
        pipe.scheduler = scheduler
        yield
    finally:
        pipe.scheduler = old


def call(pipe: Any, steps: int, prompt: str | None, call_kwargs: dict[str, Any]) -> Any:
    """Call ``pipe`` for ``steps`` steps, without decoding if it supports that.

    Raises:
        ValueError: If the pipeline uses an attribute or argument of its scheduler that `CalibrationScheduler` lacks.
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
            f"{type(pipe).__name__} needs something from its scheduler that a measurement cannot provide ({error}); "
            "measure its network (fastsched.measure)"
        ) from error


def prompt_of(prompts: str | Sequence[str] | None, turn: int) -> str | None:
    """The prompt of the ``turn``-th call."""
    if prompts is None or isinstance(prompts, str):
        return prompts
    return prompts[turn % len(prompts)]


def check_call(pipe: Any, prompts: str | Sequence[str] | None, call_kwargs: dict[str, Any]) -> None:
    """Check the arguments of a pipeline's call.

    Raises:
        TypeError: If ``pipe`` has no scheduler, or ``prompts`` are not strings.
        ValueError: If the arguments determine the steps, ``prompts`` is empty, or the prompt is given twice.
    """
    check_pipe(pipe)
    for name in STEPPING:
        if name in call_kwargs:
            raise ValueError(f"{name} must be left out, because the measurement determines the steps")
    if prompts is None:
        return
    if not isinstance(prompts, (str, list, tuple)) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError(f"prompts must be a string or a list of strings, got {prompts!r}")
    if len(prompts) == 0:
        raise ValueError("prompts must hold at least one prompt, or be None")
    if "prompt" in call_kwargs:
        raise ValueError("prompt must be left out if prompts are given")
