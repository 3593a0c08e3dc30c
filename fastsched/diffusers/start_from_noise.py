"""A scheduler that makes a pipeline begin at given noise, and records what its network is asked and answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from fastsched.denoisers.late_reading import LateReading, Verdicts
from fastsched.diffusers.calibration import UNALIKE
from fastsched.diffusers.conventions import describe, with_signature
from fastsched.diffusers.probe import scales
from fastsched.diffusers.step_checks import doubled, held_at_zero, output_of_tokens
from fastsched.diffusers.watching import Consistency, PipelineWatch, observed
from fastsched.fitting.rollouts import Evaluations
from fastsched.sampling.random_streams import noise_of
from fastsched.sampling.schedule import Schedule


class StartFromNoise:
    """Makes a scheduler (a copy) begin at given noise, and records its steps.

    A pipeline draws its own first latents and calls its network on them before the scheduler sees anything. So the
    timesteps begin with the first one twice: the first step returns the noise, and the scheduler starts again. What
    the networks are given is compared between steps, as in a measurement, for statistics may come from an earlier one.

    Attributes:
        end: The last state, once the pipeline has run.
    """

    def __init__(
        self,
        scheduler: Any,
        seeds: Tensor,
        schedule: Schedule,
        watch: PipelineWatch,
        advance: Callable[[int], object],
        owned: Tensor,
    ) -> None:
        self._advance, self._owned = advance, owned
        self.scheduler, self.seeds, self._schedule = scheduler, seeds, schedule
        self._watch, self._consistency, self._index = watch, Consistency(), 0
        self.convention = describe(scheduler)
        self.scale = scales(self.convention, self.convention.process.level(schedule.sigmas[:1]))[1].float()
        self.end = torch.empty(0)
        self._copies, self._start = 1, torch.empty(0)
        self._calls: list[tuple[float, LateReading, LateReading]] = []  # s, y, D
        self._verdicts = Verdicts()
        self._set_timesteps = scheduler.set_timesteps
        scheduler.set_timesteps = with_signature(self._prepare, self._set_timesteps)

    def evaluations(self) -> Evaluations:
        """What the network was asked and answered, in order; waits for the device.

        Raises:
            ValueError: If the networks were called otherwise at one of the steps.
        """
        self._verdicts.settle()
        return Evaluations.of([(s, y.values(), denoised.values()) for s, y, denoised in self._calls])

    def _check(self, output: Tensor) -> None:
        index, (found, resolve) = self._index, observed(self._watch.take(), output)
        self._index += 1

        def judge(values: Tensor) -> None:
            wrong = self._consistency.check(index, index + 1, *resolve(values))  # each step at a level of its own
            if wrong is not None:
                raise ValueError(f"{wrong}; {UNALIKE}")

        self._verdicts.note(found, judge)
        self._verdicts.settle(wait=False)

    def _prepare(self, *args: Any, **kwargs: Any) -> None:
        self._arguments = args, kwargs
        self._set(self._first_step)
        self.scheduler.timesteps = torch.cat([self.scheduler.timesteps[:1], self.scheduler.timesteps])
        self._levels = self.convention.levels(torch.as_tensor(self.scheduler.timesteps[1:]).cpu().double())
        if self._schedule.network_sigmas is not None:  # then timesteps are not those of the states
            self._levels = self.convention.process.level(self._schedule.sigmas[:-1])

    def _set(self, step: Callable[..., Any]) -> None:
        args, kwargs = self._arguments
        self.scheduler.__dict__.pop("step", None)
        self._set_timesteps(*args, **kwargs)
        self._step = self.scheduler.step  # which an applied schedule may have replaced
        self.scheduler.step = with_signature(step, self._step)

    def _first_step(self, output: Tensor, timestep: Any, sample: Tensor, *_: Any, **options: Any) -> Any:
        self._check(output)
        self._set(self._later_step)  # as if this step had not been
        # The batch may be larger than what is left to run, and a doubled one is so; then seeds repeat.
        seeds = self.seeds[torch.arange(len(sample)) % len(self.seeds)]
        self._start = (self.scale * noise_of(seeds, sample.shape[1:])).to(sample)
        given = self._start.clone()
        return SchedulerOutput(prev_sample=given) if options.get("return_dict", True) else (given,)

    def _later_step(self, output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._check(output)
        self._advance(len(sample) // self._copies)
        if not self._calls and doubled(sample, self._start):
            self._copies = 2  # guided DiT: the second half of the batch has become a copy of the first
        kept = sample.chunk(self._copies)[0]
        s = self._levels[len(self._calls)].reshape(1)
        sigma, (a, c) = self.convention.process.sigma(s), self.convention.denoiser.coefficients(s)
        y = kept.float() / float(scales(self.convention, s)[1])
        signed = output_of_tokens(output, timestep, kwargs, self._verdicts)
        raw = self.convention.raw_output(signed, sample.shape[1]).chunk(self._copies)[0].float()
        if bool(self._owned.any()):  # then no batch is doubled
            raw = held_at_zero(raw, float(sigma) * y, s, self.convention.denoiser, self._owned.to(sample.device))
            output = (self.convention.sign * output_of_tokens(raw, timestep, kwargs, self._verdicts)).to(output)
        self._calls.append((float(s), LateReading(y), LateReading(float(a * sigma) * y + float(c) * raw)))
        result = self._step(output, timestep, sample, *args, **kwargs)
        end = result[0] if isinstance(result, tuple) else result.prev_sample
        self.end = end.chunk(self._copies)[0]
        return result
