"""The Python file that a command takes its model from: how it is found, and what it prints."""

import json
import subprocess
import sys

import pytest
from shell_runs import one_line, run

import fastsched as fs
from fastsched.denoisers.loading import load_denoiser


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("digit", 2, "did you mean 'digits'?"),
        ("FILE:bild", 2, "did you mean 'build'?"),
        ("FILE:number", 2, "name a function"),
        ("FILE:wrong", 2, "must return a fastsched.Denoiser"),
        ("my_model.py", 2, "name a function in it, such as my_model.py:build"),
        ("my_pipeline", 2, "got 'my_pipeline'; there is no such folder"),
        ("nowhere.py:build", 1, "no such file: nowhere.py"),
        ("./my_model:build", 2, "the name of a file must end in .py, got './my_model'"),
        ("folder/my_model:build", 2, "must end in .py"),
        ("no_such_package.models:build", 1, "no module 'no_such_package.models'"),
        ("FILE:build", 2, "--shape 4,64,64"),
    ],
)
def test_a_denoiser_that_cannot_be_had_is_explained(folder, tmp_path, name, status, message):
    result = run("measure", name.replace("FILE", str(folder / "my_model.py")), "-o", tmp_path / "s.safetensors")
    assert result.exit_code == status
    assert message in one_line(result)


