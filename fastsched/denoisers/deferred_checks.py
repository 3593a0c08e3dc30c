"""Copies between a device and the CPU that do not block, and deferred checks of small results."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastsched.ops.backends import widest_dtype

#: A function that checks values on the CPU and raises an error if they are wrong.
Check: TypeAlias = "Callable[[Tensor], None]"


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Values of the CPU, copied to ``device`` without waiting for its queued work."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


class DeferredRead:
    """A tensor's values, copied to the CPU without waiting for the device.

    CPU tensors are ready at once, CUDA tensors when the copy is done. Others are copied when `values` is called.
    """

    def __init__(self, values: Tensor) -> None:
        self._values, self._event = values, None
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True, device="cpu")
            self._values.copy_(values, non_blocking=True)
            self._event: Any = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(values.device))

    @property
    def ready(self) -> bool:
        """Whether `values` returns without waiting."""
        return self._values.device.type == "cpu" if self._event is None else bool(self._event.query())

    def values(self) -> Tensor:
        """The values on the CPU; waits for the copy."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.cpu()


class DeferredChecks:
    """Deferred checks of small vectors, each made once its vector is on the CPU.

    All vectors added between two calls of `run` are read in one copy. `run` raises an error at once for CPU
    tensors, in one of its next calls for CUDA tensors, and in any case in a call with ``wait``.
    """

    def __init__(self) -> None:
        self._added: list[tuple[Tensor, Check]] = []
        self._sent: list[tuple[DeferredRead, list[tuple[int, Check]]]] = []

    def add(self, values: Tensor, check: Check) -> None:
        """Call ``check`` with ``values`` [n] as float64 (float32 from Apple's GPUs) in a later `run`."""
        self._added.append((values.reshape(-1).to(widest_dtype(values.device), copy=True), check))

    def add_finite(self, values: Tensor, wrong: Callable[[], str]) -> None:
        """Raise a ValueError with the message ``wrong()`` in a later `run` if ``values`` hold NaN or inf."""

        def check(extremes: Tensor) -> None:
            if not all(map(math.isfinite, extremes.tolist())):
                raise ValueError(wrong())

        # aminmax returns NaN if there is one; it passes over memory once, isfinite five times
        self.add(torch.stack(torch.aminmax(values)), check)

    def run(self, *, wait: bool = True) -> None:
        """Check the added vectors that are on the CPU, in order, or with ``wait`` all; the first failure raises."""
        for device in dict.fromkeys(values.device for values, _ in self._added):
            if wait or device.type in ("cpu", "cuda"):  # copies from other devices wait
                same = [(values, check) for values, check in self._added if values.device == device]
                self._added = [each for each in self._added if each[0].device != device]
                reading = DeferredRead(torch.cat([values for values, _ in same]))
                self._sent.append((reading, [(values.numel(), check) for values, check in same]))
        while self._sent and (wait or self._sent[0][0].ready):
            reading, checks = self._sent.pop(0)
            parts = reading.values().split([size for size, _ in checks])
            for part, (_, check) in zip(parts, checks, strict=True):
                check(part)
