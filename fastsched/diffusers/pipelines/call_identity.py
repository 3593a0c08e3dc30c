"""Identify the call and weights that a pipeline's measurement belongs to, so that it is not used for others."""

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
from fastsched.diffusers.pipelines.call import call_parameters
from fastsched.diffusers.watching.network_facts import PROGRESS, hooks_of
from fastsched.diffusers.watching.watch import networks_of
from fastsched.measurement.devices import gathered_by_all
from fastsched.sampling.origin import Origin, call_difference

#: Arguments of a call that are left out: the prompts (added separately), the form of the output, the strength (always
#: 1), and the first latents, which a measurement replaces by its own noise.
WITHOUT_EFFECT = ("prompt", "output_type", "return_dict", "strength", "latents")

#: Networks that run after the last step, to decode or check the result.
POSTPROCESSING = ("vae", "vqvae", "vqgan", "movq", "vocoder", "safety_checker")

#: Attributes of a network's modules that hold the scales of adapters, or the active adapters.
ADAPTER_ATTRIBUTES = ("scale", "scaling", "_active_adapter")

#: Parts of the names of module attributes that leave the output as it is: they save memory or time, mark training, or
#: note by which scale an adapter was fused.
NOT_IN_OUTPUT = ("checkpointing", "chunk", "slicing", "tiling", "tile_", "training", "compile", "lora_scale")

#: Modules that attention modules with fused projections have in addition to the ones that they were made of.
FUSED = ("to_qkv", "to_kv", "to_added_qkv")


def call_identity(pipe: Any, prompts: Sequence[str], call_kwargs: dict[str, Any]) -> str:
    """``CALL-PREDICTION-SETTINGS-DTYPE-WEIGHTS``: 12 hexadecimal digits each, but the dtypes of the weights by name.

    They are hashes of the class, prompts and arguments; of the scheduler's prediction; of numbers in the pipeline, its
    guider and its networks' modules; and of one element of each weight. Defaults count as if the call gave them, and
    so do the usual height and width. Callbacks and generators do not count. Tensors are rounded to bfloat16. The last
    part is empty if a weight cannot be read, as when hooks move it between devices or to a disk.
    """
    given = {name: value for name, value in call_parameters(pipe).items() if value is not inspect.Parameter.empty}
    given = _with_usual_size(pipe, given | call_kwargs)
    asked = prompts or call_kwargs.get("prompt") or []
    parts = [type(pipe).__name__, *([asked] if isinstance(asked, str) else map(str, asked))]
    for name, value in sorted(given.items()):
        if name not in WITHOUT_EFFECT and "callback" not in name:
            parts += [f"{name}={fact}" for fact in _content(value)]
    networks = [network for name, network in networks_of(pipe).items() if _counts(name, given, prompts)]
    weights = [weight for network in networks for weight in _weights(network)]
    dtypes = sorted({str(weight.dtype).removeprefix("torch.") for weight in weights})
    convention = describe(pipe.scheduler)
    told = (convention.denoiser.prediction, convention.denoiser.sigma_data, convention.sign, convention.train_steps)
    settings = [*_settings(pipe), *(fact for network in networks for fact in _numbers(network))]
    digits = [_digits(repr(each).encode()) for each in (parts, told, settings)]
    on_disk = any(_is_on_disk(part) for network in networks for part in network.modules())
    return "-".join([*digits, "+".join(dtypes)[:40], "" if on_disk else _of_weights(weights)])


def check_same_call(name: str, found: Origin | None, identity: str, *, any_dtype: bool = True) -> None:
    """ValueError if a measurement is not of the call ``identity``; weights are compared only if their dtypes agree.

    With ``any_dtype`` these may differ.
    """
    what = call_difference(None if found is None else found.fingerprint, identity, any_dtype)
    if what is not None:
        raise ValueError(f"{name} must be of {what}, but is not ({found}); measure this pipeline")


def check_same_calls(identity: str, group: Any) -> None:
    """ValueError in all processes of ``group`` unless their calls and weights are the same, as in `check_same_call`."""
    first, *others = gathered_by_all(identity, group)
    for rank, other in enumerate(others, 1):
        what = call_difference(first, other, any_dtype=False)
        if what is not None:
            raise ValueError(
                f"all processes of the group must measure {what}, but process {rank} differs from process 0 in this"
            )


def _with_usual_size(pipe: Any, given: dict[str, Any]) -> dict[str, Any]:
    """``given`` with the default height and width of most pipelines, if it has neither these nor an image."""
    networks = (getattr(pipe, name, None) for name in ("unet", "transformer"))
    network = next((each for each in networks if each is not None), None)  # a compiled network has no truth value
    size = getattr(pipe, "default_sample_size", None) or getattr(getattr(network, "config", None), "sample_size", None)
    factor = getattr(pipe, "vae_scale_factor", None)
    if not isinstance(size, int) or not isinstance(factor, int) or _holds_images(given):
        return given
    return given | {name: size * factor for name in ("height", "width") if name in given and given[name] is None}


