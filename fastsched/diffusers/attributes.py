"""Change attributes of a pipeline, a scheduler or a network for the length of a block, or in a copy."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor


@contextlib.contextmanager
def attributes_set(owner: Any, **values: Any) -> Iterator[None]:
    """Set attributes of ``owner`` within the block, and restore them at the end, also after an error.

    Attributes that only the class had before are deleted from ``owner``, unless they are properties.
    """
    properties = {name for name in values if hasattr(getattr(type(owner), name, None), "__set__")}
    before = {name: getattr(owner, name) for name in values if name in vars(owner) or name in properties}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name in values:
            if name in before:
                setattr(owner, name, before[name])
            elif name in vars(owner):
                delattr(owner, name)


def copied_with(owner: Any, memo: dict[int, Any], /, **values: Any) -> Any:
    """A deep copy of ``owner``, for its ``__deepcopy__`` to return, with ``values`` in place of copied attributes."""
    made = memo[id(owner)] = copy.copy(owner)
    vars(made).update(copy.deepcopy({key: each for key, each in vars(owner).items() if key not in values}, memo))
    vars(made).update(values)
    return made


def values_copied(value: Any) -> Any:
    """A copy of arguments or results, because a pipeline may write into them; objects of other kinds are shared."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if type(value) in (list, tuple):
        return type(value)(values_copied(each) for each in value)
    return {key: values_copied(each) for key, each in value.items()} if type(value) is dict else value


def deep_copy(owner: Any) -> Any:
    """A deep copy of ``owner``; attributes that cannot be copied, such as a file or a lock, are shared."""
    with contextlib.suppress(Exception):
        return copy.deepcopy(owner)
    made = copy.copy(owner)
    memo = {id(owner): made}
    for name, value in vars(owner).items():
        with contextlib.suppress(Exception):
            vars(made)[name] = copy.deepcopy(value, memo)
    return made


#: The thread that measures or fits each pipeline, and what is known of its calls, by the pipeline's identity.
_USERS: dict[int, int] = {}
_KNOWN: dict[int, dict[Any, Any]] = {}
_LOCK = threading.Lock()


def check_one_thread(pipe: Any) -> None:
    """RuntimeError if another thread is measuring or fitting ``pipe``, and so has replaced its scheduler."""
    if _USERS.get(id(pipe), threading.get_ident()) != threading.get_ident():
        raise RuntimeError("pipe is being measured or fitted in another thread; wait until that has ended")


@contextlib.contextmanager
def in_one_thread(pipe: Any) -> Iterator[None]:
    """Within the block no other thread may measure or fit ``pipe``; raises as `check_one_thread` does."""
    with _LOCK:
        outermost = id(pipe) not in _USERS
        _USERS.setdefault(id(pipe), threading.get_ident())
    check_one_thread(pipe)
    try:
        yield
    finally:
        if outermost:
            del _USERS[id(pipe)]
            _KNOWN.pop(id(pipe), None)


def known_calls(pipe: Any) -> dict[Any, Any]:
    """What calls of ``pipe`` have found out for later ones, until the end of its measurement or fit."""
    return _KNOWN.setdefault(id(pipe), {}) if id(pipe) in _USERS else {}
