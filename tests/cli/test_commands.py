import csv
import errno
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from shell_runs import one_line, run

import fastsched as fs
from fastsched.cli import shell
from fastsched.cli.commands import COMMANDS
from fastsched.denoisers.loading import load_denoiser
from fastsched.measurement.to_file import measure_to_file
from fastsched.sampling.sampler import nodes_of
from fastsched.sampling.stock_weights import stock_weights


def test_measure_writes_what_measure_returns(folder, model):
    stats = fs.PathStatistics.load(folder / "s.safetensors")
    expected = fs.measure(load_denoiser(model)[0], (2, 3), samples=3, levels=24, progress=False)
    assert torch.equal(stats.seeds, expected.seeds)
    torch.testing.assert_close(stats.gram, expected.gram)
    torch.testing.assert_close(stats.response_cross, expected.response_cross)
    assert stats.model_calls == expected.model_calls == 3 * 46 + 6  # six check the network first


def test_select_prints_plain_decimals_and_saves(folder):
    result = run("select", folder / "s.safetensors", "--steps", "4,6", "--solver", "ddim")
    lines = result.stdout.splitlines()
    for steps, line in zip((4, 6), lines, strict=True):
        schedule = fs.Schedule.load(folder / f"x-{steps}.json")
        assert "e" not in line
        assert [float(value) for value in line.split(", ")] == pytest.approx(schedule.sigmas.tolist(), rel=1e-5)
        expected = fs.optimal_schedule(fs.PathStatistics.load(folder / "s.safetensors"), steps, "ddim")
        assert torch.equal(schedule.sigmas, expected.sigmas)


def test_compare_ranks_schedules_and_baselines(folder, model):
    common = ("--shape", "2,3", "--samples", "8", "--reference-steps", "40", "-q")
    rows = folder / "rows.csv"
    result = run("compare", model, folder / "x-4.json", "--baselines", "karras,linear", *common, "--csv", rows)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[1].split()[:4] == ["x-4", "ddim", "4", "4"]
    read = {row["name"]: float(row["typical_error"]) for row in csv.DictReader(rows.read_text().splitlines())}
    assert list(read) == ["x-4", "karras", "linear"]
    assert read["x-4"] == min(read.values())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the device that is always full is Linux's")
def test_a_comparison_that_cannot_be_written_is_printed(folder, model):
    common = ("--shape", "2,3", "--samples", "4", "--reference-steps", "20", "-q")
    result = run("compare", model, folder / "x-4.json", "--baselines", "karras", *common, "--csv", "/dev/full")
    assert result.exit_code == 1
    assert one_line(result) == "error: No space left on device: /dev/full"
    assert {row["name"] for row in json.loads(result.stdout)["rows"]} == {"x-4", "karras"}


def test_compare_gives_each_number_of_steps_its_baseline(folder, model):
    files = (folder / "x-4.json", folder / "x-6.json")
    common = ("--shape", "2,3", "--samples", "2", "--reference-steps", "10", "-q", "--csv", folder / "two.csv")
    assert run("compare", model, *files, "--baselines", "karras", "--spare-last", *common).exit_code == 0
    rows = list(csv.DictReader((folder / "two.csv").read_text().splitlines()))
    assert [(row["name"], row["steps"]) for row in rows[2:]] == [("karras-ddim-4", "4"), ("karras-ddim-6", "6")]


def test_a_schedule_with_the_name_of_a_baseline_is_compared_too(folder, model, tmp_path):
    fs.Schedule.load(folder / "x-4.json").save(tmp_path / "karras.json")
    common = ("--shape", "2,3", "--samples", "2", "--reference-steps", "10", "-q", "--json")
    result = run("compare", model, tmp_path / "karras.json", folder / "x-4.json", "--baselines", "karras", *common)
    rows = {row["name"]: row["mean_error"] for row in json.loads(result.stdout)["rows"]}
    assert list(rows) == ["karras", "x-4", "common karras"]
    assert rows["karras"] == rows["x-4"] != rows["common karras"]