def test_a_module_of_the_current_folder_is_found(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    denoiser, shape = load_denoiser("my_model:build")
    assert isinstance(denoiser, fs.Denoiser)
    assert shape is None


def test_an_import_that_fails_inside_is_told_from_a_missing_module(tmp_path, monkeypatch):
    (tmp_path / "broken_model.py").write_text("import no_such_dependency\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    why = "importing broken_model failed with ModuleNotFoundError: No module named 'no_such_dependency'"
    with pytest.raises(ImportError, match=why):
        load_denoiser("broken_model:build")


TALKING = """
import fastsched as fs

print("imported")
oracle = fs.oracles.Gaussian(0.5, (2, 3))

def answer(z, s):
    print("asked")
    return oracle.denoise(z, s)

def build():
    print("built")
    return fs.Denoiser.from_denoiser(answer, 0.002, 80.0)
"""


@pytest.mark.parametrize(
    "command",
    [
        ("measure", "--samples", "2", "--levels", "8", "-o", "s.safetensors"),
        ("fit", "--steps", "3", "--model-calls", "80", "--json", "-o", "fit.json"),
        ("compare", "x-4.json", "--samples", "4", "--reference-steps", "8", "--json"),
        ("profile", "--steps", "3", "--json"),
    ],
)
def test_what_a_model_prints_is_no_result(folder, tmp_path, command):
    (tmp_path / "talking.py").write_text(TALKING)
    name, *rest = command
    here = [str(tmp_path / each) if each.endswith(("fit.json", ".safetensors")) else each for each in rest]
    here = [str(folder / each) if each == "x-4.json" else each for each in here]
    result = run(name, f"{tmp_path / 'talking.py'}:build", *here, "--shape", "2,3")
    assert result.exit_code == 0, result.stderr
    assert all(word in result.stderr for word in ("imported", "built", "asked"))
    if "--json" in command:
        json.loads(result.stdout)
    else:
        assert result.stdout == ""


def test_samples_are_checked_before_a_model_loads(tmp_path):
    (tmp_path / "none.py").write_text("raise RuntimeError('loaded')")
    result = run("measure", f"{tmp_path / 'none.py'}:build", "--samples", "5:3", "-o", tmp_path / "s.safetensors")
    assert "samples must be a number" in one_line(result)


@pytest.mark.parametrize("ending", ["SystemExit(0)", "SystemExit", "GeneratorExit"])
def test_a_model_that_ends_the_program_is_an_error(tmp_path, ending):
    source = f"def stop(z, s):\n    raise {ending}\n\ndef build():\n"
    source += "    return fs.Denoiser.from_denoiser(stop, 0.01, 20.0)\n"
    (tmp_path / "stops.py").write_text("import fastsched as fs\n\n" + source)
    output = tmp_path / "s.safetensors"
    result = run("measure", f"{tmp_path}/stops.py:build", "--shape", "4", "--levels", 8, "-o", output)
    assert result.exit_code == 1
    assert f"the model ended the command by {ending[:9]}" in one_line(result)
    assert not output.exists()


def test_a_file_in_the_current_folder_hides_no_installed_package(folder, tmp_path):
    """Python itself puts the current folder first for ``python -m``."""
    for name in ("safetensors.py", "numpy.py", "json.py"):
        (tmp_path / name).write_text("raise SystemExit(3)\n")
    (tmp_path / "beside.py").write_text((folder / "my_model.py").read_text())
    line = "measure beside:build --shape 2,3 --levels 4 --samples 1 -o s.safetensors"
    done = subprocess.run(
        [sys.executable, "-m", "fastsched", *line.split()], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "s.safetensors").exists()


def test_what_a_command_reads_is_not_its_output(folder, tmp_path):
    model, schedule = tmp_path / "my_model.py", tmp_path / "a.json"
    model.write_text((folder / "my_model.py").read_text())
    fs.Schedule([80.0, 1.0, 0.0], "ddim").save(schedule)
    before = model.read_bytes(), schedule.read_bytes()
    for command in (
        ["measure", f"{model}:build", "--shape", "2,3", "-o", model, "--overwrite"],
        ["compare", f"{model}:build", schedule, "--shape", "2,3", "--csv", schedule],
        ["compare", f"{model}:build", schedule, "--shape", "2,3", "--csv", model],
    ):
        result = run(*command)
        assert result.exit_code == 2
        name = "csv" if "--csv" in command else "output"
        assert f"{name} must be another file than" in one_line(result)
    assert (model.read_bytes(), schedule.read_bytes()) == before


@pytest.mark.parametrize(
    ("command", "output"),
    [
        (("measure", "--samples", "2", "--levels", "8", "-o"), "s.safetensors"),
        (("fit", "--steps", "3", "--model-calls", "80", "-o"), "fit.json"),
        (("compare", "x.json", "--samples", "4", "--reference-steps", "8", "--csv"), "errors.csv"),
        (("profile", "--steps", "3", "--trace"), "trace.json"),
    ],
)
def test_a_model_that_changes_the_folder_does_not_take_the_output_along(folder, tmp_path, monkeypatch, command, output):
    (tmp_path / "elsewhere").mkdir()
    moving = "import os\nos.chdir('elsewhere')\n" + (folder / "my_model.py").read_text()
    (tmp_path / "moving.py").write_text(moving)
    monkeypatch.chdir(tmp_path)
    fs.Schedule([80.0, 1.0, 0.0], "ddim").save("x.json")
    name, *rest = command
    result = run(name, "moving.py:build", *rest, output, "--shape", "2,3")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / output).exists()
    assert not (tmp_path / "elsewhere" / output).exists()


@pytest.mark.parametrize(
    "line",
    [
        "import logging.config; logging.config.dictConfig({'version': 1})",
        "import logging; logging.disable(logging.CRITICAL)",
        "import logging; logging.basicConfig(level=logging.DEBUG, force=True)",
    ],
)
def test_an_error_is_printed_once_whatever_a_model_does_to_logging(tmp_path, line):
    source = f"import fastsched as fs\n{line}\n\ndef build():\n"
    source += "    return fs.Denoiser.from_denoiser(lambda z, s: z * float('nan'), 0.01, 20.0)\n"
    (tmp_path / "quiet.py").write_text(source)
    line = "measure quiet.py:build --shape 4 --levels 8 -o s.st"
    done = subprocess.run(
        [sys.executable, "-m", "fastsched", *line.split()], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.count("model calls") == 1
    assert done.stderr.count("returned NaN or inf") == 1


@pytest.mark.parametrize("form", ["FOLDER/m.py:build", "m:build"])
def test_a_network_that_imports_at_its_first_call_finds_what_is_beside_it(tmp_path, monkeypatch, form):
    (tmp_path / "m.py").write_text(
        "import fastsched as fs\n"
        "def network(z, s):\n    import beside_the_network\n    return beside_the_network.oracle.denoise(z, s)\n"
        "def build():\n    return fs.Denoiser.from_denoiser(network, 0.002, 80.0)\n"
    )
    (tmp_path / "beside_the_network.py").write_text("import fastsched as fs\noracle = fs.oracles.Gaussian(0.5, (2,))\n")
    if form == "m:build":
        monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    model = form.replace("FOLDER", str(tmp_path))
    result = run("measure", model, "--shape", "2", "--levels", "8", "-q", "-o", tmp_path / "s.safetensors")
    assert result.exit_code == 0, result.stderr
    assert sys.path == before
    del sys.modules["beside_the_network"]
    sys.modules.pop("m", None)