def _counts(name: str, given: Mapping[str, Any], prompts: Sequence[str]) -> bool:
    """Whether the steps may depend on a network: not if it decodes, or encodes an input that is not given."""
    if name.startswith("text_encoder") and given.get("prompt_embeds") is not None:
        return bool(prompts) or any("prompt" in key and _is_text(value) for key, value in given.items())
    if name.startswith("image_encoder"):
        return _holds_images(given)
    return name not in POSTPROCESSING


def _holds_images(given: Mapping[str, Any]) -> bool:
    plain = (numbers.Number, str, type(None))
    return any(
        "image" in name and "embeds" not in name and not isinstance(value, plain) for name, value in given.items()
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, (list, tuple)) and any(isinstance(each, str) for each in value))


def _settings(pipe: Any) -> Iterator[str]:
    """Numbers in the pipeline's config, and all settings of a modular pipeline's guiders."""
    for key, value in sorted(dict(getattr(pipe, "config", None) or {}).items()):
        if isinstance(value, numbers.Number):
            yield f"{key}={_content(value)}"
    for name, guider in sorted(vars(pipe).items()):
        if "guider" in name and isinstance(getattr(guider, "config", None), Mapping):
            yield f"{name}={type(guider).__name__}"
            held = vars(guider)
            for key, value in sorted(guider.config.items()):
                now = held.get(key, held.get(f"_{key}", value))  # it may have changed since
                yield from (f"{name}.{key}={fact}" for fact in _content(now) if not key.startswith("_"))


def _numbers(network: torch.nn.Module) -> Iterator[str]:
    """Numbers and flags of a network's modules, and the adapters in use with their scales; no tensors.

    Private flags are left out: libraries note in them what they set up at the first call (transformers: its hooks).
    """
    for part in _parts(network):
        if hasattr(part, "_orig_mod") or type(part).__module__.startswith("bitsandbytes"):
            continue  # wrappers of compiled modules, and modules that change their attributes at the first call
        for key, value in vars(part).items():
            if any(word in key.lower() for word in (*PROGRESS, *NOT_IN_OUTPUT)):
                continue
            if isinstance(value, bool) and key.startswith("_"):
                continue
            if key == "fused_projections":
                if hasattr(type(part), key):  # then an object has it only once it was fused
                    continue
                value = False
            if _is_adapted(part) and key in ADAPTER_ATTRIBUTES:
                names = _adapters(part)
                value = {name: value.get(name) for name in names} if isinstance(value, Mapping) else names
            if isinstance(value, numbers.Number) or key in ADAPTER_ATTRIBUTES:
                yield f"{key}={_content(value)}"


def _parts(network: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules of a network without fused projections, whose weights repeat others, and adapters not in use."""
    modules = [*network.modules()]
    attention = [part for part in modules if getattr(part, "fused_projections", False) is True]
    left_out = {id(getattr(part, name, None)) for part in attention for name in FUSED}
    for part in modules:
        if _is_adapted(part):
            names = _adapters(part)
            unused = [each for name, each in part.named_children() if name != "base_layer"]
            if names:
                unused = [each for kind in unused for name, each in kind.named_children() if name not in names]
            else:
                left_out.add(id(part))
            left_out |= {id(each) for own in unused for each in own.modules()}
    return [part for part in modules if id(part) not in left_out]


def _is_adapted(part: torch.nn.Module) -> bool:
    """Whether a module is PEFT's around a layer, with adapters."""
    return hasattr(part, "base_layer") and isinstance(getattr(part, "active_adapters", None), (list, tuple))


def _adapters(part: Any) -> list[str]:
    """The adapters that act on a layer: not those that are inactive, disabled, at scale 0 or fused into its weights."""
    off = part.disable_adapters or part.merged
    return [] if off else [name for name in part.active_adapters if getattr(part, "scaling", {}).get(name, 1) != 0]


def _weights(network: torch.nn.Module) -> list[Tensor]:
    held = {id(weight): weight for part in _parts(network) for weight in part.parameters(recurse=False)}
    return [weight for weight in held.values() if weight.numel()]


def _is_on_disk(module: torch.nn.Module) -> bool:
    """Whether a hook of diffusers keeps the weights of a module on disk between calls; then they hold anything."""
    groups = (getattr(hook, "group", None) for hook in hooks_of(module).values())
    return any(getattr(group, "offload_to_disk_path", None) is not None for group in groups)


def _of_weights(weights: Sequence[Tensor]) -> str:
    usual = all(type(weight) in (Tensor, torch.nn.Parameter) and not weight.is_meta for weight in weights)
    if not usual or not weights:
        return ""
    kinds = {(weight.device, weight.dtype) for weight in weights}
    elements = []  # one read per device and dtype: each read waits for the device
    for kind in sorted(kinds, key=str):
        own = [weight.detach() for weight in weights if (weight.device, weight.dtype) == kind]
        elements.append(torch.cat([weight.as_strided((1,), (1,)) for weight in own]).double().cpu())
    return _digits(torch.cat(elements).sort().values.numpy().tobytes())


def _content(value: Any) -> list[str]:
    """The content of an argument in comparable form; [] for None and for objects that cannot be compared."""
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
    if callable(getattr(value, "tobytes", None)):  # NumPy arrays and PIL images
        return [_digits(value.tobytes())]
    return _content(vars(value)) if dataclasses.is_dataclass(value) else []


def _digits(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
