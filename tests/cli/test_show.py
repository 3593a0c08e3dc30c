import csv
import json
import os
import shutil

import pytest
import torch
from models import exact_denoisers, mixture
from shell_runs import one_line, run

import fastsched as fs
from fastsched.cli.comparing import _baselines
from fastsched.cli.inputs import solver_named
from fastsched.sampling.solver_names import KNOWN, UNKNOWN
from fastsched.sampling.solvers import ALIASES, FITTED, SOLVERS, STOCHASTIC_SOLVERS
from fastsched.selection.planning import COMMON, target_error


def test_info_of_statistics(folder):
    found = json.loads(run("info", folder / "s.safetensors", "--json").stdout)
    stats = fs.PathStatistics.load(folder / "s.safetensors")
    assert found["kind"] == "statistics"
    assert found["noise levels"] == [80.0, pytest.approx(0.002)]
    assert (found["shape"], found["samples"], found["levels"], found["model_calls"]) == ([2, 3], 3, 24, 3 * 46 + 6)
    assert found["data_std"] == stats.data_std
    assert found["responses"] is True
    assert ["model_calls", "144"] in [
        line.split() for line in run("info", folder / "s.safetensors").stdout.splitlines()
    ]


def test_info_of_a_schedule(folder):
    found = json.loads(run("info", folder / "x-4.json", "--json").stdout)
    schedule = fs.Schedule.load(folder / "x-4.json")
    assert found["kind"] == "schedule"
    assert found["sigmas"] == schedule.sigmas.tolist()
    assert found["predicted_error"] == schedule.predicted_error
    lines = [line.split() for line in run("info", folder / "x-4.json").stdout.splitlines()]
    assert ["solver", "ddim"] in lines
    assert ["model_calls", "4"] in lines
    assert ["calls", "to", "choose", str(found["origin"]["model_calls"])] in lines
    assert ["by", "fastsched", fs.__version__] in lines


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such file names")
def test_control_codes_in_files_and_their_names_are_escaped(folder, tmp_path):
    schedule = tmp_path / "a\x1b[31mb.json"
    shutil.copy(folder / "x-4.json", schedule)
    assert "a\\x1b[31mb.json" in run("info", schedule).stdout
    entries = json.loads(schedule.read_text())
    schedule.write_text(json.dumps({**entries, "c\x1b[2J": 1}))
    message = run("info", schedule).stderr
    assert "c\\x1b[2J" in message
    assert "\x1b" not in message


def test_info_of_a_network_with_a_long_table_stays_short(tmp_path):
    denoiser = fs.Denoiser.from_epsilon(lambda x, t: x, torch.linspace(0.9999, 0.004, 1000, dtype=torch.float64))
    fs.measure(denoiser, (3,), samples=1, levels=8, progress=False).save(tmp_path / "s.safetensors")
    lines = run("info", tmp_path / "s.safetensors").stdout.splitlines()
    (process,) = [line for line in lines if line.startswith("process")]
    assert "alphas_cumprod 1000 values, 0.9999 ... 0.004" in process
    assert max(map(len, lines)) < 120
    kept = json.loads(run("info", tmp_path / "s.safetensors", "--json").stdout)["process"]["alphas_cumprod"]
    assert len(kept) == 1000


def test_info_writes_infinity_so_that_json_can_be_read(tmp_path):
    denoiser = fs.Denoiser.from_velocity(lambda x, t: x * (2 * t[:, None] - 1))
    fs.measure(denoiser, (3,), samples=1, levels=8, progress=False).save(tmp_path / "s.safetensors")
    text = run("info", tmp_path / "s.safetensors", "--json").stdout
    assert json.loads(text, parse_constant=pytest.fail)["noise levels"][0] == "inf"


def test_info_of_a_schedule_after_a_byte_order_mark(folder, tmp_path):
    file = tmp_path / "marked.json"
    file.write_text("\ufeff" + (folder / "x-4.json").read_text())
    expected = json.loads(run("info", folder / "x-4.json", "--json").stdout)
    assert json.loads(run("info", file, "--json").stdout) == expected


@pytest.fixture
def odd_names(tmp_path, folder):
    """Schedules whose file names hold a line break, a formula, a leading underscore, or bytes that are no text."""
    names = [os.fsdecode(name) for name in (b"two\nlines.json", b"$\\foo$.json", b"_a.json", b"not\xfftext.json")]
    try:
        return [shutil.copy(folder / "x-4.json", tmp_path / name) for name in names]
    except OSError:
        pytest.skip("this system has no such file names")


