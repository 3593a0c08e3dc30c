"""Call a pipeline to measure or run it: check the arguments, and make every call in the same way."""

from __future__ import annotations

import difflib
import inspect
import numbers
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsched import validate
from fastsched.diffusers.attributes import check_one_thread, values_copied
from fastsched.diffusers.conventions import check_pipe
from fastsched.diffusers.random_numbers import random_numbers_kept
from fastsched.measurement.batches import is_out_of_memory

#: Arguments of a pipeline's call that determine its steps.
STEPPING = ("num_inference_steps", "timesteps", "sigmas")

#: Arguments of calls that need all steps, each as any other, and no images, for pipelines that take these arguments.
#: With `use_kv_cache` the first step of Qwen-Image 2.1 fills a cache for the others; it changes no result.
CALL_DEFAULTS = {"output_type": "latent", "strength": 1.0, "use_kv_cache": False}


def call(
    pipe: Any, steps: int, call_kwargs: dict[str, Any], left: Callable[[], int | None] = lambda: 1, *, seed: int = 0
) -> Any:
    """Call ``pipe`` for ``steps`` steps from pure noise, with seeded random numbers, and without decoding if possible.

    The pipeline gets copies of tensors, lists and dictionaries, so that its next call has the same arguments.
    An error after the last step, when the latents are decoded, loses nothing: then the result is None. An error before
    the first step may mean that the pipeline cannot return latents, or needs its cache (AnyFlow's): it is called again
    with its own defaults.

    ``left`` returns how many steps are left, None before the first; when not given, no error is caught.

    Raises:
        RuntimeError: If the pipeline raises StopIteration, which would end a loop of the caller without a word.
        ValueError: If the pipeline cannot be called in this way (`_reason`).
    """
    accepted = call_parameters(pipe)
    needed = {name: value for name, value in CALL_DEFAULTS.items() if name in accepted and name not in call_kwargs}
    own = {name: accepted[name] for name in needed if name != "strength"}
    arguments = needed | {"num_inference_steps": steps} | call_kwargs
    try:
        with random_numbers_kept(call_kwargs.values(), seed):
            return pipe(**values_copied(arguments))
    except Exception as error:
        if left() == 0:
            return None
        if isinstance(error, StopIteration):
            raise RuntimeError(
                "the pipeline raised StopIteration (an iterator in it or its network ran out)"
            ) from error
        if left() is not None or not own or is_out_of_memory(error):
            reason = _reason(error, pipe, steps, call_kwargs, begun=left() is not None)
            if reason is None:
                raise
            raise ValueError(reason) from error
    return call(pipe, steps, {**call_kwargs, **own}, left, seed=seed)


def _reason(error: Exception, pipe: Any, steps: int, call_kwargs: dict[str, Any], *, begun: bool) -> str | None:
    """Why a call of a pipeline has ended in ``error``, and what to do, if its own message does not tell."""
    prompt: Any = call_kwargs.get("prompt")
    latents: Any = call_kwargs.get("latents")
    unfit = isinstance(error, (AttributeError, IndexError, RuntimeError)) and not begun and not is_out_of_memory(error)
    several = isinstance(prompt, (list, tuple)) and len(prompt) > 1
    if several and unfit and not isinstance(error, AttributeError):
        return (
            f"{type(pipe).__name__} failed before its first step in a call with {len(prompt)} prompts ({error}): does "
            "an argument hold an entry for one only, as ACE-Step's lyrics? Pass prompts with prompts_per_call=1"
        )
    text = str(error)
    both = re.match(r"Cannot forward both `(\w+)`.*?and `(\w+)`", text, re.DOTALL)
    if both is not None:  # with whole tensors in the text
        name = "prompt (or prompts)" if both[1] == "prompt" else both[1]
        return f"{type(pipe).__name__} takes {name} or {both[2]}, not both; leave one of them out"
    unknown = re.search(r"does not support custom\W*(\w+)", text)
    if unknown is not None and not begun:
        scheduler = pipe.scheduler.config.get("scheduler_class", type(pipe.scheduler).__name__)
        return (
            f"{type(pipe).__name__} gives its scheduler a list of {unknown[1].rstrip('s')}s, which {scheduler} does "
            "not take, so it cannot run with it; change the scheduler (docs/schedulers.md)"
        )
    untaken = re.search(r"\bstep\(\) got an unexpected keyword argument '(\w+)'", text)
    if untaken is not None:
        return (
            f"{type(pipe).__name__} calls its scheduler's step with {untaken[1]}, which "
            f"{type(pipe.scheduler).__name__} does not take, so it cannot run with it; change the scheduler, or apply "
            "a schedule, whose steps ignore it"
        )
    if "length" in text and "num_inference_steps" in text and not begun:
        return (
            f"an argument of the call, or its default, is a list for another number of steps than the {steps} that are "
            f"needed here ({error}); pass one that holds for any number of steps (for Ideogram 4 guidance_scale=7.0, "
            "guidance_schedule=None)"
        )
    if isinstance(error, (AttributeError, TypeError)) and "CalibrationScheduler" in text:
        return (
            f"{type(pipe).__name__}, or its callback, needs something from its scheduler that a measurement cannot "
            f"provide ({error}); leave the callback out, or measure the pipeline's network (fastsched.measure)"
        )
    if latents is not None and unfit:
        what = (
            f"of shape {list(latents.shape)}, {latents.dtype}" if hasattr(latents, "dtype") else type(latents).__name__
        )
        return (
            f"{type(pipe).__name__} failed before its first step with latents {what} ({error}): is their shape or "
            "dtype another than the pipeline's own? Leave latents out, as measurements and fits draw their own noise"
        )
    return None