def test_a_schedule_of_the_fitted_solver_is_compared_with_its_weights(folder, model, tmp_path):
    sigmas = fs.baselines.exponential(5, 0.002, 80.0)
    nodes = nodes_of(load_denoiser(model)[0].process, sigmas)
    fs.Schedule(sigmas, "dpmpp_2m").save(tmp_path / "stock.json")
    weights = torch.from_numpy(stock_weights("dpmpp_2m", nodes))
    fs.Schedule(sigmas, "fitted", weights=weights).save(tmp_path / "fitted.json")
    files = (tmp_path / "stock.json", tmp_path / "fitted.json")
    common = ("--shape", "2,3", "--samples", "8", "--reference-steps", "40", "-q", "--json")
    result = run("compare", model, *files, "--baselines", "exponential", *common)
    assert result.exit_code == 0, result.stderr
    rows = {row["name"]: row for row in json.loads(result.stdout)["rows"]}
    assert rows["fitted"]["solver"] == "fitted"
    assert rows["fitted"]["typical_error"] == pytest.approx(rows["stock"]["typical_error"], rel=1e-3)
    assert rows["exponential"]["solver"] == "dpmpp_2m"
    assert "whose weights text cannot take" in one_line(run("export", tmp_path / "fitted.json", "--to", "text"))
    assert json.loads(run("info", tmp_path / "fitted.json", "--json").stdout)["weights"][0] == [1, 0, 0, 0, 0]


def test_plot_draws_each_kind_of_file(folder, tmp_path):
    stats, schedule = folder / "s.safetensors", folder / "x-4.json"
    for files in ((stats, schedule), (stats,), (schedule,)):
        output = tmp_path / f"{len(files)}{files[0].stem}.png"
        result = run("plot", *files, "-o", output)
        assert result.exit_code == 0, result.stderr
        assert output.read_bytes().startswith(b"\x89PNG")


def test_demo_passes_its_options_on(tmp_path, monkeypatch):
    called = {}
    monkeypatch.setattr(
        "fastsched.cli.demo.run_demo", lambda output, **options: called.update(output=output, **options)
    )
    threads = torch.get_num_threads()
    assert run("demo", "-o", tmp_path, "--samples", "5", "-q").exit_code == 0
    torch.set_num_threads(threads)
    assert (called["output"], called["samples"], called["progress"]) == (tmp_path, 5, False)


def test_an_interrupted_measurement_resumes_where_it_stopped(tmp_path):
    calls, oracle = [0, 10**9], fs.oracles.Gaussian(0.5, (4,))

    def network(z, sigma):
        calls[0] += len(z)
        if calls[0] > calls[1]:
            raise KeyboardInterrupt
        return oracle.denoise(z, sigma)

    denoiser = fs.Denoiser.from_denoiser(network, 0.002, 80.0)
    settings = {"levels": 16, "samples": 5, "batch_size": 2, "progress": False}
    path = tmp_path / "s.safetensors"
    calls[1] = 6 + 3 * 30  # in the second batch, after six that check the network
    with pytest.raises(KeyboardInterrupt):
        measure_to_file(denoiser, (4,), path, **settings)
    assert fs.PathStatistics.load(path).samples == 2
    calls[:] = [0, 10**9]
    resumed = measure_to_file(denoiser, (4,), path, resume=True, **settings)
    assert calls[0] == 6 + 3 * 30
    whole = fs.measure(denoiser, (4,), **settings)
    assert torch.equal(resumed.seeds, whole.seeds)
    torch.testing.assert_close(resumed.gram, whole.gram)
    torch.testing.assert_close(resumed.response_cross, whole.response_cross)
    assert whole.model_calls == 6 + 5 * 30
    assert resumed.model_calls == whole.model_calls  # checks made again do not count again
    calls[0] = 0
    assert measure_to_file(denoiser, (4,), path, resume=True, **settings).samples == 5
    assert calls[0] == 1  # asks if it is the same network, and measures nothing


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("--levels", "20"), "measured with other levels"),
        (("--seed", "1"), "measured with another seed"),
        (("--samples", "2"), "more than 2 samples"),
        (("--no-responses",), "measured with responses"),
        (("--shape", "6"), "measured with shape"),
    ],
)
def test_resuming_with_other_settings_is_refused(folder, model, changed, message):
    output = folder / "s.safetensors"
    before = output.read_bytes()
    same = ("--shape", "2,3", "--samples", "3", "--levels", "24")
    result = run("measure", model, *same, "-q", "--resume", "-o", output, *changed)
    assert result.exit_code == 2
    assert message in one_line(result)
    assert output.read_bytes() == before