def test_files_of_odd_names_are_compared_and_drawn(folder, tmp_path, model, odd_names):
    few = ("--samples", "2", "--reference-steps", "4", "--baselines", "none", "-q")
    result = run("compare", model, *odd_names, "--shape", "2,3", *few, "--csv", tmp_path / "e.csv")
    assert result.exit_code == 0, result.stderr
    assert len(result.stdout.splitlines()) == 2 + len(odd_names)
    rows = csv.DictReader((tmp_path / "e.csv").read_text(encoding="utf-8").splitlines())
    assert [row["name"] for row in rows] == [r"two\nlines", r"$\foo$", "_a", r"not\udcfftext"]
    for command in (("plot", *odd_names), ("plot", folder / "s.safetensors", *odd_names)):
        assert run(*command, "-o", tmp_path / "p.png").exit_code == 0
    page = ("report", folder / "s.safetensors", *odd_names, "--max-steps", "2", "--solver", "ddim", "-q")
    assert run(*page, "--title", "\udcff", "--errors", tmp_path / "e.csv", "-o", tmp_path / "r.html").exit_code == 0
    assert r"not\udcfftext" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_statistics_whose_name_is_no_text_are_read(folder, odd_names):
    name = odd_names[-1].with_suffix(".safetensors")
    shutil.copy(folder / "s.safetensors", name)
    assert "levels" in run("info", name).stdout
    assert fs.PathStatistics.load(name) == fs.PathStatistics.load(folder / "s.safetensors")


def test_info_of_neither_is_an_error(tmp_path):
    (tmp_path / "a.bin").write_text("neither")
    assert "must be statistics (.safetensors), a schedule (.json) or" in one_line(run("info", tmp_path / "a.bin"))
    assert "no such file" in one_line(run("info", tmp_path / "missing"))
    (tmp_path / "a.safetensors").write_text("neither")
    assert "is not a whole safetensors file" in one_line(run("info", tmp_path / "a.safetensors"))
    assert "no such statistics file" in one_line(run("info", tmp_path / "b.safetensors"))
    assert "no such schedule file" in one_line(run("info", tmp_path / "b.json"))


def test_solvers_lists_all_with_their_calls():
    found = {entry["name"]: entry for entry in json.loads(run("solvers", "--json").stdout)}
    assert list(found) == [*SOLVERS, *STOCHASTIC_SOLVERS, FITTED]
    for name, solver in SOLVERS.items():
        calls = {"n": 5, "2n - 1": 9}[found[name]["calls"]]
        assert calls == solver.model_calls(5)
        assert found[name]["order"] == solver.order
    assert sorted(alias for entry in found.values() for alias in entry["aliases"]) == sorted(ALIASES)
    lines = run("solvers").stdout.splitlines()
    assert len(lines) == len(found) + 1
    assert not any(line != line.rstrip() for line in lines)


