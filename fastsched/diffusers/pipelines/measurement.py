"""Measure a pipeline through its own loop."""

from __future__ import annotations

import contextlib
import numbers
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastsched import validate
from fastsched.diffusers.applier import check_derived
from fastsched.diffusers.attributes import attributes_set, in_one_thread, known_calls
from fastsched.diffusers.calibration import CalibrationScheduler
from fastsched.diffusers.conventions import describe, own_scheduler, warn_of_overrides
from fastsched.diffusers.pipelines.call import call, check_call
from fastsched.diffusers.pipelines.call_identity import call_identity, check_same_call, check_same_calls
from fastsched.diffusers.pipelines.prompt_calls import PromptCalls, prompts_encoded_once
from fastsched.diffusers.random_numbers import ONE_CALL
from fastsched.diffusers.schedulers.overrides import warn_of_lost_methods
from fastsched.diffusers.watching.caches import check_caches
from fastsched.diffusers.watching.consistency import warn_of_other_call
from fastsched.diffusers.watching.step_counts import calibration_steps
from fastsched.diffusers.watching.watch import watched
from fastsched.measurement.batches import Batches, attach_finished, interrupted_measurement, is_out_of_memory, resumed
from fastsched.measurement.deviated_paths import deviated_paths
from fastsched.measurement.devices import (
    check_alike,
    check_together,
    part_file,
    parts_of_group,
    prepare_together,
    rank_and_size,
    share,
    whole_of,
)
from fastsched.measurement.measuring import measured_levels
from fastsched.measurement.path_following import Measurement
from fastsched.measurement.statistics import PathStatistics, merged
from fastsched.sampling.files import absolute_file, check_writable
from fastsched.sampling.origin import Origin, origin_now
from fastsched.sampling.progress import Progress, progress_bar
from fastsched.sampling.random_streams import sample_seeds

#: Samples of a measurement by default.
PIPELINE_SAMPLES = 4

#: The last call of a measurement makes fewer than this many samples beyond those asked for.
MOST_SAMPLES = 2**16

#: Checks of arguments that differ from the usual ones; `check_call` checks the arguments of the pipeline's call.
CHECKS: dict[str, validate.Check] = dict.fromkeys(("pipe", "prompts", "call_kwargs"), validate.anything)


def measure(
    pipe: Any,
    *,
    levels: int | Tensor | Sequence[float] = 48,
    samples: int | range = PIPELINE_SAMPLES,
    prompts: str | Sequence[str] | None = None,
    seed: int = 0,
    keep_increments: bool = False,
    prompts_per_call: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    group: Any = None,
    progress: Progress = True,
    **call_kwargs: Any,
) -> PathStatistics:
    """Measure what ``pipe(**call_kwargs)`` computes, including guidance, adapters and prompt, through its own loop.

    A `CalibrationScheduler` takes the place of the pipeline's scheduler, and the pipeline is called until all samples
    are measured. The old scheduler is restored afterwards, also after an error. Latents are not decoded if possible.
    Cost: ``2 levels`` steps a call, each of as many network calls as the pipeline makes. An interrupt (Ctrl-C) returns
    the finished samples, with a warning.

    What the pipeline computes must depend only on the latents and the level. Its loop and its networks are watched, and
    it is refused if it is seen to depend on anything else (`CalibrationScheduler`, `fastsched.diffusers.watching`).
    Every call sees the same random numbers: of generators among ``call_kwargs``, and globally; all are restored.

    Args:
        pipe: A pipeline with a supported ``scheduler`` (docs/schedulers.md).
        levels: How many noise levels, 32 to 64 are enough; or a list of the levels ``s``, descending.
        samples: The least number of paths, or ``range(a, b)``: these paths, to be merged with others of the same seed.
        prompts: The prompts, which the samples use in turn, each at least once. A schedule is for a model, not for a
            prompt, so several are best. None if the pipeline takes no prompt, or ``call_kwargs`` holds it.
        seed: Seed of the noise; the pipeline's own latents are not used.
        keep_increments: As in `fastsched.measure`; `fit` needs them to tune. They take ``2 levels`` latents a sample.
        prompts_per_call: The most prompts in one call; None: no limit, or 1 if each makes several samples. Halved when
            memory runs out; 1 if the pipeline takes no list, or an argument may be for one batch size.
        checkpoint: A file in which the samples of every finished call are saved. The same call goes on from there.
        group: As in `fastsched.measure`; each process has its own pipeline.
        progress: As in `fastsched.measure`: one bar over the steps of all calls, in place of the pipeline's own.
        **call_kwargs: Arguments of the pipeline's call: ``guidance_scale``, ``height``, ...

    Returns:
        The statistics, on the CPU, for `fastsched.optimal_schedule` and others. A guided step counts as one call.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, the scheduler is not supported, the pipeline's loop does not follow
            its scheduler, or the checkpoint is of another measurement; the message says why.

    Example:
        >>> stats = fs.diffusers.measure(pipe, prompts=["a cat", "a city at night"], guidance_scale=7.5)
        >>> schedule = fs.optimal_schedule(stats, steps=8, solver="dpmpp_2m")
        >>> fs.diffusers.apply(schedule, pipe)
    """
    check_together(locals(), **CHECKS)
    settings = {"levels": validate.levels("levels", levels), "samples": samples, "seed": seed, "prompts": prompts}
    settings |= {"keep_increments": keep_increments, "prompts_per_call": prompts_per_call, "progress": progress}
    try:
        return measured_in_group(pipe, call_kwargs, group, checkpoint=absolute_file(checkpoint), **settings)
    except KeyboardInterrupt as error:
        return interrupted_measurement(error, checkpoint, group)


