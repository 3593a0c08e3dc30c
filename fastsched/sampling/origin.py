"""The origin of a measurement or a schedule: the network, how it was run, when, and at what cost."""

from __future__ import annotations

import datetime
import hashlib
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import Tensor

from fastsched.denoisers.edm import WrappedEdmNetwork, core_of
from fastsched.denoisers.network_modules import modules_of
from fastsched.sampling.files import unknown_entries

#: Largest number of characters in a text entry.
LONGEST = 200

#: The parts of an identity, as the error about a different one names them.
PARTS = {
    "call": "this pipeline called with the same prompts and arguments",
    "prediction": "the prediction that the pipeline's scheduler is set to (prediction_type)",
    "settings": "the same settings of the pipeline and its networks (guider, FreeU, scales and choice of adapters)",
    "dtype": "weights in the same dtype",
    "weights": "the same weights and adapters",
}


@dataclass(frozen=True)
class Origin:
    """Where a measurement or a schedule comes from; an entry is None if it is not known.

    Attributes:
        model: The name of the network's class or function; for a pipeline, the folder or repository it was loaded from.
        fingerprint: 12 hexadecimal digits of a hash of the network's output for a fixed input, which may differ between
            devices. For a pipeline, the hash is of its call and weights (`diffusers.pipelines.call_identity`).
        pipeline: The class of the pipeline.
        guidance: The pipeline's ``guidance_scale``, if the call set it.
        prompts: How many prompts were used.
        date: The day of the measurement, UTC, ``YYYY-MM-DD``.
        version: The version of fastsched.
        model_calls: Network evaluations spent, the measurement included; a batch of B counts as B.
        dtype: What a denoiser's network computed in when it was measured, such as ``"torch.bfloat16"``.
    """

    model: str | None = None
    fingerprint: str | None = None
    pipeline: str | None = None
    guidance: float | None = None
    prompts: int | None = None
    date: str | None = None
    version: str | None = None
    model_calls: int | None = None
    dtype: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The entries that are known."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, entries: Any) -> Origin:
        """The origin with the entries of a file; ValueError if one is unknown or has the wrong type."""
        kinds = {field.name: str(field.type).split(" ")[0] for field in fields(cls)}
        if not isinstance(entries, Mapping):
            raise ValueError(f"origin must hold some of {', '.join(kinds)}, got {entries!r:.80}")
        if unknown := set(entries) - set(kinds):
            raise ValueError(f"origin {unknown_entries(map(str, unknown))}")
        for key, value in entries.items():
            if not _is_a(value, kinds[key]):
                raise ValueError(f"origin: {key} must be {_KINDS[kinds[key]]}, got {value!r:.80}")
        return cls(**entries)

    def __str__(self) -> str:
        """The known entries in one line: ``UNet2DModel, DDIMPipeline, guidance 7.5, 2 prompts, 2026-11-26``."""
        digits = None if self.pipeline is not None else self.fingerprint
        words = [self.model or (f"network {digits}" if digits else None), self.pipeline]
        words += [None if self.guidance is None else f"guidance {self.guidance:g}"]
        words += [None if self.prompts is None else f"{self.prompts} prompt{'s' * (self.prompts != 1)}", self.date]
        return ", ".join(word for word in words if word)


_KINDS = {"str": f"text of at most {LONGEST} printable characters", "int": "a whole number", "float": "a number"}


def _is_a(value: object, kind: str) -> bool:
    if kind == "str":
        return isinstance(value, str) and len(value) <= LONGEST and value.isprintable()
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind == "float" else int):
        return False
    return math.isfinite(value) and abs(value) < 2**63


def origin_now(model: str | None, fingerprint: Tensor | None = None, **known: Any) -> Origin:
    """The origin of a measurement made today by this version."""
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    digits = None
    if fingerprint is not None:
        digits = hashlib.sha256(fingerprint.detach().cpu().double().numpy().tobytes()).hexdigest()[:12]
    # The top-level package is looked up, not imported: it depends on all layers, and most are above this one.
    version = getattr(sys.modules.get(__name__.partition(".")[0]), "__version__", None)
    name = None if model is None else "".join(letter for letter in model if letter.isprintable())[:LONGEST]
    return Origin(model=name or None, fingerprint=digits, date=today, version=version, **known)


def network_name(network: Callable[..., Any]) -> str:
    """The name of a network's class or function, inside containers such as ``torch.compile`` and partial functions.

    A lambda around a module has the name of the module's class.
    """
    core = core_of(network)
    if isinstance(core, WrappedEdmNetwork):
        core = core_of(core.net)
    name = getattr(core, "__qualname__", None)
    name = name if isinstance(name, str) and name else type(core).__qualname__  # objects may have any attribute
    modules = modules_of(core) if name.endswith("<lambda>") else []
    return (type(modules[0]).__qualname__ if modules else name).replace("<locals>.", "")


def call_difference(known: str | None, identity: str | None, any_dtype: bool = True) -> str | None:
    """The part in which two identities of a pipeline's call differ, as in `PARTS`; None if in none, or not known.

    Weights are compared only if their dtypes agree. With ``any_dtype`` these may differ.
    """
    one, other = (dict(zip(PARTS, (each or "").split("-"), strict=False)) for each in (known, identity))
    if not len(one) == len(other) == len(PARTS):  # of a denoiser, or of an earlier version
        return None
    skipped = {"dtype"} if any_dtype else set()
    if one["dtype"] != other["dtype"] or not (one["weights"] and other["weights"]):
        skipped.add("weights")
    return next((what for part, what in PARTS.items() if part not in skipped and one[part] != other[part]), None)
