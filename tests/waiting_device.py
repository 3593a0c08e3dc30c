"""A device that computes on the CPU and counts how often the host would wait for it.

Its tensors are of their own class, each of which holds an ordinary tensor. It records what would make the host wait for
a real GPU: reading a number from a tensor (``item``, ``bool``, ``tolist``, ``equal``), a copy between host and device
without ``non_blocking``, an index by tensors of the host, and an output whose size depends on values. As in PyTorch,
operands on different devices are an error.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
DEVICE = torch.device("meta")  # always available in PyTorch, and not used otherwise here
COPIES = {aten._to_copy.default, aten.copy_.default}
SIZED_BY_VALUES = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class OnDevice(torch.Tensor):
    """A tensor of the device."""

    own: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.own = inner
        return made

    def __repr__(self) -> str:  # type: ignore[override]  # Tensor's takes options
        return f"OnDevice({self.own!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} of a tensor of the waiting device, outside of its block")


class Waits(TorchDispatchMode):
    """Runs the ops of its block and records waits.

    Attributes:
        seen: The waits, in order.
        held: Bytes of the device's tensors that are alive.
        peak: The largest value of ``held``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.held = self.peak = 0
        self._live: dict[int, int] = {}

    def _hold(self, inner: torch.Tensor) -> OnDevice:
        storage = inner.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._live:
            self._live[key] = size
            self.held += size
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._free, key)
        return OnDevice(inner)

    def _free(self, key: int) -> None:
        self.held -= self._live.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
        ours = [each for each in given if isinstance(each, OnDevice)]
        on_device = bool(ours)
        wanted = kwargs.get("device")
        if wanted is not None and torch.device(wanted).type == DEVICE.type:
            on_device, kwargs["device"] = True, torch.device("cpu")
        elif wanted is not None:
            on_device = False
        if func is aten.copy_.default:
            on_device = isinstance(args[0], OnDevice)
        self._note(func, args, kwargs, on_device)
        inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
        out = func(*inner_args, **inner_kwargs)
        known = {id(each.own): each for each in ours}

        def wrap(each: Any) -> Any:
            if not isinstance(each, torch.Tensor):
                return each
            return known[id(each)] if id(each) in known else self._hold(each)

        if func is aten._to_copy.default and any(out is each for each in tree_flatten(inner_args)[0]):
            out = out.clone()
        if ours and not any(isinstance(each, torch.Tensor) for each in tree_flatten(out)[0]):
            self.seen.append(str(func))
        return tree_map(wrap, out) if on_device else out

    def _note(self, func: Any, args: Any, kwargs: dict[str, Any], on_device: bool) -> None:
        given = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
        ours = [each for each in given if isinstance(each, OnDevice)]
        others = [each for each in given if not isinstance(each, OnDevice)]
        if func in COPIES:
            crossing = bool(ours) != on_device or (bool(others) and bool(ours)) or (bool(others) and on_device)
            if crossing and not (
                kwargs.get("non_blocking", False) or (func is aten.copy_.default and args[2:] == (True,))
            ):
                self.seen.append(f"{func} between devices")
        elif func in SIZED_BY_VALUES and ours:
            self.seen.append(str(func))
        elif func in INDEXED and ours:
            masks = [each for each in ours if each.dtype == torch.bool and each is not args[0]]
            self.seen += [f"{func} by a mask or an index of the host" for _ in (*others, *masks)]
        elif ours and any(each.ndim for each in others):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device")


def _inner(each: Any) -> Any:
    return each.own if isinstance(each, OnDevice) else each


@contextlib.contextmanager
def waiting_device() -> Iterator[Waits]:
    """Within the block, tensors with ``device=DEVICE`` are made on the waiting device."""
    with Waits() as waits:
        yield waits
