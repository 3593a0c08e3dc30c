"""A diffusers scheduler that measures the pipeline in which it is used."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from fastsched.denoisers.deferred_checks import DeferredChecks
from fastsched.diffusers.attributes import copied_with
from fastsched.diffusers.conventions import class_and_settings, class_of, describe, own_scheduler
from fastsched.diffusers.schedulers.exporter import told_timesteps
from fastsched.diffusers.schedulers.overrides import ArgumentsOf, Timesteps, without_equal_sigmas
from fastsched.diffusers.schedulers.step_outputs import StepOutput
from fastsched.diffusers.watching.consistency import Consistency
from fastsched.diffusers.watching.first_latents import check_first_latents, check_neighbours
from fastsched.diffusers.watching.function_checks import check_function
from fastsched.diffusers.watching.predictions import check_noise_predicted
from fastsched.diffusers.watching.step_checks import (
    UNALIKE,
    check_copies,
    check_first_output,
    check_input_scaled,
    check_one_run,
    check_options,
    check_output,
    check_repeat,
    check_sampled,
    check_scaled,
    check_scaling,
    check_timestep,
    check_unchanged,
    doubled,
    held_at_zero,
    noise_alone,
    output_of_tokens,
    repeated_batch,
    repeated_queries,
    warn_of_clipping,
)
from fastsched.diffusers.watching.step_counts import check_steps, levels_of
from fastsched.diffusers.watching.watch import (
    PipelineWatch,
    SeenStep,
    check_replaced,
    overwritten,
    replaced,
    warn_of_unseen,
)
from fastsched.measurement.deviated_paths import deviated_paths, queries
from fastsched.measurement.measuring import measured_levels
from fastsched.measurement.memory import check_room, with_store
from fastsched.measurement.path_following import Measurement, Query, measurement_steps
from fastsched.measurement.statistics import PathStatistics, data_deviation
from fastsched.sampling.random_streams import BESIDE, sample_seeds


class CalibrationScheduler(SchedulerMixin, ConfigMixin):
    """Measure a pipeline through its own loop.

    It takes the place of the pipeline's scheduler. Each ``step`` returns the next state of a measurement over N levels
    (`measurement.path_following.measurement_steps`), and receives what the pipeline computes there, including guidance
    and adapters:

    =======================  ===================================================  ==============================
    steps                    the pipeline's network is given                      the output is used for
    =======================  ===================================================  ==============================
    first                    the pipeline's own latents                           their shape, dtype and device
    next N                   states ``x_k``, from the noisiest level down         the reference path
    next, two times N/2 - 1  states ``x'_k`` of the deviated paths, likewise      the responses
    last                     two earlier states of a level, a part of each        a check: same input, same output
    =======================  ===================================================  ==============================

    That is ``2 N`` steps for an even number of levels (`calibration_steps`).

    Every step is checked: the pipeline must start from unit noise, pass on the latents unchanged, and give ``step`` no
    argument that changes its meaning. Elements that it replaces in its network's input at every step (a given first
    frame) get ``D = 0``, and enter no sum. `fastsched.diffusers.measure` also watches the pipeline's networks
    (`fastsched.diffusers.watching`). A pipeline that doubles its batch by a copy, as guided DiT does, is measured on
    one half.

    The first step is needed because a pipeline passes its latents to the scheduler only after the first network call.
    The noise comes from ``seed``, not from the pipeline's latents (`fastsched.sampling.random_streams.noise_of`). The
    pipeline's last latents are the clean ends of the paths, and can be decoded.

    Args:
        scheduler_class: The class of the pipeline's own scheduler, which gives noise process, prediction and timesteps.
        scheduler_config: Its config.
        seed: Seed of the noise.
        samples_before: How many samples of this seed have been measured already.
        keep_increments: As in `fastsched.measure`.

    Raises:
        ValueError: From ``step`` and ``set_timesteps``, if the pipeline cannot be measured this way: another number of
            steps, more than one call of ``step`` a timestep, latents changed between steps, or a network whose answer
            to the same input changes during the run. The message says which.
    """

    order = 1
    asked_size = False  #: whether the pipeline has asked for the size of its first latents, `init_noise_sigma`

    @register_to_config
    def __init__(
        self,
        scheduler_class: str = "EulerDiscreteScheduler",
        scheduler_config: dict[str, Any] | None = None,
        seed: int = 0,
        samples_before: int = 0,
        keep_increments: bool = False,
    ) -> None:
        settings = scheduler_config or {}
        self._own = getattr(diffusers, scheduler_class).from_config(settings)
        self.convention = describe(self._own)
        # Pipelines read entries of their scheduler's config, so this config has them too.
        self.register_to_config(**{key: value for key, value in settings.items() if not key.startswith("_")})
        self.timesteps = self._levels = torch.arange(0, device="cpu")
        self._asked_levels: int | Tensor | None = None
        self._watch: PipelineWatch | None = None
        self._own_noise, self._must_scale, self._number = True, False, 0
        self._earlier: PathStatistics | None = None
        self._advance: Callable[[int], object] = lambda calls: None
        self._clear()

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From the config of any supported scheduler, or of a saved `CalibrationScheduler`.

        Raises:
            ValueError: If the noise process, the prediction or a setting is not supported.
        """
        if isinstance(config, dict) and "scheduler_class" not in config:
            config = {"scheduler_class": class_of(config), "scheduler_config": dict(config)}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def from_scheduler(
        cls,
        scheduler: Any,
        *,
        seed: int = 0,
        samples_before: int = 0,
        keep_increments: bool = False,
        levels: int | Tensor | None = None,
        watch: PipelineWatch | None = None,
        own_noise: bool = True,
        must_scale: bool = False,
        number: int = 0,
        advance: Callable[[int], object] = lambda calls: None,
    ) -> CalibrationScheduler:
        """From a pipeline's scheduler object, which may be a subclass or have attributes changed since it was made.

        Args:
            scheduler: The pipeline's scheduler.
            seed: As in the class.
            samples_before: As in the class.
            keep_increments: As in the class.
            levels: The levels to measure at, descending, or their number: the pipeline must then make as many steps.
            watch: Records the calls of the pipeline's networks, which are then compared between steps.
            own_noise: Whether the pipeline draws its first latents itself, so that their size can be checked.
            must_scale: Whether the pipeline must call ``scale_model_input``, as decoupled levels need.
            number: The number of the call. Each repeats a step at another place.
            advance: Called after each step with the number of samples.

        Raises:
            ValueError: As in `from_config`.
        """
        scheduler = own_scheduler(scheduler)
        made = cls(*class_and_settings(scheduler), seed, samples_before, keep_increments)
        made._own, made.convention = scheduler, describe(scheduler)
        made._asked_levels, made._watch, made._own_noise, made._advance = levels, watch, own_noise, advance
        made._must_scale, made._number = must_scale, number
        ArgumentsOf(made, scheduler).put()
        return made

    @property
    def init_noise_sigma(self) -> float:
        """1: whatever the class of the pipeline's scheduler, a measurement starts from standard normal noise."""
        self.asked_size = True
        return 1.0

    @property
    def statistics(self) -> PathStatistics:
        """The measurement, one sample for each element of the pipeline's batch.

        Raises:
            ValueError: If the pipeline has not made all the steps.
        """
        found = self._statistics if self._index == len(self.timesteps) else self._earlier
        if found is None and len(self.timesteps) == 0:
            raise ValueError(
                "the pipeline's call did not set its scheduler's timesteps: does it call another pipeline, which steps "
                "the latents with a scheduler of its own? Pass that one"
            )
        if found is None:
            raise ValueError(
                f"the pipeline made {self._index} of the {len(self.timesteps)} steps of a measurement; it was "
                "interrupted, or its loop leaves steps out"
            )
        return found

    @property
    def constants(self) -> dict[str, Any]:
        """`Consistency.constants`."""
        return self._consistency.constants()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        **_: Any,
    ) -> None:
        """Prepare a measurement in this number of steps (`calibration_steps`). Of one list only the length is used.

        Raises:
            ValueError: If no number of levels takes this number of steps.
        """
        given = sigmas if sigmas is not None else timesteps
        steps = num_inference_steps if given is None else len(given)
        count, asked = levels_of(steps), self._asked_levels
        if self._watch is not None:
            self._watch.begin()
            self._earlier = self._statistics or self._earlier  # a pipeline may reset its scheduler at the end
        self._parameters = dict(inspect.signature(getattr(diffusers, self.config["scheduler_class"]).step).parameters)
        # another number of steps is refused at the first step: there may be another call
        levels = asked if isinstance(asked, Tensor) and len(asked) == count else count
        self._levels = measured_levels(self.convention.denoiser, levels)
        self._clear()
        self._scales = self.convention.input_scale(self._levels).tolist()
        asked = queries(count, deviated_paths(count))
        self._repeated = repeated_queries(asked, self._number)
        self._queries = [*asked, asked[self._repeated[0]]]
        self._s = s = torch.cat([self._levels[:1], self._levels[self._queries]])
        names = told_timesteps(self._own, self.convention.timesteps(s), timesteps=timesteps, sigmas=sigmas, mu=mu)
        self._names = names.round().to(torch.int64) if self.convention.process.integer_timesteps else names.float()
        self.timesteps = Timesteps.whole(self._names.to(device, copy=True))  # the pipeline may write into it
        self.num_inference_steps = steps
        sampled = torch.nn.functional.pad(self.convention.process.sampler_sigma(s), (0, 1))
        self.sigmas = without_equal_sigmas(sampled.float(), self._own)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """ValueError unless ``begin_index`` is 0."""
        if begin_index != 0:
            raise ValueError(
                f"the pipeline starts midway, at step {begin_index} (image-to-image or inpainting with strength below "
                "1?); a measurement starts from pure noise: pass strength=1.0, or measure the text-to-image pipeline "
                "of the same model"
            )

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """``sample`` unchanged: the states that `step` returns are scaled already."""
        check_scaled(sample, self._scaled if self.convention.scales_input else None)
        self._scaled = sample.view_as(sample)
        return self._scaled

    def add_noise(self, *args: Any, **kwargs: Any) -> Tensor:
        """The noise that a run of a flow model begins with; ValueError in any other use."""
        check_one_run(again=0 < len(self.timesteps) == self._index)  # noise for another run (FreeInit)
        first = self.sigmas[0] if self._index == 0 < len(self.timesteps) else None
        return noise_alone(self.convention.process, first, [*args, *kwargs.values()])

    scale_noise = add_noise

    @torch.no_grad()
    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        *args: Any,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> StepOutput | tuple[Tensor, Tensor]:
        """Receive the network's output for the state returned last, and return the next state.

        Args:
            model_output: What the pipeline computed, [B, *shape].
            timestep: The current entry of ``timesteps``.
            sample: The state returned by the last call.
            *args: Arguments of the scheduler's own class; values that change its steps are refused.
            return_dict: Whether to return a `StepOutput`, with the state in place of ``D``, or a tuple.
            **kwargs: As ``args``.

        Raises:
            ValueError: If the pipeline cannot be measured this way (see the class), or the output is not finite.
        """
        check_one_run(again=self._earlier is not None)
        seen = None if self._watch is None else self._watch.take(self._deferred)
        self._check(timestep, sample, args, kwargs)
        model_output = output_of_tokens(model_output, timestep, kwargs, self._deferred)
        output = self.convention.raw_output(model_output, sample.shape[1])
        check_output(output, sample)
        name = f"timestep {float(self._names[self._index]):g}"
        self._deferred.add_finite(output, lambda: f"the network returned NaN or inf at {name}")
        if seen is not None:
            self._check_seen(seen, output, sample)
        if self._index == 0 and self._own_noise:
            self._first = sample.clone(), output.clone()
        elif self._first is not None:  # now it is known which elements the pipeline owns
            check_neighbours(self._first[0], self._owned, self._deferred)
            check_noise_predicted(self._first, (sample, output), self.convention, self._s[0], self._deferred)
            self._first = None
        check_copies(output, self._copies, self._deferred)
        self._deferred.run(wait=False)
        if self._owned is not None:
            x = sample / float(self.convention.input_scale(self._s[self._index]))
            output = held_at_zero(output, x, self._s[self._index], self.convention.denoiser, self._owned)
        following = self._next(output.chunk(self._copies)[0], sample.chunk(self._copies)[0]).to(sample.dtype)
        self._index += 1
        self._advance(len(sample) // self._copies)
        self._returned = following if self._copies == 1 else torch.cat([following] * self._copies)
        given = self._returned.clone()  # the pipeline may write into what it is given
        return StepOutput(given, given, given) if return_dict else (given, given)

    def __len__(self) -> int:
        return self.convention.train_steps

    def __deepcopy__(self, memo: dict[int, Any]) -> CalibrationScheduler:
        """A copy, neither watched nor counted, for latents beside those measured (sound); refused during a run."""
        made = copied_with(self, memo, _advance=lambda calls: None, **({} if self._steps else {"_watch": None}))
        made.register_to_config(seed=self.config["seed"] ^ BESIDE, keep_increments=False)
        return made

    def _clear(self) -> None:
        self._index, self._copies = 0, 1
        self._scaled: Tensor | None = None
        self._consistency = Consistency(len(self._levels))
        self._deferred = DeferredChecks()
        self._still: Tensor | None = None
        #: The pipeline's first latents, and the output for them, until the second step.
        self._first: tuple[Tensor, Tensor] | None = None
        self._owned: Tensor | None = None  # elements of the latents that the pipeline keeps for itself
        self._statistics: PathStatistics | None = None
        self._steps: Query[PathStatistics] | None = None
        self._returned: Tensor | None = None
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}  # latents and outputs of the queries to be repeated

    def _next(self, output: Tensor, sample: Tensor) -> Tensor:
        if self._index == 0:
            return self._start(output.dtype, sample)
        return self._send(output) if self._index < len(self.timesteps) - 1 else self._finish(output)

    def _start(self, dtype: torch.dtype, sample: Tensor) -> Tensor:
        denoiser, keep = self.convention.denoiser, bool(self.config["keep_increments"])
        run = Measurement(denoiser, self._levels, sample.device, dtype, deviated_paths(len(self._levels)), keep)
        self._run = with_store(run, len(sample), sample[0].numel())
        check_room(self._run, len(sample), sample[0].numel())
        seeds = sample_seeds(int(self.config["seed"]), int(self.config["samples_before"]) + len(sample))
        seeds, shape = seeds[-len(sample) :], tuple(sample.shape[1:])
        self._steps = measurement_steps(self._run, seeds, shape, deferred=self._deferred)
        return self._input(*next(self._steps))

    def _send(self, output: Tensor) -> Tensor:
        """Send the output to the measurement; returns its next state, or after its last one earlier ones again."""
        assert self._steps is not None
        assert self._returned is not None
        if self._index - 1 in self._repeated:
            self._kept[self._index - 1] = self._returned.chunk(self._copies)[0].clone(), output.clone()
        try:
            return self._input(*self._steps.send(output))
        except StopIteration as finished:
            self._measured_paths = replace(finished.value, model_calls=len(self.timesteps) * len(output))
            return repeated_batch(*(self._kept[query][0] for query in self._repeated))

    def _finish(self, output: Tensor) -> Tensor:
        """Make the checks that are left, with that of the repeated output; returns the ends of the paths."""
        self._deferred.run()
        check_repeat({query: kept[1] for query, kept in self._kept.items()}, output, *self._repeated)
        ends = self._measured_paths.ends * (1 if self._owned is None else ~self._owned.cpu())
        known = {"ends": ends, "changes": self._consistency.changes(self._levels.tolist())}
        self._statistics = found = replace(self._measured_paths, **known, data_std=data_deviation(ends))
        check_function(found)
        warn_of_clipping(getattr(diffusers, self.config["scheduler_class"]), self.config, ends)
        return ends.to(output.device)

    def _input(self, x: Tensor, k: int) -> Tensor:
        name = f"timestep {float(self._names[1 + k]):g}"
        self._deferred.add_finite(x, lambda: f"the measurement overflows at {name}; {UNALIKE}")
        return x if self._scales[k] == 1.0 else self._scales[k] * x

    def _check(self, timestep: Any, sample: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        check_options(self._parameters, args, kwargs)
        check_timestep(self._index, self._names, timestep, self._deferred)
        if self._returned is None:
            check_steps(len(self.timesteps), self._asked_levels)
            check_scaling(self.convention, self.config["scheduler_class"], self._scaled, sample)
            check_input_scaled(self._scaled is not None or not self._must_scale)
            if self._own_noise:
                asked = self.asked_size or self._watch is None
                needed = 1.0 if asked else float(getattr(self._own, "init_noise_sigma", 1.0))
                check_first_latents(sample, self._deferred, needed, self.config["scheduler_class"])
            return
        returned = self._returned.to(sample.device)
        if self._index == 1 and doubled(sample, returned):
            self._copies = 2
            self._start(self._run.dtype, sample[: len(sample) // 2])
        else:
            check_unchanged(sample, returned, self._index, self._deferred)

    def _check_seen(self, seen: SeenStep, output: Tensor, sample: Tensor) -> None:
        """Compare the networks' calls with those of earlier steps, and their input with the latents."""
        index, n, size = self._index, len(self._levels), sample.numel()
        level = [0, *self._queries][index]
        self._consistency.note(index, level, seen, output, self._deferred)
        kept = overwritten(seen, sample) if index > 0 and self._copies == 1 else None
        if index == 1 and kept is not None and 0 < int(kept.min()) < 0.99 * size:
            self._owned = replaced(seen, sample)  # their D is held at 0
            check_replaced(seen, sample, self._owned)
        if self._owned is not None:
            kept = (replaced(seen, sample) & ~self._owned).sum()
            kept = kept * (kept > 0.01 * self._owned.sum())  # in 16 bits a few were equal by chance at step 1
        if kept is not None:
            check_sampled(kept, 0.99, size, self._deferred)
        if index == 0:
            check_first_output(output, self._deferred)
        elif index <= n:
            zero = output == 0 if self._owned is None else (output == 0) & ~self._owned
            self._still = zero if self._still is None else self._still.logical_and_(zero)
            if index == n:
                warn_of_unseen(seen)
                check_sampled(self._still.sum(), 1.0, size, self._deferred)