def test_a_measurement_is_not_overwritten_unasked(folder, model, tmp_path):
    common = ("measure", model, "--shape", "2,3", "--samples", "1", "--levels", "8", "-q", "-o")
    output = tmp_path / "s.safetensors"
    output.write_text("precious")
    result = run(*common, output)
    assert result.exit_code == 1
    assert "--resume" in one_line(result)
    assert output.read_text() == "precious"
    assert run(*common, output, "--overwrite").exit_code == 0
    assert fs.PathStatistics.load(output).samples == 1


@pytest.mark.parametrize("command", ["fit", "select"])
def test_a_schedule_does_not_replace_a_measurement_whatever_its_name(folder, model, tmp_path, command):
    output = tmp_path / "s.json"
    fs.PathStatistics.load(folder / "s.safetensors").save(output)
    before = output.read_bytes()
    fit = ("fit", model, "--shape", "2,3", "--steps", "4", "--overwrite")
    result = run(*(fit if command == "fit" else ("select", folder / "s.safetensors", "--steps", "4")), "-o", output)
    assert "measurements are not replaced here" in one_line(result)
    assert "model calls" not in result.stderr  # known before any work
    assert output.read_bytes() == before


def test_an_empty_model_is_no_folder(tmp_path):
    assert "must be 'digits'" in one_line(run("measure", "", "--shape", "2,3", "-o", tmp_path / "s"))


def test_unknown_solver_names_its_near_match(folder):
    result = run("select", folder / "s.safetensors", "--steps", "4", "--solver", "dpmpp_2mm")
    assert result.exit_code == 2
    assert "did you mean 'dpmpp_2m'?" in one_line(result)


@pytest.mark.parametrize("command", [("select", "none.safetensors", "--steps", "4"), ("compare", "digits", "no.json")])
def test_a_missing_file_is_named(command):
    result = run(*command)
    assert result.exit_code == 1
    assert "no such" in one_line(result)


def test_foreign_files_are_refused(folder, tmp_path):
    foreign = tmp_path / "foreign.safetensors"
    foreign.write_text("neither")
    assert "not a whole safetensors file" in one_line(run("select", foreign, "--steps", "4"))
    (tmp_path / "foreign.json").write_text('{"a": 1}')
    result = run("plot", tmp_path / "foreign.json", "-o", tmp_path / "a.png")
    assert result.exit_code == 2
    assert "does not hold a schedule" in one_line(result)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", "six"), "steps must be integers"),
        (("--steps", "0"), "steps must be at least 1"),
        (("--steps", "60"), "steps must be at most 23"),
    ],
)
def test_bad_options_of_select_are_named(folder, arguments, message):
    result = run("select", folder / "s.safetensors", *arguments)
    assert result.exit_code == 2
    assert message in one_line(result)


def test_other_bad_options_are_named(folder, model, tmp_path):
    schedule = folder / "x-4.json"
    shaped = ("--shape", "2,3", "-q")
    cases = [
        (("compare", model, schedule, *shaped, "--baselines", "karas"), "did you mean 'karras'?"),
        (("compare", model, schedule, *shaped, "--baselines", "uniform"), "uniform is for flow models"),
        (("compare", model, schedule, *shaped, "--dtype", "float8"), "dtype must be one of"),
        (("measure", model, "--shape", "2x3", "-o", tmp_path / "s"), "separated by commas, such as 4,64,64"),
        (("measure", model, *shaped, "-o", "-"), "- is not read as standard output"),
        (
            ("fit", f"{tmp_path}/never.py:build", "--steps", "3", "-o", tmp_path / "a.json", "--dtype", "half"),
            "dtype must",
        ),
        (("plan", folder / "s.safetensors", "--target", "karas:20"), "did you mean 'karras'?"),
        (("measure", model, *shaped, "-o", tmp_path / "s", "--resume", "--overwrite"), "exclude each other"),
        (("fit", model, *shaped, "--steps", "3", "-o", tmp_path / "s.json", "--device", "meta"), "device must be one"),
        (("plot", schedule, "-o", tmp_path / "a.bmp"), "output must end in .png"),
        (("plot", *[folder / "s.safetensors"] * 2, "-o", tmp_path / "a.png"), "at most one file of statistics"),
    ]
    for arguments, message in cases:
        result = run(*arguments)
        assert result.exit_code == 2
        assert message in one_line(result)
        assert result.stdout == ""
    long = run("fit", model, *shaped, "--steps", "3", "-o", tmp_path / f"{'x' * 255}.json")
    assert long.exit_code == 1
    assert "name too long" in long.stderr
    assert "model calls" not in long.stderr


