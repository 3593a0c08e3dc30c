"""Progress bars for long work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(total: int, show: bool, what: str, unit: str = "call") -> Iterator[Callable[[int], None]]:
    """A bar over ``total`` model calls or other units, or nothing; yields the function that is told of those done."""
    if not show:
        yield lambda done: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=what, unit=unit) as bar:
        yield lambda done: (bar.update(done), None)[1]
