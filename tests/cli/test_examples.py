"""Every command line in the help, the README and the docs, run in a folder that has the files they name."""

import re
import shlex
import shutil
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from shell_runs import run

import fastsched as fs
from fastsched.cli.commands import COMMANDS

ROOT = Path(__file__).parents[2]
#: Commands that would take long are asked for their cost only.
LONG = ("fit", "measure", "compare", "profile")
MODEL = """
import fastsched as fs
def build():
    return fs.Denoiser.from_denoiser(lambda z, s: z / (1 + s.reshape(-1, 1, 1, 1) ** 2), 0.002, 80.0)
"""


def command_lines() -> list[str]:
    helps = [run(command, "--help").stdout for command in COMMANDS] + [run("--help").stdout]
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
    found = [line for text in helps for line in re.findall(r"(?:^|  )(fastsched (?!\[)[a-z].*)$", text, re.MULTILINE)]
    for page in pages:
        blocks = re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
        found += [line for block in blocks for line in re.findall(r"^(fastsched .*)$", block, re.MULTILINE)]
        found += re.findall(r"`(fastsched [a-z]+ [^`]+)`", page)
    return sorted({re.sub(r"\s+#.*", "", line).strip() for line in found})


@pytest.fixture(scope="module")
def work(tmp_path_factory, text_folder):
    path = tmp_path_factory.mktemp("examples")
    (path / "my_model.py").write_text(MODEL)
    (path / "package").mkdir()
    (path / "package" / "__init__.py").write_text("")
    (path / "package" / "models.py").write_text(MODEL)
    denoiser = fs.Denoiser.from_denoiser(lambda z, s: z / (1 + s.reshape(-1, 1, 1, 1) ** 2), 0.002, 80.0)
    stats = fs.measure(denoiser, (4, 64, 64), samples=2, levels=17, progress=False)  # few, so that plans are quick
    stats.save(path / "stats.safetensors")
    stats.save(path / "model.safetensors")
    stats.save(path / "a.safetensors")
    fs.measure(denoiser, (4, 64, 64), samples=range(2, 3), levels=17, progress=False).save(path / "b.safetensors")
    for name in ("schedule", "a", "b", "model-8"):
        fs.optimal_schedule(stats, 8, "ddim", polish=False).save(path / f"{name}.json")  # of the folder's scheduler
    (path / "errors.csv").write_text("name,solver,steps,typical_error\nkarras,dpmpp_2m,8,0.25\n")
    matplotlib.image.imsave(path / "samples.png", np.zeros((2, 2, 3)))
    fs.Schedule(torch.tensor([1.0, 0.5, 0.0]), "ddim", "flow").save(path / "flow.json")
    diffusers = pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")
    shutil.copytree(text_folder, path / "my_pipeline_folder")
    flow = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    flow.save_pretrained(path / "my_flow_pipeline_folder" / "scheduler")
    return path


def test_there_are_examples_of_every_command():
    lines = command_lines()
    assert {line.split()[1] for line in lines} >= set(COMMANDS)


@pytest.mark.parametrize("line", command_lines())
def test_a_command_line_works(work, tmp_path, monkeypatch, line):
    shutil.copytree(work, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    if line.split()[1] == "demo":
        monkeypatch.setattr("fastsched.cli.demo.run_demo", lambda output, **options: None)
    arguments = shlex.split(line)[1:]
    if arguments[0] == "report":  # curves of many steps take long
        arguments += ["--solver", "ddim", "--max-steps", "3"]
    if arguments[0] == "plan":
        arguments += ["--max-steps", "16" if "--target" in arguments else "4"]
    for name in ("-o", "--output"):
        if name in arguments and arguments[0] in LONG:
            Path(arguments[arguments.index(name) + 1]).unlink(missing_ok=True)
    cost_only = ["--dry-run"] if arguments[0] in LONG else []
    result = run(*arguments, *cost_only)
    assert result.exit_code == 0, result.stderr
