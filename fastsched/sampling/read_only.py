"""Results that do not change when somebody writes into their tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor


class ReadOnlyTensors:
    """Tensors of such an object are copied when they are read: written into, it would not be what was measured."""

    #: Attributes that are too large to be copied.
    uncopied: ClassVar[tuple[str, ...]] = ()

    if not TYPE_CHECKING:  # to a type checker it would mean that the object has any attribute

        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            return value.clone() if isinstance(value, Tensor) and name not in type(self).uncopied else value
