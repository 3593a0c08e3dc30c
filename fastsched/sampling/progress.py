"""Progress bars for long work, or a callback in their place."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

#: Whether to show a bar; or a function that is called with the units done so far and their total.
Progress = bool | Callable[[int, int], object]


@contextlib.contextmanager
def progress_bar(total: int, show: Progress, what: str, unit: str = "call") -> Iterator[Callable[[int], None]]:
    """A progress bar over ``total`` units of some work, a callback, or neither; yields a function that adds units done.

    An error of the callback ends the work; its StopIteration becomes a RuntimeError. If the bar cannot be drawn (the
    terminal was closed, the disk with its log is full), the work goes on without it.
    """
    if callable(show):
        done_so_far = 0

        def advance(done: int) -> None:
            nonlocal done_so_far
            done_so_far += done
            try:
                show(done_so_far, total)
            except StopIteration as error:  # it would end a loop here
                raise RuntimeError("progress raised StopIteration (an iterator in it ran out)") from error

        yield advance
        return
    if not show or sys.stderr is None:  # a program without a console has none
        yield lambda done: None
        return
    from tqdm import tqdm

    bars: list[Any] = []
    _draw(bars, lambda: bars.append(tqdm(total=total, desc=what, unit=unit)))
    try:
        yield partial(_advance, bars)
    finally:
        _draw(bars, lambda: [bar.close() for bar in bars])


def _advance(bars: list[Any], done: int) -> None:
    _draw(bars, lambda: [bar.update(done) for bar in bars])


def _draw(bars: list[Any], action: Callable[[], object]) -> None:
    """Call ``action``, which draws; if the console is gone, disable ``bars``."""
    try:
        action()
    except (OSError, ValueError):  # ValueError: a closed file
        for bar in bars:
            bar.disable = True