def test_env_names_versions_and_devices():
    found = json.loads(run("env", "--json").stdout)
    assert found["fastsched"] == fs.__version__
    assert found["torch"] == torch.__version__
    assert len(found["cuda"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert "torch" in run("env").stdout


@pytest.mark.parametrize(
    ("name", "solver"),
    [
        ("DPM++ 2M Karras", "dpmpp_2m"),
        ("DPM++ 2M", "dpmpp_2m"),
        ("dpmpp2m", "dpmpp_2m"),
        ("sample_dpmpp_2m", "dpmpp_2m"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m"),
        ("DPM++ 2M SDE Exponential", "sde_dpmpp_2m"),
        ("Euler", "ddim"),
        ("Euler a", "ancestral"),
        ("Euler SGM Uniform", "ddim"),
        ("LMS Karras", "lms"),
        ("DPM2 Karras", "dpm_2"),
        ("UniPC", "unipc"),
        ("EulerDiscreteScheduler", "ddim"),
        ("UniPC_BH1", "unipc_bh1"),
    ],
)
def test_names_that_people_know_resolve(name, solver, caplog):
    with caplog.at_level("INFO", "fastsched"):
        assert solver_named(name) == solver
    (remark,) = caplog.messages
    assert repr(name) in remark
    assert ("take the place" in remark) == any(word in name for word in ("Karras", "Exponential", "SGM"))


def test_own_names_come_back_without_a_remark(caplog):
    with caplog.at_level("INFO", "fastsched"):
        for name in (*SOLVERS, *ALIASES, *STOCHASTIC_SOLVERS, "dpmpp_2n"):
            assert solver_named(name) == name
    assert caplog.messages == []


def test_every_known_name_is_a_solver_and_every_unknown_one_names_another():
    assert set(KNOWN.values()) <= {*SOLVERS, *STOCHASTIC_SOLVERS}
    for name in UNKNOWN:
        with pytest.raises(ValueError, match="solver"):
            solver_named(name)


def test_select_says_what_a_known_name_is(folder):
    result = run("select", folder / "s.safetensors", "--steps", "4", "--solver", "DPM++ 2M Karras")
    assert result.exit_code == 0
    assert "is dpmpp_2m here; fastsched's noise levels take the place of the karras ones" in result.stderr
    assert result.stdout == run("select", folder / "s.safetensors", "--steps", "4").stdout


def test_select_and_plan_as_json(folder):
    found = json.loads(run("select", folder / "s.safetensors", "--steps", "4,6", "--json").stdout)
    assert [entry["steps"] for entry in found] == [4, 6]
    (curve,) = json.loads(
        run("plan", folder / "s.safetensors", "--max-steps", "9", "--target", "karras:6", "--json").stdout
    )
    expected = fs.error_curve(fs.PathStatistics.load(folder / "s.safetensors"), "dpmpp_2m", 9)
    assert [entry["predicted_error"] for entry in curve["curve"]] == list(expected.predicted_errors)
    assert curve["steps_needed"] <= 6


@pytest.mark.parametrize("kind", ["velocity", "epsilon", "x0"])
def test_a_target_and_a_baseline_of_one_name_are_one_schedule(kind):
    denoiser = exact_denoisers(mixture(d=4))[kind]
    stats = fs.measure(denoiser, (4,), levels=16, samples=1, responses=False, progress=False)
    some = fs.Schedule(stats.sigmas[[0, 3, 6, 9, -1]], "ddim", stats.process.kind)
    names = [name for name in COMMON if name != "uniform" or kind == "velocity"]
    for name, schedule in _baselines(stats.process, names, {"some": some}, False).items():
        assert target_error(stats, "ddim", (name, 4)) == fs.predict_error(stats, schedule)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_can_be_shown(shell):
    import os
    import subprocess
    import sys

    # typer otherwise shows the completion of the shell among its parents, if there is one
    settings = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [sys.executable, "-m", "fastsched", "--show-completion", shell]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=settings)
    script = {"bash": "complete -o", "zsh": "compdef", "fish": "complete --command"}
    assert script[shell] in result.stdout, result.stderr


def test_completion_knows_the_programs_to_export_to():
    from typer.testing import CliRunner

    from fastsched.cli.commands import app

    words = {"COMP_WORDS": "fastsched export a.json --to c", "COMP_CWORD": "4", "_FASTSCHED_COMPLETE": "complete_bash"}
    result = CliRunner().invoke(app, [], env=words, prog_name="fastsched")
    assert result.stdout.split() == ["comfyui"]


def test_the_log_level_hides_what_is_said_but_not_errors(folder):
    select = ("select", folder / "s.safetensors", "--steps", "4")
    assert "squared error" in run(*select).stderr
    quiet = run("--log-level", "warning", *select)
    assert quiet.exit_code == 0
    assert quiet.stderr == ""
    assert quiet.stdout == run(*select).stdout
    assert "no such statistics file" in one_line(
        run("--log-level", "error", "select", "none.safetensors", "--steps", "4")
    )
    wrong = run("--log-level", "loud", *select)
    assert wrong.exit_code == 2
    assert "log-level must be one of debug, info" in one_line(wrong)


def test_demo_prints_its_rows_as_json(monkeypatch, tmp_path):
    from fastsched.cli.demo import run_demo

    def small(output, *, samples, progress, say):
        return run_demo(output, samples=samples, solvers=("ddim",), steps=(6,), progress=False, say=say)

    monkeypatch.setattr("fastsched.cli.demo.run_demo", small)
    result = run("demo", "-o", tmp_path, "--samples", "8", "--json")
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)
    assert len(rows) == 6
    assert {row["solver"] for row in rows} == {"ddim"}
    assert "on 4 paths" in result.stderr


def test_profile_says_its_cost_first(folder, tmp_path):
    model = ("profile", f"{folder / 'my_model.py'}:build", "--shape", "2,3", "--steps", "3", "-q")
    asked = run(*model, "--dry-run")
    assert (asked.exit_code, asked.stdout) == (0, "")
    assert asked.stderr == "model calls (a batch of 4 counts as 4): about 12\n"
    result = run(*model, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)


def test_profile_refuses_what_it_would_not_heed(folder, monkeypatch):
    model = ("profile", f"{folder / 'my_model.py'}:build", "--shape", "2,3", "--steps", "3", "-q", "--dry-run")
    assert run(*model, "--device", "cpu").exit_code == 0
    refused = run(*model, "--dtype", "float64")
    assert refused.exit_code == 2
    assert "dtype is for pipelines" in one_line(refused)
    monkeypatch.setattr(fs.Denoiser, "device", torch.device("cuda"))
    assert "device must be cuda, where the denoiser's network is, got 'cpu'" in one_line(run(*model, "--device", "cpu"))


def test_profile_announces_the_longer_measurement_of_a_gpu(folder, monkeypatch):
    model = ("profile", f"{folder / 'my_model.py'}:build", "--shape", "2,3", "--steps", "3", "-q", "--dry-run")
    monkeypatch.setattr(fs.Denoiser, "device", torch.device("cuda"))
    assert run(*model).stderr == "model calls (a batch of 4 counts as 4): about 36\n"  # 2 * 3, and 30 on 16 levels
