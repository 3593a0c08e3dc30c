"""Compare schedules by running a pipeline of diffusers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsched.comparison import Comparison, row_of
from fastsched.diffusers.applier import applied
from fastsched.diffusers.attributes import attributes_set
from fastsched.diffusers.conventions import describe, solver_of
from fastsched.diffusers.pipelines.call import call, check_call
from fastsched.diffusers.schedulers.exporter import plain_copy, warn_of_solver
from fastsched.diffusers.schedulers.overrides import Override, Step
from fastsched.diffusers.watching.step_checks import check_scaling
from fastsched.measurement.converged_samples import Reference, level_count
from fastsched.sampling.fitted import chosen_solver
from fastsched.sampling.progress import progress_bar
from fastsched.sampling.schedule import Schedule
from fastsched.sampling.solvers import FITTED, Solver
from fastsched.selection.starts import even_schedule


def solver_that_runs(pipe: Any, steps: int, schedule: Schedule | None = None) -> Solver:
    """The solver of a run of ``pipe`` with ``schedule``, or with its own when None; unknown ones count as ddim."""
    fitted = schedule is not None and schedule.weights is not None
    return chosen_solver(FITTED if fitted else solver_of(pipe.scheduler, steps) or "ddim")


def compare_pipeline(
    pipe: Any,
    schedules: Mapping[str, Schedule],
    own_steps: Sequence[int],
    *,
    prompts: Sequence[str] | None,
    samples: int,
    seed: int,
    reference_steps: int,
    arguments: dict[str, Any],
    progress: bool = True,
) -> Comparison:
    """Sample a pipeline with each schedule and with its own, and report the distance to converged samples.

    All runs use the pipeline's scheduler, which is restored afterwards. Its own schedule runs at each of ``own_steps``.
    The converged samples come from a run of ``reference_steps`` steps, uniform in ``log s``, or of as many as the
    network has integer timesteps. Each run is ``samples`` calls, which take the ``prompts`` in turn, other
    ``arguments``, and seeds that count up from ``seed``. Samples are latents if the pipeline can return them.

    Raises:
        ValueError: If the pipeline cannot be given a schedule, does not scale its latents where its scheduler needs it,
            or returns no tensors.
    """
    check_call(pipe, prompts, arguments)
    for name, schedule in schedules.items():
        _check_applied(name, schedule, pipe.scheduler)
    solver = solver_of(pipe.scheduler, max(own_steps, default=None)) or "ddim"
    process = describe(pipe.scheduler).process
    fine = even_schedule(process, level_count(process, reference_steps), solver)
    # The converged run comes first.
    runs: list[tuple[str, Schedule | None, int]] = [("", fine, fine.steps)]
    runs += [(name, schedule, schedule.steps) for name, schedule in schedules.items()]
    runs += [(f"the pipeline's own, {steps} steps", None, steps) for steps in own_steps]
    ends = []
    with progress_bar(samples * sum(steps for *_, steps in runs), progress, "comparing") as advance:
        for _, schedule, steps in runs:
            parts = []
            for n in range(samples):
                prompt = {"prompt": prompts[n % len(prompts)]} if prompts else {}
                parts.append(_sampled(pipe, schedule, steps, seed + n, arguments | prompt))
                advance(steps)
            ends.append(torch.cat(parts))
    calls = samples * solver_that_runs(pipe, fine.steps).model_calls(fine.steps)
    reference = Reference(torch.empty(0, device="cpu"), ends[0], solver, fine.steps, calls)
    found = zip(runs[1:], ends[1:], strict=True)
    rows = []
    for (name, schedule, steps), end in found:
        ran = solver_that_runs(pipe, steps, schedule)
        rows.append(row_of(name, ran.name, steps, ran.model_calls(steps), end, reference))
    return Comparison(tuple(rows), len(ends[0]), reference)


def _check_applied(name: str, schedule: Schedule, scheduler: Any) -> None:
    """ValueError with the schedule's name, before any run, if ``scheduler`` cannot be given it."""
    warn_of_solver(schedule, scheduler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its runs repeat them
            applied(schedule, scheduler)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _sampled(pipe: Any, schedule: Schedule | None, steps: int, seed: int, arguments: dict[str, Any]) -> Tensor:
    """The samples of one call, [images, *shape] float32 on the CPU; ``schedule`` None is the pipeline's own."""
    if schedule is None:
        scheduler = plain_copy(pipe.scheduler)
        Step(scheduler).put()  # as an applied schedule it ignores eta=0 and a generator, which not all classes take
    else:
        scheduler, _ = applied(schedule, pipe.scheduler)  # with the rounding that the scheduler will apply
    convention, scaling = describe(pipe.scheduler), _Scaling(scheduler)
    if convention.scales_input:
        scaling.put()
    with attributes_set(pipe, scheduler=scheduler):
        result = call(pipe, steps, arguments, seed=seed)  # without a generator the seed sets torch's own
    # The first entry of an output of diffusers holds the samples, named images, frames or otherwise.
    images = result if isinstance(result, Tensor) else result[0]
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(images)
    if not isinstance(images, Tensor):
        raise ValueError(f"{type(pipe).__name__} returns {type(images).__name__}; add --call output_type=np")
    if not scaling.asked:
        check_scaling(convention, type(pipe.scheduler).__name__, None, images)
    return images.detach().float().cpu()


class _Scaling(Override):
    """``scale_model_input`` that notes whether the pipeline calls it."""

    name = "scale_model_input"
    asked = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Called as the class's own method."""
        self.asked = True
        return self.original(*args, **kwargs)
