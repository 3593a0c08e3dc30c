"""Find caches that let a pipeline's network reuse results of earlier steps."""

from __future__ import annotations

from typing import Any

import torch

from fastsched.diffusers.watching.network_facts import hooks_of
from fastsched.diffusers.watching.watch import networks_of

#: Attributes that diffusers, cache-dit and TeaCache set on a network or pipeline, and how to disable each cache.
CACHES = {
    "is_cache_enabled": "{}.disable_cache()",
    "_is_cached": "cache_dit.disable_cache(pipe)",
    "enable_teacache": "{}.enable_teacache = False",
}

#: Modules of diffusers with caches that keep a state from call to call, but only of the prompt, which does not change.
OF_THE_PROMPT = ("diffusers.hooks.text_kv_cache",)


def check_caches(pipe: Any) -> None:
    """ValueError if a network reuses results of earlier steps by a known cache; the message says how to disable it."""
    networks = networks_of(pipe)
    holders = {"pipe": pipe, **{f"pipe.{name}": module for name, module in networks.items()}}
    for name, holder in holders.items():
        of_the_prompt = type(getattr(holder, "_cache_config", None)).__module__ in OF_THE_PROMPT
        for mark, remedy in CACHES.items():
            if getattr(holder, mark, False) is True and not (of_the_prompt and mark == "is_cache_enabled"):
                raise ValueError(_message(name, f"{mark} is True", remedy.format(name)))
    for name, module in networks.items():
        hooks = _caching_hooks(module)
        if hooks:
            registry = f"diffusers.hooks.HookRegistry.check_if_exists_or_initialize(pipe.{name})"
            remedy = ", ".join(f"{registry}.remove_hook({hook!r}, recurse=True)" for hook in hooks)
            raise ValueError(_message(f"pipe.{name}", f"diffusers' hooks {', '.join(hooks)} on its layers", remedy))


def _caching_hooks(network: torch.nn.Module) -> list[str]:
    """The names of diffusers' hooks on a network's modules that keep results from call to call.

    The functions ``diffusers.hooks.apply_...`` put them there, and unlike ``enable_cache`` they leave no other mark.
    """
    found = dict[str, None]()
    for module in network.modules():
        for name, hook in hooks_of(module).items():
            origin = type(hook).__module__
            if getattr(hook, "_is_stateful", False) and origin.startswith("diffusers.") and origin not in OF_THE_PROMPT:
                found[name] = None
    return [*found]


def _message(name: str, sign: str, remedy: str) -> str:
    return (
        f"{name} uses a cache ({sign}), so what it computes depends on the steps before and on their number; disable "
        f"it before measuring and fitting: {remedy}"
    )
