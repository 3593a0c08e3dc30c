"""Make a pipeline begin at given noise, and record the inputs and outputs of its network."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsched.denoisers.deferred_checks import DeferredChecks, DeferredRead
from fastsched.diffusers.attributes import copied_with
from fastsched.diffusers.conventions import describe, own_scheduler
from fastsched.diffusers.fitted_scheduler import FittedScheduler
from fastsched.diffusers.schedulers.exporter import gives_both_lists
from fastsched.diffusers.schedulers.overrides import Override, Timesteps, without_equal_sigmas
from fastsched.diffusers.schedulers.probe import scales
from fastsched.diffusers.schedulers.step_outputs import StepOutput
from fastsched.diffusers.watching.consistency import Consistency
from fastsched.diffusers.watching.step_checks import (
    INSTEAD,
    check_input_scaled,
    check_one_run,
    check_output,
    check_unchanged,
    doubled,
    held_at_zero,
    output_of_tokens,
)
from fastsched.diffusers.watching.watch import PipelineWatch
from fastsched.fitting.rollouts import Evaluations
from fastsched.sampling.random_streams import BESIDE, noise_of
from fastsched.sampling.schedule import Schedule

#: Attributes in which schedulers list a value for each step, and which pipelines read.
TABLES = ("timesteps", "sigmas")
#: Arguments of ``set_timesteps`` that tell the number of steps.
ASKED = ("num_inference_steps", *TABLES)


class StartFromNoise:
    """Makes a scheduler (a copy) begin at given noise, and records its steps.

    A pipeline draws its own first latents and calls its network on them before it calls the scheduler. So the pipeline
    is asked for one step more than the schedule's, and shown timesteps and sigmas in which the first one is repeated:
    the first step returns the noise, and the scheduler starts again. The networks' arguments are compared between
    steps, as in a measurement, because the statistics may come from an earlier one.

    Some pipelines copy their scheduler, to step other latents beside these (sound beside a video). Those latents begin
    at noise of their own, as in a measurement, and are not recorded.

    Attributes:
        end: The last state, once the pipeline has run.
        left: How many steps are left; None before the first.
    """

    def __init__(
        self,
        scheduler: Any,
        seeds: Tensor,
        schedule: Schedule,
        watch: PipelineWatch,
        advance: Callable[[int], object],
        owned: Tensor,
        changes: Sequence[tuple[float, float]] = (),
        *,
        must_scale: bool = False,
    ) -> None:
        self._advance, self._owned, self._changes = advance, owned, changes
        self.scheduler, self.seeds, self._schedule = scheduler, seeds, schedule
        self._watch, self._consistency, self._index = watch, Consistency(changes=self._may_change), 0
        self.convention = describe(scheduler)
        own = schedule.network_sigmas if schedule.decoupled == "denoiser" else None
        self._at = None if own is None else self.convention.process.level(own)  # the levels that D is computed for
        self.scale = scales(self.convention, self.convention.process.level(schedule.sigmas[:1]))[1].float()
        self.end = torch.empty(0, device="cpu")
        self.left: int | None = None
        self._copies, self._returned = 1, torch.empty(0, device="cpu")
        self._calls: list[tuple[float, DeferredRead, DeferredRead]] = []  # s, y, D
        self._deferred = DeferredChecks()
        self._recorded, self._must_scale = True, must_scale
        self._own: dict[str, Tensor] = {}
        self._set_timesteps = scheduler.set_timesteps
        _Replaced(scheduler, "set_timesteps", self.prepare).put()
        if hasattr(type(scheduler), "scale_model_input"):
            _Replaced(scheduler, "scale_model_input", self.scale_model_input).put()

    def __deepcopy__(self, memo: dict[int, Any]) -> StartFromNoise:
        own = {"seeds": self.seeds ^ BESIDE * 2**32, "_recorded": False, "_deferred": DeferredChecks(), "_calls": []}
        return copied_with(self, memo, **own, _watch=self._watch, _advance=self._advance)

    def check_ended(self) -> None:
        """ValueError unless the pipeline made all the steps of its run."""
        if self.left != 0:
            left = "all" if self.left is None else self.left
            raise ValueError(
                f"the pipeline ended its run with {left} of its steps left (did a callback interrupt it?), {INSTEAD}"
            )

    def constants(self) -> dict[str, Any]:
        """`Consistency.constants`."""
        self._deferred.run()
        return self._consistency.constants()

    def evaluations(self) -> Evaluations:
        """The network's inputs and outputs, in order; waits for the device. ValueError if a step made other calls."""
        self._deferred.run()
        return Evaluations.of([(s, y.values(), denoised.values()) for s, y, denoised in self._calls])

    def _check(self, output: Tensor) -> None:
        seen, level = self._watch.take(self._deferred), self._index + 1  # each step has a level of its own
        self._consistency.note(self._index, level, seen, output, self._deferred)
        self._index += 1
        self._deferred.run(wait=False)

    def _may_change(self, index: int) -> bool:
        """Whether a change that was measured (`PathStatistics.changes`) may lie between a step and the one before."""
        around = [float(x) for levels in (self._told, self._levels) for x in levels[index - 2 : index]]
        return any(low < 1.001 * max(around) and high > 0.999 * min(around) for high, low in self._changes)

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Replaces the scheduler's ``set_timesteps``."""
        if self.left == 0:  # the run has ended, and the pipeline only resets its scheduler
            return
        self._watch.begin()
        asked = inspect.signature(self._set_timesteps).bind(*args, **kwargs)
        for name in [each for each in ASKED if each in asked.arguments]:
            asked.arguments[name] = _without_added_step(asked.arguments[name])
        self._arguments, self.left = (asked.args, asked.kwargs), None
        self._set()
        self._told = self._levels = self.convention.levels(torch.as_tensor(self.scheduler.timesteps[1:]).cpu().double())
        if self._schedule.network_sigmas is not None or gives_both_lists(**asked.arguments):
            # Then the timesteps are not those of the states' levels.
            self._levels = self.convention.process.level(self._schedule.sigmas[:-1])

    @torch.no_grad()
    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Replaces the scheduler's ``step``."""
        check_one_run(again=self.left == 0)
        if self._recorded:
            self._check(model_output)
        if self.left is None:
            check_input_scaled(not self._must_scale)
            return self._first_step(sample, **kwargs)
        if self._recorded:
            return self._recorded_step(model_output, timestep, sample, *args, **kwargs)
        with self.own_tables():
            return self._step(model_output, timestep, sample, *args, **kwargs)

    def scale_model_input(self, *args: Any, **kwargs: Any) -> Any:
        """Replaces the scheduler's ``scale_model_input``."""
        self._must_scale = False  # it has been called
        with self.own_tables():
            return type(self.scheduler).scale_model_input(self.scheduler, *args, **kwargs)

    @contextlib.contextmanager
    def own_tables(self) -> Iterator[None]:
        """Within the block the scheduler has its own timesteps and sigmas, not those that the pipeline sees."""
        vars(self.scheduler).update(self._own)
        try:
            yield
        finally:
            vars(self.scheduler).update(self._shown)

    def _set(self) -> None:
        args, kwargs = self._arguments
        vars(self.scheduler).pop("step", None)
        vars(self.scheduler).update(self._own)
        self._set_timesteps(*args, **kwargs)
        self._step = self.scheduler.step  # an applied schedule may have replaced it
        _Replaced(self.scheduler, "step", self.step).put()
        tables = {name: vars(self.scheduler).get(name) for name in TABLES}
        self._own = {name: table for name, table in tables.items() if isinstance(table, Tensor)}
        self._shown = {name: torch.cat([table[:1], table]) for name, table in self._own.items()}
        if "timesteps" in self._shown:
            self._shown["timesteps"] = Timesteps.whole(self._shown["timesteps"])
        if "sigmas" in self._shown:
            self._shown["sigmas"] = without_equal_sigmas(self._shown["sigmas"], own_scheduler(self.scheduler))
        vars(self.scheduler).update(self._shown)

    def _first_step(self, sample: Tensor, **options: Any) -> Any:
        self._set()  # start again, as if this step had not been made
        self.left = len(self._own["timesteps"])
        # The batch may be larger than the number of samples left, as a doubled one is; then seeds repeat.
        seeds = self.seeds[torch.arange(len(sample), device="cpu") % len(self.seeds)]
        given = (self.scale * noise_of(seeds, sample.shape[1:])).to(sample)
        self._returned = given.clone()  # the pipeline may write into what it is given
        return StepOutput(given, given, given) if options.get("return_dict", True) else (given, given)

    def _recorded_step(self, output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.scheduler, FittedScheduler):
            sample = self.scheduler.unscaled(sample)
        self._advance(len(sample) // self._copies)
        if not self._calls and doubled(sample, self._returned):
            self._copies = 2  # guided DiT: the second half of the batch has become a copy of the first
        else:
            check_unchanged(sample, self._returned.to(sample.device), self._index - 1, self._deferred)
        kept = sample.chunk(self._copies)[0]
        s = self._levels[len(self._calls)].reshape(1)
        at = s if self._at is None else self._at[len(self._calls)].reshape(1)
        process, (a, c) = self.convention.process, self.convention.denoiser.coefficients(at)
        y = kept.float() / float(scales(self.convention, s)[1])
        x = float(process.sigma(at) * process.sigma_ratio(s, at)) * y
        signed = output_of_tokens(output, timestep, kwargs, self._deferred)
        raw = self.convention.raw_output(signed, sample.shape[1]).chunk(self._copies)[0].float()
        check_output(raw, kept)
        if bool(self._owned.any()):  # then the batch is not doubled
            raw = held_at_zero(raw, x, at, self.convention.denoiser, self._owned.to(sample.device))
            output = (self.convention.sign * output_of_tokens(raw, timestep, kwargs, self._deferred)).to(output)
        self._calls.append((float(s), DeferredRead(y), DeferredRead(float(a) * x + float(c) * raw)))
        with self.own_tables():
            result = self._step(output, timestep, sample, *args, **kwargs)
        end = result[0] if isinstance(result, tuple) else result.prev_sample
        self._returned = end.clone()
        assert self.left is not None
        self.end, self.left = self._returned.chunk(self._copies)[0], self.left - 1
        return result


def _without_added_step(asked: Any) -> Any:
    """A number of steps, or a list of their timesteps, without the step that `StartFromNoise` adds to a run."""
    if asked is None:
        return None
    return asked[:-1] if hasattr(asked, "__len__") else asked - 1


class _Replaced(Override):
    """Replaces a method of a scheduler by one of a `StartFromNoise`, which is copied with the scheduler."""

    def __init__(self, owner: Any, name: str, method: Callable[..., Any]) -> None:
        super().__init__(owner)
        self.name, self.method = name, method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.method(*args, **kwargs)
