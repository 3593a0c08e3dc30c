"""What keeps the package easy to enter: layers in one order, no circles, short functions, a short listing."""

import ast
import shutil
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fastsched"
FOLDERS = FILES = 10  # directly in fastsched/
LINES = 60  # of a function, decorators not counted


def sources() -> list[Path]:
    """The package's files and the kernels', each once: the link ``fastsched/kernels`` is not followed."""
    own = (path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] != "kernels")
    return sorted([*own, *(ROOT / "kernels").glob("*.py")])


def lint(folder):
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run([sys.executable, "-c", command, "--no-cache"], cwd=folder, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "fastsched", ignore=shutil.ignore_patterns("__pycache__", "kernels", "assets"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_layers_import_downwards_only():
    result = lint(ROOT)
    assert result.returncode == 0, result.stdout


UPWARDS = {
    "at the top": "from fastsched.selection.optimal import optimal_schedule\n",
    "as a module": "from fastsched.selection import optimal\n",
    "inside a function": "def later():\n    from fastsched.selection.optimal import optimal_schedule\n",
    "for types": (
        "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n"
        "    from fastsched.selection.optimal import optimal_schedule\n"
    ),
}


@pytest.mark.parametrize("line", UPWARDS.values(), ids=UPWARDS)
def test_an_import_upwards_is_found(copy, line):
    assert lint(copy).returncode == 0
    with (copy / "fastsched" / "denoisers" / "noise.py").open("a") as file:
        file.write(line)
    result = lint(copy)
    assert result.returncode == 1
    assert "fastsched.denoisers.noise -> fastsched.selection.optimal" in result.stdout


def test_a_circle_within_a_layer_is_found(copy):
    with (copy / "fastsched" / "sampling" / "multistep.py").open("a") as file:
        file.write("def later():\n    from fastsched.sampling import solvers\n")
    result = lint(copy)
    assert result.returncode == 1
    assert ".solvers -> .multistep" in result.stdout


def test_a_layer_without_a_place_is_found(copy):
    (copy / "fastsched" / "attic").mkdir()
    (copy / "fastsched" / "attic" / "__init__.py").write_text('"""Things."""\n')
    result = lint(copy)
    assert result.returncode == 1
    assert "attic" in result.stdout


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, first and last the same; empty without one."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_circle_of_imports_among_modules():
    """Imports inside functions and for types count; the package's own list of names, which all follow, does not."""
    found = grimp.build_graph("fastsched", cache_dir=None)
    modules = found.modules - {"fastsched"}
    graph = {module: set(found.find_modules_directly_imported_by(module)) for module in modules}
    assert len(graph) > 50
    assert circle(graph) == []
    assert circle(graph | {"fastsched.validate": {"fastsched.comparison"}})  # which imports validate


def test_only_the_shell_imports_the_whole_package():
    """``import fastsched as fs`` in a layer would reach every other one, and no linter would see it."""
    importers = grimp.build_graph("fastsched", cache_dir=None).find_modules_that_directly_import("fastsched")
    assert [name for name in sorted(importers) if not name.startswith("fastsched.cli.")] == []


def test_imports_by_name_are_the_known_ones():
    """`importlib.import_module` hides an import from the linter."""
    found = {}
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "importlib.import_module",
                "import_module",
                "__import__",
            ):
                found[path.relative_to(ROOT).as_posix()] = ast.unparse(node.args[0])
    assert found == {
        "fastsched/__init__.py": "f'fastsched.{_HOME[name]}'",  # names on first use
        "fastsched/denoisers/loading.py": "name",  # the user's own module
        "fastsched/ops/registration.py": "f'fastsched.kernels.{name}'",  # Triton on first use
        "fastsched/sampling/display.py": "'fastsched.plot'",  # .plot(), drawn by what lies above
        "fastsched/sampling/schedule.py": "'fastsched.diffusers'",  # Schedule.to_diffusers, deprecated
    }


def test_kernels_import_nothing_of_the_package():
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not [name for name in names if name.split(".")[0] in ("fastsched", "kernels")], path.name
            assert not (isinstance(node, ast.ImportFrom) and node.level > 1), path.name


def test_the_listing_is_short():
    entries = [path for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    link = PACKAGE / "kernels"  # a text file in a clone without symbolic links
    folders = [path.name for path in entries if path.is_dir() or path == link]
    files = [path.name for path in entries if path.name not in folders]
    assert len(folders) <= FOLDERS, sorted(folders)
    assert len(files) <= FILES, sorted(files)


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def functions(tree: ast.AST, depth: int = 0):
    """Every function and lambda under ``tree`` with its depth: 1 for one that lies in no other function."""
    for node in ast.iter_child_nodes(tree):
        inside = isinstance(node, FUNCTIONS)
        if inside:
            yield node, depth + 1
        yield from functions(node, depth + inside)


def misfits(wrong) -> str:
    """A line ``path:line name`` for every function of which ``wrong(node, depth)`` holds."""
    return "\n".join(
        f"{path.relative_to(ROOT)}:{node.lineno} {getattr(node, 'name', 'lambda')}"
        for path in sources()
        for node, depth in functions(ast.parse(path.read_text(encoding="utf-8")))
        if wrong(node, depth)
    )


def test_functions_fit_a_screen():
    assert misfits(lambda node, _: node.end_lineno - node.lineno + 1 > LINES) == ""


def test_no_closure_within_a_closure():
    assert misfits(lambda _, depth: depth >= 3) == ""


def test_depth_counts_functions_and_lambdas_alone():
    code = "class A:\n    def f(self):\n        def g():\n            if g:\n                return lambda: 0\n"
    assert [depth for _, depth in functions(ast.parse(code))] == [1, 2, 3]


#: Functions of torch that make a tensor on a program's default device if no device is named.
MAKERS = {"arange", "empty", "eye", "full", "linspace", "logspace", "ones", "tensor", "triu_indices", "zeros"}


def test_new_tensors_name_their_device():
    """Else they would be on a program's default device, beside others on the CPU; modules' parameters may be."""
    found = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            function = node.func if isinstance(node, ast.Call) else None
            if not (isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name)):
                continue
            made = function.attr in MAKERS or function.attr.startswith("rand")
            if made and function.value.id == "torch" and "device" not in [keyword.arg for keyword in node.keywords]:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert [place for place in found if "denoisers/digits.py" not in place] == []
