"""Every file, and every name in a file, that the documents point to exists."""

import ast
import importlib.util
import pkgutil
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *("README.md", "CONTRIBUTING.md", "kernels/README.md", "integrations/comfyui/README.md"),
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "benchmarks").rglob("README.md")),
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]
FOLDERS = ("benchmarks", "docs", "examples", "fastsched", "integrations", "kernels", "tests")
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)#\s]+)")
POINTER = re.compile(rf"(?:^|\s)((?:{'|'.join(FOLDERS)})/[\w./*-]*)(?:::(\w+))?")


def pointers(text):
    """Pairs (path, name or "") of what code spans point to: ``tests/x.py``, ``fastsched/x.py::name``."""
    return [found for span in CODE.findall(text) for found in POINTER.findall(span)]


def names_of(path):
    """What a module defines at top level."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found.update(target.id for target in targets if isinstance(target, ast.Name))
    return found


def missing(text, folder):
    """What ``text``, a document in ``folder``, points to and is not there."""
    wrong = []
    for path, name in pointers(text):
        files = list(ROOT.glob(path))
        if not files or (name and name not in names_of(files[0])):
            wrong.append(f"{path}::{name}" if name else path)
    links = [link for link in LINK.findall(text) if "://" not in link]
    return wrong + [link for link in links if not (folder / link).exists()]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_a_document_points_to_exists(document):
    path = ROOT / document
    assert missing(path.read_text(encoding="utf-8"), path.parent) == []


def test_what_is_missing_is_found():
    text = "`fastsched/attic.py`, `python tests/no.py`, `fastsched/metrics.py::nothing`, [here](no.md), `setup.py`"
    assert missing(text + ", `fastsched/metrics.py`", ROOT) == [
        "fastsched/attic.py",
        "tests/no.py",
        "fastsched/metrics.py::nothing",
        "no.md",
    ]


def navigation(entries):
    """The pages of a navigation, in order."""
    for entry in entries:
        for page in entry.values():
            yield from navigation(page) if isinstance(page, list) else [page]


def test_the_navigation_names_every_page_once():
    yaml = pytest.importorskip("yaml", reason="PyYAML reads mkdocs.yml")
    pages = list(navigation(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    assert sorted(pages) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_no_page_links_out_of_the_site():
    """A page of the site has no other file of the checkout beside it: such files are named as code."""
    outside = re.compile(r"\]\((?:\.\./|/)")
    wrong = [path.name for path in (ROOT / "docs").glob("*.md") if outside.search(path.read_text(encoding="utf-8"))]
    assert wrong == []


def test_the_reference_has_every_public_name():
    import fastsched as fs

    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    headings = re.findall(r"heading: fs\.(\w+)", text)
    assert sorted(headings) == sorted(fs.__all__)
    for path in re.findall(r"^::: (\S+)$", text, re.MULTILINE):
        assert pkgutil.resolve_name(path) is not None


def test_the_architecture_names_every_layer():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    layers = [path.name for path in (ROOT / "fastsched").iterdir() if (path / "__init__.py").exists()]
    assert [layer for layer in layers if layer not in text] == []


MAKE = re.compile(r"(?:^ *|`)make ([a-z-]+)", re.MULTILINE)
PYTHON = re.compile(r"(?:^ *|`)python (-m [\w.]+|[\w/.]+\.py)([^`\n#|]*)", re.MULTILINE)
#: Modules of a package whose folder has another name here.
FILES = {"fastsched_comfyui": "integrations/comfyui/__main__.py"}


def commands(pattern):
    """What the documents say to run, without repeats."""
    texts = [(ROOT / document).read_text(encoding="utf-8") for document in DOCUMENTS]
    return sorted({found for text in texts for found in pattern.findall(text)})


def test_every_make_target_in_the_documents_exists():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(commands(MAKE)) <= set(targets)


@pytest.mark.parametrize(("what", "arguments"), commands(PYTHON))
def test_a_python_command_takes_the_options_that_a_document_gives_it(what, arguments, monkeypatch, capsys):
    """The tests of its own folder run what it does; this one its ``--help``, which names every option."""
    name = what.removeprefix("-m ")
    spec = importlib.util.find_spec(name) if what.startswith("-m ") and name not in FILES else None
    file = Path(spec.origin) if spec is not None else ROOT / FILES.get(name, name)
    options = re.findall(r"(?<=\s)--[a-z-]+", arguments)
    if "argparse" not in file.read_text(encoding="utf-8"):
        assert options == []
        return
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(file), run_name="__main__")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert [option for option in options if option not in shown] == []
