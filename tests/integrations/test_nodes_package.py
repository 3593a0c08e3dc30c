"""How ComfyUI finds the nodes: without fastsched, and as an installed package."""

import importlib.util
import sys

import pytest


def test_without_fastsched_the_older_nodes_remain(comfy, package_folder, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "fastsched.fitting.loop", None)
    spec = importlib.util.spec_from_file_location("fastsched_nodes_alone", package_folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    for name in [name for name in sys.modules if name.startswith("fastsched_nodes_alone.")]:
        monkeypatch.delitem(sys.modules, name)
    assert set(module.NODE_CLASS_MAPPINGS) == {"FastschedScheduleLoader", "FastschedFittedLoader"}
    assert "not installed" in caplog.text


def test_an_installed_package_tells_comfyui_of_itself(package_folder, tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("main_under_test", package_folder / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["fastsched_comfyui", str(tmp_path)])
    with pytest.raises(SystemExit):
        module.main()
    assert "must be a folder that holds custom_nodes" in capsys.readouterr().err
    (tmp_path / "custom_nodes").mkdir()
    module.main()
    assert "from fastsched_comfyui import *" in (tmp_path / "custom_nodes" / "fastsched_nodes.py").read_text()
