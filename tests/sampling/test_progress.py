import errno
import io
import math
import sys
import time

import pytest
import torch

import fastsched as fs
from fastsched.sampling.progress import progress_bar

DENOISER = fs.Denoiser.from_denoiser(lambda z, s: z / (1 + s[:, None] ** 2), 0.002, 80.0)


def test_a_progress_function_gets_the_units_done_and_the_total(capsys):
    heard = []
    with progress_bar(10, lambda done, total: heard.append((done, total)), "working") as advance:
        advance(4)
        advance(6)
    assert heard == [(4, 10), (10, 10)]
    assert capsys.readouterr().err == ""


def test_there_is_no_bar_in_a_program_without_a_console(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert fs.measure(DENOISER, (4,), levels=8, samples=2, progress=True).samples == 2


class Gone(io.StringIO):
    """A console that takes some text until it is gone."""

    def __init__(self, error, writes):
        super().__init__()
        self.error, self.writes = error, writes

    def write(self, text):
        self.writes -= 1
        if self.writes < 0:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize("writes", [0, 1, 3])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), BrokenPipeError(), OSError(errno.EIO, "hung up")], ids=repr
)
def test_work_goes_on_without_its_bar_where_the_console_is_gone(monkeypatch, error, writes):
    monkeypatch.setattr(sys, "stderr", Gone(error, writes))
    assert fs.measure(DENOISER, (4,), levels=8, samples=2).samples == 2
    with progress_bar(9, True, "working") as advance:
        for _ in range(9):
            time.sleep(0.02)
            advance(1)


def test_a_closed_console_ends_no_work(monkeypatch):
    for name in ("stderr", "stdout"):
        console = io.StringIO()
        console.close()
        monkeypatch.setattr(sys, name, console)
        assert fs.measure(DENOISER, (4,), levels=8, samples=2).samples == 2


@pytest.mark.parametrize(
    "work",
    [
        lambda hear: fs.measure(DENOISER, (4,), levels=16, samples=2, progress=hear),
        lambda hear: fs.compare(DENOISER, {"a": fs.Schedule([80.0, 1.0, 0.0], "ddim")}, shape=(4,), progress=hear),
    ],
    ids=["measure", "compare"],
)
def test_progress_of_long_functions_ends_at_the_total(work):
    heard = []
    work(lambda done, total: heard.append((done, total)))
    for total in {total for _, total in heard}:
        counts = [done for done, of in heard if of == total]
        assert counts == sorted(counts)
        assert counts[-1] == total


@pytest.mark.parametrize("sigmas", [[math.inf, 5.0, 1.0, 0.0], [math.inf, 5.0, 1.0], [math.inf, 0.0], [5.0, 1.0, 0.0]])
@pytest.mark.parametrize("solver", ["ddim", "heun", "dpmpp_2s"])
def test_progress_of_a_sampler_ends_at_the_total_also_from_pure_noise(sigmas, solver):
    table = torch.cat([torch.linspace(0.99, 0.01, 20), torch.zeros(1)])
    heard = []
    denoiser = fs.Denoiser.from_v(lambda x, t: 0 * x, table)
    fs.sample(denoiser, sigmas, solver, torch.ones(1, 2), progress=lambda *counts: heard.append(counts))
    assert [done for done, _ in heard] == list(range(1, heard[-1][1] + 1))


def test_a_fit_can_be_ended_by_its_callback():
    class Enough(Exception):
        pass

    def hear(done, total):
        if done > 20:
            raise Enough

    with pytest.raises(Enough):
        fs.fit(DENOISER, (4,), 4, levels=16, samples=2, progress=hear)


def test_a_callback_that_runs_out_says_so():
    with pytest.raises(RuntimeError, match="progress raised StopIteration"):
        fs.measure(DENOISER, (4,), levels=8, samples=1, progress=lambda done, total: next(iter([])))
