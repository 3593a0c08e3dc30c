"""Run a pipeline with a schedule from the noises of its measurement: what a fit ranks and tunes schedules by."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from fastsched.diffusers.applier import applied
from fastsched.diffusers.attributes import attributes_set, known_calls
from fastsched.diffusers.pipelines.call import call
from fastsched.diffusers.pipelines.measurement import with_fewer_prompts
from fastsched.diffusers.pipelines.prompt_calls import PromptCalls
from fastsched.diffusers.pipelines.start_from_noise import StartFromNoise
from fastsched.diffusers.random_numbers import ONE_CALL
from fastsched.diffusers.watching.consistency import warn_of_other_call
from fastsched.diffusers.watching.watch import watched
from fastsched.fitting.rollouts import Rollout
from fastsched.measurement.statistics import PathStatistics
from fastsched.sampling.random_streams import sample_number
from fastsched.sampling.schedule import Schedule


class PipelineRunner:
    """Runs a pipeline from the noises of the measured paths.

    The pipeline is called as in `fastsched.diffusers.measure`, with a schedule applied. One additional step at the
    first level makes it start from those noises.
    """

    def __init__(
        self,
        pipe: Any,
        stats: PathStatistics,
        prompts: PromptCalls,
        call_kwargs: dict[str, Any],
        *,
        calls: int = 1,
        model_calls: float = math.inf,
        must_scale: bool = False,
    ) -> None:
        self.pipe, self.stats, self.prompts, self.call_kwargs = pipe, stats, prompts, call_kwargs
        self.calls, self.left, self._must_scale = calls, model_calls, must_scale
        self.advance: Callable[[int], object] = lambda calls: None
        self._batch = 1
        self._owned = (stats.ends == 0).all(0)  # elements whose D was held at 0
        # A call makes a whole batch, so samples that one round does not need are kept for the next.
        self._rollouts: dict[int, tuple[Schedule, list[Rollout]]] = {}

    def __call__(self, schedule: Schedule, first: int, last: int) -> Rollout | None:
        """Samples ``first .. last - 1`` under a schedule, float32 on the CPU.

        None if they are not finite, the scheduler cannot use the schedule, or too few model calls are left: a call of
        the pipeline makes a whole batch, even if fewer samples are asked for.

        Raises:
            ValueError: If the pipeline's samples have another shape than those of the measurement.
        """
        if not fits(schedule, self.pipe.scheduler):
            return None
        _, parts = self._rollouts.setdefault(id(schedule), (schedule, []))
        while (done := sum(len(part.ends) for part in parts)) < last:
            if self.calls * self._batch > self.left:
                return None
            parts.append(self._one_call(schedule, done))
        if last == self.stats.samples:
            del self._rollouts[id(schedule)]
        found = Rollout.joined(parts).samples(first, last)
        return found if bool(found.ends.isfinite().all()) else None

    def part(self, schedule: Schedule, first: int, last: int) -> Rollout | None:
        """Like calling this object, but makes no other samples, and ignores how many model calls are left."""
        if not fits(schedule, self.pipe.scheduler):
            return None
        parts, done = [], first
        while done < last:
            parts.append(self._one_call(schedule, done, last))
            done += len(parts[-1].ends)
        found = Rollout.joined(parts).samples(0, last - first)
        return found if bool(found.ends.isfinite().all()) else None

    def _one_call(self, schedule: Schedule, done: int, last: int | None = None) -> Rollout:
        wanted = (self.stats.samples if last is None else last) - done
        number = sample_number(self.stats.seeds[done])
        arguments = self.prompts.arguments(number, wanted, self.call_kwargs)
        try:
            run = self._run(schedule, done, arguments)
        except Exception as error:
            self.prompts = with_fewer_prompts(self.prompts, arguments, error)
            return self._one_call(schedule, done, last)
        ends = run.end.float().cpu()
        self._batch = len(ends)
        self.prompts = self.prompts.updated(arguments, len(ends))
        self.left -= self.calls * self._batch
        if ends.shape[1:] != self.stats.ends.shape[1:]:
            raise ValueError(
                f"stats are of samples {list(self.stats.ends.shape[1:])} and the pipeline's are "
                f"{list(ends.shape[1:])}; stats must be measured on this pipeline with the same arguments"
            )
        usable = self.prompts.usable_samples(number, len(ends))
        return Rollout(ends, run.evaluations()).samples(0, min(usable, self.stats.samples - done))

    def _run(self, schedule: Schedule, done: int, arguments: dict[str, Any]) -> StartFromNoise:
        scheduler, _ = applied(schedule, self.pipe.scheduler)
        with ONE_CALL, watched(self.pipe) as watch, attributes_set(self.pipe, scheduler=scheduler):
            seeds, known = self.stats.seeds[done:], (self._owned, self.stats.changes)
            options = {"must_scale": self._must_scale}
            run = StartFromNoise(scheduler, seeds, schedule, watch, self.advance, *known, **options)
            call(self.pipe, schedule.steps + 1, arguments, lambda: run.left)  # it adds the step that returns the noise
            run.check_ended()
            warn_of_other_call(known_calls(self.pipe), arguments, run.constants())
        return run


def fits(schedule: Schedule, scheduler: Any) -> bool:
    """Whether ``scheduler`` can use the schedule."""
    try:
        applied(schedule, scheduler)
    except ValueError:
        return False
    return True
