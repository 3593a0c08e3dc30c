"""What a pipeline's measurement is of, so that one of another call or of other weights is not taken for it."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import numbers
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsched.diffusers.conventions import describe
from fastsched.diffusers.pipeline_call import call_parameters
from fastsched.diffusers.watching import PROGRESS, networks_of
from fastsched.sampling.origin import Origin

#: Arguments of a call that do not change the latents' steps: what is made of them at the end, what looks on, and the
#: first latents, whose noise a measurement replaces.
WITHOUT_EFFECT = ("prompt", "output_type", "return_dict", "strength", "latents")

#: Networks that decode or judge what the steps end in.
AFTERWARDS = ("vae", "vqvae", "vqgan", "movq", "vocoder", "safety_checker")

#: Entries of a network's parts that hold scales of adapters, or which of them are used.
OF_ADAPTERS = ("scale", "scaling", "_active_adapter")

#: In names of numbers of a network's parts that save memory or time, or tell that it is trained, and change no answer.
WITHOUT_ANSWER = ("checkpointing", "chunk", "slicing", "tiling", "tile_", "training", "compile")

#: What each part of an identity tells, and what to do where it is another.
PARTS = {
    "call": "this pipeline called with the same prompts and arguments",
    "prediction": "the prediction that the pipeline's scheduler is set to (prediction_type)",
    "settings": "the same settings of the pipeline and its networks (guider, FreeU, scales and choice of adapters)",
    "weights": "the same weights and adapters",
}


def call_identity(pipe: Any, prompts: Sequence[str], call_kwargs: dict[str, Any]) -> str:
    """``CALL-PREDICTION-SETTINGS-DTYPE-WEIGHTS``: 12 digits of each, and the dtypes of the weights.

    Of the class, prompts and arguments; of the scheduler's prediction; of numbers that the pipeline, its guider and the
    parts of its networks hold; and of an element of each weight. Defaults of the call count as if they were given, and
    so do heights and widths that are the usual default. Callbacks and generators do not count. Tensors count as rounded
    to bfloat16. The last part is empty where a weight is not to be read, as where hooks move it between devices.
    """
    given = {name: value for name, value in call_parameters(pipe).items() if value is not inspect.Parameter.empty}
    given = _with_usual_size(pipe, given | call_kwargs)
    asked = prompts or call_kwargs.get("prompt") or []
    parts = [type(pipe).__name__, *([asked] if isinstance(asked, str) else map(str, asked))]
    for name, value in sorted(given.items()):
        if name not in WITHOUT_EFFECT and "callback" not in name:
            parts += [f"{name}={fact}" for fact in _content(value)]
    networks = [network for name, network in networks_of(pipe).items() if _counts(name, given, prompts)]
    weights = [weight for network in networks for weight in network.parameters() if weight.numel()]
    dtypes = sorted({str(weight.dtype).removeprefix("torch.") for weight in weights})
    convention = describe(pipe.scheduler)
    told = (convention.denoiser.prediction, convention.denoiser.sigma_data, convention.sign, convention.train_steps)
    settings = [*_settings(pipe), *(fact for network in networks for fact in _numbers(network))]
    digits = [_digits(repr(each).encode()) for each in (parts, told, settings)]
    return "-".join([*digits, "+".join(dtypes)[:40], _of_weights(weights)])


def check_same_call(name: str, found: Origin | None, identity: str) -> None:
    """ValueError if a measurement was not of what `call_identity` tells; weights are compared with those of a dtype."""
    known = "" if found is None or found.fingerprint is None else found.fingerprint
    if known.count("-") != identity.count("-"):
        return  # not known, or of a denoiser
    *those, dtype, weights = known.split("-")
    *these, own_dtype, own_weights = identity.split("-")
    if dtype == own_dtype and weights and own_weights:
        those, these = [*those, weights], [*these, own_weights]
    for one, other, what in zip(those, these, PARTS.values(), strict=False):
        if one != other:
            raise ValueError(f"{name} must be of {what}, and is of another ({found}); measure this one")


def _with_usual_size(pipe: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments with the height and width that most pipelines use where none is given, nor an image."""
    networks = (getattr(pipe, name, None) for name in ("unet", "transformer"))
    network = next((each for each in networks if each is not None), None)  # a compiled one has no truth value
    size = getattr(pipe, "default_sample_size", None) or getattr(getattr(network, "config", None), "sample_size", None)
    factor = getattr(pipe, "vae_scale_factor", None)
    if not isinstance(size, int) or not isinstance(factor, int) or _holds_images(given):
        return given
    return given | {name: size * factor for name in ("height", "width") if name in given and given[name] is None}


