"""Find the modules that a network uses, check their mode, and restore their buffers after a measurement."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastsched import validate
from fastsched.denoisers.network_modules import modules_of

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


def is_training(module: nn.Module) -> bool:
    """Whether a module, or one in it, is in training mode; those of a frozen TorchScript module have no mode."""
    return any(getattr(each, "training", False) for each in module.modules())


def active_training_layer(network: Any) -> str | None:
    """The class of a layer in training mode that makes outputs random or batch-dependent; None if there is none."""
    for module in modules_of(network):
        for layer in module.modules():
            without = isinstance(layer, nn.modules.instancenorm._InstanceNorm) and not layer.track_running_stats
            if isinstance(layer, LAYERS) and layer.training and getattr(layer, "p", 1) > 0 and not without:
                return type(layer).__name__.strip("_")
    return None


def check_evaluation_mode(network: Any, name: str = "the network") -> None:
    """ValueError if a layer in training mode makes outputs random or batch-dependent."""
    layer = active_training_layer(network)
    if layer is not None:
        raise training_error(f"with an active {layer}", name)


def training_error(what: str, name: str = "the network") -> ValueError:
    """The error about a network in training mode."""
    return ValueError(f"{name} is in training mode, {what}: call {name.removeprefix('the ')}.eval() first")


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
        raise training_error("and writes to its parameters" if written else "and draws random numbers")


@contextmanager
def warned_of_draws(network: Any, device: torch.device, harm: str) -> Iterator[None]:
    """Warn if a network draws torch's random numbers in here, with the ``harm`` that this does.

    Those of NumPy and Python are not watched, because other threads of a training draw them too.
    """
    state = random_state(device)
    yield
    if not torch.equal(state, random_state(device)):
        training = any(is_training(each) for each in modules_of(network))
        how = "is in training mode, and draws random numbers (dropout?)" if training else "draws random numbers"
        validate.warn(f"the network {how}: {harm}")


def random_state(device: torch.device) -> Tensor:
    """The state of the global random numbers of a device."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _other_random_states() -> dict[str, str]:
    """The states of the global random numbers of NumPy and Python, as text, since arrays do not compare as a whole."""
    states = {"NumPy": np.random.get_state(legacy=False), "Python": random.getstate()}  # noqa: NPY002 - networks use it
    return {name: repr(state) for name, state in states.items()}


@contextmanager
def warned_of_randomness(device: torch.device, what: str, harm: str) -> Iterator[list[str]]:
    """Warn if global random numbers are drawn in here: a network may be random at some levels alone.

    For the message, ``what`` is done here, and ``harm`` if the network is random. Afterwards the list that it gives
    holds whose numbers were drawn.
    """
    drawn: list[str] = []
    places = {torch.device("cpu"), device}
    before = [(place, random_state(place)) for place in places]
    others = _other_random_states()
    yield drawn
    drawn += [] if all(torch.equal(state, random_state(place)) for place, state in before) else ["torch"]
    drawn += [name for name, state in _other_random_states().items() if state != others[name]]
    if drawn:
        validate.warn(
            f"{' and '.join(drawn)}'s random numbers were drawn during {what}: if the network's answers depend on them "
            f"(noise or dropout at some levels?), {harm}; call network.eval(), or fix the numbers"
        )


@dataclass
class _Held:
    """A module's buffer, what it held before, and how many blocks of `unchanged_buffers` are open on it."""

    module: nn.Module
    name: str
    buffer: Tensor
    value: Tensor
    users: int = 0

    def put_back(self) -> None:
        """Restore the buffer, if it has changed, or another tensor has taken its place."""
        buffer, value = self.buffer, self.value
        # What was made in inference mode can be written there alone, and a network may have resized its buffer.
        with torch.inference_mode(buffer.is_inference()), torch.no_grad():
            if buffer.shape != value.shape or buffer.dtype != value.dtype:
                buffer.data = value
            elif not torch.equal(buffer, value):
                buffer.copy_(value)
        now = dict(self.module.named_buffers(recurse=False)).get(self.name)
        # A network that has moved or converted itself keeps its new buffers, which go with its parameters.
        if now is not None and now is not buffer and (now.device, now.dtype) == (buffer.device, buffer.dtype):
            setattr(self.module, self.name, buffer)


#: Buffers held now, by module and name; and a lock, because threads may share a network: the last one puts its buffers
#: back, as what another finds at its start has been written to already.
_HELD: dict[tuple[int, str], _Held] = {}
_LOCK = threading.Lock()


@contextmanager
def unchanged_buffers(network: Any) -> Iterator[None]:
    """Put buffers of up to `MOST_ELEMENTS` of a network's modules back, whatever its calls wrote into them."""
    modules = {id(each): each for module in modules_of(network) for each in module.modules()}
    taken = []
    try:
        with _LOCK:
            for key, module in modules.items():
                for name, each in module.named_buffers(recurse=False):
                    if each.numel() <= MOST_ELEMENTS and not (each.is_meta or is_lazy(each)):
                        held = _HELD.get((key, name))
                        held = held or _HELD.setdefault((key, name), _Held(module, name, each, each.detach().clone()))
                        held.users += 1
                        taken.append(held)
        yield
    finally:
        with _LOCK:
            for held in taken:
                held.users -= 1
                if held.users == 0:
                    del _HELD[id(held.module), held.name]
            for held in (each for each in taken if each.users == 0):
                held.put_back()
