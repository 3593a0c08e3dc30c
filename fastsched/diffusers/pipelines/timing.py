"""Short runs of a pipeline, timed: with its own scheduler, with a fitted schedule, and while it is measured."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastsched.diffusers.applier import applied
from fastsched.diffusers.attributes import attributes_set
from fastsched.diffusers.calibration import CalibrationScheduler
from fastsched.diffusers.conventions import describe
from fastsched.diffusers.fitted_scheduler import FittedScheduler
from fastsched.diffusers.pipelines.call import call, call_parameters, check_call
from fastsched.diffusers.pipelines.measurement import PIPELINE_SAMPLES, calibration_calls, measure
from fastsched.diffusers.random_numbers import random_numbers_kept
from fastsched.diffusers.watching.watch import networks_of
from fastsched.measurement.deviated_paths import asked_levels
from fastsched.measurement.timeline import TimedRun, Timeline, device_of, synchronisations
from fastsched.ops import vector_gram
from fastsched.sampling.solvers import FITTED
from fastsched.selection.starts import even_schedule

#: A solver whose schedules every pipeline takes: pipelines of latent consistency models take none of the fitted solver.
STOCK = "ddim"


class PipelineRuns:
    """Runs of a pipeline. The attributes are known after the first run; networks may be added by later ones.

    Attributes:
        networks: The networks that the steps call.
        elements: The number of elements in one sample's latents.
        batch: The number of samples in one call.
    """

    def __init__(self, pipe: Any, call_kwargs: dict[str, Any]) -> None:
        check_call(pipe, None, call_kwargs)
        self.pipe, self.call_kwargs, self.name = pipe, call_kwargs, type(pipe).__name__
        self.device = device_of(pipe)
        self.networks: list[nn.Module] = []
        self.elements, self.batch = 0, 1
        self.own_steps = self._own_steps()

    def _own_steps(self) -> int:
        """The call's default number of steps; if it has none, as in Stable Audio 3, they are counted in a run."""
        default = call_parameters(self.pipe).get("num_inference_steps")
        if isinstance(default, int):
            return default
        with random_numbers_kept(self.call_kwargs.values()):
            return len(self._timed(lambda: self.pipe(**self.call_kwargs), self.pipe.scheduler).steps)

    def measuring_calls(self, levels: int) -> int:
        """Model calls of a measurement, counted per sample."""
        return calibration_calls(levels, PIPELINE_SAMPLES)

    def sampling(self, steps: int) -> TimedRun:
        """Run the pipeline with its own scheduler."""
        return self._timed(lambda: call(self.pipe, steps, self.call_kwargs), self.pipe.scheduler)

    def sampling_fitted(self, steps: int) -> TimedRun:
        """Run the pipeline with a fitted schedule: of a stock solver where the pipeline takes no other."""
        process = describe(self.pipe.scheduler).process
        if "original_inference_steps" in call_parameters(self.pipe):
            scheduler = applied(even_schedule(process, steps, STOCK), self.pipe.scheduler)[0]
        else:
            scheduler = FittedScheduler.from_schedule(even_schedule(process, steps, FITTED), self.pipe.scheduler)
        with attributes_set(self.pipe, scheduler=scheduler):
            return self._timed(lambda: call(self.pipe, steps, self.call_kwargs), scheduler)

    def measuring(self, levels: int) -> TimedRun:
        """Make one call of a measurement; the kernel is compiled before it, so that the time does not include that."""
        vectors = levels - 1 + 2 * len(asked_levels(levels))
        vector_gram(torch.zeros(1, vectors, self.elements, device=self.device))
        return self._timed(
            lambda: measure(self.pipe, levels=levels, samples=1, progress=False, **self.call_kwargs),
            CalibrationScheduler,
            calls=2,
        )

    def _timed(self, run: Callable[[], Any], scheduler: Any, calls: int = 1) -> TimedRun:
        timeline, waits = Timeline(self.device), list[int]()
        with _owned_step(timeline, scheduler, self._seen, waits), _owned_networks(timeline, self.pipe) as called:
            run()
        if calls == 1:  # in a second call, prompts are encoded after a step
            called |= {id(module) for module in self.networks}  # short runs may miss one of two that take turns
            self.networks = [module for module in networks_of(self.pipe).values() if id(module) in called]
        return timeline.run("scheduler", waits if self.device.type == "cuda" else None)

    def _seen(self, latents: Tensor) -> None:
        self.batch, self.elements = len(latents), latents[0].numel()


@contextlib.contextmanager
def _owned_step(timeline: Timeline, scheduler: Any, seen: Callable[[Tensor], None], waits: list[int]) -> Iterator[None]:
    """Count the time of ``scheduler.step`` (of an object or a class) as the scheduler's."""
    owned = functools.partial(_timed_step, timeline=timeline, seen=seen, waits=waits)
    mine, set_timesteps = [owned(scheduler.step)], scheduler.set_timesteps

    @functools.wraps(set_timesteps)  # pipelines inspect its signature
    def prepared(*args: Any, **kwargs: Any) -> None:
        vars(scheduler).pop("step", None)  # an applied schedule would warn that it leaves out the timed one
        set_timesteps(*args, **kwargs)
        if scheduler.step is not mine[-1]:  # an applied schedule has set a step of its own
            mine.append(owned(scheduler.step))
            scheduler.step = mine[-1]

    prepares = {} if isinstance(scheduler, type) else {"set_timesteps": prepared}
    with attributes_set(scheduler, step=mine[0], **prepares):
        yield


def _timed_step(
    step: Callable[..., Any], timeline: Timeline, seen: Callable[[Tensor], None], waits: list[int]
) -> Callable[..., Any]:
    """``step``, timed; the number of its waits goes to ``waits``, its latents to ``seen``."""
    named = inspect.signature(step)

    @functools.wraps(step)
    def timed(*args: Any, **kwargs: Any) -> Any:
        with timeline.within("scheduler"), synchronisations(timeline.device) as found:
            result = step(*args, **kwargs)
        seen(named.bind(*args, **kwargs).arguments["sample"])
        waits.append(len(found or []))
        return result

    return timed


@contextlib.contextmanager
def _owned_networks(timeline: Timeline, pipe: Any) -> Iterator[set[int]]:
    """Count the time of the pipeline's networks as the network's; collect the ids of those that its steps call.

    Before the first step prompts and images are encoded; the last network called before it is the step's.
    """
    called: set[int] = set()
    with contextlib.ExitStack() as stack:
        for module in networks_of(pipe).values():
            name = "forward" if getattr(module, "_compiled_call_impl", None) is None else "_compiled_call_impl"
            function = getattr(module, name)

            @functools.wraps(module.forward)  # diffusers inspects its signature
            def timed(*args: Any, module: nn.Module = module, function: Any = function, **kwargs: Any) -> Any:
                if not timeline.had("scheduler"):
                    called.clear()
                called.add(id(module))
                with timeline.within("network"):
                    return function(*args, **kwargs)

            stack.enter_context(attributes_set(module, **{name: timed}))
        yield called
