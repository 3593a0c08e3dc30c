"""Objects that `fastsched.diffusers.apply` sets on a scheduler in place of its methods.

They are not functions bound to the scheduler, so that a scheduler keeps its schedule when it is copied or pickled: a
pickled bound method would be restored as the class's own.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from fastsched import validate
from fastsched.diffusers.attributes import attributes_set, copied_with
from fastsched.diffusers.conventions import class_names

#: Attributes in which multistep classes keep their history, and the value of an empty history.
HISTORIES: dict[str, Callable[[], Any]] = {"lower_order_nums": lambda: 0, "ets": list}


#: Methods of a scheduler that a measurement and an applied schedule replace, and that programs set by hand.
LOST = ("step", "scale_model_input", "convert_model_output")


class Override:
    """Replaces the method ``name`` of ``owner``, a scheduler, and has its signature, which pipelines inspect."""

    name: str

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(getattr(type(self.owner), self.name))
        return signature.replace(parameters=[*signature.parameters.values()][1:])

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """Call the class's own method."""
        return getattr(type(self.owner), self.name)(self.owner, *args, **kwargs)

    def put(self) -> None:
        """Set this on its owner."""
        setattr(self.owner, self.name, self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Override:
        """A copy for the owner's copy, or for the owner itself where only its attributes are copied (Panorama)."""
        return copied_with(self, memo, owner=memo.get(id(self.owner), self.owner))


class ArgumentsOf(Override):
    """``set_timesteps`` with the signature of ``other``'s, so that pipelines pass what that scheduler takes."""

    name = "set_timesteps"

    def __init__(self, owner: Any, other: Any) -> None:
        super().__init__(owner)
        self.other = other

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.other.set_timesteps)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Called as the class's own method."""
        self.original(*args, **kwargs)


class Step(Override):
    """``step`` that ignores harmless arguments which the class does not take: ``eta=0.0``, a generator.

    Attributes:
        start: The timestep at which a run that starts midway must begin; None if it has begun, or starts from noise.
        first: The timestep of the run's first step, from which classes count their steps.
    """

    name = "step"
    start: float | None = None
    first: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Called as the class's own method."""
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        self.begin(timestep)
        try:
            return self.run(*args, **kwargs)
        except Exception as error:
            for each in (timestep, self.first):
                if each is not None:
                    self.check_known(each, error)
            raise

    def check_known(self, timestep: Any, error: Exception) -> None:
        """ValueError unless ``timestep``, of a step that ended in ``error``, or of the first, is of the schedule."""
        known, given = torch.as_tensor(self.owner.timesteps).cpu(), torch.as_tensor(timestep).cpu()
        away = (known.double() - given.double().reshape(-1, 1)).abs().amin(1)
        if float(away.max()) > 1e-6 * float(known.abs().max()):  # float32 rounds by less
            raise ValueError(
                f"step was called with timestep {given.tolist()}, which is none of the applied schedule's: "
                f"{known.tolist()}; does the loop round the timesteps, or take them from before set_timesteps? Pass "
                "step those of scheduler.timesteps as they are"
            ) from error

    def begin(self, timestep: Any) -> None:
        """Begin a run if this is its first step; ValueError if it starts midway elsewhere than at `start`.

        Waits for the device if the run starts midway.
        """
        if isinstance(self.owner.timesteps, Timesteps) and not self.owner.timesteps.begun:
            self.first, self.owner.timesteps.begun = timestep, True
        start, self.start = self.start, None
        if start is not None and abs(float(torch.as_tensor(timestep).max()) - start) > 1e-3 * (1 + abs(start)):
            raise ValueError(
                "the loop does not start where a slice of scheduler.timesteps has made the applied schedule start: "
                "timesteps[index:] starts midway, as image-to-image pipelines do; to look at the timesteps that "
                "follow, slice a copy, scheduler.timesteps.clone()[1:]"
            )

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Make the step."""
        return self.original(*args, **kwargs)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """Call the class's own method without the arguments that are ignored."""
        ignored = {name for name, value in kwargs.items() if isinstance(value, torch.Generator) or not _counts(value)}
        ignored -= set(self.__signature__.parameters)
        return super().original(*args, **{name: value for name, value in kwargs.items() if name not in ignored})


