"""What a command says and leaves when Ctrl-C ends it."""

import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import typer
from shell_runs import one_line, run

import fastsched as fs
from fastsched.cli import demo
from fastsched.cli.commands import app
from fastsched.selection import optimal

#: Starts the command, and sends it Ctrl-C at its first import of typer.
EARLY = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background ignore it

class Finder:
    def find_spec(self, name, *_):
        if name == "typer":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
sys.argv = ["fastsched", "solvers"]
from fastsched.__main__ import main
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no status of a signal")
def test_ctrl_c_while_the_command_loads_shows_no_traceback():
    done = subprocess.run([sys.executable, "-c", EARLY], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def interrupted(*_, **__):
    raise KeyboardInterrupt


def test_ctrl_c_before_a_command_begins_shows_no_traceback(monkeypatch):
    monkeypatch.setattr(typer.Typer, "__call__", interrupted)
    with pytest.raises(SystemExit) as end:
        app(["solvers"])
    assert end.value.code == 130


def test_an_interrupted_command_names_the_files_that_it_has_written(folder, tmp_path, monkeypatch):
    found = optimal.optimal_schedule
    monkeypatch.setattr(optimal, "optimal_schedule", lambda stats, n, _: found(stats, n) if n == 2 else interrupted())
    select = ("select", folder / "s.safetensors", "-o", tmp_path / "x.json", "--steps")
    stopped = run(*select, "2,3")
    assert stopped.exit_code == 130
    assert stopped.stderr.splitlines() == [
        f"wrote {tmp_path / 'x-2.json'}",
        f"interrupted; written: {tmp_path / 'x-2.json'}",
    ]
    assert one_line(run(*select, "3,2")) == "interrupted; nothing was written"


def test_an_interrupted_demo_leaves_no_empty_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    monkeypatch.setattr(demo, "measure", interrupted)
    (tmp_path / "old").mkdir()
    for name in ("a/b", "old"):
        assert one_line(run("demo", "-q", "-o", tmp_path / name)) == "interrupted; nothing was written"
    assert [each.name for each in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("slow", ["draw", "save_figure"])
def test_a_demo_interrupted_while_it_draws_has_written_nothing(tmp_path, monkeypatch, slow):
    ours = fs.Schedule(torch.tensor([80.0, 1.0, 0.0]), "ddim", "ve")
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    monkeypatch.setattr(demo, "_run", lambda *_: SimpleNamespace(schedules={"ddim": {2: {demo.OURS: ours}}}))
    monkeypatch.setattr(demo, "draw", lambda *_: None)
    monkeypatch.setattr(demo, slow, interrupted)
    assert one_line(run("demo", "-q", "-o", tmp_path / "new")) == "interrupted; nothing was written"
    assert list(tmp_path.iterdir()) == []