def check_call(pipe: Any, prompts: str | Sequence[str] | None, call_kwargs: dict[str, Any]) -> None:
    """Check a pipeline and the arguments of its call.

    Raises:
        RuntimeError: If another thread measures or fits the pipeline.
        TypeError: If ``pipe`` has no scheduler, or as `check_arguments` does.
        ValueError: As `check_arguments` does.
    """
    check_one_thread(pipe)
    check_pipe(pipe)
    check_arguments(pipe, prompts, call_kwargs)


def check_arguments(pipe: Any, prompts: str | Sequence[str] | None, call_kwargs: dict[str, Any]) -> None:
    """Check the arguments of a call of a pipeline, or of a class of pipelines.

    Raises:
        TypeError: If ``prompts`` are not strings, or the call lacks one of ``call_kwargs``.
        ValueError: If the arguments determine the steps or add noise, ``prompts`` is empty, or the prompt is given
            twice.
    """
    for name in STEPPING:
        if name in call_kwargs:
            raise ValueError(f"{name} must be left out, because the measurement determines the steps")
    strength = call_kwargs.get("strength", 1)
    if not isinstance(strength, (int, float)) or strength != 1:
        raise ValueError(
            f"strength must be left out or 1.0, with which the pipeline starts from pure noise, got {strength!r}"
        )
    eta = call_kwargs.get("eta")  # some pipelines pass it only to schedulers whose step takes it
    if isinstance(eta, (numbers.Real, Tensor)) and bool(torch.as_tensor(eta).ne(0).any()):
        raise ValueError(f"eta must be 0, because it adds noise, which is not measured, got {eta!r}; leave it out")
    for name in ("denoising_start", "denoising_end"):
        value = call_kwargs.get(name)
        if isinstance(value, numbers.Real) and 0 < float(value) < 1:
            raise ValueError(
                f"{name} must be left out, because a measurement and a fit go through all levels, got {value!r}; the "
                "schedule can then be applied to both pipelines of a base and a refiner"
            )
    check_accepted(pipe, call_kwargs)
    if prompts is None:
        return
    if not isinstance(prompts, (str, list, tuple)) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError(f"prompts must be a string or a list of strings, got {prompts!r}")
    if len(prompts) == 0 and not isinstance(prompts, str):
        raise ValueError("prompts must hold at least one prompt, or be None")
    if "prompt" in call_kwargs:
        raise ValueError("prompt must be left out if prompts are given")
    check_accepted(pipe, ["prompt"])


def call_parameters(pipe: Any) -> dict[str, Any]:
    """The names of the arguments of a call of a pipeline, or of a class of pipelines, and their defaults.

    The arguments of a modular pipeline are those of its blocks, not of its class.
    """
    named = call_signature(pipe)
    blocks = getattr(pipe, "default_call_parameters", None)
    if not isinstance(blocks, dict):
        return {name: each.default for name, each in named.items() if name != "self"}
    own = {name: each.default for name, each in named.items() if name != "self" and each.kind is not each.VAR_KEYWORD}
    return own | {name: default for name, default in blocks.items() if name is not None}


def call_signature(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of a pipeline's call; of one that takes any keyword, those of the call that it overrides too."""
    found: dict[str, inspect.Parameter] = {}
    for function in _calls(pipe if isinstance(pipe, type) else type(pipe)):
        named = inspect.signature(function).parameters
        found = {name: each for name, each in named.items() if each.kind is not each.VAR_POSITIONAL} | found
        if not any(each.kind is each.VAR_KEYWORD for each in named.values()):
            break
    return found


def _calls(kind: type) -> list[Callable[..., Any]]:
    """The functions ``__call__`` of a class and of those that it derives from, its own first."""
    return [vars(each)["__call__"] for each in kind.__mro__ if "__call__" in vars(each)]


def check_accepted(pipe: Any, names: Iterable[str]) -> None:
    """Check that the call of a pipeline, or of a class of pipelines, has arguments of these names.

    Raises:
        TypeError: If one is missing. If the call takes any keyword, as some of diffusers do, and the name does not
            resemble an argument of the call, there is only a warning, as the call may ignore it. A modular pipeline
            counts as taking only the arguments that its blocks declare.
    """
    accepted = call_parameters(pipe)
    kind = pipe if isinstance(pipe, type) else type(pipe)
    kinds = {name: each.kind for name, each in call_signature(pipe).items()}
    any_name = any(kinds.get(name) is inspect.Parameter.VAR_KEYWORD for name in accepted)
    known = [name for name in accepted if name not in STEPPING]
    for name in names:
        if name in accepted or (any_name and _reads(kind, name)):
            continue
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
        message = f"the call of {kind.__name__} has no argument {name!r}"
        if near or not any_name:
            raise TypeError(f"{message}; {hint}")
        validate.warn(f"{message} and may ignore it; {hint}")


def _reads(kind: type, name: str) -> bool:
    """Whether a call's source reads an argument that its signature lacks, as with ``kwargs.pop("callback")``."""
    try:
        return any(f'"{name}"' in inspect.getsource(function) for function in _calls(kind))
    except (OSError, TypeError):
        return False
