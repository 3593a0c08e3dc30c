"""Watch a pipeline while it is measured: the arguments of its networks, and how it combines their outputs.

A measurement treats a pipeline as a function of latents and level. A pipeline can depend on more: control or guidance
within a window of steps, a scale that changes with the step's number, a network that reuses parts of its last steps.
The scheduler sees only the result of a step, so this module records the networks' calls. `consistency` compares them
between steps.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastsched import validate
from fastsched.denoisers.deferred_checks import DeferredChecks
from fastsched.denoisers.network_state import (
    check_evaluation_mode,
    is_training,
    random_state,
    training_error,
    unchanged_buffers,
)
from fastsched.diffusers.watching.formula import Formula, Given, part_like, products_of
from fastsched.diffusers.watching.network_facts import NUMBERS, NetworkFacts
from fastsched.diffusers.watching.step_checks import FROM_NOISE, differing
from fastsched.ops.backends import widest_dtype

#: Ends of the names of networks' arguments that are timesteps.
TIMES = ("timestep", "timesteps")


@dataclass
class SeenStep:
    """What happened between two calls of the scheduler's ``step``."""

    calls: Counter[str] = field(default_factory=Counter)  #: the number of calls of each network
    #: Arguments of networks and attributes of the pipeline, by name: numbers, flags, tensors' shapes and sums.
    facts: dict[str, Any] = field(default_factory=dict)
    #: For tensors that are not on the CPU, the shapes, and the sums, which have not been copied to the CPU yet.
    sums: dict[str, tuple[tuple[int, ...], Tensor, Tensor]] = field(default_factory=dict)
    #: How many layers each network ran, where they could be counted.
    layers: Counter[str] = field(default_factory=Counter)
    inputs: list[Given] = field(default_factory=list)  #: the tensors that the networks were given, or lists of them
    #: The first tensor, or list of tensors, in each call's output; copies, as guidance may be computed in their place.
    outputs: list[Given] = field(default_factory=list)
    #: The timesteps that the networks were given as tensors, by argument.
    times: dict[str, Tensor] = field(default_factory=dict)
    first: SeenStep | None = None  #: in the second step, the first; otherwise None


