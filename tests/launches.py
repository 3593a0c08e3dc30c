"""Counts ops, those on tensors as large as a state, and the bytes that they read and write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class Launches(TorchDispatchMode):
    """Records the ops of its block that compute; views are not recorded.

    Attributes:
        seen: The name of each op, and the bytes that it reads and writes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given, made = _tensors((args, kwargs)), _tensors(out)
        memory = {each.untyped_storage()._cdata for each in given}
        mutable = func._schema.is_mutable
        if mutable or any(each.untyped_storage()._cdata not in memory for each in made):
            sizes = [each.numel() * each.element_size() for each in (given if mutable else [*given, *made])]
            self.seen.append((str(func), sum(sizes)))
        return out

    def per_step(self, marks: Sequence[int], state: int) -> tuple[float, float, float]:
        """Means over steps: ops, ops on at least half a state, and bytes read and written in units of a state.

        Args:
            marks: Lengths of `seen` where steps began, and where the last one ended.
            state: Bytes of a state.
        """
        seen, steps = self.seen[marks[0] : marks[-1]], len(marks) - 1
        large = sum(size >= state / 2 for _, size in seen)
        return len(seen) / steps, large / steps, sum(size for _, size in seen) / state / steps


def _tensors(values: Any) -> list[torch.Tensor]:
    return [each for each in tree_flatten(values)[0] if isinstance(each, torch.Tensor)]
