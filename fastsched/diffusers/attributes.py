"""Attributes of a pipeline, a scheduler or a network that are others for a while, or in a copy."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def attributes_set(owner: Any, **values: Any) -> Iterator[None]:
    """Set attributes of ``owner`` within the block; at the end, also after an error, they are as before.

    Those that only its class had are the class's again.
    """
    before = {name: vars(owner)[name] for name in values if name in vars(owner)}
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


def copied_with(owner: Any, memo: dict[int, Any], **values: Any) -> Any:
    """A deep copy of ``owner``, as its ``__deepcopy__`` returns it, with these attributes in place of copies."""
    made = memo[id(owner)] = copy.copy(owner)
    vars(made).update(copy.deepcopy({key: each for key, each in vars(owner).items() if key not in values}, memo))
    vars(made).update(values)
    return made


#: The thread that measures or fits each pipeline, by the pipeline's identity.
_USERS: dict[int, int] = {}
_LOCK = threading.Lock()


def check_one_thread(pipe: Any) -> None:
    """RuntimeError if another thread measures or fits ``pipe``, whose scheduler is another for that while."""
    if _USERS.get(id(pipe), threading.get_ident()) != threading.get_ident():
        raise RuntimeError("pipe is being measured or fitted in another thread; wait until that has ended")


@contextlib.contextmanager
def in_one_thread(pipe: Any) -> Iterator[None]:
    """Within the block no other thread may measure or fit ``pipe``; errors as of `check_one_thread`."""
    with _LOCK:
        outermost = id(pipe) not in _USERS
        _USERS.setdefault(id(pipe), threading.get_ident())
    check_one_thread(pipe)
    try:
        yield
    finally:
        if outermost:
            del _USERS[id(pipe)]
