"""What a command says and leaves when Ctrl-C ends it."""

import signal
import subprocess
import sys

import pytest
import typer

from fastsched.cli.commands import app

#: Starts the command, and sends it Ctrl-C at its first import of typer.
EARLY = """
import os, signal, sys

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


def test_ctrl_c_before_a_command_begins_shows_no_traceback(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(typer.Typer, "__call__", interrupted)
    with pytest.raises(SystemExit) as end:
        app(["solvers"])
    assert end.value.code == 130
