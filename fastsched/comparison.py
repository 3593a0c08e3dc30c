"""Compare schedules by their distance to the converged samples of the same noise."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastsched import metrics, validate
from fastsched.denoisers.denoiser import Denoiser, placement
from fastsched.denoisers.network_state import check_evaluation_mode
from fastsched.measurement.batches import attach_finished
from fastsched.measurement.checks.network_warnings import warned_of_faults
from fastsched.measurement.converged_samples import (
    REFERENCE_SOLVER,
    REFERENCE_STEPS,
    Reference,
    converged,
    fine_sigmas,
    level_count,
    sampled_in_batches,
    shared_noise,
)
from fastsched.measurement.fingerprints import same_network
from fastsched.sampling.display import aligned
from fastsched.sampling.files import write_whole
from fastsched.sampling.progress import Progress, progress_bar
from fastsched.sampling.sampler import schedule_solver
from fastsched.sampling.schedule import Schedule, check_decoupled, check_sigmas, check_start
from fastsched.sampling.solvers import Solver, get_solver


@dataclass(frozen=True)
class ComparisonRow:
    """The error of one schedule.

    Attributes:
        name: The schedule's name.
        solver: The solver it was run with.
        steps: The number of steps, the last of which ends at sigma 0.
        model_calls: Network evaluations per sample.
        typical_error: Geometric mean over samples of ``||x0 - x0_converged||^2``, summed over a sample's elements. An
            error below float32's rounding of the sample counts as that rounding.
        mean_error: Arithmetic mean of the same. A few samples that end in another mode can dominate it.
        standard_error: The standard error of ``mean_error``.
        frechet: Squared Frechet distance between the samples and the converged ones (`metrics.frechet_distance`).
    """

    name: str
    solver: str
    steps: int
    model_calls: int
    typical_error: float
    mean_error: float
    standard_error: float
    frechet: float


@dataclass(frozen=True)
class Comparison:
    """The errors of several schedules; ``print`` it for a table, best first.

    Attributes:
        rows: One per schedule, in the order given.
        samples: The number of samples.
        reference: The converged samples; pass them to the next `compare` to save their cost.
    """

    rows: tuple[ComparisonRow, ...]
    samples: int
    reference: Reference

    header: ClassVar = ("schedule", "solver", "steps", "calls", "typical error", "mean error", "frechet")

    @property
    def ranked(self) -> tuple[ComparisonRow, ...]:
        """The rows by typical error, best first."""
        return tuple(sorted(self.rows, key=lambda row: row.typical_error))

    def __iter__(self) -> Iterator[str]:
        """The names of the schedules, as of a dictionary."""
        return (row.name for row in self.rows)

    def __getitem__(self, name: str) -> ComparisonRow:
        """The row of that name.

        Raises:
            KeyError: If there is none.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no schedule {name!r}; there are {', '.join(repr(row.name) for row in self.rows)}")

    def to_dicts(self) -> list[dict[str, Any]]:
        """The rows as dictionaries, in the order given; keys as in `ComparisonRow`."""
        return [asdict(row) for row in self.rows]

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """The rows as CSV with a header, in the order given; also written to ``path`` if given."""
        name = None if path is None else validate.path("path", path)
        text = io.StringIO()
        writer = csv.DictWriter(text, [field.name for field in fields(ComparisonRow)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.to_dicts())
        if name is not None:
            write_whole(name, text.getvalue().encode())
        return text.getvalue()

    def __str__(self) -> str:
        return f"{aligned([self.header, *self.cells], left=2)}\n{self.legend}"

    @property
    def cells(self) -> list[tuple[str, ...]]:
        """The rows as text, best first, in the columns of `header`."""
        return [
            (
                row.name,
                row.solver,
                str(row.steps),
                str(row.model_calls),
                f"{row.typical_error:.4g}",
                f"{row.mean_error:.4g}" + ("" if math.isnan(row.standard_error) else f" ± {row.standard_error:.2g}"),
                "-" if math.isnan(row.frechet) else f"{row.frechet:.4g}",
            )
            for row in self.ranked
        ]

    @property
    def legend(self) -> str:
        """One line that explains the errors."""
        return (
            f"squared distance to the converged samples ({self.reference.solver}, {self.reference.steps} steps), over "
            f"{self.samples} noises; typical = geometric mean"
        )


@torch.no_grad()
def compare(
    denoiser: Denoiser,
    schedules: Mapping[str, Schedule | Tensor],
    solver: str | Solver | None = None,
    *,
    shape: Sequence[int] | None = None,
    samples: int | range = 256,
    seed: int = 0,
    reference_steps: int = REFERENCE_STEPS,
    reference: Reference | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress = True,
) -> Comparison:
    """Run the sampler with each schedule and report the distance of its samples to the converged ones.

    Typical and mean error (`ComparisonRow`) are the geometric and the arithmetic mean, over the noises ``b``, of
    ``||x0_b - x0_b(converged)||^2``.

    The arguments ``denoiser``, ``shape``, ``samples``, ``seed``, ``batch_size``, ``device``, ``dtype`` and ``progress``
    are those of `converged_reference`. The others are

    * ``schedules``: by name, a `Schedule` or sampler sigmas [steps + 1] descending to 0 (times for a flow model).
    * ``solver``: a solver to run all of them with; each `Schedule`'s own when None.
    * ``reference``: converged samples of an earlier call; then ``shape``, ``samples``, ``seed`` and ``reference_steps``
      (the ``steps`` of `converged_reference`) are not used. A few calls tell whether the network is a denoiser, and
      the reference of it; two more whether it has changed or mixes samples. A warning says if something is wrong.

    Returns:
        One row per schedule, and the reference for the next call. With a single sample, ``standard_error`` and
        ``frechet`` are NaN.

    Raises:
        ValueError: If there is no schedule, one does not fit the denoiser or names no solver, or an argument is out
            of range or unknown. Later errors and Ctrl-C carry the reference, and rows, as ``error.partial``.
    """
    validate.arguments(locals(), **_CHECKS)
    check_evaluation_mode(denoiser.network)
    runs = _planned(denoiser, schedules, solver)
    place = placement(denoiser, device, dtype)
    noise = shared_noise(shape, samples, seed, reference)
    sampled = partial(sampled_in_batches, denoiser, noise, batch_size, *place)
    fine = fine_sigmas(denoiser, reference_steps)
    rows, calls = [], sum(method.model_calls(steps) for _, method, steps in runs.values())
    try:
        with warned_of_faults(denoiser, tuple(noise.shape[1:]), batch_size or len(noise), *place) as known:
            if reference is None:
                reference = converged(sampled, fine, get_solver(REFERENCE_SOLVER), noise, progress, known)
            else:
                _warn_of_another(known, reference, place[1])
            with progress_bar(calls * len(noise), progress, "comparing") as advance:
                for name, (run, method, steps) in runs.items():
                    ends = torch.cat(list(sampled(run, method, advance)))
                    rows.append(row_of(name, method.name, steps, method.model_calls(steps), ends, reference))
    except BaseException as error:  # also Ctrl-C: the reference takes most of the calls
        if isinstance(finished := reference or getattr(error, "partial", None), Reference):  # others' may be anything
            attach_finished(error, Comparison(tuple(rows), len(finished.noise), finished))
        raise
    return Comparison(tuple(rows), len(noise), reference)


def comparison_calls(
    denoiser: Denoiser,
    schedules: Mapping[str, Schedule | Tensor],
    solver: str | Solver | None = None,
    *,
    samples: int | range = 256,
    reference_steps: int = REFERENCE_STEPS,
) -> tuple[int, int]:
    """The numbers of model calls that `compare` makes with these arguments, for the reference and for all schedules."""
    runs = _planned(denoiser, schedules, solver)
    reference = level_count(denoiser.process, validate.positive_int("reference_steps", reference_steps, minimum=2))
    each = sum(method.model_calls(steps) for _, method, steps in runs.values())
    count = len(validate.sample_range("samples", samples))
    return reference * count, each * count


def _planned(
    denoiser: Denoiser, schedules: Mapping[str, Schedule | Tensor], solver: str | Solver | None
) -> dict[str, tuple[Schedule | Tensor, Solver, int]]:
    """The schedule or sigmas, the solver and the steps of each; checked before any model call."""
    runs = {}
    for name, schedule in schedules.items():
        values = check_sigmas(f"schedules[{name!r}]", schedule, to_zero=True)
        if isinstance(schedule, Schedule) and schedule.noise != denoiser.process.kind:
            raise ValueError(
                f"schedules[{name!r}] is for a {schedule.noise!r} noise process, and the denoiser's is "
                f"{denoiser.process.kind!r}; compare schedules of one model"
            )
        if solver is None and not isinstance(schedule, Schedule):
            raise ValueError(f"solver must be given, because schedules[{name!r}] is not a Schedule and names none")
        try:
            denoiser.process.level(values)  # raises where sigmas are not of this process
            method = schedule_solver(schedule, solver)
            if getattr(schedule, "network_sigmas", None) is not None:
                check_decoupled(method.name)
        except ValueError as error:
            raise ValueError(f"schedules[{name!r}]: {error}") from None
        check_start(f"schedules[{name!r}]", values, denoiser)
        runs[name] = (schedule if isinstance(schedule, Schedule) else values, method, len(values) - 1)
    return runs


def row_of(name: str, solver: str, steps: int, model_calls: int, ends: Tensor, reference: Reference) -> ComparisonRow:
    """The errors of the samples ``ends`` [B, *shape] against the converged ones; `ComparisonRow` defines them."""
    squared = metrics.squared_distances(ends, reference.ends)
    mean, error = metrics.mean_and_standard_error(squared)
    return ComparisonRow(
        name=name,
        solver=solver,
        steps=steps,
        model_calls=model_calls,
        typical_error=metrics.geometric_mean(squared.maximum(metrics.rounding_floor(reference.ends))),
        mean_error=mean,
        standard_error=error,
        frechet=metrics.frechet_distance(ends, reference.ends) if len(ends) > 1 else math.nan,
    )


def _warn_of_another(known: Tensor | None, reference: Reference, dtype: torch.dtype) -> None:
    """Warn if the reference is of another denoiser than that of the fingerprint: of a teacher, say, it may be meant."""
    if not same_network(reference.fingerprint, known, dtype):
        validate.warn(
            "reference was made with another network, parameterisation or dtype, so that errors are distances "
            "to that one's samples; leave it out, or make one of this denoiser by fastsched.converged_reference",
        )


#: Checks of the arguments of `compare`.
_CHECKS: dict[str, validate.Check] = {
    "schedules": validate.named,  # `_planned` checks each schedule
    "shape": validate.optional(validate.CHECKS["shape"]),
    "reference": validate.optional(
        partial(validate.instance, kind=Reference, made_by="fastsched.converged_reference returns one")
    ),
}
