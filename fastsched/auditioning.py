"""Let candidate schedules sample, and keep the best: the sampler's own word is the last one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastsched import baselines, validate
from fastsched.costs.path import WEIGHTS
from fastsched.denoiser import Denoiser
from fastsched.measurement import noise_of
from fastsched.metrics import squared_distances
from fastsched.optimal import optimal_schedule
from fastsched.path_statistics import PathStatistics
from fastsched.planning import predict_error
from fastsched.progress import progress_bar
from fastsched.sampling import sample
from fastsched.schedule import Schedule
from fastsched.solvers import Solver, get_solver

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
    """

    name: str
    schedule: Schedule
    errors: Tensor
    log_ratio: float
    stderr: float

    @property
    def typical_error(self) -> float:
        """Geometric mean of the errors."""
        return float(self.errors.log().mean().exp())


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


def default_candidates(stats: PathStatistics, steps: int, solver: str | Solver) -> dict[str, Schedule]:
    """Up to eight schedules: selections under each weight, that for ddim, and two schedules in common use.

    Of karras and exponential, each with its end kept and spared, kl_optimal with the data's own deviation (and uniform
    and shifted times for flow models), the two of least predicted error. Statistics without a sensitivity give
    unweighted selections alone. Schedules that coincide are listed once.
    """
    name = get_solver(solver).name
    found: dict[str, Schedule] = {}
    for weight in (None,) if stats.cross is None else WEIGHTS:
        found[f"{weight or 'unweighted'}, polished"] = optimal_schedule(stats, steps, name, weight=weight)
    default = None if stats.cross is None else "geometric"
    for weight in dict.fromkeys((default, None)):
        found[weight or "unweighted"] = optimal_schedule(stats, steps, name, weight=weight, polish=False)
    ddim = optimal_schedule(stats, steps, "ddim", weight=default, polish=False)
    found["ddim's"] = replace(ddim, solver=name, predicted_error=None)
    common = {
        label: Schedule.from_levels(stats.process, levels, name)
        for label, levels in _common_levels(stats, steps).items()
    }
    expected = {label: predict_error(stats, schedule, name, weight=default) for label, schedule in common.items()}
    for label in sorted(common, key=expected.__getitem__)[:2]:
        found[label] = common[label]
    distinct: dict[str, Schedule] = {}
    for label, schedule in found.items():
        if not any(torch.allclose(schedule.sigmas, other.sigmas, rtol=1e-6, atol=0) for other in distinct.values()):
            distinct[label] = schedule
    return distinct


def _common_levels(stats: PathStatistics, steps: int) -> dict[str, Tensor]:
    """Levels ``s`` [steps + 1] of the schedules in common use, over the measured range."""
    finite = stats.s[stats.s.isfinite()]
    low, high = float(finite[-1]), float(finite[0])
    scale = max(stats.data_std, low)  # 0 for a constant denoiser
    levels = {
        "karras": baselines.karras(steps, low, high),
        "karras, end spared": baselines.karras(steps, low, high, spare_last=True),
        "exponential": baselines.exponential(steps, low, high),
        "exponential, end spared": baselines.exponential(steps, low, high, spare_last=True),
        "kl_optimal, end spared": baselines.kl_optimal(steps, low, high, scale, spare_last=True),
    }
    if getattr(stats.process, "integer_timesteps", False):
        return {label: _snapped(each, stats.s) for label, each in levels.items()}
    for each in levels.values():
        each[0] = stats.s[0]  # pure noise, where the process starts from it
    if stats.process.kind == "flow":
        top = float(stats.process.sampler_sigma(stats.s[:1]))
        for label, shift in {"uniform times": 1.0, "shift 3": 3.0}.items():
            levels[label] = stats.process.level(top * baselines.flow_shift(steps, shift))
    return levels


def _snapped(sigmas: Tensor, s: Tensor) -> Tensor:
    """``sigmas`` [steps + 1] moved to distinct levels of the grid ``s``, as near as order allows."""
    chosen: list[int] = []
    inner = sigmas[:-1]
    for n, sigma in enumerate(inner):
        low, high = (chosen[-1] + 1 if chosen else 0), len(s) - (len(inner) - n)
        nearest = int((s.log() - sigma.log()).abs().argmin())
        chosen.append(min(max(nearest, low), high))
    return torch.cat([s[chosen], s.new_zeros(1)])


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
    ends, which are converged to the path's own accuracy (that of N steps of DPM-Solver++(3M)); among schedules that
    come near it, differences mean little. The rank is by the geometric mean over samples, which a few samples that
    change mode do not decide. All run on
    the first three eighths of the samples, and the best two on the rest.

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
    stage = _Stage(denoiser, stats, method, batch_size, device, dtype)
    first = -(-3 * count // 8) if len(entrants) > FINALISTS else count
    errors: dict[str, Tensor] = {}
    total = len(entrants) * first + FINALISTS * (count - first)
    with progress_bar(total * method.model_calls(steps), progress, "audition") as advance:
        for name, schedule in entrants.items():
            errors[name] = stage.errors(schedule, 0, first, advance)
        if first < count:
            leaders = sorted(entrants, key=lambda name: _typical(errors[name]))[:FINALISTS]
            for name in leaders:
                rest = stage.errors(entrants[name], first, count, advance)
                errors[name] = torch.cat([errors[name], rest])
    calls = method.model_calls(steps) * sum(len(each) for each in errors.values())
    return Audition(_table(entrants, errors), calls)


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


class _Stage:
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
        self.noise, self.ends = noise_of(stats.seeds, stats.shape), stats.ends
        self.batch = stats.samples if batch_size is None else validate.positive_int("batch_size", batch_size)

    def errors(self, schedule: Schedule, first: int, last: int, advance: Any) -> Tensor:
        """Squared distances of samples ``first .. last - 1`` to their paths' ends."""
        parts = []
        for start in range(first, last, self.batch):
            rows = slice(start, min(start + self.batch, last))
            noise = self.noise[rows].to(self.device)
            found = sample(self.denoiser, schedule.sigmas, self.method, noise, dtype=self.dtype)
            parts.append(squared_distances(found.cpu(), self.ends[rows]))
            advance(len(noise) * self.method.model_calls(schedule.steps))
        # an exact hit must not make a geometric mean 0: rounding of the ends is the least that can be told apart
        floor = torch.finfo(torch.float32).eps ** 2 * self.ends.double().square().flatten(1).sum(1).mean()
        return torch.cat(parts).clamp_min(max(float(floor), torch.finfo(torch.float64).tiny))


def _typical(errors: Tensor) -> float:
    return float(errors.log().mean())


def _table(entrants: Mapping[str, Schedule], errors: Mapping[str, Tensor]) -> tuple[Candidate, ...]:
    order = sorted(entrants, key=lambda name: (-len(errors[name]), _typical(errors[name])))
    best = errors[order[0]]
    rows = []
    for name in order:
        own = errors[name]
        difference = own.log() - best[: len(own)].log()
        spread = float(difference.std() / math.sqrt(len(own))) if len(own) > 1 else math.nan
        schedule = replace(entrants[name], measured_error=float(own.log().mean().exp()))
        rows.append(Candidate(name, schedule, own, float(difference.mean()), spread))
    return tuple(rows)
