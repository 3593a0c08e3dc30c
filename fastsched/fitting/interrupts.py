"""The schedule that an interrupted fit returns."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fastsched import validate
from fastsched.fitting.rollouts import Rollout, Run, distances
from fastsched.measurement.batches import attach_finished
from fastsched.measurement.statistics import PathStatistics
from fastsched.metrics import power_mean
from fastsched.sampling.schedule import Schedule
from fastsched.sampling.solvers import Solver
from fastsched.selection.optimal import optimal_schedule


@dataclass
class BestSoFar:
    """Calls ``run``, and remembers the finished runs of each schedule."""

    run: Run
    stats: PathStatistics
    finished: dict[int, tuple[Schedule, list[Rollout]]] = field(default_factory=dict)

    def __call__(self, schedule: Schedule, first: int, last: int) -> Rollout | None:
        """As ``run``; an error carries the measurement as ``error.partial``."""
        try:
            found = self.run(schedule, first, last)
        except BaseException as error:
            attach_finished(error, self.stats)
            raise
        if found is not None:
            self.finished.setdefault(id(schedule), (schedule, []))[1].append(Rollout(found.ends))
        return found

    def joined(self, schedule: Schedule) -> Rollout:
        """The finished runs of a schedule as one, without the evaluations on the way."""
        return Rollout.joined(self.finished[id(schedule)][1])

    def best(self) -> Schedule | None:
        """The schedule of least error among those that ran on the most samples; None if no schedule was run."""
        runs = [(schedule, distances(self.stats, self.joined(schedule).ends)) for schedule, _ in self.finished.values()]
        if not runs:
            return None
        schedule, errors = min(runs, key=lambda run: (-len(run[1]), float(power_mean(run[1]))))
        spent = sum(one.model_calls * len(part.ends) for one, parts in self.finished.values() for part in parts)
        origin = self.stats.schedule_origin(spent) or schedule.origin
        return replace(schedule, measured_error=float(power_mean(errors)), origin=origin)


def interrupted_schedule(stats: PathStatistics, steps: int, method: Solver, runs: BestSoFar | None = None) -> Schedule:
    """The best schedule known when a fit is interrupted; a warning says where it comes from."""
    best = None if runs is None else runs.best()
    if runs is not None and best is not None:
        what = f"the best of the {len(runs.finished)} that were run"
    else:
        best = optimal_schedule(stats, steps, method.name)
        what = f"that of optimal_schedule for the {stats.samples} paths that were finished"
    validate.warn(
        f"interrupted: this schedule is {what} (fit(checkpoint=PATH) keeps what is finished in files, and the same "
        "call goes on from there)"
    )
    return best