def warn_of_lost_methods(scheduler: Any, because: str) -> None:
    """Warn if methods that were set on the object by hand, which are about to be left out, are not used ``because``."""
    name = type(scheduler).__name__
    for lost in LOST:
        if lost in vars(scheduler) and not isinstance(vars(scheduler)[lost], Override):
            validate.warn(
                f"the {lost} that was set on this {name} object by hand is not used, because {because}; to follow a "
                f"run use the pipeline's callback, and to change it give the pipeline a subclass of {name} with "
                f"another {lost}, or do the same in the network",
            )


def _counts(value: Any) -> bool:
    """Whether an argument is anything but None, False or 0."""
    return isinstance(value, Tensor) or bool(value)


class FirstOrderEnd(Step):
    """``step`` whose last step, to sigma 0, is of first order, as in every solver of fastsched (``z = D``)."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Make the step."""
        if self.owner.step_index == len(self.owner.timesteps) - 1:
            vars(self.owner).update({key: empty() for key, empty in HISTORIES.items() if hasattr(self.owner, key)})
            kwargs |= {"order": 1} if "order" in self.__signature__.parameters else {}
        return self.original(*args, **kwargs)


class StrideStep(Step):
    """``step`` of DDIM to ``t - train_steps // num_inference_steps``, with that number set before each step.

    The last step ends at sigma 0, whatever level the class would end at.
    """

    def __init__(self, owner: Any, following: dict[int, int]) -> None:
        super().__init__(owner)
        self.following = following

    def run(self, model_output: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        """Make the step."""
        stride = int(timestep) - self.following[int(timestep)]
        self.owner.num_inference_steps = Fraction(self.owner.config.num_train_timesteps, stride)
        with attributes_set(self.owner, final_alpha_cumprod=torch.ones_like(self.owner.final_alpha_cumprod)):
            return self.original(model_output, timestep, *args, **kwargs)


class ScaleModelInput(Override):
    """``scale_model_input`` of a run that starts midway: the first call must be for its first timestep."""

    name = "scale_model_input"

    def __call__(self, sample: Tensor, timestep: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Called as the class's own method."""
        if isinstance(self.owner.step, Step) and timestep is not None:
            self.owner.step.begin(timestep)
        return self.original(sample, timestep, *args, **kwargs)


class SetBeginIndex(Override):
    """``set_begin_index`` that sets index 0 if ``set_timesteps``, an `applier.SetTimesteps`, knows where to start."""

    name = "set_begin_index"

    def __init__(self, owner: Any, set_timesteps: Any) -> None:
        super().__init__(owner)
        self.set_timesteps = set_timesteps

    def __call__(self, begin_index: int = 0) -> None:
        """Called as the class's own method."""
        started = self.set_timesteps.started_at is not None
        if not started and begin_index >= len(self.owner.timesteps):
            steps = self.set_timesteps.schedule.steps
            raise ValueError(
                f"begin_index must be below the applied schedule's {steps} steps, got {begin_index}; call the pipeline "
                f"with num_inference_steps={steps}"
            )
        self.original(0 if started else begin_index)


class SaveConfig(Override):
    """``save_config``, which ``save_pretrained`` calls, with a warning: a config has no place for a schedule."""

    name = "save_config"

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Called as the class's own method."""
        validate.warn(
            f"{type(self.owner).__name__} is saved without the schedule that was applied to it, so a pipeline loaded "
            "from there uses its own; keep the schedule by Schedule.save, and apply it again after loading"
        )
        self.original(*args, **kwargs)


class Timesteps(Tensor):
    """A scheduler's timesteps, of which two slices have a meaning of their own before a run.

    * ``timesteps[index:]`` is ``start_at(index)``: by this slice image-to-image pipelines start midway. Their index
      counts the steps that they asked for, from the end if negative. If they first compare the timesteps with that of
      ``denoising_start``, it counts these timesteps.
    * ``timesteps[:-1]`` gives all timesteps: pipelines of LTX leave out the last one, which would be that of sigma 0
      (`LTXEulerAncestralRFScheduler` lists it), and is not among these.

    If a pipeline goes through the timesteps and then slices ``timesteps[:count]``, its run ends early for a refiner
    (``denoising_end``), and ``ends_at`` is called.
    Everything else gives plain tensors: other operations, copies, pickles, and these slices during a run. Sigmas are
    sliced in the same way.

    Attributes:
        start_at: Computes ``[index:]``.
        ends_at: Called for ``[:count]`` of `listed` timesteps.
        listed: Whether the pipeline has gone through the timesteps.
        compared: Whether the pipeline has compared the timesteps.
        begun: Whether a step of the run has been made.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # plain results

    start_at: Callable[[int], Tensor]
    ends_at: Callable[[int], object]
    listed: bool
    compared: bool
    begun: bool

    @classmethod
    def of(
        cls, timesteps: Tensor, start_at: Callable[[int], Tensor], ends_at: Callable[[int], object] = lambda count: None
    ) -> Timesteps:
        """``timesteps`` whose ``[index:]`` is ``start_at(index)``, and whose ``[:count]`` may call ``ends_at``."""
        made = timesteps.as_subclass(cls)
        made.start_at, made.ends_at = start_at, ends_at
        made.listed = made.compared = made.begun = False
        return made

    @classmethod
    def whole(cls, timesteps: Tensor) -> Timesteps:
        """``timesteps`` whose ``[index:]`` is a plain slice; ``[:-1]`` before a run still gives all."""
        return cls.of(timesteps, lambda index: timesteps[index:])

    @property
    def plain(self) -> Tensor:
        """The same values as a plain tensor."""
        return self.as_subclass(Tensor)

    def __getitem__(self, index: Any) -> Tensor:
        if isinstance(index, slice) and not self.begun:
            if isinstance(index.start, int) and (index.stop, index.step) == (None, None):
                return self.start_at(index.start)
            if (index.start or 0, index.stop, index.step) == (0, -1, None):
                return self.plain
            ends = self.listed and (index.start, index.step) == (None, None) and isinstance(index.stop, int)
            if ends and 1 < index.stop < len(self):  # `[:1]` is the first timestep, for a batch
                self.ends_at(index.stop)
        if isinstance(index, int) and index >= len(self):
            raise IndexError(
                f"timestep {index} was asked for, and the applied schedule has {len(self)}; pass num_inference_steps="
                f"{len(self)} if the loop counts its steps by that"
            )
        return self.plain[index]

    def __iter__(self) -> Iterator[Tensor]:
        self.listed = True
        return iter(self.plain)

    def __lt__(self, other: Any) -> Tensor:
        self.compared = True
        return self.plain < other

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.plain, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain.__reduce_ex__(protocol)


def start_by_strength(index: int, count: int, own: int) -> int:
    """The index among ``own`` timesteps of a start at ``index`` of ``count``, which the pipeline found by ``strength``.

    Pipelines that give their scheduler a list (FLUX, Qwen-Image) count the timesteps that they get back, so they round
    ``strength`` to a multiple of ``1 / count``. Its value is read from the function that takes the slice.

    Raises:
        ValueError: If that function has none by which the index could be found.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith("fastsched."):
        frame = frame.f_back
    strength = None if frame is None else frame.f_locals.get("strength")
    if isinstance(strength, (int, float)):
        for whole in (int, math.ceil):  # as the pipeline rounds
            if whole(count - min(count * strength, count)) == index:
                return whole(own - min(own * strength, own))
    if index == 0 or index >= count:  # all or none of them
        return 0 if index == 0 else own
    raise ValueError(
        f"the loop starts at step {index} of the applied schedule's {count}, but has given the scheduler a list of "
        f"{own}, so its strength is not known; pass num_inference_steps={count}, or a list of {count}"
    )


def without_equal_sigmas(sigmas: Tensor, scheduler: Any) -> Tensor:
    """``sigmas`` to show to a pipeline, for a flow map (AnyFlow) without equal ones: it leaves out steps of length 0.

    Of two equal sigmas in turn the second is made smaller by more than timesteps are rounded. Those for other
    schedulers stay as they are.
    """
    if "FlowMapEulerDiscreteScheduler" not in class_names(scheduler):
        return sigmas
    return torch.cat([sigmas[:1], sigmas[1:] * (1 - 1e-6 * (sigmas[1:] == sigmas[:-1]))])
