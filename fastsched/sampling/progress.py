"""Progress bars for long work, or a callback in their place."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

#: Whether to show a bar; or a function that is called with the units done so far and their total.
Progress = bool | Callable[[int, int], object]


@contextlib.contextmanager
def progress_bar(total: int, show: Progress, what: str, unit: str = "call") -> Iterator[Callable[[int], None]]:
    """A progress bar over ``total`` units of some work, a callback, or neither; yields a function that adds units done.

    What a callback raises ends the work; a StopIteration does so as a RuntimeError.
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

    with tqdm(total=total, desc=what, unit=unit) as bar:
        yield lambda done: (bar.update(done), None)[1]
