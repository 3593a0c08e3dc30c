"""The modules that a network uses are found wherever its function reaches them."""

import functools
import types

import numpy as np
import pytest
import torch
from torch import nn

from fastsched.denoisers.network_modules import _holds_nothing, modules_of


class Holder:
    """What holds a network, and is not called itself."""

    __slots__ = ("inner", "net", "unused")

    def __init__(self, net, inner=None):
        self.net, self.inner, self.unused = net, inner, nn.Identity()

    @property
    def model(self):
        return self.net

    def predict(self, z, s):
        return self.net(z, s)

    def by_property(self, z, s):
        return self.model(z, s)

    def __call__(self, z, s):
        return self.inner.predict(z, s)


MODULE = types.ModuleType("networks")


def _in_places(net):
    holder = Holder(net)
    outer, MODULE.net = Holder(None, holder), net
    return {
        "method": holder.predict,
        "property": holder.by_property,
        "object in an object": outer,
        "attribute": lambda z, s: holder.net(z, s),
        "method of an attribute": lambda z, s: outer.inner.predict(z, s),
        "method that calls a method": outer.__call__,
        "default": lambda z, s, net=net: net(z, s),
        "keyword default": lambda z, s, *, net=net: net(z, s),
        "Python module": lambda z, s: MODULE.net(z, s),
        "compiled method": functools.partial(holder.predict, s=0).__call__,
        "wrapped by torch": torch.func.vmap(net),
        "comprehension": lambda z, s: torch.cat([MODULE.net(row[None], s) for row in z]),
    }


@pytest.mark.parametrize("place", _in_places(None))
def test_modules_are_found_wherever_a_function_reaches_them(place):
    net = nn.Identity()
    assert modules_of(_in_places(net)[place]) == [net]


@pytest.mark.parametrize("thing", [1, 2.0, "net", None, len, torch.cat, np.mean, np.add, np, torch.Tensor, np.float64])
def test_libraries_and_plain_values_are_not_searched(thing):
    assert _holds_nothing(thing)


def test_methods_that_call_each_other_end_the_search():
    class Pair:
        net = nn.Identity()

        def one(self, z, s):
            return self.other(z, s)

        def other(self, z, s):
            return self.one(z, s) if s else self.net(z)

    pair = Pair()
    assert modules_of(pair.one) == [pair.net]
