"""The Python file that a command takes its model from: how it is found, and what it prints."""

import json
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
