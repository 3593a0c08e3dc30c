"""Every file, and every name in a file, that the documents point to exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *("README.md", "CONTRIBUTING.md", "kernels/README.md", "benchmarks/README.md", "benchmarks/experiments/README.md"),
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


def test_the_architecture_names_every_room():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = [path.name for path in (ROOT / "fastsched").iterdir() if (path / "__init__.py").exists()]
    assert [room for room in rooms if room not in text] == []