def measured_in_group(
    pipe: Any, call_kwargs: dict[str, Any], group: Any, *, vectors: str = "all", **settings: Any
) -> PathStatistics:
    """`measured_pipeline`, with its samples distributed over ``group``; ``vectors`` as in `parts_of_group`.

    Raises:
        ValueError: If the processes were given different arguments or pipelines.
        RuntimeError: If another process failed.
    """
    rank, size = rank_and_size(group)
    if size == 1:
        return measured_pipeline(pipe, call_kwargs, **settings)

    def prepare() -> tuple[PromptCalls, Origin]:
        calls = checked_calls(pipe, settings["prompts"], call_kwargs, settings["prompts_per_call"])
        return calls, _origin(pipe, calls, call_kwargs)

    which = validate.sample_range("samples", settings["samples"])
    calls, origin = prepare_together(prepare, group)
    given = {name: settings[name] for name in ("levels", "samples", "seed", "keep_increments")}
    check_alike({name: x.tolist() if isinstance(x, Tensor) else x for name, x in given.items()}, group)
    assert origin.fingerprint is not None
    check_same_calls(origin.fingerprint, group)
    own = share(range(which.start, which.start + _needed(settings["samples"], which, calls)), group).tolist()
    file, keep = settings["checkpoint"], settings["keep_increments"]
    if file is not None:
        settings["checkpoint"] = part_file(file, rank, size)
    settings["samples"] = range(own[0], own[-1] + 1) if own else None

    def measure() -> PathStatistics:
        known = None if file is None else _resumed(file, pipe, which, origin, settings, call_kwargs.get("latents"))
        if known is not None and known.samples > own[-1] - which.start:  # the file of a group that has finished
            part = known.select([sample - which.start for sample in own])
            return replace(part, model_calls=known.model_calls * len(own) // known.samples)
        return measured_pipeline(pipe, call_kwargs, **settings)

    parts = parts_of_group(measure if own else None, group, vectors if keep else "none")
    return whole_of(parts, file, group, vectors=keep)


def measured_pipeline(
    pipe: Any,
    call_kwargs: dict[str, Any],
    *,
    levels: int | Tensor,
    samples: int | range,
    prompts: str | Sequence[str] | None,
    seed: int,
    keep_increments: bool,
    prompts_per_call: int | None,
    checkpoint: str | os.PathLike[str] | None,
    progress: Progress,
    must_scale: bool = False,
    resume: bool = True,
) -> PathStatistics:
    """`measure`, but an interrupt is raised. Like any error, it carries the finished samples as ``error.partial``.

    Without ``resume`` a checkpoint that exists is replaced after the first call. ``must_scale`` is as in
    `CalibrationScheduler.from_scheduler`.
    """
    which = validate.sample_range("samples", samples)
    calls = checked_calls(pipe, prompts, call_kwargs, prompts_per_call)
    check_caches(pipe)
    origin = _origin(pipe, calls, call_kwargs)
    check_derived(pipe.scheduler)
    warn_of_overrides(own_scheduler(pipe.scheduler))
    warn_of_lost_methods(own_scheduler(pipe.scheduler), "a measurement has one of its own")
    known = {"levels": levels, "seed": seed, "keep_increments": keep_increments}
    whole, needed = None, _needed(samples, which, calls)
    if checkpoint is not None and resume:
        whole = _resumed(checkpoint, pipe, which, origin, known, call_kwargs.get("latents"), needed)
    left, number = max(0, needed - (0 if whole is None else whole.samples)), which.start
    with (
        in_one_thread(pipe),
        prompts_encoded_once(pipe),
        one_bar(pipe, left * calibration_steps(levels), progress, "measuring") as advance,
    ):
        try:
            while whole is None or whole.samples < _needed(samples, which, calls):
                done = which.start + (0 if whole is None else whole.samples)
                arguments = calls.arguments(done, _needed(samples, which, calls) + which.start - done, call_kwargs)
                settings = {"seed": seed, "samples_before": done, "keep_increments": keep_increments}
                settings |= {"must_scale": must_scale, "number": number}
                try:
                    part = _one_call(pipe, levels, arguments, advance, **settings)
                except Exception as error:
                    calls = with_fewer_prompts(calls, arguments, error)
                    continue
                calls, part, number = calls.updated(arguments, part.samples), replace(part, origin=origin), number + 1
                if calls.usable_samples(done, part.samples) < part.samples:
                    part = part.select(range(calls.usable_samples(done, part.samples)))
                whole = part if whole is None else merged(whole, part)
                if isinstance(samples, range) and whole.samples > len(which):
                    whole = whole.select(range(len(which)))
                if checkpoint is not None:
                    whole.save(checkpoint, vectors=keep_increments)
        except BaseException as error:
            attach_finished(error, whole)
            raise
    return replace(whole, origin=origin)


def with_fewer_prompts(calls: PromptCalls, arguments: dict[str, Any], error: Exception) -> PromptCalls:
    """Calls with half the prompts of one that ended in ``error``, and a warning, if memory ran out; else raises it."""
    fewer = calls.halved(arguments) if is_out_of_memory(error) else None
    if fewer is None:
        raise error
    validate.warn(
        f"memory ran out: the pipeline is called with {fewer.size} prompts at a time (prompts_per_call={fewer.size})",
    )
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return fewer


def calibration_calls(levels: int | Tensor, samples: int | range, least: int = 1) -> int:
    """The model calls of a pipeline's measurement, counted per sample; ``least`` samples use every prompt once."""
    return (len(samples) if isinstance(samples, range) else max(samples, least)) * calibration_steps(levels)


def _needed(samples: int | range, which: range, calls: PromptCalls) -> int:
    """The number of samples to measure: all of a range; of a number, at least one for each prompt."""
    return len(which) if isinstance(samples, range) else max(len(which), calls.minimum_samples)


def _resumed(
    file: str | os.PathLike[str],
    pipe: Any,
    which: range,
    origin: Origin,
    settings: dict[str, Any],
    latents: Any,
    needed: int = 0,
) -> PathStatistics | None:
    """The samples of this measurement that a file holds, to become ``needed``; None if there is no file."""
    check_writable(file)
    if not os.path.exists(file):
        return None
    denoiser = describe(own_scheduler(pipe.scheduler)).denoiser
    s, keep = measured_levels(denoiser, settings["levels"]), settings["keep_increments"]
    run = Measurement(denoiser, s, torch.device("cpu"), torch.float32, deviated_paths(len(s)), keep)
    found = PathStatistics.load(file)
    assert origin.fingerprint is not None  # every pipeline has one
    check_same_call(os.fspath(file), found.origin, origin.fingerprint, any_dtype=False)
    shape = found.shape  # before a call, only the file tells it
    if isinstance(latents, Tensor) and latents.ndim == 1 + len(shape) and latents.shape[1:] != torch.Size(shape):
        raise ValueError(
            f"latents must be of the shape {list(shape)} of the samples in {os.fspath(file)}, got "
            f"{list(latents.shape[1:])}; leave them out, or name another file"
        )
    seeds = sample_seeds(settings["seed"], range(which.start, max(which.stop, which.start + MOST_SAMPLES)))
    known = resumed(file, run, Batches(shape, seeds, 1), needed)
    if known is not None and not torch.equal(known.seeds, seeds[: known.samples]):  # calls go on after the last sample
        raise ValueError(
            f"{os.fspath(file)} holds other samples than the first {known.samples} of this measurement; resume it with "
            "the same samples, or name another file"
        )
    return known


def _origin(pipe: Any, calls: PromptCalls, call_kwargs: dict[str, Any]) -> Origin:
    """What is measured: the name under which the pipeline was loaded, its class, guidance and number of prompts."""
    source = getattr(getattr(pipe, "config", None), "_name_or_path", None) or getattr(pipe, "name_or_path", None)
    guidance = call_kwargs.get("guidance_scale")
    prompts = calls.prompts or call_kwargs.get("prompt")
    known = origin_now(
        # not the whole path, which would reveal the folders of this machine
        os.path.basename(os.path.normpath(source)) if isinstance(source, (str, os.PathLike)) and source else None,
        pipeline=type(pipe).__name__,
        guidance=float(guidance) if isinstance(guidance, numbers.Real) else None,
        prompts=1 if isinstance(prompts, str) else len(prompts) if isinstance(prompts, (list, tuple)) else None,
    )
    return replace(known, fingerprint=call_identity(pipe, calls.prompts, call_kwargs))


def _one_call(
    pipe: Any,
    levels: int | Tensor,
    arguments: dict[str, Any],
    advance: Callable[[int], object],
    **settings: Any,
) -> PathStatistics:
    steps, taken = calibration_steps(levels), list[int]()

    def count(samples: int) -> None:
        taken.append(samples)
        advance(samples)

    with ONE_CALL, watched(pipe) as watch:  # a network shared with another pipeline must not be called meanwhile
        settings |= {"own_noise": arguments.get("latents") is None, "advance": count, "watch": watch}
        calibration = CalibrationScheduler.from_scheduler(pipe.scheduler, levels=levels, **settings)
        with attributes_set(pipe, scheduler=calibration):
            try:
                call(pipe, steps, arguments, lambda: steps - len(taken) if taken else None)
            except Exception as error:
                if pipe.scheduler is calibration:
                    raise
                raise ValueError(
                    f"the pipeline, or its callback, put a {type(pipe.scheduler).__name__} in the scheduler's place "
                    "during the run, so its loop cannot be measured; leave the scheduler as it is"
                ) from error
    warn_of_other_call(known_calls(pipe), arguments, calibration.constants)
    return calibration.statistics


@contextlib.contextmanager
def one_bar(pipe: Any, total: int, show: Progress, what: str) -> Iterator[Callable[[int], object]]:
    """One progress bar over ``total`` steps of all calls, in place of the pipeline's own; none if not ``show``."""
    with contextlib.ExitStack() as hidden:
        for owner in _owners_of_bars(pipe) if show else ():
            own = {**(getattr(owner, "_progress_bar_config", None) or {}), "disable": True}
            hidden.enter_context(attributes_set(owner, _progress_bar_config=own))
        yield hidden.enter_context(progress_bar(total, show, what, unit="step"))


def _owners_of_bars(pipe: Any) -> list[Any]:
    """The pipeline, and the blocks of a modular pipeline, at any depth: each loop shows a bar of its own."""
    found = [pipe]
    blocks = [getattr(pipe, "_blocks", None)]  # pipe.blocks is a copy
    for block in blocks:
        found += [block] if hasattr(block, "progress_bar") else []
        blocks += (getattr(block, "sub_blocks", None) or {}).values()
    return found


def checked_calls(
    pipe: Any, prompts: str | Sequence[str] | None, call_kwargs: dict[str, Any], prompts_per_call: int | None
) -> PromptCalls:
    """How to distribute samples over calls of the pipeline; raises as `check_call` does."""
    check_call(pipe, prompts, call_kwargs)
    return PromptCalls.of(pipe, prompts, call_kwargs, prompts_per_call)
