"""Find the `torch.nn.Module` objects that a network uses, also if the network is a plain function."""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import Tensor, nn

#: Types of Python itself, beside functions, modules and classes, whose contents or attributes are followed.
FOLLOWED = (types.MethodType, list, tuple, dict, staticmethod, classmethod)

#: Packages whose modules, classes and plain functions hold no network of the user's.
LIBRARIES = ("torch", "numpy", "scipy", "math")


def modules_of(network: Any) -> list[nn.Module]:
    """The modules that a network is or uses.

    The search starts at the network and follows the contents of partial functions, lists and dictionaries, the
    attributes of callable objects, and the names in a function's code: globals, variables of its closure, default
    arguments, and attributes of these and of the object that a method belongs to.
    """
    found: dict[int, nn.Module] = {}
    waiting, seen = [network], dict[Any, Any]()  # `seen` holds the objects, so that no id is used twice
    while waiting and len(seen) < 200:  # enough for wrappers, without searching the whole program
        thing = waiting.pop(0)
        if _holds_nothing(thing):
            continue
        bound = isinstance(thing, types.MethodType)  # Python makes a new object at every access
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
    """The objects that a function, a method or a callable object may use."""
    found = [getattr(function, name, None) for name in ("__self__", "__wrapped__")]
    found += getattr(function, "__dict__", {}).values()
    code = getattr(function, "__code__", None)
    if not isinstance(code, types.CodeType):
        call = getattr(type(function), "__call__", None)  # noqa: B004 - inspected, not called
        return [*found, types.MethodType(call, function)] if isinstance(call, types.FunctionType) else found
    names, known = _names(code), function.__globals__
    owners = [known[name] for name in names if name in known]
    owners += [getattr(function, "__self__", None), *map(_content, function.__closure__ or ())]
    owners += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for owner in owners:  # the list grows, by attributes of attributes
        if len(owners) < 200 and not isinstance(owner, (nn.Module, Tensor)) and not _holds_nothing(owner):
            owners += _attributes(owner, names)
    return found + owners


def _holds_nothing(thing: Any) -> bool:
    """Whether no network can be reached from a thing: numbers, strings, compiled functions, a library's functions."""
    kind = type(thing)
    if kind is types.FunctionType:  # one with a closure or attributes may wrap a function of the user's
        return thing.__closure__ is None and not vars(thing) and _of_library(thing.__globals__.get("__name__"))
    if isinstance(thing, types.ModuleType):
        return _of_library(thing.__name__)
    if isinstance(thing, type):
        return _of_library(thing.__module__)
    if kind.__module__ != "builtins" or isinstance(thing, FOLLOWED):
        return kind.__module__.partition(".")[0] == "numpy"
    owner = getattr(thing, "__self__", None)  # of a compiled method
    return owner is None or isinstance(owner, types.ModuleType)


def _of_library(name: Any) -> bool:
    return isinstance(name, str) and name.partition(".")[0] in LIBRARIES


def _attributes(owner: Any, names: list[str]) -> list[Any]:
    """The attributes ``names`` that an object has, found without running code of a property.

    `inspect.getattr_static` does the same for one name, and takes 5 to 13 times as long.
    """
    classes = owner.__mro__ if isinstance(owner, type) else type(owner).__mro__
    try:
        places = [object.__getattribute__(owner, "__dict__"), *map(vars, classes)]
    except AttributeError:  # with __slots__
        places = [*map(vars, classes)]
    found = []
    for name in names:
        for place in places:
            if name in place:
                found.append(_value(owner, name, place[name]))
                break
    return [each for each in found if each is not None]


def _value(owner: Any, name: str, held: Any) -> Any:
    """What the attribute of an owner is whose ``__dict__`` or whose class's holds ``held``; of a property, its code."""
    if isinstance(held, types.MemberDescriptorType):  # of __slots__
        return getattr(owner, name, None)
    if isinstance(held, property):
        held = held.fget
    elif isinstance(held, (staticmethod, classmethod)):
        held = held.__func__
    if isinstance(held, types.FunctionType) and not isinstance(owner, types.ModuleType):
        held = types.MethodType(held, owner)
    return held


def _names(code: types.CodeType) -> list[str]:
    """The names in ``code`` and in the comprehensions and functions inside it."""
    inner = (each for each in code.co_consts if isinstance(each, types.CodeType))
    return list(dict.fromkeys([*code.co_names, *(name for each in inner for name in _names(each))]))


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not set yet
        return None
