"""Copies between a device and the CPU that do not wait; small results are judged once they are there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

#: Looks at values on the CPU and raises an error if something is wrong with them.
Judge: TypeAlias = "Callable[[Tensor], None]"


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Values of the CPU on ``device``, which need not have come to their place in its work."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


class LateReading:
    """A tensor's values, copied to the CPU without waiting for the device.

    On the CPU they are there at once, from CUDA devices when the copy is done, from others when they are asked for.
    """

    def __init__(self, values: Tensor) -> None:
        self._values, self._event = values, None
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event: Any = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(values.device))

    @property
    def ready(self) -> bool:
        """Whether `values` would not wait."""
        return self._values.device.type == "cpu" if self._event is None else bool(self._event.query())

    def values(self) -> Tensor:
        """The values, on the CPU; waits until they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.cpu()


class Verdicts:
    """Judgements of small vectors in the order in which they were noted, each as soon as it can be made.

    So an error is raised at once on the CPU, soon after on a CUDA device, and at the end at the latest.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[LateReading, Tensor, Judge]] = []

    def note(self, values: Tensor, judge: Judge) -> None:
        """Have ``values`` [n] judged later, or now if they are there and so are all before them."""
        self._waiting.append((LateReading(values), values, judge))
        self.settle(wait=False)

    def settle(self, *, wait: bool = True) -> None:
        """Judge all that there are, or with ``wait`` all that were noted.

        Raises:
            ValueError: Or another error of the first judge that raises one.
        """
        while self._waiting and self._waiting[0][0].ready:
            reading, _, judge = self._waiting.pop(0)
            judge(reading.values())
        if not self._waiting or not wait:
            return
        waiting, self._waiting = self._waiting, []
        for values, (_, _, judge) in zip(_together([each for _, each, _ in waiting]), waiting, strict=True):
            judge(values)


def _together(vectors: list[Tensor]) -> list[Tensor]:
    """Vectors on the CPU, of all with one dtype and device in one copy."""
    found: dict[int, Tensor] = {}
    for kind in {(each.dtype, each.device) for each in vectors}:
        places = [n for n, each in enumerate(vectors) if (each.dtype, each.device) == kind]
        joined = torch.cat([vectors[n].reshape(-1) for n in places]).cpu()
        parts = joined.split([vectors[n].numel() for n in places])
        found |= {n: part.view(vectors[n].shape) for n, part in zip(places, parts, strict=True)}
    return [found[n] for n in range(len(vectors))]
