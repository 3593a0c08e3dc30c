"""Collect the benchmarks, whose files are named after the ops and not ``test_*``."""

from pathlib import Path

import pytest

COLLECTED = ("level_gram.py", "measured_gram.py", "hutchinson.py")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Take the files with pytest-benchmark functions in them."""
    if file_path.name in COLLECTED:
        return pytest.Module.from_parent(parent, path=file_path)
    return None