def _counts(name: str, given: Mapping[str, Any], prompts: Sequence[str]) -> bool:
    """Whether the steps may follow a network of the pipeline's: not one that decodes, or encodes what is not given."""
    if name.startswith("text_encoder") and given.get("prompt_embeds") is not None:
        return bool(prompts) or any("prompt" in key and _is_text(value) for key, value in given.items())
    if name.startswith("image_encoder"):
        return _holds_images(given)
    return name not in AFTERWARDS


def _holds_images(given: Mapping[str, Any]) -> bool:
    plain = (numbers.Number, str, type(None))
    return any(
        "image" in name and "embeds" not in name and not isinstance(value, plain) for name, value in given.items()
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, (list, tuple)) and any(isinstance(each, str) for each in value))


def _settings(pipe: Any) -> Iterator[str]:
    """Numbers of the pipeline's config, and all that a modular pipeline's guiders are set to."""
    for key, value in sorted(dict(getattr(pipe, "config", None) or {}).items()):
        if isinstance(value, numbers.Number):
            yield f"{key}={_content(value)}"
    for name, guider in sorted(vars(pipe).items()):
        if "guider" in name and isinstance(getattr(guider, "config", None), Mapping):
            yield f"{name}={type(guider).__name__}"
            held = vars(guider)
            for key, value in sorted(guider.config.items()):
                now = held.get(key, held.get(f"_{key}", value))  # it may have been set since
                yield from (f"{name}.{key}={fact}" for fact in _content(now) if not key.startswith("_"))


def _numbers(network: torch.nn.Module) -> Iterator[str]:
    """Numbers and flags of a network's parts, and which adapters are used and how much; no tensors."""
    for part in network.modules():
        if hasattr(part, "_orig_mod") or type(part).__module__.startswith("bitsandbytes"):
            continue  # what wraps a compiled one, and what notes at its first call what it has found
        for key, value in vars(part).items():
            if any(word in key.lower() for word in (*PROGRESS, *WITHOUT_ANSWER)):
                continue
            if isinstance(value, numbers.Number) or key in OF_ADAPTERS:
                yield f"{key}={_content(value)}"


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
    """What an argument holds; nothing of None and of what cannot be compared."""
    if isinstance(value, Tensor):
        exact = value.detach().cpu()
        exact = exact.bfloat16().float() if exact.is_floating_point() else exact.float()
        return [f"{tuple(value.shape)} {_digits(exact.contiguous().numpy().tobytes())}"]
    if isinstance(value, (str, bool, np.bool_)):
        return [repr(value if isinstance(value, str) else bool(value))]
    if isinstance(value, numbers.Real):
        return [repr(float(value))]
    if isinstance(value, Mapping):
        return [f"{key}:{fact}" for key, each in value.items() for fact in _content(each)]
    if isinstance(value, (list, tuple)):
        return [f"{n}:{fact}" for n, each in enumerate(value) for fact in _content(each)]
    if callable(getattr(value, "tobytes", None)):  # of NumPy and PIL
        return [_digits(value.tobytes())]
    return _content(vars(value)) if dataclasses.is_dataclass(value) else []


def _digits(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
