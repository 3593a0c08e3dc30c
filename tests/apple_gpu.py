"""An imitation of Apple's GPUs on the CPU: their tensors say that they are on MPS, and float64 is an error there."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

MPS = torch.device("mps")
NO_FLOAT64 = "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64"


class OnMps(torch.Tensor):
    """A tensor of the CPU that says it is on MPS."""


class AppleGpu(TorchFunctionMode):
    """Within its block ``.to("mps")`` gives tensors on the imitated device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func == torch.Tensor.device.__get__ and type(args[0]) is OnMps:  # type: ignore[attr-defined]  # a descriptor
            return MPS
        if name == "cpu" and type(args[0]) is OnMps:
            return plain(args[0]).clone()
        if name == "to":
            return _moved(args[0], [*args[1:], *kwargs.values()])
        made_there = str(kwargs.get("device")).startswith("mps")
        if made_there:
            kwargs["device"] = "cpu"
        found = func(*args, **kwargs)
        if made_there:
            found = found.as_subclass(OnMps)
        for each in found if isinstance(found, (tuple, list)) else (found,):
            if type(each) is OnMps and each.dtype == torch.float64:
                raise TypeError(NO_FLOAT64)
        return found


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers as an ordinary tensor."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(torch.Tensor)


def _moved(tensor: torch.Tensor, targets: list[Any]) -> torch.Tensor:
    like = next((each for each in targets if isinstance(each, torch.Tensor)), None)
    dtype = next(
        (each for each in targets if isinstance(each, torch.dtype)), tensor.dtype if like is None else like.dtype
    )
    places = [str(each) for each in targets if isinstance(each, (str, torch.device))]
    stays = type(tensor) is OnMps if like is None else type(like) is OnMps
    there = places[0].startswith("mps") if places else stays
    if dtype == torch.float64 and (there or type(tensor) is OnMps):
        raise TypeError(NO_FLOAT64)
    with torch._C.DisableTorchFunctionSubclass():
        moved = tensor.as_subclass(torch.Tensor).to(dtype)
        return moved.as_subclass(OnMps) if there else moved
