"""Explain the errors that a network raises, and check its output."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable

import torch
from torch import Tensor

from fastsched.denoisers.noise import NoiseProcess

#: Pairs of a pattern for error messages of Python and PyTorch, and advice for the user; the first match counts.
CAUSES = (
    (
        r"^KeyError",
        "it looks up what is not there; conditions that it needs must be bound: lambda x, t: network(x, t, "
        "conditions). The time or level may be fractional",
    ),
    (
        r"not compiled with|No CUDA GPUs|Found no NVIDIA driver",
        "it moves something to a device that is not here; move it to that of x instead: .to(x.device)",
    ),
    (
        r"Guard failed: .*size\(\)\[0\]",
        "it takes batches of one size alone: export it with a dynamic batch (dynamic_shapes), or for one sample, and "
        "give batch_size=1",
    ),
    (
        r"^AssertionError",
        "it asserts what this call does not fulfil; conditions that it needs must be bound, a row for each sample: "
        "lambda x, t: network(x, t, labels.expand(len(x)))",
    ),
    (
        r"missing \d+ required (positional|keyword-only) argument",
        "it takes more arguments than (x, condition); bind them: lambda x, t: network(x, t, prompt_embedding)",
    ),
    (
        r"takes .* positional argument",
        "it takes fewer arguments than (x, condition); wrap it: lambda x, t: network(x), or "
        "network(x, sigma=t) if it takes the condition by name; or, if it holds the network and returns its training "
        "loss, pass the network that it holds",
    ),
    (
        r"unexpected keyword argument|got multiple values for argument",
        "wrap it as a function of (x, condition): lambda x, t: network(x, timestep=t)",
    ),
    (
        r"Expected more than 1 (value per channel|spatial element) when training",
        "a layer normalises over the batch or over one element (batch norm in training mode, or without running "
        "statistics?); call network.eval(), or use a layer whose samples are independent",
    ),
    (
        r"used as ind|'indices'|dtype (int32( or |/))?int64 for index|converted to an .*index|indices must be int",
        "it looks something up by the time or level, which is a float: integer_timesteps=True of from_epsilon and "
        "from_v gives it integer timesteps in int64; or round in the network: table[t.round().long()]",
    ),
    (
        r"^(index .* is out of bounds|index out of range|list index out of range|tuple index out of range)",
        "it looks up what has too few entries; if by the time or level, has it one for each timestep or level of the "
        "noise process?",
    ),
    (
        r"only (one element|0-dimensional|length-1) (tensors|arrays) can be converted|cannot be converted to Scalar|"
        r"can only convert an array of size 1|"
        r"(Boolean|truth) value of .* with more than one",
        "it takes one sample at a time: let it compute with all of the condition, [B], or give batch_size=1",
    ),
    (
        r"same device|meta tensor|is on \w+(:\d+)?,? (but|different from)|device meta|not on the expected device",
        "the network or its conditioning is on another device than the states; move them to one device (device=, "
        "or the device of the noise)",
    ),
    (
        r"same dtype|scalar type|expected .*(Half|Float|Double|BFloat16)|Input type .* and (weight|bias) type|"
        r"expected dtype|the dtype of the input",
        "the network computes in another dtype; give dtype= that of its parameters; the time or level stays float32, "
        "so the network must cast what it computes from it to the dtype of x",
    ),
    (
        r"does not require grad|Inference tensors cannot",
        "it takes gradients itself, and they are off here: let it do so under torch.enable_grad(), and do not call "
        "fastsched under torch.inference_mode()",
    ),
    (
        r"shapes? .*(cannot be multiplied|invalid for)|Given groups=|size of tensor|expected input|must match|"
        r"Sizes of tensors|channels|normalized_shape|number of dimensions|Expected \dD",
        "is shape, or that of the noise without its batch, the shape of one sample, such as (4, 64, 64)? Does the "
        "network take x first, then the time? Embeddings must have a row for each sample, or broadcast",
    ),
)


def explained(error: Exception, x: Tensor, condition: Tensor, dtype: torch.dtype) -> ValueError | None:
    """An error that says how the network was called and what may be wrong; None if the cause is not known.

    The call with states ``x``, given in ``dtype``, and this condition raised ``error``.
    """
    text = str(error)
    if isinstance(error, KeyError):  # whose text is the key alone
        text = f"KeyError: {text}"
    elif isinstance(error, AssertionError):  # which often has no text
        text = f"AssertionError: {text or traceback.extract_tb(error.__traceback__)[-1].line}"
    cause = next((hint for pattern, hint in CAUSES if re.search(pattern, text)), None)
    if cause is None or "out of memory" in text:
        return None
    kind = str(dtype).removeprefix("torch.")
    asked = f"x {tuple(x.shape)} in {kind}, condition {tuple(condition.shape)}, on {x.device}"
    return ValueError(f"the network failed when called with {asked}: {text.splitlines()[0]}; {cause}")


def checked_call(call: Callable[[], object], x: Tensor, condition: Tensor, dtype: torch.dtype) -> Tensor:
    """The output of ``call()``, which gives a network states like ``x``, in ``dtype``, and this condition.

    Errors are those of `checked_output`; `explained` ones if the network fails for a known cause; and a RuntimeError in
    place of StopIteration, which would end a loop of the caller without a word.
    """
    gradients = torch.is_grad_enabled()
    try:
        output = call()
    except StopIteration as error:
        raise RuntimeError("the network raised StopIteration (an iterator in it ran out)") from error
    except (TypeError, ValueError, RuntimeError, LookupError, AssertionError) as error:
        known = explained(error, x, condition, dtype)
        if known is None:
            raise
        raise known from error
    finally:
        if torch.is_grad_enabled() != gradients:  # the network turned them on or off, for the code after it too
            torch.set_grad_enabled(gradients)
    return checked_output(output, x)


def checked_output(output: object, x: Tensor) -> Tensor:
    """The output that a network returned for ``x``; TypeError or ValueError if it cannot be a prediction."""
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the network returned {type(output).__name__}, not a tensor; wrap it so that it returns the "
            "prediction alone (for diffusers: model(x, t, return_dict=False)[0]), and no training loss"
        )
    if not output.is_floating_point() or output.dtype.itemsize < 2:
        wanted = "floating-point ones of at least 16 bits"
        raise TypeError(f"the network returned {output.dtype} numbers; it must return {wanted}")
    fault = _unusual(output, x)
    if fault is not None:
        raise TypeError(f"the network returned {fault}; it must return an ordinary tensor")
    if output.shape != x.shape:
        hint = ""
        if output.ndim == x.ndim and output.shape[1] == 2 * x.shape[1]:
            hint = "; a network that also predicts a variance must be wrapped to return only the first half"
        elif output.ndim == 0:
            hint = "; one number is likely a training loss: pass the network that this wrapper holds"
        raise ValueError(
            f"the network returned shape {tuple(output.shape)} for a state of shape {tuple(x.shape)}{hint}"
        )
    return output


def _unusual(output: Tensor, x: Tensor) -> str | None:
    """What makes ``output`` no ordinary tensor like ``x``; None if it is one."""
    if output.is_nested:
        return "a nested tensor"
    if output.layout != torch.strided:
        return f"a tensor of layout {output.layout}"
    own = _has_own_operations(output) and not _has_own_operations(x)
    if own and _has_own_operations(output.clone()):  # results of collectives are ordinary once copied
        return f"a tensor of class {type(output).__name__}, with operations of its own"
    return "a meta tensor, which holds no numbers" if output.is_meta and not x.is_meta else None


def _has_own_operations(tensor: Tensor) -> bool:
    """Whether a tensor's class computes operations itself; then its numbers may be elsewhere, or none."""
    name = "__torch_dispatch__"  # by name, because type checkers take it for a method
    return getattr(type(tensor), name) is not getattr(Tensor, name)


def not_finite(process: NoiseProcess, s: Tensor) -> str:
    """The error message for a network that returns NaN or inf at level ``s``."""
    sigma = float(process.sampler_sigma(s))
    timestep = process.timestep(s)
    where = f"sigma = {sigma:g}" + ("" if timestep is None else f" (timestep {float(timestep):g})")
    return (
        f"the network returned NaN or inf at {where}; check its input scaling and the sigma range; if it "
        "runs in 16 bits, try float32 (dtype=torch.float32)"
    )
