"""Checkpointed work is killed at random times; it goes on to the same schedule, and little is done twice."""

import multiprocessing.forkserver
import os
import random
import signal
import sys
import time
from unittest import mock

import pytest
import torch
from fuzz.amounts import KILLS
from fuzz.killed_work import KINDS, LEVELS, work

import fastsched as fs

#: What one kill may cost: the calls of one path, and those that check the network.
ONCE_MORE = 2 * LEVELS + 7

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")


@pytest.fixture(scope="module", autouse=True)
def preloaded():
    """A fork server that has the imports; Python's (3.10 to 3.13) does not take over ``sys.path`` to preload them."""
    multiprocessing.set_forkserver_preload(["fuzz.killed_work"])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        multiprocessing.forkserver.ensure_running()


def started(kind, folder):
    context = multiprocessing.get_context("forkserver")
    (folder / "started").unlink(missing_ok=True)
    process = context.Process(target=work, args=(kind, str(folder)))
    process.start()
    while not (folder / "started").exists() and process.is_alive():
        time.sleep(1e-3)
    return process


def finish(kind, folder):
    process, begin = started(kind, folder), time.monotonic()
    process.join(60)
    assert process.exitcode == 0
    return time.monotonic() - begin


def calls(folder):
    return os.path.getsize(folder / "calls")


@pytest.fixture(scope="module", params=KINDS)
def whole(request, tmp_path_factory):
    """A kind of work, the schedule it gives, its calls, and how long it takes."""
    folder = tmp_path_factory.mktemp(request.param)
    seconds = finish(request.param, folder)
    return request.param, fs.Schedule.load(folder / "result"), calls(folder), seconds


def test_killed_work_goes_on_to_the_same_schedule(whole, tmp_path):
    kind, schedule, needed, seconds = whole
    chance = random.Random(kind)
    left = max(2, KILLS // len(KINDS))
    trial = 0
    while left > 0:
        folder, kills = tmp_path / f"{trial}", 0
        trial += 1
        folder.mkdir()
        for _ in range(min(left, chance.randint(1, 4))):
            process, delay = started(kind, folder), chance.uniform(0, seconds)
            process.join(delay)
            alive = process.is_alive()
            process.kill()
            process.join()
            if not alive:
                break
            kills += 1
        left -= kills
        finish(kind, folder)
        found = fs.Schedule.load(folder / "result")
        assert torch.equal(found.sigmas, schedule.sigmas), f"another schedule after {kills} kills"
        assert found.measured_error == schedule.measured_error
        assert calls(folder) <= needed + kills * ONCE_MORE + (kills == 0), f"{kills} kills"
        left_behind = [file for file in os.listdir(folder) if file.endswith(".unfinished")]
        assert len(left_behind) <= kills  # a kill during a write leaves what was not yet put in its place