def test_a_warning_is_a_line_without_its_place_in_the_code(folder, monkeypatch):
    def loaded(path):
        warnings.warn("mind\nthe gap", stacklevel=1)
        return fs.PathStatistics.load(path)

    monkeypatch.setattr("fastsched.cli.inputs.load_statistics", loaded)
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # not an error, as in the other tests
        result = run("select", folder / "s.safetensors", "--steps", "2")
    assert result.exit_code == 0
    assert result.stderr.splitlines()[0] == "warning: mind the gap"


def test_an_unexpected_error_is_one_line_unless_a_traceback_is_asked_for(tmp_path, monkeypatch):
    (tmp_path / "failing_model.py").write_text("def build():\n    raise RuntimeError('out of\\nmemory')\n")
    arguments = ("measure", f"{tmp_path / 'failing_model.py'}:build", "--shape", "3", "-o", tmp_path / "s")
    result = run(*arguments)
    assert result.exit_code == 1
    where = " (use fastsched --traceback to see where)"
    assert one_line(result).endswith(f"build() failed with RuntimeError: out of memory{where}")
    assert isinstance(run("--traceback", *arguments).exception.__cause__, RuntimeError)
    monkeypatch.setattr("fastsched.cli.inputs.load_statistics", lambda path: {}[path])
    assert one_line(run("plan", "s")) == f"error: KeyError: PosixPath('s'){where}"


