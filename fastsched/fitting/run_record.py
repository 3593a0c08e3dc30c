"""The runs of a tuning, and the predictions from them for schedules near one of the runs.

Predictions use only the Gram matrix of the vectors: those of the measurement, and those that the runs add.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastsched.costs.norms import Array, Norms
from fastsched.costs.secants import KnownAnswers, Secants
from fastsched.costs.surrogate import Surrogate
from fastsched.fitting.neighbourhood import Neighbourhood, Point, log_ratio
from fastsched.fitting.rollouts import Evaluations, Rollout, distances, rounding_of
from fastsched.fitting.run_secants import residuals, with_runs
from fastsched.measurement.statistics import PathStatistics
from fastsched.metrics import power_mean
from fastsched.sampling.sampler import calls_of, nodes_of, schedule_solver
from fastsched.sampling.schedule import Schedule
from fastsched.sampling.solvers import Solver

#: How many elements of each vector are converted to float64 at a time.
ELEMENTS = 1 << 16


def increments_of(stats: PathStatistics) -> Tensor:
    """The increments, [B, N-1, d]; ValueError if they were not kept."""
    if stats.increments is None:
        raise ValueError("stats must hold the increments: measure with keep_increments=True")
    return stats.increments


@dataclass(frozen=True, eq=False)
class Trial:
    """A run: its schedule and errors, and the columns of its vectors in the Gram matrix."""

    schedule: Schedule  #: with its measured error
    point: Point  #: its levels, weights and offsets
    errors: Tensor  #: ``||x0 - x0_path||^2`` of each sample, [B]
    s: Array  #: the levels of the network evaluations; empty if they are not known
    first: int  #: the column of the first residual; the others follow
    column: int  #: the column of the error

    @property
    def error(self) -> float:
        """The power mean of the errors."""
        return float(power_mean(self.errors))

    @property
    def offsets(self) -> Array:
        """The offset of each network evaluation; with decoupled levels there is one evaluation a step."""
        return np.zeros(len(self.s)) if self.point.offsets is None else self.point.offsets


class RunRecord:
    """The runs so far, and predictions from them for schedules near one of the runs.

    The first runs are those in ``known``. The measurement must have increments. If ``decoupled`` is not None, or a
    known schedule has decoupled levels, the network may be told other levels than the states' (`Schedule.decoupled`).
    """

    def __init__(
        self,
        stats: PathStatistics,
        method: Solver,
        known: Sequence[tuple[Schedule, Rollout]] = (),
        *,
        decoupled: str | None = None,
    ) -> None:
        self.stats, self.method, self.surrogate = stats, method, Surrogate.of(stats)
        self.decoupled = next((each.decoupled for each, _ in known if each.decoupled is not None), decoupled)
        self.trials: list[Trial] = []
        #: Increments, responses, and each run's residuals and error, [B, n, d]; a list, because a joined copy is large.
        self._vectors = [increments_of(stats)] + ([] if stats.responses is None else [stats.responses])
        self._gram = stats.vector_gram.numpy()  # of all vectors, [B, n, n]
        for schedule, rollout in known:
            self.add(schedule, rollout)

    def best(self) -> int:
        """The index of the run of least error."""
        return min(range(len(self.trials)), key=lambda m: self.trials[m].error)

    def add(self, schedule: Schedule, rollout: Rollout) -> None:
        """Add a run and its vectors."""
        squared = distances(self.stats, rollout.ends)
        error = (rollout.ends.double() - self.stats.ends.double()).flatten(1)[:, None]
        levels, weights = self.stats.process.level(schedule.sigmas), schedule.weights
        s, found = self._levels_and_residuals(rollout.evaluations, levels)
        offsets = None if self.decoupled is None else _offsets(self.stats, schedule)
        first = self._add_vectors(torch.cat([found, error.float()], dim=1))
        self.trials.append(
            Trial(
                schedule=replace(schedule, measured_error=float(power_mean(squared))),
                point=Point(levels.numpy(), None if weights is None else weights.numpy(), offsets),
                errors=squared,
                s=s,
                first=first,
                column=self._gram.shape[1] - 1,
            )
        )

    def _levels_and_residuals(self, found: Evaluations | None, levels: Tensor) -> tuple[Array, Tensor]:
        """Levels and residuals of a run's evaluations; empty if not kept, not of the expected number, or not finite."""
        if found is not None and len(found.s) == calls_of(self.method, nodes_of(self.stats.process, levels)):
            vectors = residuals(self.surrogate, self.stats, found)
            if bool(vectors.isfinite().all()):
                return np.array(found.s), vectors
        return np.zeros(0), self._vectors[0][:, :0]

    def _add_vectors(self, vectors: Tensor) -> int:
        """Add vectors [B, m, d] to the Gram matrix; returns the column of the first."""
        self._vectors.append(vectors)
        rows = [_products([each[b] for each in self._vectors], own) for b, own in enumerate(vectors)]
        columns, before = np.stack(rows), self._gram.shape[1]  # [B, n + m, m]
        self._gram = np.block([[self._gram, columns[:, :before]], [columns.transpose(0, 2, 1)]])
        return before

    def near(self, anchor: int) -> Neighbourhood:
        """The neighbourhood of a run, with predictions from all runs and the measurement."""
        trial = self.trials[anchor]
        norms = Norms(self._gram, trial.errors.numpy())  # relative to each sample's error in this run
        others = [other for other in self.trials if other is not trial]
        return Neighbourhood(
            surrogate=self.surrogate,
            secants=self.secants(anchor, norms),
            norms=norms,
            solver=self.method,
            run=trial.point,
            column=trial.column,
            others=np.array([other.point.parameters for other in others]).reshape(len(others), -1 if others else 0),
            columns=[other.column for other in others],
            least=rounding_of(self.stats),
        )

    def secants(self, anchor: int, norms: Norms) -> Secants:
        """The secants of the measurement, and of all runs with known evaluations, for schedules near the ``anchor``."""
        near = self.trials[anchor]
        known = [trial for trial in self.trials if len(trial.s) == len(near.s) > 0]
        s = np.array([trial.s for trial in known])
        deviations = np.array([self._deviations(trial, norms.vectors) for trial in known])
        columns = np.array([trial.first + np.arange(len(trial.s)) for trial in known])
        offsets = np.array([trial.offsets for trial in known])
        # The squared norm of unit noise, relative to the samples' errors and averaged, as the metric is.
        noise = math.prod(self.stats.shape) * float((1 / norms.size).mean())
        place = known.index(near) if known else 0
        return with_runs(self.surrogate.secants, s, deviations, columns, offsets, place, norms.metric, noise)

    def _deviations(self, trial: Trial, vectors: int) -> Array:
        """Deviations of a run from the path at its evaluations, [evaluations, V]."""
        answers = KnownAnswers(trial.first, vectors)
        return self.surrogate.run(trial.point.levels[None], schedule_solver(trial.schedule), answers).deviations[:, 0]


def _offsets(stats: PathStatistics, schedule: Schedule) -> Array:
    """``log`` of the levels that the network is told over the states' levels, [steps]; 0 at pure noise."""
    if schedule.network_sigmas is None:
        return np.zeros(schedule.steps)
    levels, asked = (stats.process.level(each).numpy() for each in (schedule.sigmas[:-1], schedule.network_sigmas))
    return log_ratio(asked, levels)


def _products(rows: Sequence[Tensor], vectors: Tensor) -> Array:
    """Inner products of rows, [n, d] each, with vectors [m, d]: [sum of n, m] float64, `ELEMENTS` at a time."""
    found = torch.zeros(sum(map(len, rows)), len(vectors), dtype=torch.float64, device="cpu")
    for start in range(0, vectors.shape[1], ELEMENTS):
        part = slice(start, start + ELEMENTS)
        own = vectors[:, part].double().T
        found += torch.cat([each[:, part].double() @ own for each in rows])
    return found.numpy()
