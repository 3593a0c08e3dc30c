"""Rank candidates by running the sampler: successive halving over the measured samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fastsched import validate
from fastsched.denoisers.denoiser import Denoiser
from fastsched.fitting.candidates import candidates_in_turn
from fastsched.fitting.interrupts import BestSoFar
from fastsched.fitting.rollouts import Rollout, Run, Runner, distances
from fastsched.measurement.measuring import check_same_network
from fastsched.measurement.statistics import PathStatistics
from fastsched.metrics import power_mean
from fastsched.sampling.fitted import chosen_solver
from fastsched.sampling.progress import Progress, progress_bar
from fastsched.sampling.schedule import Schedule, check_kind, check_sigmas, check_start
from fastsched.sampling.solvers import Solver

#: How many candidates run on all samples.
FINALISTS = 2

#: How many candidates an audition has by default.
CANDIDATES = 6


@dataclass(frozen=True, eq=False)
class Candidate:
    """The result of running one candidate schedule.

    Attributes:
        name: The candidate's name.
        schedule: The schedule, with its measured error.
        errors: ``||x0 - x0_path||^2`` of each sample that was run, in the order of the statistics' samples, [<= B].
        log_ratio: Mean of ``log(error / error of the winner)`` over the samples that this candidate ran.
        stderr: The standard error of `log_ratio`, from the paired differences; NaN with fewer than two samples.
        rollout: The ends of the samples, [<= B, *shape]; and the network evaluations on the way, if the candidate ran
            as many samples as the winner.
    """

    name: str
    schedule: Schedule
    errors: Tensor = field(repr=False)
    log_ratio: float
    stderr: float
    rollout: Rollout = field(repr=False)

    @property
    def error(self) -> float:
        """Power mean of the errors (`fastsched.metrics.power_mean`). Candidates are ranked by it."""
        return float(power_mean(self.errors))


@dataclass(frozen=True, eq=False)
class Audition:
    """The ranking of all candidates, the best first, and its cost.

    Attributes:
        table: The candidates that ran all samples, by error; then the candidates dropped before that.
        model_calls: Network evaluations; a batch of B counts as B.
    """

    table: tuple[Candidate, ...]
    model_calls: int

    @property
    def winner(self) -> Schedule:
        """The schedule of least error; the error is its ``measured_error``."""
        return self.table[0].schedule

    def complete(self, samples: int) -> list[tuple[Schedule, Rollout]]:
        """The schedules that ran exactly this number of samples, and their runs."""
        return [(row.schedule, row.rollout) for row in self.table if len(row.rollout.ends) == samples]

    def __str__(self) -> str:
        rows = [f"{'candidate':24} {'error':>14} {'against the winner':>20} {'samples':>8}"]
        for row in self.table:
            spread = "" if math.isnan(row.stderr) else f" x/ {math.exp(row.stderr):.2f}"
            against = f"{math.exp(row.log_ratio):.2f}{spread}"
            rows.append(f"{row.name:24} {row.error:14.4g} {against:>20} {len(row.errors):8d}")
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
    checks: bool = True,
    progress: Progress = True,
) -> Audition:
    """Run candidate schedules with the real solver from the noises of the measured paths, and rank them by their error.

    The error of a sample is its squared distance to the end of the measured path. The paths have the accuracy of N
    steps of third-order UniPC, so differences between errors close to that accuracy mean little. All candidates run on
    the first three eighths of the samples, and the best two also on the rest. Candidates are ranked by the power mean
    over samples (`fastsched.metrics.power_mean`).

    Args:
        denoiser: The denoiser that ``stats`` was measured on.
        stats: What `fastsched.measure` returned.
        steps: Steps of the candidates.
        solver: A solver's name.
        candidates: Schedules by name, each of ``steps`` steps; when None, up to six of `fastsched.fitting.candidates`.
        samples: How many of the statistics' samples to use; all when None.
        batch_size: Samples run at once; all when None.
        device: Where to run; where the network's parameters are when None.
        dtype: What the network computes in; that of its parameters when None.
        checks: Whether to check the denoiser against ``stats``: by one call, and the first outputs of each run.
        progress: Show a progress bar, or a function called with the model calls done and their total.

    Returns:
        The ranking; after Ctrl-C, with a warning, of the candidates that were run. Cost: at most ``steps`` calls
        (``2 steps - 1`` for two-stage solvers) a sample and candidate.

    Raises:
        ValueError: If there is no candidate, a candidate has another number of steps or starts where ``D`` is not
            finite, the statistics are of another network, or the network returns NaN or inf.
    """
    validate.arguments(
        locals(), candidates=validate.optional(validate.named), samples=validate.optional(validate.positive_int)
    )
    method = chosen_solver(solver)
    count = stats.samples if samples is None else validate.positive_int("samples", samples)
    if count > stats.samples:
        raise ValueError(f"samples must be at most the {stats.samples} that were measured, got {count}")
    chosen = _checked(stats, steps, method, candidates)
    for name, schedule in chosen.items():
        check_start(f"candidates[{name!r}]", schedule, denoiser)
    check_calls = check_same_network(denoiser, stats, device, dtype) if checks else 0
    runner = Runner(denoiser, stats, method, batch_size, device, dtype, checks)
    total, calls = sample_runs(len(chosen), count), method.model_calls(steps)
    with progress_bar(total * calls, progress, "audition") as runner.advance:
        found = _ranked_until_interrupted(BestSoFar(runner, stats), chosen, calls, count)
    return replace(found, model_calls=found.model_calls + check_calls)


def _ranked_until_interrupted(run: BestSoFar, candidates: Mapping[str, Schedule], calls: int, samples: int) -> Audition:
    """`ranked`, but after Ctrl-C of the candidates that were run, with a warning."""
    try:
        return ranked(run, run.stats, candidates, calls, samples)
    except KeyboardInterrupt:
        runs = {name: run.joined(schedule) for name, schedule in candidates.items() if id(schedule) in run.finished}
        if not runs:
            raise
    validate.warn(f"interrupted: this ranking is of the {len(runs)} of {len(candidates)} candidates that were run")
    spent = sum(len(each.ends) for each in runs.values())
    return Audition(_table({name: candidates[name] for name in runs}, run.stats, runs), calls * spent)


def ranked(run: Run, stats: PathStatistics, candidates: Mapping[str, Schedule], calls: int, samples: int) -> Audition:
    """Rank named candidates by successive halving with any sampler, on the first ``samples`` measured samples.

    A run takes ``calls`` network evaluations per sample. A candidate is dropped if one of its runs returns None.
    ValueError if none could be run.
    """
    first = first_round(samples) if len(candidates) > FINALISTS else samples
    runs: dict[str, Rollout] = {}
    for name, schedule in candidates.items():
        rollout = run(schedule, 0, first)
        if rollout is not None:
            runs[name] = rollout
    spent = len(candidates) * first
    if first < samples:
        for name in sorted(runs, key=lambda name: float(power_mean(distances(stats, runs[name].ends))))[:FINALISTS]:
            rest = run(candidates[name], first, samples)
            spent += samples - first
            if rest is None:
                del runs[name]
            else:
                runs[name] = Rollout.joined([runs[name], rest])
    if not runs:
        raise ValueError(
            f"the sampler gave NaN or inf, or could not be run, under every one of {len(candidates)} schedules"
        )
    return Audition(_table({name: candidates[name] for name in runs}, stats, runs), calls * spent)


def _checked(
    stats: PathStatistics, steps: int, method: Solver, candidates: Mapping[str, Any] | None
) -> dict[str, Schedule]:
    steps = validate.positive_int("steps", steps)
    if candidates is None:
        return dict(islice(candidates_in_turn(stats, steps, method), CANDIDATES))
    chosen = {}
    for name, given in candidates.items():
        sigmas = check_sigmas(f"candidates[{name!r}]", given)
        check_kind(f"candidates[{name!r}]", given, stats.process)
        try:
            if isinstance(given, Schedule):
                predicted = given.predicted_error if given.solver == method.name else None  # else of another solver
                schedule = replace(given, solver=method.name, predicted_error=predicted)
            else:
                schedule = Schedule.from_levels(stats.process, stats.process.level(sigmas), method.name)
        except ValueError as error:
            raise ValueError(f"candidates[{name!r}]: {error}") from None
        if schedule.steps != steps:
            raise ValueError(f"candidates[{name!r}] has {schedule.steps} steps, not {steps}")
        chosen[name] = schedule
    return chosen


def first_round(samples: int) -> int:
    """The number of samples that every candidate runs: three eighths of all, rounded up."""
    return -(-3 * samples // 8)


def sample_runs(candidates: int, samples: int) -> int:
    """How many samples are run in an audition, summed over the candidates; only finalists run all ``samples``."""
    return min(candidates, FINALISTS) * samples + max(candidates - FINALISTS, 0) * first_round(samples)


def _table(
    candidates: Mapping[str, Schedule], stats: PathStatistics, runs: Mapping[str, Rollout]
) -> tuple[Candidate, ...]:
    errors = {name: distances(stats, run.ends) for name, run in runs.items()}
    order = sorted(candidates, key=lambda name: (-len(errors[name]), float(power_mean(errors[name]))))
    best = errors[order[0]]
    rows = []
    for name in order:
        own = errors[name]
        difference = own.log() - best[: len(own)].log()
        stderr = float(difference.std() / math.sqrt(len(own))) if len(own) > 1 else math.nan
        run = runs[name] if len(own) == len(best) else Rollout(runs[name].ends)
        schedule = replace(candidates[name], measured_error=float(power_mean(own)))
        rows.append(Candidate(name, schedule, own, float(difference.mean()), stderr, run))
    return tuple(rows)
