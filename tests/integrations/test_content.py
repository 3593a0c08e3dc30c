"""What a fit in ComfyUI is remembered by: all that the model and its patches compute with, and nothing else."""

import random
import sys
import threading
import types

import pytest
import torch


def test_weights_count_as_they_were_before_patches(package, given):
    """A loaded model holds patched weights in place and keeps the others aside."""
    digest = sys.modules[f"{package.__name__}.content"].digest
    model = given()["model"]
    before = digest(model)
    original = model.model.diffusion_model.scale.detach().clone()
    model.backup["diffusion_model.scale"] = type("Kept", (), {"weight": original})()
    model.model.diffusion_model.scale.data *= 2
    assert digest(model) == before is not None


def test_how_much_of_a_network_is_loaded_does_not_count(package):
    """ComfyUI writes it into a ControlNet's network."""
    digest = sys.modules[f"{package.__name__}.content"].digest
    control = type("Control", (), {})()
    control.control_model = torch.nn.Linear(2, 2)
    control.control_model.model_loaded_weight_memory = 0
    before = digest(control)
    control.control_model.model_loaded_weight_memory, control.control_model.model_lowvram = 24, False
    assert digest(control) == before is not None
    control.control_model.scale = 2.0
    assert digest(control) != before


class Sharpen:
    """A patch as a custom node has it, with attributes of names that ComfyUI gives to bookkeeping."""

    def __init__(self, **settings):
        self.__dict__.update(settings)


class Slotted:
    __slots__ = ("__dict__", "strength")

    def __init__(self, strength):
        self.strength = strength


class Settings(dict):
    """A dict with an attribute."""

    def __init__(self, strength):
        self.strength = strength


def module_with(strength):
    """A patch that is a module, and has its setting in a part."""
    found = torch.nn.Sequential(torch.nn.Identity())
    found[0].strength = [strength]
    return found


def function_with(text, **known):
    exec(text, known)
    return known["patch"]


PATCHES = {
    **{
        f"attribute {name}": lambda v, name=name: Sharpen(**{name: v}) for name in ("size", "device", "parent", "conds")
    },
    "slots": Slotted,
    "attribute of a dict": Settings,
    "part of a module": module_with,
    "builtin method": lambda v: torch.tensor(v).mul,
    "namespace": lambda v: types.SimpleNamespace(strength=v),
    "global": lambda v: function_with("def patch(told): return told['denoised'] * strength", strength=v),
    "function in a function": lambda v: function_with(f"def patch(told): return (lambda: {v})()"),
    "nesting": lambda v: {"a": {}, "b": 1} if v == 2.0 else {"a": {"b": 1}},
}


@pytest.mark.parametrize("kind", list(PATCHES))
def test_a_patch_s_settings_count_wherever_they_are(package, kind):
    digest = sys.modules[f"{package.__name__}.content"].digest
    make = PATCHES[kind]
    assert digest(make(2.0)) == digest(make(2.0)) is not None
    assert digest(make(2.0)) != digest(make(3.0)) is not None


def test_what_cannot_be_read_is_not_remembered(package, given):
    digest = sys.modules[f"{package.__name__}.content"].digest
    assert digest(given()["model"]) == digest(given()["model"]) is not None
    lock = threading.Lock()
    assert digest({"patch": lambda: lock}) is None
    assert digest(type("Dice", (random.Random,), {})()) is None  # its state is not among its attributes
    assert digest([1, 2]) != digest([2, 1])
    assert digest("ab", "c") != digest("a", "bc")
    big = torch.zeros(5_000_000)
    assert digest(big) == digest(big.clone())
