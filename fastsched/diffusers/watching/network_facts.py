"""What can change a network's output from one call to the next: its weights, settings, parts and hooks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor

#: Words in the names of values that follow the level or the step, and so differ between steps in every pipeline.
PROGRESS = ("time", "step", "sigma", "index", "progress", "temb")

#: The types of settings. An attribute that is None may become one of these later, as FreeU's factors do.
NUMBERS = (bool, int, float, str)

#: Attributes that hold functions of a network.
FUNCTIONS = ("forward", "processor")

#: Containers of numbers that are settings: LoRA's scales by adapter, an IP-adapter's by image.
SCALES = ("scaling", "scale")


def progresses(name: str) -> bool:
    """Whether a fact of this name follows the level or the step (`PROGRESS`)."""
    return any(word in name.lower().rsplit(".", 1)[-1] for word in PROGRESS)


def hooks_of(module: torch.nn.Module) -> dict[str, Any]:
    """The hooks that diffusers has set on a module, by name."""
    return getattr(vars(module).get("_diffusers_hook"), "hooks", None) or {}


class NetworkFacts:
    """An element of each of a network's weights and buffers, and the settings of its modules and their processors.

    The places to read are found once: a walk through a large network at every step would take longer than the
    scheduler. Tensors are read only if they are plain tensors on one device that no hooks move to other devices.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        parts = [*module.modules()]
        self._parts = [vars(part) for part in parts]
        self._modules = [part._modules for part in parts]
        self._hooks = [hooks for part in parts for hooks in (part._forward_hooks, part._forward_pre_hooks)]
        self._places: list[int] = []
        self._find()
        kinds: list[dict[str, Any]] = [kind for part in parts for kind in (part._parameters, part._buffers)]
        self._weights = [(kind, key) for kind in kinds for key in kind if isinstance(kind[key], Tensor)]
        tensors = [kind[key].detach() for kind, key in self._weights]
        values = [each for each in tensors if each.is_floating_point() and each.numel()]
        moved = any(hooks_of(part) or hasattr(part, "_hf_hook") for part in parts)
        usual = all(type(each) is Tensor and each.device == values[0].device for each in values)
        self._watched = bool(values) and usual and not moved and values[0].device.type != "meta"
        self._elements: dict[torch.dtype, list[Tensor]] = {}
        for each in values if self._watched else ():
            self._elements.setdefault(each.dtype, []).append(each.as_strided((1,), (1,)))  # works in any memory format

    def facts(self) -> dict[str, Any]:
        """Numbers and tensors that must be equal at every step."""
        found: dict[str, Any] = {"settings": hash(tuple(self._settings()))}
        if self._watched:
            places = (kind[key].data_ptr() for kind, key in self._weights if isinstance(kind.get(key), Tensor))
            found["weights"] = hash(tuple(places))
            found |= {f"weights.{dtype}": torch.cat(elements) for dtype, elements in self._elements.items()}
        return found

    def _settings(self) -> Iterator[Any]:
        yield from map(len, self._hooks)
        yield from map(id, chain.from_iterable(each.values() for each in self._modules))
        processors = [part.get("processor") for part in self._processed]
        places = [*map(len, self._parts), *map(id, processors)]
        if places != self._places:  # a new attribute, as FreeU's
            self._places = places
            self._find()
        yield from [at.get(key) for at, key in self._numbers]
        yield from [value if isinstance(value := at.get(key), NUMBERS) else None for at, key in self._empty]
        for at, key in self._others:
            value = at.get(key)
            if key == "processor":
                yield type(value)  # the object may be made anew
            elif key == "forward":
                yield id(getattr(value, "__func__", value))
            else:
                yield str(value)

    def _find(self) -> None:
        """Find the attributes to read."""
        self._processed = [part for part in self._parts if part.get("processor") is not None]
        processors = (part["processor"] for part in self._processed)
        holders = [*self._parts, *(vars(each) for each in processors if hasattr(each, "__dict__"))]
        known = [(at, key, value) for at in holders for key, value in at.items() if not progresses(key)]
        self._numbers = [(at, key) for at, key, value in known if isinstance(value, NUMBERS)]
        self._empty = [(at, key) for at, key, value in known if value is None and not key.startswith("_")]
        self._others = [(at, key) for at, key, value in known if key in FUNCTIONS or _are_scales(key, value)]


def _are_scales(key: str, value: Any) -> bool:
    return key in SCALES and isinstance(value, (list, dict))
