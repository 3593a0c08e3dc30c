import subprocess
import sys
import textwrap

import pytest

import fastsched as fs
from fastsched.denoisers.loading import load_denoiser

BUILD = "import fastsched as fs\ndef build():\n    return fs.Denoiser.from_denoiser(lambda z, s: z, 0.01, 20.0)\n"


def test_the_folder_of_a_model_is_searched_last_and_only_while_it_loads(tmp_path):
    (tmp_path / "beside_the_model.py").write_text("value = 7\n")
    (tmp_path / "m.py").write_text(
        BUILD + f"import sys\nassert sys.path[-1] == {str(tmp_path)!r}\nimport beside_the_model\n"
    )
    before = list(sys.path)
    assert isinstance(load_denoiser(f"{tmp_path / 'm.py'}:build")[0], fs.Denoiser)
    assert sys.path == before
    assert sys.modules.pop("beside_the_model").value == 7


@pytest.mark.parametrize("form", ["beside/m.py:build", "m:build"])
def test_a_file_beside_a_model_hides_no_installed_package(tmp_path, form):
    """`form` names the model from its parent folder or from its own."""
    beside = tmp_path / "beside"
    beside.mkdir()
    for package in ("safetensors", "tqdm", "scipy"):
        (beside / f"{package}.py").write_text("raise SystemExit('hidden')\n")
    (beside / "m.py").write_text(BUILD)
    code = f"""
        import os, sys
        sys.path[:] = [path for path in sys.path if path]  # as python -P, which Python 3.10 does not have
        from fastsched.denoisers.loading import load_denoiser
        os.chdir({str(beside if form.startswith("m:") else tmp_path)!r})
        load_denoiser({form!r})
        import safetensors, tqdm, scipy
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)


def test_a_model_file_takes_no_modules_place(tmp_path):
    import colorsys

    (tmp_path / "colorsys.py").write_text(BUILD)
    (tmp_path / "antigravity.py").write_text(BUILD)  # a module that nothing here has imported
    for name in ("colorsys", "antigravity"):
        load_denoiser(f"{tmp_path / name}.py:build")
    assert sys.modules["colorsys"] is colorsys
    assert "antigravity" not in sys.modules


def test_a_model_may_define_dataclasses(tmp_path):
    (tmp_path / "m.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Net:\n    gain: float = 1.0\n    def __call__(self, z, s):\n        return self.gain * z\n"
        "import fastsched as fs\ndef build():\n    return fs.Denoiser.from_denoiser(Net(), 0.01, 20.0)\n"
    )
    assert isinstance(load_denoiser(f"{tmp_path / 'm.py'}:build")[0], fs.Denoiser)


def test_a_file_that_fails_leaves_nothing_behind(tmp_path):
    (tmp_path / "fails.py").write_text("raise RuntimeError('broken')\n")
    before, modules = list(sys.path), set(sys.modules)
    with pytest.raises(ImportError, match=r"importing .*fails\.py failed with RuntimeError: broken"):
        load_denoiser(f"{tmp_path / 'fails.py'}:build")
    assert sys.path == before
    assert set(sys.modules) == modules


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def build(a): pass", r"m\.py:build\(\) failed with TypeError: build\(\) missing 1 required"),
        ("import sys\ndef build(): sys.exit(0)", r"m\.py:build\(\) failed with SystemExit: 0"),
        ("def build(): raise KeyError('no weights')", r"failed with KeyError: 'no weights'"),
        ("def (:", r"importing .*m\.py failed with SyntaxError"),
        ("import sys\nsys.exit(0)", r"importing .*m\.py failed with SystemExit"),
    ],
)
def test_a_model_that_cannot_be_built_is_named(tmp_path, body, message):
    (tmp_path / "m.py").write_text(body)
    with pytest.raises(ImportError, match=message):
        load_denoiser(f"{tmp_path / 'm.py'}:build")


def test_a_denoiser_in_place_of_the_function_that_returns_it_is_named(tmp_path):
    made = "import fastsched as fs\nmodel = fs.Denoiser.from_denoiser(lambda z, s: z, 0.1, 9.0)\n"
    (tmp_path / "m.py").write_text(made)
    with pytest.raises(TypeError, match=r"m\.py:model is a Denoiser; name a function that returns a Denoiser"):
        load_denoiser(f"{tmp_path / 'm.py'}:model")
