"""Let candidate schedules sample, and keep the best: the sampler's own word is the last one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastsched import validate
from fastsched.denoisers.denoiser import Denoiser
from fastsched.fitting.candidates import default_candidates
from fastsched.fitting.secants import Performance, Recorder
from fastsched.measurement.statistics import PathStatistics
from fastsched.metrics import geometric_mean, squared_distances
from fastsched.progress import progress_bar
from fastsched.sampling.random_streams import noise_of
from fastsched.sampling.sampler import sample
from fastsched.sampling.schedule import Schedule
from fastsched.sampling.solvers import Solver, get_solver

#: How many candidates run on all samples.
FINALISTS = 2


@dataclass(frozen=True, eq=False)
class Candidate:
    """How one schedule fared.

    Attributes:
        name: What it is.
        schedule: The schedule, with its measured error.
        errors: ``||x0 - x0_path||^2`` of each sample it ran, in the order of the statistics' samples, [<= B].
        log_ratio: Mean over the samples that both ran of ``log(error / error of the winner)``.
        stderr: The standard error of `log_ratio`, from the paired differences; NaN with fewer than two samples.
        performance: Where the samples it ran ended, [<= B, *shape]; and what the network said on the way, an image for
            each call, if it ran as many as the winner.
    """

    name: str
    schedule: Schedule
    errors: Tensor
    log_ratio: float
    stderr: float
    performance: Performance

    @property
    def typical_error(self) -> float:
        """Geometric mean of the errors."""
        return geometric_mean(self.errors)


@dataclass(frozen=True, eq=False)
class Audition:
    """The outcome: every candidate, the best first, and what it took.

    Attributes:
        table: The candidates that ran all samples, by typical error; then those dropped on the way.
        model_calls: Network evaluations, counted per sample.
    """

    table: tuple[Candidate, ...]
    model_calls: int

    @property
    def winner(self) -> Schedule:
        """The schedule of least typical error, with that error as ``measured_error``."""
        return self.table[0].schedule

    def __str__(self) -> str:
        rows = [f"{'candidate':24} {'typical error':>14} {'against the winner':>20} {'samples':>8}"]
        for row in self.table:
            spread = "" if math.isnan(row.stderr) else f" x/ {math.exp(row.stderr):.2f}"
            against = f"{math.exp(row.log_ratio):.2f}{spread}"
            rows.append(f"{row.name:24} {row.typical_error:14.4g} {against:>20} {len(row.errors):8d}")
        return "\n".join(rows)


def audition(
    denoiser: Denoiser,
    stats: PathStatistics,
    steps: int,
    solver: str | Solver = "dpmpp_2m",
    candidates: Mapping[str, Schedule | Tensor | Sequence[float]] | None = None,
    *,
    samples: int | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Audition:
    """Run candidate schedules with the real solver on the measured paths' noises, and rank them by typical error.

    Each candidate samples from the noises of the paths in ``stats``; its error is the squared distance to the paths'
    ends, which are converged to the path's own accuracy (that of N steps of third-order UniPC); among schedules that
    come near it, differences mean little. The rank is by the geometric mean over samples, which a few samples that
    change mode do not decide. All run on the first three eighths of the samples, and the best two on the rest.

    Args:
        denoiser: The denoiser that ``stats`` was measured on.
        stats: What `fastsched.measure` returned.
        steps: Steps of the candidates.
        solver: A solver's name.
        candidates: Schedules by name, each of ``steps`` steps; `default_candidates` when None.
        samples: How many of the statistics' samples to use; all when None.
        batch_size: Samples run at once; all when None.
        device: Where to run; where the network's parameters are when None.
        dtype: What the network computes in; that of its parameters when None.
        progress: Show a progress bar.

    Returns:
        The ranking. Cost: at most ``steps`` calls (``2 steps - 1`` for two-stage solvers) a sample and candidate.

    Raises:
        ValueError: If there is no candidate, one has another number of steps, or the network returns NaN or inf.
    """
    method = get_solver(solver)
    count = stats.samples if samples is None else validate.positive_int("samples", samples)
    if count > stats.samples:
        raise ValueError(f"samples must be at most the {stats.samples} that were measured, got {count}")
    entrants = _entrants(stats, steps, method, candidates)
    stage = Stage(denoiser, stats, method, batch_size, device, dtype)
    first = first_round(count) if len(entrants) > FINALISTS else count
    runs: dict[str, Performance] = {}
    total = len(entrants) * first + FINALISTS * (count - first)
    with progress_bar(total * method.model_calls(steps), progress, "audition") as advance:
        for name, schedule in entrants.items():
            runs[name] = stage.run(schedule, 0, first, advance)
        if first < count:
            errors = {name: distances(stats, run.ends) for name, run in runs.items()}
            for name in sorted(entrants, key=lambda name: geometric_mean(errors[name]))[:FINALISTS]:
                runs[name] = Performance.joined([runs[name], stage.run(entrants[name], first, count, advance)])
    calls = method.model_calls(steps) * sum(len(run.ends) for run in runs.values())
    return Audition(_table(entrants, stats, runs), calls)


def _entrants(
    stats: PathStatistics, steps: int, method: Solver, candidates: Mapping[str, Any] | None
) -> dict[str, Schedule]:
    steps = validate.positive_int("steps", steps)
    if candidates is None:
        return default_candidates(stats, steps, method)
    if not candidates:
        raise ValueError("candidates must hold at least one schedule")
    entrants = {}
    for name, given in candidates.items():
        if isinstance(given, Schedule):
            schedule = replace(given, solver=method.name)
        else:
            levels = stats.process.level(validate.descending_sigmas(given, name=f"candidates[{name!r}]"))
            schedule = Schedule.from_levels(stats.process, levels, method.name)
        if schedule.steps != steps:
            raise ValueError(f"candidates[{name!r}] has {schedule.steps} steps, not {steps}")
        entrants[name] = schedule
    return entrants


def first_round(samples: int) -> int:
    """Of how many of the samples every candidate runs."""
    return -(-3 * samples // 8)


class Stage:
    """Where candidates perform: the noises, the ends to meet, and how to run."""

    def __init__(
        self,
        denoiser: Denoiser,
        stats: PathStatistics,
        method: Solver,
        batch_size: int | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        self.denoiser, self.method = denoiser, method
        self.device = torch.device(device) if device is not None else denoiser.device
        self.dtype = dtype if dtype is not None else denoiser.dtype
        self.noise = noise_of(stats.seeds, stats.shape)
        self.batch = stats.samples if batch_size is None else validate.positive_int("batch_size", batch_size)

    def run(self, schedule: Schedule, first: int, last: int, advance: Callable[[int], None]) -> Performance:
        """Samples ``first .. last - 1`` under a schedule."""
        parts = []
        for start in range(first, last, self.batch):
            noise = self.noise[start : min(start + self.batch, last)].to(self.device)
            recorder = Recorder.of(self.denoiser)
            ends = sample(recorder, schedule.sigmas, self.method, noise, dtype=self.dtype).cpu()
            parts.append(Performance(ends, recorder.evaluations()))
            advance(len(noise) * self.method.model_calls(schedule.steps))
        return Performance.joined(parts)


def distances(stats: PathStatistics, ends: Tensor) -> Tensor:
    """Squared distances of ends [<= B, *shape] to those of the first paths, [<= B] float64.

    An exact hit must not make a geometric mean 0: rounding of the ends is the least that can be told apart.
    """
    return squared_distances(ends, stats.ends[: len(ends)]).clamp_min(rounding_of(stats))


def rounding_of(stats: PathStatistics) -> float:
    """The squared distance that float32 rounding of the ends makes."""
    floor = torch.finfo(torch.float32).eps ** 2 * stats.ends.double().square().flatten(1).sum(1).mean()
    return max(float(floor), torch.finfo(torch.float64).tiny)


def _table(
    entrants: Mapping[str, Schedule], stats: PathStatistics, runs: Mapping[str, Performance]
) -> tuple[Candidate, ...]:
    errors = {name: distances(stats, run.ends) for name, run in runs.items()}
    order = sorted(entrants, key=lambda name: (-len(errors[name]), geometric_mean(errors[name])))
    best = errors[order[0]]
    rows = []
    for name in order:
        own = errors[name]
        difference = own.log() - best[: len(own)].log()
        spread = float(difference.std() / math.sqrt(len(own))) if len(own) > 1 else math.nan
        run = runs[name] if len(own) == len(best) else Performance(runs[name].ends)
        schedule = replace(entrants[name], measured_error=geometric_mean(own))
        rows.append(Candidate(name, schedule, own, float(difference.mean()), spread, run))
    return tuple(rows)
