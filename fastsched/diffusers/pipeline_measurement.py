"""Measure a pipeline through its own loop."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsched import validate
from fastsched.diffusers.calibration import CalibrationScheduler, calibration_steps
from fastsched.diffusers.conventions import check_pipe
from fastsched.diffusers.watching import check_caches, watched
from fastsched.measurement.statistics import PathStatistics
from fastsched.sampling.origin import Origin, origin_now

#: Arguments of a pipeline's call that determine its steps.
STEPPING = ("num_inference_steps", "timesteps", "sigmas")

#: Arguments for a call whose steps are all needed and whose images are not, where a pipeline takes them.
NEEDED = {"output_type": "latent", "strength": 1.0}


def measure(
    pipe: Any,
    *,
    levels: int | Tensor = 48,
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

    What the pipeline computes must depend only on the latents and the level. Its loop and its networks are watched, and
    it is refused if it is seen to depend on anything else (`CalibrationScheduler`, `fastsched.diffusers.watching`).
    Every call of the pipeline sees the same random numbers: generators among ``call_kwargs`` are restored after each
    call, and so is the global random state, which is seeded for the call.

    Args:
        pipe: A pipeline with a supported ``scheduler`` (docs/schedulers.md).
        levels: How many noise levels, 32 to 64 are enough; or the levels ``s`` themselves, descending.
        samples: How many paths at least; one call of the pipeline measures as many as it makes images.
        prompts: One prompt for each call, in turn, all of them used at least once. A schedule is for a model, not for a
            prompt, so several different ones are best. None if the pipeline takes no prompt, or ``call_kwargs`` holds
            it.
        seed: Seed of the noise; the pipeline's own latents are not used.
        keep_increments: As in `fastsched.measure`; `fit` needs them to tune. They take ``2 levels`` latents a sample.
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
    validate.arguments(locals(), pipe=validate.anything, prompts=validate.anything, call_kwargs=validate.anything)
    check_call(pipe, prompts, call_kwargs)
    check_caches(pipe)
    turns = 1 if prompts is None or isinstance(prompts, str) else len(prompts)
    parts: list[PathStatistics] = []
    while sum(part.samples for part in parts) < samples or len(parts) < turns:
        settings = {"seed": seed, "samples_before": sum(part.samples for part in parts)}
        prompt = prompt_of(prompts, len(parts))
        parts.append(_one_call(pipe, levels, prompt, call_kwargs, keep_increments=keep_increments, **settings))
    return replace(functools.reduce(PathStatistics.merge, parts), origin=_origin(pipe, prompts, call_kwargs))


def _origin(pipe: Any, prompts: str | Sequence[str] | None, call_kwargs: dict[str, Any]) -> Origin:
    """What is measured: the last part of where the pipeline was loaded from, its class, guidance and prompts."""
    source = getattr(getattr(pipe, "config", None), "_name_or_path", None) or getattr(pipe, "name_or_path", None)
    guidance = call_kwargs.get("guidance_scale")
    if prompts is None:
        prompts = call_kwargs.get("prompt")
    return origin_now(
        # not the whole path, which says how folders are named on this machine
        os.path.basename(os.path.normpath(source)) if isinstance(source, (str, os.PathLike)) and source else None,
        pipeline=type(pipe).__name__,
        guidance=float(guidance) if isinstance(guidance, (int, float)) else None,
        prompts=1 if isinstance(prompts, str) else len(prompts) if isinstance(prompts, (list, tuple)) else None,
    )


def _one_call(
    pipe: Any, levels: int | Tensor, prompt: str | None, call_kwargs: dict[str, Any], **settings: Any
) -> PathStatistics:
    count, given = (len(levels), levels) if isinstance(levels, Tensor) else (levels, None)
    with watched(pipe) as watch:
        own_noise = call_kwargs.get("latents") is None
        calibration = CalibrationScheduler.from_scheduler(
            pipe.scheduler, levels=given, watch=watch, own_noise=own_noise, **settings
        )
        with scheduler_replaced(pipe, calibration):
            call(pipe, calibration_steps(count), prompt, call_kwargs)
    return calibration.statistics


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
    """Call ``pipe`` for ``steps`` steps from pure noise, with the same random numbers each time, not decoded if it can.

    Raises:
        ValueError: If the pipeline uses an attribute or argument of its scheduler that `CalibrationScheduler` lacks.
    """
    accepted = inspect.signature(type(pipe).__call__).parameters
    arguments = {"num_inference_steps": steps, **call_kwargs}
    if prompt is not None:
        arguments["prompt"] = prompt
    for name, value in NEEDED.items():
        if name in accepted:
            arguments.setdefault(name, value)
    try:
        with random_numbers_kept(call_kwargs.values()):
            return pipe(**arguments)
    except (AttributeError, TypeError) as error:
        if "CalibrationScheduler" not in str(error):
            raise
        raise ValueError(
            f"{type(pipe).__name__} needs something from its scheduler that a measurement cannot provide ({error}); "
            "measure its network (fastsched.measure)"
        ) from error


@contextlib.contextmanager
def random_numbers_kept(arguments: Iterable[Any]) -> Iterator[None]:
    """Seed the global random numbers, and at the end restore them and every generator among ``arguments``.

    So a pipeline that draws its conditioning at random draws the same one in every run, whatever ran in between.
    """
    generators = [
        value
        for argument in arguments
        for value in (argument if isinstance(argument, (list, tuple)) else [argument])
        if isinstance(value, torch.Generator)
    ]
    states = [generator.get_state() for generator in generators]
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - what pipelines may use
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002 - as above
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002 - as above
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


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
    strength = call_kwargs.get("strength", 1)
    if not isinstance(strength, (int, float)) or strength != 1:
        raise ValueError(
            f"strength must be left out or 1.0, with which the pipeline starts from pure noise, got {strength!r}"
        )
    if prompts is None:
        return
    if not isinstance(prompts, (str, list, tuple)) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError(f"prompts must be a string or a list of strings, got {prompts!r}")
    if len(prompts) == 0:
        raise ValueError("prompts must hold at least one prompt, or be None")
    if "prompt" in call_kwargs:
        raise ValueError("prompt must be left out if prompts are given")
