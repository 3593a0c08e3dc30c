"""The modules behind a network, and their state: which a measurement must not change."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

#: Elements of the largest buffer that is put back. Larger ones are weights of quantised networks, which no call changes
#: and whose copies would not fit beside them.
MOST_ELEMENTS = 2**18

#: Layers that answer otherwise in training mode.
LAYERS = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


def modules_of(network: Any) -> list[nn.Module]:
    """The modules that a network is or uses.

    Itself, what a partial function, a method, a list or a dictionary holds, and what a function names, in its closure
    or globally.
    """
    found: dict[int, nn.Module] = {}
    waiting, seen = [network], set()
    while waiting and len(seen) < 200:  # enough for wrappers; not the whole program
        thing = waiting.pop(0)
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, nn.Module):
            found[id(thing)] = thing
        elif isinstance(thing, functools.partial):
            waiting += [thing.func, *thing.args, *thing.keywords.values()]
        elif isinstance(thing, dict):
            waiting += thing.values()
        elif isinstance(thing, (list, tuple)):
            waiting += thing
        elif callable(thing) and not isinstance(thing, type):
            names, known = getattr(getattr(thing, "__code__", None), "co_names", ()), getattr(thing, "__globals__", {})
            waiting += [known[name] for name in names if name in known]
            waiting += [getattr(thing, "__self__", None), getattr(thing, "__wrapped__", None)]
            waiting += [_content(cell) for cell in getattr(thing, "__closure__", None) or ()]
            waiting += list(getattr(thing, "__dict__", {}).values())
    return list(found.values())


def active_training_layer(network: Any) -> str | None:
    """The class of a layer in training mode that makes answers random or batch-dependent; None if there is none."""
    for module in modules_of(network):
        for layer in module.modules():
            if layer.training and isinstance(layer, LAYERS) and getattr(layer, "p", 1) > 0:
                return type(layer).__name__
    return None


def check_evaluation_mode(network: Any) -> None:
    """ValueError if a layer in training mode makes answers random, or dependent on the batch."""
    layer = active_training_layer(network)
    if layer is not None:
        raise ValueError(f"the network is in training mode, with an active {layer}: call network.eval() first")


@contextmanager
def unchanged_buffers(network: Any) -> Iterator[None]:
    """Put buffers of up to `MOST_ELEMENTS` of a network's modules back, whatever its calls wrote into them."""
    every = (each for module in modules_of(network) for each in module.buffers())
    known = (each for each in every if not (each.is_meta or is_lazy(each)) and each.numel() <= MOST_ELEMENTS)
    before = [(each, each.detach().clone()) for each in {id(each): each for each in known}.values()]
    try:
        yield
    finally:
        for buffer, value in before:
            # What was made in inference mode can be written there alone, and a network may have resized its buffer.
            with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                if buffer.shape != value.shape or buffer.dtype != value.dtype:
                    buffer.data = value
                elif not torch.equal(buffer, value):
                    buffer.copy_(value)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not set yet
        return None
