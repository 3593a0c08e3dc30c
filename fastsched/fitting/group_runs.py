"""Runs of the sampler, with the samples shared among the processes of a ``torch.distributed`` group.

Only the first process decides which schedule runs next, so that processes cannot make different decisions. The others
only run their part of the samples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fastsched.fitting.rollouts import Rollout, Run
from fastsched.fitting.run_log import identity
from fastsched.measurement.devices import (
    attempted,
    broadcast_by_first,
    check_alike,
    described,
    gathered_by_first,
    joint_failure,
    rank_and_size,
    share,
)
from fastsched.measurement.statistics import PathStatistics, with_vectors
from fastsched.sampling.schedule import Schedule


def check_group(stats: PathStatistics | None, group: Any, **arguments: Any) -> None:
    """ValueError, which names them, if the processes of ``group`` were given different arguments or statistics."""
    check_alike({**arguments, "stats": None if stats is None else identity(stats)["stats"]}, group)


def led_by_first(run: Run, work: Callable[[Run], Any], group: Any) -> Any:
    """``work(run)``, the report of a fit, with the samples of each run shared among the processes of ``group``.

    Only the first process calls ``work``. Every process gets the report; all but the first get it without increments
    and responses, which are large and not needed there.

    Raises:
        RuntimeError: If another process failed. The process that failed raises its own error.
    """
    rank, size = rank_and_size(group)
    if size == 1:
        return work(run)
    if rank > 0:
        return _follow(run, group)
    try:
        result = work(lambda schedule, first, last: _run_by_all(run, schedule, first, last, group))
    except Exception as error:
        with contextlib.suppress(Exception):  # if the error is that a process has died, this fails as well
            broadcast_by_first(("failed", described(error)), group)
        raise
    light = with_vectors(result.stats, None)
    broadcast_by_first(("done", replace(result, stats=light)), group)
    return result


def _run_by_all(run: Run, schedule: Schedule, first: int, last: int, group: Any) -> Rollout | None:
    """In the first process: a run of which every process makes a part; None if it cannot be made."""
    broadcast_by_first(("run", (schedule, first, last)), group)
    own, failure = _own_part(run, schedule, first, last, group)
    found = gathered_by_first((own, described(failure)), group)
    assert found is not None  # the first process gets the results
    error = joint_failure([text for _, text in found], failure)
    if error is not None:
        raise error
    parts = [part for own, _ in found for part in own]
    return None if any(part is None for part in parts) else Rollout.joined(parts)


def _follow(run: Run, group: Any) -> Any:
    """In the other processes: make parts of runs until the first has the report, and return it."""
    failure: Exception | None = None
    while True:
        what, value = broadcast_by_first(None, group)
        if what == "done":
            return value
        if what == "failed":
            raise failure if failure is not None else RuntimeError(f"process 0 of the group failed: {value}")
        schedule, first, last = value
        own, failure = _own_part(run, schedule, first, last, group)
        gathered_by_first((own, described(failure)), group)


def _own_part(
    run: Run, schedule: Schedule, first: int, last: int, group: Any
) -> tuple[list[Rollout | None], Exception | None]:
    """The run of this process's samples, in a list that is empty if it has none; and the error if it failed."""
    own = share(range(first, last), group)
    if len(own) == 0:
        return [], None
    made, failure = attempted(lambda: run(schedule, int(own[0]), int(own[-1]) + 1))
    return [made], failure
