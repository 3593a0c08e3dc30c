"""The package as a user meets it: what import costs, what a wheel holds, and life without Triton."""

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(code, **options):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_leaves_heavy_packages_alone():
    loaded = run(
        "import sys, torch; before = set(sys.modules); import fastsched;"
        "heavy = {'triton', 'scipy', 'matplotlib', 'sklearn', 'diffusers', 'typer', 'tqdm', 'pandas'};"
        "print(sorted(heavy & (set(sys.modules) - before)))"
    )
    assert loaded == "[]"


def test_measuring_and_selecting_need_torch_and_numpy_alone():
    loaded = run(
        "import sys, torch; before = set(sys.modules); import fastsched as fs;"
        "d = fs.Denoiser.from_denoiser(lambda z, s: 0.1 * z, 0.1, 10.0);"
        "fs.optimal_schedule(fs.measure(d, (4,), levels=12, samples=1, progress=False), 4);"
        "print(sorted({'triton', 'scipy', 'matplotlib', 'sklearn', 'torch._dynamo'} & (set(sys.modules) - before)))"
    )
    assert loaded == "[]"


def test_import_executes_little():
    """``import fastsched`` loads itself alone; its parts come on first use."""
    loaded = run(
        "import sys, torch; before = set(sys.modules); import fastsched;"
        "print(sorted(name for name in set(sys.modules) - before if name.startswith('fastsched')))"
    )
    assert loaded == "['fastsched']"


def test_works_without_triton():
    printed = run(
        "import sys; sys.modules['triton'] = None; import fastsched as fs;"
        "d = fs.Denoiser.from_denoiser(lambda z, s: 0.1 * z, 0.1, 10.0);"
        "print(fs.optimal_schedule(fs.measure(d, (4,), levels=12, samples=1, progress=False), 4).steps)"
    )
    assert printed == "4"


def test_public_names_exist():
    import fastsched as fs

    for name in fs.__all__:
        if name != "diffusers" or importlib.util.find_spec("diffusers"):
            assert getattr(fs, name) is not None
    assert set(fs.__all__) <= set(dir(fs))
    with pytest.raises(AttributeError, match="no attribute 'optimal_shedule'"):
        _ = fs.optimal_shedule


def test_importing_submodules_first_keeps_the_functions():
    printed = run(
        "import pkgutil, importlib, fastsched as fs;"
        "[importlib.import_module(m.name) for m in pkgutil.iter_modules(fs.__path__, 'fastsched.')"
        " if m.name not in ('fastsched.kernels', 'fastsched.diffusers')];"
        "print([n for n in ('measure', 'sample', 'optimal_schedule', 'compare') if not callable(getattr(fs, n))])"
    )
    assert printed == "[]"


@pytest.mark.slow
def test_wheel_holds_the_package_alone_and_works(tmp_path):
    """Built, installed into an empty folder and used from there, without the checkout."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = tmp_path / "source"  # setuptools leaves a build folder where it builds
    source.mkdir()
    for name in ("fastsched", "kernels"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(source)], check=True, timeout=600)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fastsched"}
    for needed in ("py.typed", "kernels/level_gram.py", "denoisers/assets/digits.safetensors"):
        assert f"fastsched/{needed}" in names
    assert "fastsched/kernels/__init__.py" not in names
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True, timeout=600)
    printed = run(
        f"import sys; sys.path.insert(0, {str(site)!r}); import fastsched as fs; from fastsched.denoisers.digits import"
        " load_digits_network; load_digits_network(); print(fs.__file__)",
        cwd=tmp_path,
    )
    assert printed.startswith(str(site))
