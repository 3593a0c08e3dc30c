"""The modules behind a network, and their state: which a measurement must not change."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

#: Elements of the largest buffer that is put back. Larger ones are weights of quantised networks, which no call changes
#: and whose copies would not fit beside them.
MOST_ELEMENTS = 2**18

#: Layers that answer otherwise in training mode.
LAYERS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.dropout._DropoutNd,
    nn.modules.instancenorm._InstanceNorm,
    nn.utils.parametrizations._SpectralNorm,
)


def modules_of(network: Any) -> list[nn.Module]:
    """The modules that a network is or uses.

    Itself, what a partial function, a list or a dictionary holds, and what a function reaches by the names in its code:
    globally, in its closure, as defaults, and as attributes of these or of the object whose method it is.
    """
    found: dict[int, nn.Module] = {}
    waiting, seen = [network], dict[Any, Any]()  # kept, so that no other thing gets the same id
    while waiting and len(seen) < 200:  # enough for wrappers; not the whole program
        thing = waiting.pop(0)
        bound = isinstance(thing, types.MethodType)  # made anew whenever it is asked for
        key = (id(thing.__func__), id(thing.__self__)) if bound else id(thing)
        if key in seen:
            continue
        seen[key] = thing
        if isinstance(thing, nn.Module):
            found[id(thing)] = thing
        elif isinstance(thing, functools.partial):
            waiting += [thing.func, *thing.args, *thing.keywords.values()]
        elif isinstance(thing, dict):
            waiting += thing.values()
        elif isinstance(thing, (list, tuple)):
            waiting += thing
        elif callable(thing) and not isinstance(thing, type):
            waiting += _reached(thing)
    return list(found.values())


def _reached(function: Any) -> list[Any]:
    """What a function, a method or an object that is called may use."""
    found = [getattr(function, name, None) for name in ("__self__", "__wrapped__")]
    found += getattr(function, "__dict__", {}).values()
    code = getattr(function, "__code__", None)
    if not isinstance(code, types.CodeType):
        call = getattr(type(function), "__call__", None)  # noqa: B004 - to be looked into, not called
        return [*found, types.MethodType(call, function)] if isinstance(call, types.FunctionType) else found
    names, known = _names(code), function.__globals__
    owners = [known[name] for name in names if name in known]
    owners += [getattr(function, "__self__", None), *map(_content, function.__closure__ or ())]
    owners += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for owner in owners:  # grows: attributes of attributes
        library = isinstance(owner, types.ModuleType) and owner.__name__.partition(".")[0] == "torch"
        if not library and not isinstance(owner, (nn.Module, Tensor)) and len(owners) < 200:
            owners += [each for name in names for each in _attribute(owner, name)]
    return found + owners


def _attribute(owner: Any, name: str) -> list[Any]:
    """The attribute of that name without running any code for it, as a list; none if there is no such one."""
    held = inspect.getattr_static(owner, name, None)
    if isinstance(held, types.MemberDescriptorType):  # of __slots__
        held = getattr(owner, name, None)
    elif isinstance(held, property):
        held = held.fget
    elif isinstance(held, (staticmethod, classmethod)):
        held = held.__func__
    if isinstance(held, types.FunctionType) and not isinstance(owner, types.ModuleType):
        held = types.MethodType(held, owner)
    return [] if held is None else [held]


def _names(code: types.CodeType) -> list[str]:
    """The names in code, and in comprehensions and functions in it."""
    inner = (each for each in code.co_consts if isinstance(each, types.CodeType))
    return list(dict.fromkeys([*code.co_names, *(name for each in inner for name in _names(each))]))


def is_training(module: nn.Module) -> bool:
    """Whether a module, or one in it, is in training mode."""
    return any(each.training for each in module.modules())


def active_training_layer(network: Any) -> str | None:
    """The class of a layer in training mode that makes answers random or batch-dependent; None if there is none."""
    for module in modules_of(network):
        for layer in module.modules():
            without = isinstance(layer, nn.modules.instancenorm._InstanceNorm) and not layer.track_running_stats
            if layer.training and isinstance(layer, LAYERS) and getattr(layer, "p", 1) > 0 and not without:
                return type(layer).__name__.strip("_")
    return None


def check_evaluation_mode(network: Any) -> None:
    """ValueError if a layer in training mode makes answers random, or dependent on the batch."""
    layer = active_training_layer(network)
    if layer is not None:
        raise ValueError(f"the network is in training mode, with an active {layer}: call network.eval() first")


@contextmanager
def checked_training(network: Any, device: torch.device) -> Iterator[None]:
    """ValueError if a network in training mode draws random numbers, or writes to its parameters, in here.

    Layers of a network's own do so, for dropout, label dropout or forced weight normalisation. Parameters of up to
    `MOST_ELEMENTS` are put back.
    """
    training = [each for each in modules_of(network) if is_training(each)]
    if not training:
        yield
        return
    every = {id(each): each for module in training for each in module.parameters()}.values()
    known = [each for each in every if not (each.is_meta or is_lazy(each) or each.is_inference())]
    before = [(each, each._version, each.detach().clone() if each.numel() <= MOST_ELEMENTS else None) for each in known]
    state = random_state(device)
    try:
        yield
    finally:
        written = [(each, value) for each, version, value in before if each._version != version]
        for parameter, value in written:
            if value is not None:
                parameter.data.copy_(value)
    if written or not torch.equal(state, random_state(device)):
        what = "writes to its parameters" if written else "draws random numbers"
        raise ValueError(f"the network is in training mode, and {what}: call network.eval() first")


def random_state(device: torch.device) -> Tensor:
    """The state of the global random numbers of a device."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


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
