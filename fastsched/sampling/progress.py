"""Progress bars for long work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(total: int, show: bool, what: str, unit: str = "call") -> Iterator[Callable[[int], None]]:
    """A progress bar over ``total`` units, or none; yields a function that adds units done."""
    if not show:
        yield lambda done: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=what, unit=unit) as bar:
        yield lambda done: (bar.update(done), None)[1]
