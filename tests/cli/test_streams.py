"""What commands write to terminals, pipes and closed streams."""

import json
import os
import re
import subprocess
import sys
import types

import pytest
from shell_runs import one_line, run

import fastsched as fs
from fastsched.cli import shell


def test_a_reader_that_has_enough_ends_a_command_silently():
    command = f"{sys.executable} -m fastsched solvers | true"
    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert result.stderr == ""


@pytest.mark.parametrize("encoding", ["cp1252", "utf-8"])
def test_names_that_stdout_cannot_encode_are_written_as_escapes(folder, tmp_path, encoding):
    name = {"cp1252": "x\u0436.json", "utf-8": "x\udcff.json"}[encoding]  # the second is no text: a byte of a name
    (tmp_path / name).write_bytes((folder / "x-4.json").read_bytes())
    command = [sys.executable, "-m", "fastsched", "info", str(tmp_path / name)]
    environment = os.environ | {"PYTHONIOENCODING": f"{encoding}:strict", "PYTHONUTF8": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert ascii(name)[1:-1] in result.stdout


def test_a_command_works_without_stderr(model, tmp_path):
    path = tmp_path / "s.safetensors"
    arguments = f"measure {model} --shape 2,3 --levels 8 --samples 2 -o {path}"
    subprocess.run(f"{sys.executable} -m fastsched {arguments} 2>&-", shell=True, check=True)  # as some services do
    assert fs.PathStatistics.load(path).samples == 2


@pytest.mark.parametrize("columns", [30, 50, 62, 63, 64, 70, 100])
def test_tables_can_be_read_in_narrow_terminals(columns, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes stdout for a terminal
    monkeypatch.setenv("COLUMNS", str(columns))
    header = ["schedule", "solver", "steps", "calls", "typical error", "mean error", "frechet"]
    shell.print_table(header, [["exponential", "dpmpp_2m", "4", "4", "0.2541", "0.2708 ± 0.048", "0.2935"]] * 2, left=2)
    text = re.sub(r"\x1b\[\d+m", "", capsys.readouterr().out)  # without the codes of bold headers
    assert max(map(len, text.splitlines())) <= columns
    for word in ("exponential", "dpmpp_2m", "typical", "0.2708", "frechet"):
        assert word in text


def test_there_are_bars_in_a_terminal_alone(folder, model, monkeypatch):
    arguments = ["compare", model, folder / "x-4.json", "--shape", "2,3", "--samples", "8", "--reference-steps", "40"]
    command = [sys.executable, "-m", "fastsched", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stderr.splitlines()[0].startswith("model calls")
    assert "comparing" not in result.stderr
    (option,) = shell.Quiet.__metadata__
    monkeypatch.setattr(sys, "stderr", types.SimpleNamespace(isatty=lambda: True))
    assert [option.callback(quiet) for quiet in (False, True)] == [False, True]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the device that is always full is Linux's")
@pytest.mark.parametrize("option", ["--help", "--version"])
def test_a_text_that_cannot_be_written_is_an_error_in_a_line(option):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "fastsched", option]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["error: No space left on device"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the device that is always full is Linux's")
def test_a_profile_is_printed_if_its_trace_cannot_be_written(model, tmp_path):
    (tmp_path / "trace.json").symlink_to("/dev/full")
    result = run("profile", model, "--shape", "2,3", "--steps", "3", "--json", "--trace", tmp_path / "trace.json")
    assert result.exit_code == 1
    assert one_line(result).startswith("error: No space left on device")
    assert len(json.loads(result.stdout)["steps"]) == 3
