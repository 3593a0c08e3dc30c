"""Which prompts a pipeline is called with, and their encodings, made once."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastsched.diffusers.attributes import attributes_set

#: Methods of pipelines that encode prompts.
ENCODERS = ("encode_prompt", "_encode_prompt")

#: How pipelines call the number of images or videos that they make of a prompt.
PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt")


@dataclass(frozen=True)
class PromptCalls:
    """How samples are distributed over calls of a pipeline: each prompt makes ``images`` of them, in turn.

    Attributes:
        prompts: The prompts; empty if the pipeline takes none, or the call's arguments hold it.
        size: The most prompts of a call; 0 where a call takes one prompt, not a list.
        images: Samples a prompt makes, or a call without prompts; known once a call has been made.
    """

    prompts: tuple[str, ...]
    size: int
    images: int

    @classmethod
    def of(
        cls, pipe: Any, prompts: str | Sequence[str] | None, call_kwargs: dict[str, Any], most: int | None
    ) -> PromptCalls:
        """For calls of ``pipe(prompt=..., **call_kwargs)``, of at most ``most`` prompts each; all when None."""
        turns = () if prompts is None else (prompts,) if isinstance(prompts, str) else tuple(prompts)
        images = next((int(call_kwargs[name]) for name in PER_PROMPT if call_kwargs.get(name)), 1)
        lists = turns and _takes_lists(pipe) and not any(_is_of_one_batch(value) for value in call_kwargs.values())
        return cls(turns, (2**31 if most is None else most) if lists else 0, images)

    @property
    def fewest(self) -> int:
        """Samples that use every prompt once."""
        return self.images * len(self.prompts) if self.prompts else 1

    def arguments(self, done: int, wanted: int, call_kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call, after ``done`` samples, that makes up to ``wanted`` more, or one prompt's."""
        if not self.prompts:
            return call_kwargs
        first = done // self.images
        count = max(1, min(self.size, -(-wanted // self.images)))
        which = [(first + n) % len(self.prompts) for n in range(count)]
        texts = {name: self._dealt(value, which) for name, value in call_kwargs.items() if "prompt" in name}
        if not self.size:
            texts = {name: value[0] if _are_texts(value) else value for name, value in texts.items()}
            return {"prompt": self.prompts[which[0]], **call_kwargs, **texts}
        return {"prompt": [self.prompts[n] for n in which], **call_kwargs, **texts}

    def _dealt(self, value: Any, which: Sequence[int]) -> Any:
        """Another prompt's texts for those of these numbers: one serves all, of a list each has its own."""
        if isinstance(value, str):
            return [value] * len(which)
        return [value[n] for n in which] if _are_texts(value) and len(value) == len(self.prompts) else value

    def after(self, arguments: dict[str, Any], made: int) -> PromptCalls:
        """What is known once a call of those arguments has made so many samples."""
        prompt = arguments.get("prompt") if self.prompts else None
        return replace(self, images=max(1, made // len(prompt) if isinstance(prompt, list) else made))

    def halved(self, arguments: dict[str, Any]) -> PromptCalls | None:
        """Half as many prompts a call as in ``arguments``; None if there was one."""
        prompt = arguments.get("prompt")
        if not self.size or not isinstance(prompt, list) or len(prompt) < 2:
            return None
        return replace(self, size=len(prompt) // 2)


@contextlib.contextmanager
def prompts_encoded_once(pipe: Any) -> Iterator[None]:
    """Within the block, ``pipe`` encodes the same prompts once: later calls get copies of what the first one got.

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
        return _copy(self._results[key])


def _key(value: Any) -> Hashable:
    if value is None or isinstance(value, (bool, int, float, str, torch.device, torch.dtype)):
        return (type(value).__name__, value)
    if isinstance(value, (list, tuple)):
        return tuple(_key(each) for each in value)
    if isinstance(value, dict):
        return tuple((name, _key(each)) for name, each in sorted(value.items()))
    raise TypeError(f"{type(value).__name__} cannot be compared")


def _copy(value: Any) -> Any:
    """A pipeline may write into what it got."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if type(value) in (list, tuple):
        return type(value)(_copy(each) for each in value)
    return value


def _takes_lists(pipe: Any) -> bool:
    """Whether the pipeline says that ``prompt`` may be a list."""
    prompt = inspect.signature(type(pipe).__call__).parameters.get("prompt")
    return prompt is not None and "list" in str(prompt.annotation).lower()


def _are_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value)


def _is_of_one_batch(value: Any) -> bool:
    """Whether an argument may be made for the batch of one call: a tensor, an image, or a list of such."""
    if isinstance(value, (list, tuple)):
        return any(_is_of_one_batch(each) or isinstance(each, torch.Generator) for each in value)
    plain = (bool, int, float, str, type(None), dict, torch.Generator, torch.dtype, torch.device)
    return not isinstance(value, plain) and not callable(value)
