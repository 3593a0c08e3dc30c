"""The package as a user meets it: what import costs, what a wheel holds, and life without Triton."""

import email
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(code, **options):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_leaves_heavy_packages_alone():
    """``import fastsched`` loads itself alone; its parts come on first use."""
    loaded = run(
        "import sys, torch; before = set(sys.modules); import fastsched;"
        "heavy = {'triton', 'scipy', 'matplotlib', 'sklearn', 'diffusers', 'typer', 'tqdm', 'pandas'};"
        "loaded = set(sys.modules) - before;"
        "print(sorted(name for name in loaded if name in heavy or name.startswith('fastsched')));"
        "fastsched.baselines.karras(5, 0.1, 1.0);"
        "print(sorted(heavy & (set(sys.modules) - before)))"
    )
    assert loaded.splitlines() == ["['fastsched']", "[]"]


def test_measuring_and_selecting_leave_heavy_packages_alone():
    loaded = run(
        "import sys, torch; before = set(sys.modules); import fastsched as fs;"
        "d = fs.Denoiser.from_denoiser(lambda z, s: 0.1 * z, 0.1, 10.0);"
        "fs.optimal_schedule(fs.measure(d, (4,), levels=12, samples=1, progress=False), 4);"
        "print(sorted({'triton', 'matplotlib', 'sklearn', 'torch._dynamo'} & (set(sys.modules) - before)))"
    )
    assert loaded == "[]"


def test_works_without_triton():
    printed = run(
        "import sys; sys.modules['triton'] = None; import fastsched as fs;"
        "d = fs.Denoiser.from_denoiser(lambda z, s: 0.1 * z, 0.1, 10.0);"
        "print(fs.optimal_schedule(fs.measure(d, (4,), levels=12, samples=1, progress=False), 4).steps)"
    )
    assert printed == "4"


def test_the_shell_fits_a_denoiser_without_diffusers():
    printed = run(
        "import sys; sys.modules['diffusers'] = None; sys.stderr = sys.stdout;"
        "from fastsched.cli.commands import app;"
        "app(['fit', 'digits', '--steps', '4', '-o', 'unused.json', '--dry-run'])"
    )
    assert "383 to measure" in printed


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


PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


@pytest.fixture(params=["link", "text"])
def clone(request, tmp_path):
    """What a wheel is built from. Git writes ``fastsched/kernels`` as a link, or as text where there are no links."""
    source = tmp_path / "source"  # setuptools leaves a build folder where it builds
    source.mkdir()
    for name in ("fastsched", "kernels"):
        ignored = shutil.ignore_patterns("__pycache__", *(["kernels"] if name == "fastsched" else []))
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    if request.param == "link":
        (source / "fastsched" / "kernels").symlink_to("../kernels")
    else:
        (source / "fastsched" / "kernels").write_text("../kernels")
    return source


def check_metadata(text):
    """One version, no need of Triton, and a description that points to no file beside it."""
    import fastsched

    entries = email.message_from_string(text)
    assert entries["Version"] == fastsched.__version__
    needed = entries.get_all("Requires-Dist")
    assert not [line for line in needed if line.startswith("triton") and "extra ==" not in line]
    extras = set(entries.get_all("Provides-Extra"))
    assert extras == {"plot", "demo", "diffusers", "triton", "comfyui", "docs", "test", "dev"}
    description = entries.get_payload()
    assert description.startswith("# fastsched")
    assert "![" not in description
    assert re.findall(r"\]\((?!https?:)[^)]*\)", description) == []
    assert "docs/shell.md" in description  # what a link was to


def test_the_source_distribution_takes_every_folder():
    """``MANIFEST.in`` names whatever lies beside the package, but for what git and CI alone read."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("needs a clone, to know what belongs to it")
    tracked = subprocess.check_output([git, "ls-files"], cwd=ROOT, text=True).splitlines()
    tops = {path.split("/")[0] for path in tracked} - {".ci", ".gitignore", ".pre-commit-config.yaml", "MANIFEST.in"}
    lines = (ROOT / "MANIFEST.in").read_text().splitlines()
    named = {name for line in lines if line.startswith(("include", "graft")) for name in line.split()[1:]}
    always = {"LICENSE", "README.md", "pyproject.toml", "setup.py"}  # setuptools takes these by itself
    assert tops - always == named


@pytest.mark.slow
def test_wheel_holds_the_package_alone_and_works(clone, tmp_path):
    """Built, installed into an empty folder and used from there, without the checkout."""
    subprocess.run([*PIP, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(clone)], check=True, timeout=600)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [archive.read(name).decode() for name in names if name.endswith("METADATA")]
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fastsched"}
    modules = {f"fastsched/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    for path in (ROOT / "fastsched").rglob("*.py"):
        modules.add(path.relative_to(ROOT).as_posix())
    assert {name for name in names if name.endswith(".py")} == modules
    assert {"fastsched/py.typed", "fastsched/denoisers/assets/digits.safetensors"} <= set(names)
    check_metadata(metadata)
    site = tmp_path / "site"
    subprocess.run([*PIP, "install", "--no-deps", "--target", str(site), str(wheel)], check=True, timeout=600)
    printed = run(
        f"import sys; sys.path.insert(0, {str(site)!r}); import fastsched as fs; from fastsched.denoisers.digits import"
        " load_digits_network; load_digits_network(); import fastsched.kernels.config; print(fs.__file__)",
        cwd=tmp_path,
    )
    assert printed.startswith(str(site))


@pytest.mark.slow
def test_editable_install_has_the_kernels_or_says_what_to_do(clone, tmp_path):
    prefix = tmp_path / "prefix"
    command = [*PIP, "install", "--no-deps", "--ignore-installed", "--prefix", str(prefix), "--editable", str(clone)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if not (clone / "fastsched" / "kernels").is_dir():
        assert result.returncode != 0
        assert "needs fastsched/kernels as a symbolic link" in result.stderr
        return
    assert result.returncode == 0, result.stderr
    (site,) = prefix.rglob("site-packages")
    code = (  # -S: an editable install of the checkout itself would come first
        f"import site, sys; site.addsitedir({str(site)!r}); sys.path.append({sysconfig.get_path('purelib')!r});"
        "import fastsched.kernels.config as config; print(config.__file__)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    printed = subprocess.check_output([sys.executable, "-S", "-c", code], cwd=tmp_path, env=environment, text=True)
    assert printed.strip() == str(clone / "fastsched" / "kernels" / "config.py")
