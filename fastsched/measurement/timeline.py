"""Measure where time is spent: consecutive spans, each with a named owner, on the device's own clock."""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class TimedRun:
    """A run of a sampler or a measurement."""

    steps: Sequence[dict[str, float]]  #: for every step, its seconds by owner
    seconds: float  #: seconds of the whole run
    #: How often the host waited for the GPU in each step, or the mean; None without a GPU.
    synchronisations: Sequence[float] | None


class Timeline:
    """Spans of time and their owners: a block of `within` owns its time, except that of blocks within it.

    Time outside of all blocks belongs to ``owner``. On a CUDA device, events measure the device's time, and the host
    does not wait until the spans are read.
    """

    def __init__(self, device: torch.device, owner: str = "rest") -> None:
        self.device = device
        self._owners = [owner]
        self._marks: list[tuple[str, Any]] = [(owner, self._now())]

    def had(self, owner: str) -> bool:
        """Whether there was a span of this owner."""
        return any(name == owner for name, _ in self._marks)

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))  # this device may not be the current one
        return event

    @contextlib.contextmanager
    def within(self, owner: str) -> Iterator[None]:
        """The time within the block belongs to ``owner``."""
        self._owners.append(owner)
        self._marks.append((owner, self._now()))
        try:
            yield
        finally:
            self._owners.pop()
            self._marks.append((self._owners[-1], self._now()))

    def owned(self, owner: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap ``function`` so that its time belongs to ``owner``."""

        @functools.wraps(function, updated=())
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.within(owner):
                return function(*args, **kwargs)

        return call

    def spans(self) -> list[tuple[str, float]]:
        """Owner and seconds of every span so far, in order."""
        marks = [*self._marks, ("", self._now())]
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            seconds = [a.elapsed_time(b) / 1e3 for (_, a), (_, b) in itertools.pairwise(marks)]
        else:
            seconds = [b - a for (_, a), (_, b) in itertools.pairwise(marks)]
        return [(owner, each) for (owner, _), each in zip(marks, seconds, strict=False)]

    def steps(self, last: str) -> list[dict[str, float]]:
        """For every step, its seconds by owner; a step ends with a span of the owner ``last``."""
        found: list[dict[str, float]] = []
        step: dict[str, float] = {}
        for owner, seconds in self.spans():
            step[owner] = step.get(owner, 0.0) + seconds
            if owner == last:
                found.append(step)
                step = {}
        return found

    def run(self, last: str, synchronisations: Sequence[float] | None) -> TimedRun:
        """The run so far; a step ends with a span of the owner ``last``."""
        return TimedRun(self.steps(last), sum(seconds for _, seconds in self.spans()), synchronisations)


def device_of(model: Any) -> torch.device:
    """The device that a denoiser or a pipeline runs on, which is not where an offloaded pipeline's weights are."""
    return torch.device(getattr(model, "_execution_device", None) or model.device)


@contextlib.contextmanager
def synchronisations(device: torch.device) -> Iterator[list[str] | None]:
    """Collect the source lines at which PyTorch warns that the host waits for a CUDA device; None for other devices."""
    if device.type != "cuda":
        yield None
        return
    found: list[str] = []
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
            found += [f"{each.filename}:{each.lineno}" for each in caught if "synchroniz" in str(each.message)]