class PipelineWatch:
    """Records the calls of a pipeline's networks, step by step: `begin` begins a run, `take` ends a step."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self._first: SeenStep | None = None
        self._step = SeenStep()
        self._names: dict[str, list[str]] = {}
        self._states: dict[str, NetworkFacts] = {}
        self._steps = 0
        self._times: dict[str, Tensor] = {}
        self._random: dict[str, Tensor] = {}
        self._given: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> PipelineWatch:
        raise ValueError(
            f"{type(self.pipe).__name__} copies its scheduler's attributes (a panorama's views, a video's frames?), "
            "so it cannot be measured by its loop; measure another pipeline of the same model, and apply its schedule"
        )

    def begin(self) -> None:
        """Forget calls before the run: prompt encoders, or a network that fills a cache (GLM-Image from an image)."""
        self._step = SeenStep()

    def take(self, deferred: DeferredChecks) -> SeenStep:
        """End a step: return what happened since the last call of this method; ``deferred`` collects what to compare.

        Raises:
            ValueError: As `check_times` does.
        """
        step, self._step = self._step, SeenStep()
        check_times(self._times, step.times, deferred)
        self._times = step.times
        self._steps += 1
        step.first, self._first = self._first, step if self._steps == 1 else None
        for name, value in vars(self.pipe).items():
            if isinstance(value, NUMBERS):
                step.facts[f"pipe.{name}"] = value
            elif name in step.calls:
                state = self._states.get(name) or self._states.setdefault(name, NetworkFacts(value))
                _note(step, name, state.facts())
        return step

    def begun(self, name: str, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the arguments of a network before its call, and check its training mode.

        The mode is not checked in the first step, when prompt encoders may run.
        """
        held = {key: _held(value) for key, value in kwargs.items()}
        self._given[name] = (tuple(_held(value) for value in args), held)
        if self._steps == 0 or not is_training(module):
            return
        check_evaluation_mode(module, f"pipe.{name}")
        self._random[name] = random_state(_device_of(module))

    def ended(self, name: str, module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Record a network's call; ValueError if it drew random numbers in training mode, as label dropout does."""
        before = self._random.pop(name, None)
        if before is not None and not torch.equal(before, random_state(_device_of(module))):
            raise training_error("and draws random numbers", f"pipe.{name}")
        self.called(name, *self._given.pop(name, (args, kwargs)), output)

    def called(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Record a call of a network."""
        step = self._step
        turn = step.calls[name]
        step.calls[name] += 1
        for key, value in {**dict(zip(self._positional(name), args, strict=False)), **kwargs}.items():
            _note(step, f"{name}#{turn}.{key}", value)
            if _are_tensors(value):
                step.inputs.append(_held(value))
            if isinstance(value, Tensor) and (key == "t" or key.endswith(TIMES)):
                step.times[f"{name}#{turn}.{key}"] = value.clone()  # it may be a buffer that the next step overwrites
        first = _first_tensor(output)
        if first is not None:
            step.outputs.append(first.clone() if isinstance(first, Tensor) else [each.clone() for each in first])

    def _positional(self, name: str) -> list[str]:
        if name not in self._names:
            parameters = inspect.signature(getattr(self.pipe, name).forward).parameters.values()
            named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
            self._names[name] = [*named, *(f"step_argument_{n}" for n in range(len(named), 16))]
        return self._names[name]

    def layer_ran(self, name: str) -> None:
        """Record a call of one of a network's layers."""
        self._step.layers[name] += 1


@contextlib.contextmanager
def watched(pipe: Any) -> Iterator[PipelineWatch]:
    """Record the calls of ``pipe``'s networks within the block.

    Modules that are compiled in place are not hooked, because that would compile them again.
    """
    watch, networks = PipelineWatch(pipe), networks_of(pipe)
    with contextlib.ExitStack() as hooks:
        hooks.enter_context(unchanged_buffers([module for module in networks.values() if is_training(module)]))
        for name, module in networks.items():
            if getattr(module, "_compiled_call_impl", None) is not None:
                continue
            begun = lambda *given, name=name: watch.begun(name, *given)
            ended = lambda *given, name=name: watch.ended(name, *given)
            hooks.enter_context(module.register_forward_pre_hook(begun, with_kwargs=True))
            # before other hooks on the output, which may depend on the step's number
            hooks.enter_context(module.register_forward_hook(ended, with_kwargs=True, prepend=True))
            for layer in _layers(module):
                hooks.enter_context(layer.register_forward_hook(lambda *_, name=name: watch.layer_ran(name)))
        yield watch


def _device_of(module: torch.nn.Module) -> torch.device:
    return next((each.device for each in module.parameters()), torch.device("cpu"))


def networks_of(pipe: Any) -> dict[str, torch.nn.Module]:
    """The modules that ``pipe`` holds, by attribute."""
    return {name: value for name, value in vars(pipe).items() if isinstance(value, torch.nn.Module)}


def observed(step: SeenStep, output: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[SeenStep, Formula | None]]]:
    """Collect what must be copied to the CPU of a step in which the scheduler was given ``output`` [B, *shape].

    Returns:
        A small vector on the output's device, and a function from its CPU values to (step without tensors, formula).
    """
    products = products_of(step.outputs, output)
    exact = widest_dtype(output.device)
    sums = [each.to(output.device, non_blocking=True) for _, *both in step.sums.values() for each in both]
    parts = [torch.stack(sums).to(exact)] if sums else [output.new_zeros(0, dtype=exact)]
    vector = torch.cat(parts if products is None else [*parts, products.flatten()])
    light = SeenStep(step.calls, dict(step.facts), layers=step.layers)
    shapes = {name: shape for name, (shape, *_) in step.sums.items()}
    size = torch.Size([0]) if products is None else products.shape

    def resolve(values: Tensor) -> tuple[SeenStep, Formula | None]:
        numbers = values[: 2 * len(shapes)].view(-1, 2).tolist()
        light.facts |= {name: (shape, *sums) for (name, shape), sums in zip(shapes.items(), numbers, strict=True)}
        square = values[2 * len(shapes) :][: size.numel()].view(size)
        return light, Formula.of_products(square) if size.numel() else None

    return vector, resolve


def overwritten(step: SeenStep, latents: Tensor) -> Tensor | None:
    """How many elements of ``latents`` [B, *shape] the pipeline replaced in each of its networks' inputs, [n].

    An input is compared if it has the latents' shape, repeats them along the batch, or extends them along one other
    dimension. The result is None if no input does. If all elements differ, the pipeline scales its input.
    """
    counts = []
    for given in step.inputs:
        first, last = (part_like(given, latents, last=last) for last in (False, True))
        if first is None or last is None:
            continue
        count = differing(first.to(latents.device), latents, 0.02)
        if last.storage_offset() != first.storage_offset():  # the latents may lie behind a given frame
            behind = differing(last.to(latents.device), latents, 0.02)
            count = torch.where(behind == 0, behind, count)
        counts.append(count)
    return torch.stack(counts) if counts else None


def replaced(step: SeenStep, latents: Tensor) -> Tensor:
    """Which elements of ``latents`` [B, *shape] the pipeline replaced in its networks' input, bool.

    Compares the inputs that `overwritten` compares, of longer ones the beginning, exactly in the input's dtype. Returns
    the mask with the fewest elements. Waits for the device.
    """
    parts = [part for given in step.inputs if (part := part_like(given, latents)) is not None]
    masks = [part.to(latents.device) != latents.to(part.dtype) for part in parts]
    return min(masks, key=lambda mask: int(mask.sum()), default=torch.zeros_like(latents, dtype=torch.bool))


def check_replaced(step: SeenStep, latents: Tensor, kept: Tensor) -> None:
    """ValueError, at the second step, if what a pipeline puts in place of ``kept`` elements follows the latents.

    If not, it is equal at the first step, which has the same timestep and unrelated latents.
    """
    before, now = ([part_like(given, latents) for given in each.inputs] for each in (step.first or SeenStep(), step))
    for one, two in zip(reversed(before), reversed(now), strict=False):  # text encoders may be among the first's
        if one is None or two is None or not torch.equal((two != latents.to(two)).to(kept.device), kept):
            continue
        count = int(((one != two).to(kept.device) & kept).sum())
        if count > 0:
            raise ValueError(
                f"the pipeline gives its network a blend of the latents with something else at {count} of "
                f"{kept.numel()} elements (a soft mask, an image at a strength below 1?), so its output is not that "
                f"for the latents; make the mask hard, or {FROM_NOISE}"
            )
        return


def check_times(before: dict[str, Tensor], now: dict[str, Tensor], deferred: DeferredChecks) -> None:
    """ValueError unless all timesteps in an argument of a network that follow the level are equal, ``before`` and now.

    Others must be constant, such as 0 for a given frame: a part of the latents whose timestep is a fraction of the
    step's own has another noise level than the scheduler assumes.
    """
    for name, times in now.items():
        last = before.get(name)
        if last is None or last.shape != times.shape or times.numel() < 2:
            continue
        # Relative to the step's own: far above float32's rounding, or two roundings of a 16-bit dtype. A condition of
        # strength 0.99 differs by 0.01.
        rounded = max(1e-3, 2 * torch.finfo(times.dtype).eps) if times.is_floating_point() else 1e-3
        pair = torch.stack([last.flatten(), times.flatten()]).float()
        own = pair[:, (pair[1] - pair[0]).abs().argmax().reshape(1)]  # that of the step, which changes most
        apart = ((pair - own).abs() > rounded * own.abs() + 1e-6).any(0) & (pair[0] != pair[1])

        def check(found: Tensor, name: str = name, size: int = times.numel()) -> None:
            if int(found) > 0:
                raise ValueError(
                    f"{name.replace('#0', '')} holds another timestep than the step's at {int(found)} of its {size} "
                    "entries, and follows the level there (conditions at a strength below 1?), so a part of the "
                    f"latents has another noise level than the scheduler assumes; {FROM_NOISE}"
                )

        deferred.add(apart.sum(), check)


def warn_of_unseen(step: SeenStep) -> None:
    """Warn if no call of a network was seen in a step."""
    if not step.calls:
        validate.warn(
            "no call of the pipeline's networks is seen (are they called by their forward, compiled in place, or no "
            "attributes of the pipeline?), so it is not noticed if guidance, control or prompts depend on the step's "
            "number, and then the measurement is wrong"
        )


def is_number(value: Any) -> bool:
    """Whether a fact is a number, a flag or a text, not a tensor."""
    return value is None or isinstance(value, NUMBERS)


def _facts(name: str, value: Any) -> dict[str, Any]:
    """Comparable facts about an argument: numbers as they are, tensors by shape and sums, containers by entry.

    The sums of a tensor that is not on the CPU stay on its device, so that the host does not wait for them.
    """
    if is_number(value):
        return {name: value}
    if isinstance(value, Tensor):
        numbers = torch.view_as_real(value.detach()) if value.is_complex() else value.detach()
        numbers = numbers if numbers.is_floating_point() else numbers.float()
        exact = torch.promote_types(numbers.dtype, torch.float32)
        sums = numbers.sum(dtype=exact), torch.linalg.vector_norm(numbers, 1, dtype=exact)
        return {name: (tuple(value.shape), *(map(float, sums) if numbers.device.type == "cpu" else sums))}
    if isinstance(value, dict):
        return {key: fact for k, v in value.items() for key, fact in _facts(f"{name}.{k}", v).items()}
    if isinstance(value, (list, tuple)) and len(value) <= 64:
        return {key: fact for k, v in enumerate(value) for key, fact in _facts(f"{name}.{k}", v).items()}
    return {}


def _note(step: SeenStep, name: str, value: Any) -> None:
    """Add the facts about ``value`` to a step's facts, or to its sums if they are not on the CPU yet."""
    for key, fact in _facts(name, value).items():
        if isinstance(fact, tuple) and isinstance(fact[1], Tensor):
            step.sums[key] = fact
        else:
            step.facts[key] = fact


def _are_tensors(value: Any) -> bool:
    """Whether ``value`` is a tensor or a non-empty list of tensors."""
    listed = isinstance(value, list) and len(value) > 0
    return all(isinstance(each, Tensor) for each in value) if listed else isinstance(value, Tensor)


def _held(value: Any) -> Any:
    """``value``; a list is copied, as it may be emptied: T2I adapters' by the UNet, ControlNets' by HunyuanDiT."""
    return [*value] if isinstance(value, list) else value


def _first_tensor(output: Any) -> Given | None:
    if _are_tensors(output):
        return output
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else ()
    return next((value for value in values if _are_tensors(value)), None)


def _layers(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules without children in ``module``, unless a part of it is compiled."""
    parts = [*module.modules()]
    compiled = any(
        getattr(part, "_compiled_call_impl", None) is not None or hasattr(part, "_orig_mod") for part in parts
    )
    return [] if compiled else [part for part in parts if part is not module and not [*part.children()]]
