"""What a measurement keeps of its paths: vectors in memory that is allocated before the first call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsched import ops


@dataclass(frozen=True, eq=False)
class KeptVectors:
    """Rows of float32 memory for the vectors of each sample."""

    data: Tensor  #: the rows, [B, rows, d], on ``device`` or on the CPU
    device: torch.device  #: where the states are

    @classmethod
    @contextlib.contextmanager
    def allocated(
        cls, sizes: tuple[int, int, int], device: torch.device, store: str, out: Tensor | None = None
    ) -> Iterator[KeptVectors]:
        """Memory of ``sizes`` [B, rows, d], all zero, for as long as the block lasts.

        Rows are with the states on their ``device``, or with ``store="cpu"`` in the host's memory: in ``out``, if that
        has this shape. CPU memory for states on a CUDA device is page-locked, so that copies need not wait.
        """
        place = device if store == "device" else torch.device("cpu")
        if out is not None and place.type == "cpu" and out.shape == sizes:
            data = out
        else:
            data = torch.zeros(sizes, dtype=torch.float32, device=place)
        with page_locked(data, device):
            yield cls(data, device)

    def row(self, row: int, shape: Sequence[int]) -> Tensor | None:
        """A row as writable memory, viewed as ``shape`` [B, *shape]; None if rows are not on the states' device."""
        return self.data[:, row].view(shape) if self.data.device == self.device else None

    def write(self, row: int, values: Tensor) -> None:
        """Put ``values`` [B, *shape] into a row, without waiting for the device."""
        values = values.flatten(1).float()
        if self.data.device == values.device:
            self.data[:, row].copy_(values)
            return
        # Sample by sample, because only copies of contiguous memory between devices are asynchronous.
        for own, value in zip(self.data, values, strict=True):
            own[row].copy_(value, non_blocking=True)

    def read(self, row: int, shape: Sequence[int]) -> Tensor:
        """A row on the device of the states, as ``shape`` [B, *shape]: the row itself if it is there, else a copy."""
        own = self.row(row, shape)
        if own is not None:
            return own
        found = torch.empty(shape, dtype=torch.float32, device=self.device)
        for each, value in zip(found.flatten(1), self.data, strict=True):
            each.copy_(value[row], non_blocking=True)
        return found

    def gram(self, vectors: int) -> Tensor:
        """Gram matrix of the first ``vectors`` rows of each sample, [B, vectors, vectors] float64 on the CPU."""
        self._wait()
        return ops.vector_gram(self.data[:, :vectors]).cpu().double()

    def on_cpu(self, vectors: int, out: Tensor | None = None) -> Tensor:
        """The first ``vectors`` rows, [B, vectors, d], on the CPU: in ``out`` if given, else as a view or a copy."""
        self._wait()
        rows = self.data[:, :vectors]
        if out is None or rows.data_ptr() == out.data_ptr():
            return rows.cpu()
        return out.copy_(rows)

    def _wait(self) -> None:
        """Wait for copies to the CPU that are under way."""
        if self.data.device != self.device and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextlib.contextmanager
def page_locked(data: Tensor, device: torch.device) -> Iterator[None]:
    """Page-lock CPU memory for fast copies from and to a CUDA ``device``; if that fails, copies wait.

    PyTorch's own page-locked memory comes in powers of two, up to twice as much as requested.
    """
    if device.type != "cuda" or data.device.type != "cpu" or data.nbytes == 0:
        yield
        return
    runtime: Any = torch.cuda.cudart()
    locked = int(runtime.cudaHostRegister(data.data_ptr(), data.nbytes, 0)) == 0
    try:
        yield
    finally:
        if locked:
            torch.cuda.synchronize(device)
            runtime.cudaHostUnregister(data.data_ptr())