def test_help_teaches_and_imports_nothing_heavy():
    for command in COMMANDS:
        result = run(command, "--help")
        assert result.exit_code == 0
        assert f"fastsched {command}" in result.stdout
    code = (
        "import sys; from typer.testing import CliRunner; from fastsched.cli.commands import app;"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0;"
        "heavy = {'torch', 'numpy', 'scipy', 'matplotlib', 'sklearn', 'triton'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_numbers_out_of_range_are_refused_before_a_model_loads(tmp_path):
    for option, value in (("--steps", "0"), ("--levels", "2"), ("--samples", "0"), ("--seed", "-1")):
        result = run("fit", "never.py:build", "--steps", "3", option, value, "-o", tmp_path / "a.json")
        assert result.exit_code == 2
        assert f"Invalid value for '{option}'" in result.stderr


def test_an_error_of_the_system_is_told_without_its_number(folder, tmp_path, monkeypatch):
    def full(schedule, path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(fs.Schedule, "save", full)
    path = tmp_path / "a.json"
    result = run("select", folder / "s.safetensors", "--steps", "4", "-o", path)
    assert result.stderr.splitlines()[-1] == f"error: No space left on device: {path}"


def test_files_are_written_before_anything_is_printed(folder, model, tmp_path, monkeypatch):
    def closed(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr(shell.os, "dup2", lambda *_: None)  # stdout of these tests has no descriptor of its own
    monkeypatch.setattr(shell.typer, "echo", closed)
    stats, schedule = folder / "s.safetensors", folder / "x-4.json"
    few = ("--shape", "2,3", "--samples", "2", "--reference-steps", "5", "--baselines", "none", "-q")
    for command in (
        ("select", stats, "--steps", "3,4", "-o", tmp_path / "a.json"),
        ("plan", stats, "--max-steps", "2", "-o", tmp_path / "b.png"),
        ("compare", model, schedule, *few, "--csv", tmp_path / "c.csv"),
    ):
        assert run(*command).exit_code == 1
    assert sorted(os.listdir(tmp_path)) == ["a-3.json", "a-4.json", "b.png", "c.csv"]


def test_version():
    assert run("--version").stdout == f"fastsched {fs.__version__}\n"


def test_plan_prints_and_draws(folder, tmp_path):
    figure = tmp_path / "plan.png"
    result = run("plan", folder / "s.safetensors", "--solver", "ddim,dpmpp_2m", "--max-steps", "6", "-o", figure)
    assert result.exit_code == 0, result.output
    assert "predicted error" in result.stdout
    assert figure.read_bytes().startswith(b"\x89PNG")
    result = run("plan", folder / "s.safetensors", "--max-steps", "8", "--target", "karras:8")
    assert "steps for karras:8" in result.stdout


def test_what_is_named_twice_is_done_once(folder, tmp_path):
    twice = run("plan", folder / "s.safetensors", "--solver", "ddim,dpmpp_2m, euler,ddim", "--max-steps", "2", "--json")
    assert [entry["solver"] for entry in json.loads(twice.stdout)] == ["ddim", "dpmpp_2m"]
    run("select", folder / "s.safetensors", "--steps", "2,3,2", "-o", tmp_path / "x.json")
    assert sorted(os.listdir(tmp_path)) == ["x-2.json", "x-3.json"]
    assert len(json.loads(run("select", folder / "s.safetensors", "--steps", "2,2", "--json").stdout)) == 1


def test_plan_shows_the_other_solvers_if_one_does_not_reach_the_target(folder):
    options = ("--solver", "ddim,dpmpp_2m", "--max-steps", "8", "--target")
    curves = json.loads(run("plan", folder / "s.safetensors", *options, "1e9", "--json").stdout)
    least = [curve["curve"][-1]["predicted_error"] for curve in curves]
    assert least[1] < least[0]
    result = run("plan", folder / "s.safetensors", *options, f"{2 * least[1]:.17g}")
    assert result.exit_code == 2
    assert "dpmpp_2m needs 8 steps" in result.stdout
    assert "the best ddim one reaches" in result.stderr
    result = run("plan", folder / "s.safetensors", *options, f"{2 * least[1]:.17g}", "--json")
    assert [entry["steps_needed"] for entry in json.loads(result.stdout)] == [None, 8]


def test_plan_goes_as_far_as_few_levels_allow(tmp_path):
    assert (
        run("measure", "digits", "--levels", "6", "--samples", "1", "-q", "-o", tmp_path / "s.safetensors").exit_code
        == 0
    )
    curve = json.loads(run("plan", tmp_path / "s.safetensors", "--json").stdout)[0]["curve"]
    assert [row["steps"] for row in curve] == [1, 2, 3, 4, 5]
    assert "max_steps must be at most 5" in run("plan", tmp_path / "s.safetensors", "--max-steps", "6").stderr


def test_plan_refuses_a_strange_target(folder):
    result = run("plan", folder / "s.safetensors", "--max-steps", "4", "--target", "karras:many")
    assert result.exit_code == 2
    assert "target must be an error such as 0.05" in result.stderr


def test_module_runs_as_the_command():
    command = [sys.executable, "-m", "fastsched", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0
    assert fs.__version__ in result.stdout


def test_ranges_of_samples_are_merged(tmp_path):
    measure = lambda which, name: run(
        *("measure", "digits", "--levels", "8", "--samples", which, "--batch-size", "1", "-o", tmp_path / name)
    )
    for which, name in (("0:1", "a.safetensors"), ("1:3", "b.safetensors"), ("3", "whole.safetensors")):
        assert measure(which, name).exit_code == 0
    merged = run("merge", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "-o", tmp_path / "m.safetensors")
    assert merged.exit_code == 0, merged.stderr
    found, whole = (fs.PathStatistics.load(tmp_path / name) for name in ("m.safetensors", "whole.safetensors"))
    assert torch.equal(found.seeds, whole.seeds)
    assert torch.equal(found.vector_gram, whole.vector_gram)
    twice = run("merge", tmp_path / "a.safetensors", tmp_path / "whole.safetensors", "-o", tmp_path / "x.safetensors")
    assert twice.exit_code == 2
    assert "repeats 1 of these paths" in one_line(twice)
    assert "samples must be a number, or A:B" in one_line(measure("a:b", "y.safetensors"))


def test_a_bad_name_of_a_file_is_said_of_the_option_that_gave_it(folder, model, tmp_path):
    nowhere = tmp_path / "no" / "such"
    for command in (
        ("compare", model, folder / "x-4.json", "--shape", "2,3", "--csv", nowhere / "a.csv"),
        ("profile", model, "--shape", "2,3", "--trace", nowhere / "a.json"),
    ):
        assert f"error: {command[-2][2:]}: no such folder" in one_line(run(*command))
