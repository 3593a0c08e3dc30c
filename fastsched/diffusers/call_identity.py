"""What a pipeline's measurement is of, so that one of another call or of other weights is not taken for it."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsched.diffusers.watching import networks_of
from fastsched.sampling.origin import Origin

#: Arguments of a call that do not change the latents' steps: what is made of them at the end, and what looks on.
WITHOUT_EFFECT = ("prompt", "output_type", "return_dict", "strength")

#: Networks that decode or judge what the steps end in.
AFTERWARDS = ("vae", "vqvae", "vqgan", "movq", "vocoder", "safety_checker")


def call_identity(pipe: Any, prompts: Sequence[str], call_kwargs: dict[str, Any]) -> str:
    """``CALL-DTYPE-WEIGHTS``: 12 digits of the class, prompts and arguments, and 12 of an element of each weight.

    Defaults of the call count as if they were given. Callbacks and generators do not count. The last part is empty
    where a weight is not to be read, as where hooks move it between devices.
    """
    signature = inspect.signature(type(pipe).__call__).parameters
    given = {name: each.default for name, each in signature.items() if each.default is not each.empty}
    given |= call_kwargs
    asked = prompts or call_kwargs.get("prompt") or []
    parts = [type(pipe).__name__, *([asked] if isinstance(asked, str) else map(str, asked))]
    for name, value in sorted(given.items()):
        if name not in WITHOUT_EFFECT and "callback" not in name:
            parts += [f"{name}={fact}" for fact in _content(value)]
    weights = [
        weight
        for name, network in networks_of(pipe).items()
        if name not in AFTERWARDS
        for weight in network.parameters()
        if weight.numel()
    ]
    dtypes = sorted({str(weight.dtype).removeprefix("torch.") for weight in weights})
    return f"{_digits(repr(parts).encode())}-{'+'.join(dtypes)[:40]}-{_of_weights(weights)}"


def check_same_call(name: str, found: Origin | None, identity: str) -> None:
    """ValueError if a measurement was of another call than `call_identity` tells, or of other weights of its dtype."""
    known = "" if found is None or found.fingerprint is None else found.fingerprint
    if known.count("-") != 2:
        return  # not known, or of a denoiser
    (call, dtype, weights), (own, own_dtype, own_weights) = known.split("-"), identity.split("-")
    if call != own:
        raise ValueError(
            f"{name} must be of this pipeline called with the same prompts and arguments, and is of another call "
            f"({found}); measure this one anew"
        )
    if dtype == own_dtype and weights and own_weights and weights != own_weights:
        raise ValueError(f"{name} must be of the same weights and adapters, and is of others; measure these anew")


def _of_weights(weights: Sequence[Tensor]) -> str:
    usual = all(type(weight) in (Tensor, torch.nn.Parameter) and not weight.is_meta for weight in weights)
    if not usual or not weights:
        return ""
    kinds = {(weight.device, weight.dtype) for weight in weights}
    elements = []  # read once a device and dtype: each reading waits for the device
    for kind in sorted(kinds, key=str):
        own = [weight.detach() for weight in weights if (weight.device, weight.dtype) == kind]
        elements.append(torch.cat([weight.as_strided((1,), (1,)) for weight in own]).double().cpu())
    return _digits(torch.cat(elements).sort().values.numpy().tobytes())


def _content(value: Any) -> list[str]:
    """What an argument holds, exactly; nothing of None and of what cannot be compared."""
    if isinstance(value, Tensor):
        return [f"{tuple(value.shape)} {_digits(value.detach().cpu().float().contiguous().numpy().tobytes())}"]
    if isinstance(value, (bool, int, float, str)):
        return [repr(float(value) if isinstance(value, int) and not isinstance(value, bool) else value)]
    if isinstance(value, dict):
        return [f"{key}:{fact}" for key, each in value.items() for fact in _content(each)]
    if isinstance(value, (list, tuple)):
        return [f"{n}:{fact}" for n, each in enumerate(value) for fact in _content(each)]
    return [_digits(value.tobytes())] if callable(getattr(value, "tobytes", None)) else []  # of NumPy and PIL


def _digits(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
