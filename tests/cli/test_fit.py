import errno
import inspect
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from shell_runs import one_line, run

import fastsched as fs
from fastsched.cli import comparing, making, shell
from fastsched.cli.commands import app
from fastsched.denoisers.loading import load_denoiser
from fastsched.sampling.files import runs_beside

QUICK = ("--shape", "2,3", "--samples", "2", "--levels", "12", "--model-calls", "111", "-q")


def test_fit_writes_what_fit_returns(folder, model, tmp_path):
    output = tmp_path / "a.json"
    result = run("fit", model, "--steps", "4", "--solver", "ddim", *QUICK, "-o", output)
    assert result.exit_code == 0, result.stderr
    options = {"samples": 2, "levels": 12, "model_calls": 111, "progress": False}
    expected = fs.fit(load_denoiser(model)[0], (2, 3), 4, "ddim", **options)
    found = fs.Schedule.load(output)
    assert torch.equal(found.sigmas, expected.sigmas)
    assert found.measured_error == expected.measured_error
    assert [float(value) for value in result.stdout.split(", ")] == pytest.approx(expected.sigmas.tolist(), rel=1e-5)


def test_a_fit_that_cannot_be_written_is_printed_whole(model, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    path = tmp_path / "a.json"
    options = ("--shape", "2,3", "--steps", "3", "--solver", "fitted", "--model-calls", "60", "-q")
    result = run("fit", model, *options, "-o", path)
    assert result.stderr.splitlines()[-1] == f"error: No space left on device: {path}"
    found = json.loads(result.stdout)
    assert fs.Schedule(found["sigmas"], "fitted", weights=found["weights"]).steps == 3


def test_the_cost_is_said_before_it_is_spent(folder, model, tmp_path):
    (tmp_path / "counting.py").write_text(
        "import fastsched as fs\n"
        "def count(z, s):\n    raise RuntimeError('called')\n"
        "def build():\n    return fs.Denoiser.from_denoiser(count, 0.002, 80.0)\n"
    )
    counting = f"{tmp_path / 'counting.py'}:build"
    spent = ("fit", counting, "--steps", "4", "--shape", "8", "-q", "-o", tmp_path / "a.json")
    result = run(*spent)
    cost = "model calls (a batch of 4 counts as 4): 383 to measure, at most 417 to run and tune schedules"
    assert result.stderr.splitlines()[0] == cost
    assert "called" in result.stderr
    dry = run(*spent, "--dry-run")
    assert (dry.exit_code, dry.stderr.strip()) == (0, cost)
    assert not (tmp_path / "a.json").exists()


def test_the_guide_has_the_calls_that_measuring_takes(model):
    """Those of dry runs of the default fit, for samples of many elements and of few."""
    page = (Path(__file__).parents[2] / "docs" / "shell.md").read_text(encoding="utf-8")
    calls = []
    for shape in ("4,8,8", "2"):
        plan = run("fit", model, "--steps", "8", "--shape", shape, "-q", "--dry-run").stderr
        calls += re.findall(r"(\d+) to measure", plan)
    assert "{} measure a denoiser ({} if a sample has at most 4 elements".format(*calls) in page


@pytest.mark.parametrize("command", [("fit", "--steps", "4"), ("measure",)])
def test_a_dry_run_needs_no_output(model, command):
    asked = (command[0], model, *command[1:], "--shape", "2,3", "-q")
    result = run(*asked, "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "to measure" in result.stderr
    result = run(*asked)
    assert result.exit_code == 2
    assert one_line(result) == "error: output must be given: -o FILE; only --dry-run needs none"


def test_a_dry_run_makes_the_fits_own_checks(folder, model):
    asked = ("fit", model, "--steps", "4", "--dry-run")
    result = run(*asked, "--shape", "2,3", "--solver", "heun", "--decoupled")
    assert "one call a step for decoupled levels" in one_line(result)
    result = run(*asked, "--shape", "3,2", "--stats", folder / "s.safetensors")
    assert one_line(result) == "error: stats are of samples of shape (2, 3), not of shape (3, 2)"


def test_the_cost_of_a_fit_is_without_what_its_checkpoint_has(model, tmp_path):
    kept = tmp_path / "kept.safetensors"
    asked = ("fit", model, "--steps", "3", "--levels", "8", "--shape", "2,3", "--model-calls", "75")
    asked += ("--samples", "3", "--checkpoint", kept)
    assert run(*asked, "-q", "-o", tmp_path / "a.json").exit_code == 0
    said = run(*asked, "--dry-run").stderr
    assert said.strip().endswith("0 to measure, at most 26 to run and tune schedules, less the runs in the checkpoint")
    os.remove(runs_beside(kept))
    fs.PathStatistics.load(kept).select([0]).save(kept, vectors=True)
    unfinished = run(*asked, "--dry-run").stderr
    assert "35 to measure, at most 26 to run and tune schedules\n" in unfinished


def test_measuring_and_fitting_are_one_bar(capsys):
    with shell.joint_bar(50, True, "fitting") as hear:
        for done, total in ((10, 20), (20, 20), (6, 30), (24, 30)):
            hear(done, total)
    assert "44/50" in capsys.readouterr().err


def test_a_fit_shows_one_bar_over_all_its_calls(folder, model, tmp_path, bars):
    making.fit(model, 4, tmp_path / "a.json", shape="2,3", levels=12, samples=2, model_calls=111)
    (bar,) = bars
    assert bar.total == 111
    assert 44 < bar.n <= 111  # 44 of them measure
    known = folder / "s.safetensors"
    making.fit(model, 4, tmp_path / "b.json", shape="2,3", stats=known, model_calls=60)
    assert bars[1:] == [bars[-1]]
    assert bars[-1].total == 60


def test_a_comparison_shows_one_bar_over_all_its_calls(folder, model, bars):
    comparing.compare(model, [folder / "x-4.json"], "karras", shape="2,3", samples=4, reference_steps=10)
    (bar,) = bars
    assert bar.n == bar.total == 4 * (10 + 4 + 4)  # the converged samples, the schedule, karras


def test_the_defaults_of_the_shell_are_those_of_the_library():
    of_denoisers, of_pipelines = (inspect.signature(each).parameters for each in (fs.measure, fs.diffusers.measure))
    for parameters, samples in ((of_denoisers, making.SAMPLES), (of_pipelines, making.PIPELINE_SAMPLES)):
        assert parameters["samples"].default == samples
        assert parameters["levels"].default == making.LEVELS


def test_fit_takes_earlier_statistics_and_spends_no_measurement(folder, model, tmp_path):
    output = tmp_path / "a.json"
    result = run(
        *("fit", model, "--steps", "4", "--shape", "2,3", "--stats", folder / "s.safetensors", "--model-calls", "0"),
        *("-q", "--json", "-o", output),
    )
    assert result.exit_code == 0, result.stderr
    assert "0 to measure, at most 0 to run" in result.stderr
    found = json.loads(result.stdout)
    assert found["sigmas"] == fs.Schedule.load(output).sigmas.tolist()
    assert found["solver"] == "dpmpp_2m"
    assert found["model_calls"] == found["steps"] == 4
    again = run(
        *("fit", model, "--steps", "4", "--shape", "2,3", "--stats", folder / "s.safetensors", "--dry-run"),
        *("-o", tmp_path / "b.json"),
    )
    assert f"{3 * 46} to measure, at most 740" in again.stderr  # the same paths again, for their increments
    for untuned in (("--steps", "1"), ("--steps", "4", "--model-calls", "11")):
        asked = ("fit", model, *untuned, "--shape", "2,3", "--stats", folder / "s.safetensors", "--dry-run")
        assert ": 0 to measure, at most" in run(*asked).stderr


def test_statistics_with_increments_need_no_second_measurement(model, tmp_path):
    oracle = fs.oracles.Gaussian(0.5, (2, 3))
    denoiser = fs.Denoiser.from_denoiser(oracle.denoise, 0.002, 80.0)
    stats = fs.measure(denoiser, (2, 3), levels=12, samples=2, keep_increments=True, progress=False)
    stats.save(tmp_path / "s.safetensors", vectors=True)
    given = ("--steps", "4", "--shape", "2,3", "--stats", tmp_path / "s.safetensors", "--model-calls", "60", "-q")
    result = run("fit", model, *given, "-o", tmp_path / "a.json")
    assert result.exit_code == 0, result.stderr
    assert "0 to measure, at most 60 to run" in result.stderr
    found = fs.Schedule.load(tmp_path / "a.json")
    assert stats.model_calls < found.origin.model_calls <= stats.model_calls + 1 + 60  # one call tells the network


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("-o", "EXISTS.json"), 1, "exists; replace it (--overwrite)"),
        (("-o", "a.txt"), 2, "output must end in .json"),
        (("-o", "missing/a.json"), 1, "no such folder"),
        (("-o", "FOLDER.json"), 1, "output is a folder"),
        (("-o", "a.json", "--stats", "SCHEDULE"), 2, "is a schedule, and statistics are needed"),
        (("-o", "a.json", "--prompt", "a cat"), 2, "prompt is for pipelines"),
        (("-o", "a.json", "--call", "x=1"), 2, "call is for pipelines"),
        (("-o", "a.json", "--scheduler", "DDIMScheduler"), 2, "scheduler is for pipelines"),
        (("-o", "a.json", "--device", "cuda:99"), 2, "device is 'cuda:99'"),
        (("-o", "a.json", "--device", "gpu"), 2, "device must be one that PyTorch knows"),
        (("-o", "a.json", "--solver", "PLMS"), 2, "'ipndm' is the nearest solver"),
        (("-o", "a.json", "--steps", "99", "--levels", "12"), 2, "steps must be at most"),
        (("-o", "a.json", "--levels", "48", "--samples", "8", "--model-calls", "300"), 2, "measuring takes 759 model"),
    ],
)
def test_what_cannot_work_is_refused_before_any_call(folder, model, tmp_path, monkeypatch, arguments, status, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EXISTS.json").write_text("precious")
    (tmp_path / "FOLDER.json").mkdir()
    given = [str(folder / "x-4.json") if argument == "SCHEDULE" else argument for argument in arguments]
    result = run("fit", model, "--steps", "4", "--shape", "2,3", "-q", *given)
    assert result.exit_code == status
    assert message in one_line(result)
    assert (tmp_path / "EXISTS.json").read_text() == "precious"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_cuda_is_explained(folder, model, tmp_path):
    for arguments in (
        ("measure", "digits", "-o", tmp_path / "s.safetensors"),
        ("compare", "digits", folder / "x-4.json"),
    ):
        result = run(*arguments, "--device", "cuda")
        assert result.exit_code == 2
        assert "finds no CUDA GPU; use cpu" in one_line(result)


def test_ctrl_c_says_what_is_left(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import fastsched as fs\n"
        "def stop(z, s):\n    raise KeyboardInterrupt\n"
        "def build():\n    return fs.Denoiser.from_denoiser(stop, 0.002, 80.0)\n"
    )
    slow = f"{tmp_path / 'slow.py'}:build"
    measured = run("measure", slow, "--shape", "3", "-q", "-o", tmp_path / "s.safetensors")
    assert (measured.exit_code, one_line(measured)) == (
        130,
        "interrupted; 'fastsched measure --resume' continues from the last saved batch, if any",
    )
    fitted = run("fit", slow, "--steps", "4", "--shape", "3", "-q", "-o", tmp_path / "a.json")
    assert (fitted.exit_code, one_line(fitted)) == (130, "interrupted; nothing was written")


#: A network that ends its own process, as a job scheduler does, while the fit runs the sampler.
ENDED = """
import os, signal, fastsched as fs
oracle, calls = fs.oracles.Gaussian(0.5, (2, 3)), []

def denoise(z, s):
    calls.append(len(z))
    if sum(calls[:-1]) < 80 <= sum(calls):
        os.kill(os.getpid(), signal.SIGTERM)
    return oracle.denoise(z, s)

def build():
    return fs.Denoiser.from_denoiser(denoise, 0.002, 80.0)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a program at once")
def test_sigterm_loses_no_work(tmp_path):
    (tmp_path / "ended.py").write_text(ENDED)
    fitting = ("fit", "ended.py:build", "--steps", "4", *QUICK, "-o", "a.json")
    command = [sys.executable, "-m", "fastsched", *fitting]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 130, done.stderr
    assert "warning: interrupted: this schedule is the best of" in done.stderr
    assert "(--checkpoint FILE keeps what is finished" in done.stderr
    assert fs.Schedule.load(tmp_path / "a.json").steps == 4


def test_an_interrupted_fit_goes_on_from_its_checkpoint(folder, model, tmp_path):
    counted = tmp_path / "counted.py"
    counted.write_text(
        "import os, fastsched as fs\n"
        "oracle, calls = fs.oracles.Gaussian(0.5, (2, 3)), []\n"
        "def denoise(z, s):\n"
        "    calls.append(len(z))\n"
        "    if os.path.exists('stop') and sum(calls) > 60:\n        raise KeyboardInterrupt\n"
        "    with open('calls', 'a') as file:\n        file.write('.' * len(z))\n"
        "    return oracle.denoise(z, s)\n"
        "def build():\n"
        f"    os.chdir({str(tmp_path)!r})\n"
        "    return fs.Denoiser.from_denoiser(denoise, 0.002, 80.0)\n"
    )
    whole = run("fit", f"{counted}:build", "--steps", "4", *QUICK, "-o", tmp_path / "whole.json")
    assert whole.exit_code == 0, whole.stderr
    needed = len((tmp_path / "calls").read_text())
    (tmp_path / "calls").unlink()
    (tmp_path / "stop").touch()
    options = ("--steps", "4", *QUICK, "--checkpoint", tmp_path / "kept.safetensors", "-o", tmp_path / "a.json")
    stopped = run("fit", f"{counted}:build", *options)
    assert (stopped.exit_code, one_line(stopped)) == (130, "interrupted; the same command goes on from the checkpoint")
    (tmp_path / "stop").unlink()
    assert run("fit", f"{counted}:build", *options).exit_code == 0
    found, expected = (fs.Schedule.load(tmp_path / name) for name in ("a.json", "whole.json"))
    torch.testing.assert_close(found.sigmas, expected.sigmas, rtol=1e-6, atol=0)
    assert len((tmp_path / "calls").read_text()) <= needed + 2 * 12 + 7  # one path, and the checks


def test_a_checkpoint_is_another_file(folder, model, tmp_path):
    stats = tmp_path / "s.safetensors"
    stats.write_bytes((folder / "s.safetensors").read_bytes())
    common = ("fit", model, "--steps", "4", "--shape", "2,3", "-q", "-o", tmp_path / "a.json")
    for path, message in ((tmp_path / "a.json", "another file than output"), (stats, "which is read")):
        refused = run(*common, "--stats", stats, "--checkpoint", path)
        assert refused.exit_code == 2
        assert message in one_line(refused)


def test_a_resumed_measurement_costs_what_is_left(folder, model, tmp_path):
    output = tmp_path / "s.safetensors"
    output.write_bytes((folder / "s.safetensors").read_bytes())
    result = run("measure", model, "--shape", "2,3", "--samples", "4", "-q", "--resume", "-o", output, "--dry-run")
    assert result.stderr.strip() == "model calls (a batch of 4 counts as 4): 101 to measure"


def test_decoupled_levels_are_fitted_shown_and_exported_where_they_can_be(folder, model, tmp_path):
    output = tmp_path / "a.json"
    options = ("--steps", "4", "--solver", "ddim", "--decoupled", *QUICK, "--model-calls", "200", "-o", output)
    result = run("fit", model, *options)
    assert result.exit_code == 0, result.stderr
    schedule = fs.Schedule.load(output)
    assert schedule.network_sigmas is not None
    assert "the network is told" in result.stderr
    shown = json.loads(run("fit", model, *options, "--overwrite", "--json").stdout)
    assert shown["network_sigmas"] == schedule.network_sigmas.tolist()
    for program, instead in (("comfyui", "Load Schedule"), ("k-diffusion", "fs.decoupled_model"), ("text", "")):
        refused = run("export", output, "--to", program)
        assert refused.exit_code == 2
        assert "decoupled levels" in one_line(refused)
        assert instead in one_line(refused)
    assert "fs.diffusers.apply(schedule, pipe)" in run("export", output, "--to", "diffusers").stdout


def test_what_is_named_in_place_of_an_export_can_take_the_schedule(tmp_path):
    sigmas, weights = torch.tensor([10.0, 1.0, 0.0]), torch.eye(2)
    for decoupled, named in (("denoiser", True), (None, True), ("timestep", False)):
        told = None if decoupled is None else 1.1 * sigmas[:-1]
        schedule = fs.Schedule(sigmas, "fitted", "ve", weights=weights, network_sigmas=told, decoupled=decoupled)
        schedule.save(tmp_path / "a.json")
        for program, instead in (("comfyui", "Load Schedule"), ("k-diffusion", "sample_fitted(model, x, schedule)")):
            refused = run("export", tmp_path / "a.json", "--to", program)
            assert refused.exit_code == 2
            assert (instead in one_line(refused)) == named


def test_levels_are_decoupled_in_one_way(model, tmp_path):
    options = ("--shape", "2,3", "--steps", "4", "--decoupled", "--decoupled-timesteps", "-o", tmp_path / "a.json")
    result = run("fit", model, *options)
    assert result.exit_code == 2
    assert "--decoupled and --decoupled-timesteps exclude each other" in one_line(result)


@pytest.mark.parametrize("option", ["levels", "samples", "seed"])
def test_levels_and_paths_are_those_of_statistics(folder, model, tmp_path, option):
    common = ("--shape", "2,3", "--steps", "4", "--stats", folder / "s.safetensors", "-o", tmp_path / "a.json")
    result = run("fit", model, *common, f"--{option}", "4")
    assert result.exit_code == 2
    assert f"{option} must be left out with --stats" in one_line(result)


def test_statistics_of_another_noise_process_are_named(folder, model, tmp_path):
    flow = tmp_path / "flow.safetensors"
    run("measure", model.replace(":build", ":flow"), "--shape", "2,3", "--samples", "2", "-o", flow)
    result = run("fit", model, "--shape", "2,3", "--steps", "4", "--stats", flow, "-o", tmp_path / "a.json")
    assert result.exit_code == 2
    assert "stats are of another noise process" in one_line(result)


def test_advice_names_options(tmp_path):
    (tmp_path / "unstable.py").write_text(
        "import fastsched as fs\n"
        "def build():\n    return fs.Denoiser.from_denoiser(lambda z, s: z * float('nan'), 0.002, 80.0)\n"
    )
    failed = run("measure", f"{tmp_path / 'unstable.py'}:build", "--shape", "3", "-q", "-o", tmp_path / "s.safetensors")
    assert one_line(failed).endswith("if it runs in 16 bits, try float32 (--dtype float32)")
    schedule = fs.Schedule([80.0, 1.0, 0.0], "ddim", network_sigmas=[79.0, 1.1])
    schedule.save(tmp_path / "d.json")
    assert one_line(run("export", tmp_path / "d.json", "--to", "text")).endswith("fit one without --decoupled")


def test_the_app_runs_in_a_thread():
    """Only the main thread may handle signals."""
    ends = []

    def shown():
        with pytest.raises(SystemExit) as end:
            app(["solvers"])
        ends.append(end.value.code)

    thread = threading.Thread(target=shown)
    thread.start()
    thread.join()
    assert ends == [0]


def test_an_earlier_interrupt_does_not_change_the_status_of_the_next_command(monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *_: None)  # the tests' own handlers stay
    monkeypatch.setitem(shell.STATE, "interrupted", True)
    with pytest.raises(SystemExit) as end:
        app(["solvers"])
    assert end.value.code == 0


@pytest.mark.parametrize(
    ("solver", "message"), [("Euler a", "solver must be deterministic here"), ("dpmpp_2mm", "did you mean 'dpmpp_2m'?")]
)
def test_a_solver_that_cannot_be_fitted_is_refused_before_any_cost_is_said(model, solver, message):
    result = run("fit", model, "--steps", "4", "--shape", "2,3", "--solver", solver, "--dry-run")
    assert result.exit_code == 2
    assert message in result.stderr
    assert "model calls" not in result.stderr
