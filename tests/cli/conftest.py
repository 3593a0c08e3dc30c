import pytest
from shell_runs import MODEL, run


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A model file, statistics and two schedules made by the command itself."""
    path = tmp_path_factory.mktemp("cli")
    (path / "my_model.py").write_text(MODEL)
    model = f"{path / 'my_model.py'}:build"
    assert run("measure", model, "--shape", "2,3", "--samples", "3", "-q", "-o", path / "s.safetensors").exit_code == 0
    result = run("select", path / "s.safetensors", "--steps", "4,6", "--solver", "ddim", "-o", path / "x.json")
    assert result.exit_code == 0
    return path


@pytest.fixture
def model(folder) -> str:
    return f"{folder / 'my_model.py'}:build"
