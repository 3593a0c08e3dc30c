import sys

import pytest

import fastsched as fs
from fastsched.sampling.progress import progress_bar

DENOISER = fs.Denoiser.from_denoiser(lambda z, s: z / (1 + s[:, None] ** 2), 0.002, 80.0)


def test_a_function_hears_what_is_done_and_the_total(capsys):
    heard = []
    with progress_bar(10, lambda done, total: heard.append((done, total)), "working") as advance:
        advance(4)
        advance(6)
    assert heard == [(4, 10), (10, 10)]
    assert capsys.readouterr().err == ""


def test_there_is_no_bar_in_a_program_without_a_console(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert fs.measure(DENOISER, (4,), levels=8, samples=2, progress=True).samples == 2


@pytest.mark.parametrize(
    "work",
    [
        lambda hear: fs.measure(DENOISER, (4,), levels=16, samples=2, progress=hear),
        lambda hear: fs.compare(DENOISER, {"a": fs.Schedule([80.0, 1.0, 0.0], "ddim")}, shape=(4,), progress=hear),
    ],
    ids=["measure", "compare"],
)
def test_long_functions_end_at_their_total(work):
    heard = []
    work(lambda done, total: heard.append((done, total)))
    for total in {total for _, total in heard}:
        counts = [done for done, of in heard if of == total]
        assert counts == sorted(counts)
        assert counts[-1] == total


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
