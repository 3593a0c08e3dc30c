"""Progress bars for long work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(total: int, show: bool, what: str) -> Iterator[Callable[[int], None]]:
    """A bar over ``total`` model calls, or nothing; yields the function that is told of calls made."""
    if not show:
        yield lambda calls: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=what, unit="call") as bar:
        yield lambda calls: (bar.update(calls), None)[1]
