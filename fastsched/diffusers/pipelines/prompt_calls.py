"""Distribute prompts over calls of a pipeline, and encode each prompt only once."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch

from fastsched.diffusers.attributes import attributes_set, values_copied
from fastsched.diffusers.pipelines.call import call_parameters

#: Methods of pipelines that encode prompts.
ENCODERS = ("encode_prompt", "_encode_prompt")

#: Names of the argument for the number of images, videos, waveforms, ... that a pipeline makes from one prompt.
PER_PROMPT = re.compile(r"num_\w+_per_prompt")

#: Arguments that may hold an entry for each sample.
PER_SAMPLE = ("generator", "latents")


@dataclass(frozen=True)
class PromptCalls:
    """How samples are distributed over calls of a pipeline: each prompt makes ``images`` of them, in turn."""

    prompts: tuple[str, ...]  #: the prompts; empty if the pipeline takes none, or the call's arguments hold it
    size: int  #: the most prompts in a call; 0 if a call takes one prompt, not a list
    images: int  #: the number of samples from one prompt, or from a call without prompts; exact after the first call

    @classmethod
    def of(
        cls, pipe: Any, prompts: str | Sequence[str] | None, call_kwargs: dict[str, Any], most: int | None
    ) -> PromptCalls:
        """For calls of ``pipe(prompt=..., **call_kwargs)``, of at most ``most`` prompts each.

        When None, there is no limit if a prompt makes one sample, and a limit of 1 if it makes several: given several
        prompts then, many pipelines (LTX, Sana, Mochi, Lumina 2) use the attention mask of another prompt.
        """
        turns = () if prompts is None else (prompts,) if isinstance(prompts, str) else tuple(prompts)
        given = call_parameters(pipe) | call_kwargs
        counts = [value for name, value in given.items() if PER_PROMPT.fullmatch(name) and isinstance(value, Integral)]
        calls = cls(turns, 0, max([1, *map(int, counts)]))
        fixed = any(_is_of_one_batch(each) and not calls._per_prompt(name, each) for name, each in call_kwargs.items())
        lists = turns and _takes_lists(pipe) and not fixed
        usual = 2**31 if calls.images == 1 else 1
        return replace(calls, size=usual if most is None else most) if lists else calls

    @property
    def minimum_samples(self) -> int:
        """The number of samples that uses every prompt once."""
        return self.images * len(self.prompts) if self.prompts else 1

    def arguments(self, done: int, wanted: int, call_kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call, after ``done`` samples, for up to ``wanted`` more samples or those of one prompt."""
        if not self.prompts:
            return call_kwargs
        first, begun = divmod(done, self.images)
        count = 1 if begun else max(1, min(self.size, -(-wanted // self.images)))
        which = [(first + n) % len(self.prompts) for n in range(count)]
        given = {name: self._entries_for(name, value, which) for name, value in call_kwargs.items()}
        if not self.size:
            given |= {
                name: value[0] for name, value in given.items() if "prompt" in name and _are_texts(value) and value
            }
            return {"prompt": self.prompts[which[0]], **given}
        return {"prompt": [self.prompts[n] for n in which], **given}

    def _per_prompt(self, name: str, value: Any) -> bool:
        """Whether an argument has an entry for each prompt, or for each sample of each prompt."""
        listed = isinstance(value, (list, tuple)) or (isinstance(value, torch.Tensor) and value.ndim > 0)
        if not self.prompts or not listed or not ("prompt" in name or name in PER_SAMPLE):
            return False
        return len(value) in (len(self.prompts), len(self.prompts) * (self.images if name in PER_SAMPLE else 1))

    def _entries_for(self, name: str, value: Any, which: Sequence[int]) -> Any:
        """An argument for the prompts ``which``: a text for all, or each prompt's own entries; others unchanged."""
        if isinstance(value, str) and "prompt" in name:
            return [value] * len(which)
        if not self._per_prompt(name, value):
            return value
        each = len(value) // len(self.prompts)
        rows = [n * each + row for n in which for row in range(each)]
        return value[rows] if isinstance(value, torch.Tensor) else [value[row] for row in rows]

    def usable_samples(self, done: int, made: int) -> int:
        """How many of a call's ``made`` samples are used: if ``done`` ended within a prompt, only its rest."""
        return min(made, self.images - done % self.images) if self.prompts and done % self.images else made

    def updated(self, arguments: dict[str, Any], made: int) -> PromptCalls:
        """These calls with ``images`` as found in a call with ``arguments``, which made ``made`` samples."""
        prompt = arguments.get("prompt") if self.prompts else None
        return replace(self, images=max(1, made // len(prompt) if isinstance(prompt, list) else made))

    def halved(self, arguments: dict[str, Any]) -> PromptCalls | None:
        """These calls with half as many prompts each as in ``arguments``; None if there was only one."""
        prompt = arguments.get("prompt")
        if not self.size or not isinstance(prompt, list) or len(prompt) < 2:
            return None
        return replace(self, size=len(prompt) // 2)


@contextlib.contextmanager
def prompts_encoded_once(pipe: Any) -> Iterator[None]:
    """Within the block, ``pipe`` encodes the same prompts once: later calls get copies of the first result.

    Arguments that hold tensors are not compared; such calls are made each time.
    """
    names = [name for name in ENCODERS if callable(getattr(pipe, name, None)) and name not in vars(pipe)]
    with attributes_set(pipe, **{name: _Remembering(getattr(pipe, name)) for name in names}):
        yield


class _Remembering:
    """A function that remembers its results."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self._results = function, {}
        self.__signature__ = inspect.signature(function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            key = _key((args, kwargs))
        except TypeError:
            return self._function(*args, **kwargs)
        if key not in self._results:
            self._results[key] = self._function(*args, **kwargs)
        return values_copied(self._results[key])


def _key(value: Any) -> Hashable:
    if value is None or isinstance(value, (bool, int, float, str, torch.device, torch.dtype)):
        return (type(value).__name__, value)
    if isinstance(value, (list, tuple)):
        return tuple(_key(each) for each in value)
    if isinstance(value, dict):
        return tuple((name, _key(each)) for name, each in sorted(value.items()))
    raise TypeError(f"{type(value).__name__} cannot be compared")


def _takes_lists(pipe: Any) -> bool:
    """Whether the pipeline says that ``prompt`` may be a list."""
    prompt = inspect.signature(type(pipe).__call__).parameters.get("prompt")
    return prompt is not None and "list" in str(prompt.annotation).lower()


def _are_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value)


def _is_of_one_batch(value: Any) -> bool:
    """Whether an argument may be for one batch size: a tensor, an image, or a list of these or of generators."""
    if isinstance(value, (list, tuple)):
        return any(_is_of_one_batch(each) or isinstance(each, torch.Generator) for each in value)
    plain = (bool, int, float, str, type(None), dict, torch.Generator, torch.dtype, torch.device)
    return not isinstance(value, plain) and not callable(value)
