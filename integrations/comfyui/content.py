"""A digest of what a workflow gives a node, by content: the key under which a fitted schedule is kept.

Two runs have the same key only if everything that is known to matter is equal: weights, patches, conditions, options.
Where something cannot be read for certain, there is no key, and nothing is kept.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import types
import uuid
from collections.abc import Iterable
from typing import Any

import torch

#: Elements of each of a network's weights that are read, evenly spread: training and merging change nearly all of them.
#: Other tensors are read whole, for in prompts and images one element may be all that differs.
ELEMENTS = 1 << 14
#: Values that are read as they are, beside None, bytes and a few more.
PLAIN = (bool, int, float, str)
#: Values nested deeper than this are not read; only a mistake nests deeper.
DEEPEST = 40

#: Attributes of ComfyUI's own classes that are bookkeeping: they change without any change of what is computed.
BOOKKEEPING = frozenset(
    {
        *("uuid", "patches_uuid", "hook_id", "device", "load_device", "offload_device", "cond_hint", "timestep_range"),
        *("inner_model", "loaded_models", "conds"),  # of a guider, while it samples
        *("current_patcher", "parent", "backup", "object_patches_backup", "_curr_t", "model_sampling_current"),
    }
)
#: Attributes that are no settings of a network of any class: those that PyTorch gives every module (tensors are read
#: separately), and those that count how much of the network ComfyUI has loaded at the moment.
NO_SETTINGS = frozenset(
    {
        *vars(torch.nn.Module()),
        *("model_loaded_weight_memory", "model_offload_buffer_memory", "model_lowvram", "lowvram_patch_counter"),
        *("comfy_patched_weights", "comfy_cast_weights", "prev_comfy_cast_weights"),
    }
)
#: CPython's flag `Py_TPFLAGS_HEAPTYPE`, which is set for classes that are created at run time.
HEAP_TYPE = 1 << 9
#: The attributes of ComfyUI's ModelPatcher that are read, in addition to its network's weights.
PATCHER = (
    *("patches", "object_patches", "model_options", "weight_wrapper_patches", "wrappers", "callbacks", "injections"),
    *("hook_patches", "additional_models", "attachments", "force_cast_weights"),
)


#: No attributes; as ``originals``, it says that a network has no patcher.
NOTHING: dict[str, Any] = {}


class Unreadable(Exception):
    """Something that has no content to compare."""


def digest(*parts: Any) -> str | None:
    """SHA-256 of the content of ``parts``; None if some of it cannot be read."""
    reader = _Reader()
    try:
        for part in parts:
            reader.read(part, 0)
    except Exception:  # whatever the reason, without the content there is no key
        return None
    return reader.hash.hexdigest()


class _Reader:
    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self.seen: dict[int, int] = {}
        self.kept: list[Any] = []  # so that no object is freed and its id used again

    def say(self, *words: object) -> None:
        for word in words:
            text = word if isinstance(word, bytes) else str(word).encode("utf-8", "backslashreplace")
            self.hash.update(len(text).to_bytes(8, "little") + text)

    def read(self, value: Any, depth: int) -> None:
        if depth > DEEPEST:
            raise Unreadable
        if value is None or isinstance(value, (*PLAIN, complex, bytes, torch.dtype, torch.Size)):
            self.say(type(value).__name__, value if isinstance(value, bytes) else repr(value))
            return
        if isinstance(value, (uuid.UUID, torch.device)):
            self.say(type(value).__name__)
            return
        if id(value) in self.seen:
            self.say("again", self.seen[id(value)])
            return
        self.seen[id(value)] = len(self.seen)
        self.kept.append(value)
        self._read_new(value, depth + 1)

    def _read_new(self, value: Any, depth: int) -> None:
        if isinstance(value, torch.Tensor):
            self.tensor(value)
        elif isinstance(value, (dict, list, tuple, set, frozenset)):
            self.container(value, depth)
        elif isinstance(value, enum.Enum):
            self.say(type(value).__qualname__, value.name)
        elif isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType)):
            self.say("named", getattr(value, "__module__", ""), getattr(value, "__qualname__", value.__name__))
            if isinstance(value, types.BuiltinFunctionType):
                self.read(value.__self__, depth)  # the object that it is a method of, or its module
        elif isinstance(value, types.FunctionType):
            self.function(value, depth)
        elif isinstance(value, types.MethodType):
            self.each((value.__func__, value.__self__), depth)
        elif isinstance(value, functools.partial):
            self.each((value.func, value.args, value.keywords), depth)
        elif hasattr(value, "model_options") and hasattr(value, "patches") and hasattr(value, "model"):
            self.patcher(value, depth)
        elif isinstance(value, torch.nn.Module):
            self.network(value, NOTHING, depth)
        elif hasattr(value, "__array__") and hasattr(value, "tobytes"):
            self.say("array", str(value.dtype), value.shape, value.tobytes())
        else:
            self.instance(value, depth)

    def each(self, values: Iterable[Any], depth: int) -> None:
        for value in values:
            self.read(value, depth)

    def container(self, value: Any, depth: int) -> None:
        self.say(type(value).__name__, len(value))
        if isinstance(value, dict):
            self.mapping(value, depth)
        elif isinstance(value, (list, tuple)):
            self.each(value, depth)
        else:
            if not all(isinstance(item, PLAIN) for item in value):
                raise Unreadable
            self.say(*sorted(map(repr, value)))
        self.mapping(getattr(value, "__dict__", NOTHING), depth)  # attributes, if the class is derived

    def mapping(self, value: dict[Any, Any], depth: int, skipped: frozenset[str] = frozenset({"uuid"})) -> None:
        kept = [(key, item) for key, item in value.items() if not (isinstance(key, str) and key in skipped)]
        self.say("dict", len(kept))
        for key, item in kept:
            self.read(key, depth)
            self.read(item, depth)

    def function(self, value: types.FunctionType, depth: int) -> None:
        self.say("function", value.__module__, value.__qualname__)
        self.code(value.__code__, value.__globals__, depth)
        self.each([cell.cell_contents for cell in value.__closure__ or ()], depth)
        self.each((value.__defaults__, value.__kwdefaults__), depth)

    def code(self, code: types.CodeType, known: dict[str, Any], depth: int) -> None:
        """A function's code, that of functions within it, and the plain values and containers among its globals."""
        self.say("code", code.co_code, repr(code.co_names), len(code.co_consts))
        for const in code.co_consts:
            if isinstance(const, types.CodeType):
                self.code(const, known, depth)
            else:
                self.read(const, depth)
        for name in code.co_names:
            if isinstance(known.get(name), (*PLAIN, dict, list, tuple)):
                self.say("global", name)
                self.read(known[name], depth)

    def instance(self, value: Any, depth: int) -> None:
        """An object: all its attributes. They are its whole state only if all its classes are written in Python."""
        classes = type(value).__mro__[:-1]
        slotted = [vars(each)["__slots__"] for each in classes if "__slots__" in vars(each)]
        if not all(map(_made_in_python, classes)) or not (slotted or hasattr(value, "__dict__")):
            raise Unreadable(type(value))
        state = dict(getattr(value, "__dict__", NOTHING))
        for slots in slotted:
            for name in (slots,) if isinstance(slots, str) else slots:
                if hasattr(value, name) and name not in ("__dict__", "__weakref__"):
                    state[name] = getattr(value, name)
        self.say("object", type(value).__module__, type(value).__qualname__)
        self.mapping(state, depth, BOOKKEEPING if _of_comfyui(value) else frozenset())

    def patcher(self, value: Any, depth: int) -> None:
        """A ModelPatcher: its weights as they were before its patches, and the patches."""
        self.say("patcher", type(value).__qualname__)
        originals = {key: getattr(kept, "weight", kept) for key, kept in getattr(value, "backup", {}).items()}
        self.network(value.model, originals, depth)
        if hasattr(value.model, "model_sampling"):  # a ControlNet has none
            self.read(value.get_model_object("model_sampling"), depth)  # it may be a patch, applied or not yet
        self.mapping({name: getattr(value, name, None) for name in PATCHER}, depth)

    def network(self, value: torch.nn.Module, originals: dict[str, Any], depth: int) -> None:
        self.say("network", type(value).__module__, type(value).__qualname__)
        config = getattr(getattr(value, "model_config", None), "unet_config", None)
        self.read({k: v for k, v in (config or {}).items() if isinstance(v, PLAIN)}, depth)
        self.say(*(each.__qualname__ for each in type(value).__mro__))
        for name, tensor in value.state_dict(keep_vars=True).items():
            if name.startswith("model_sampling."):
                continue
            self.say(name)
            self.tensor(originals.get(name, tensor), ELEMENTS)
        if originals is not NOTHING:
            return
        for name, part in value.named_modules():
            own = {key: item for key, item in vars(part).items() if key not in NO_SETTINGS}
            if _of_comfyui(part):  # attributes of inner modules change while they are loaded
                kept = {k: v for k, v in own.items() if isinstance(v, PLAIN) and k not in BOOKKEEPING}
                own = kept if part is value else {}
            self.say(name, type(part).__module__, type(part).__qualname__)
            self.mapping(own, depth)

    def tensor(self, value: torch.Tensor, most: int | None = None) -> None:
        """All elements, or about ``most`` of them, evenly spread."""
        data = value.detach()
        self.say("tensor", str(data.dtype), tuple(data.shape))
        flat = data.reshape(-1)
        if most is not None and flat.numel() > most:
            flat = flat[:: -(-flat.numel() // most)]
        self.say(flat.contiguous().cpu().view(torch.uint8).numpy().tobytes())


def _of_comfyui(value: Any) -> bool:
    """Whether the class of ``value`` or one of its base classes is ComfyUI's."""
    return any((each.__module__ or "").partition(".")[0] in ("comfy", "comfy_extras") for each in type(value).__mro__)


def _made_in_python(kind: type) -> bool:
    """Whether a class is written in Python, so that it adds only attributes to its instances, unlike a C class."""
    own = not isinstance(vars(kind).get("__new__"), types.BuiltinFunctionType) and kind.__flags__ & HEAP_TYPE
    return bool(own) or kind is types.SimpleNamespace
