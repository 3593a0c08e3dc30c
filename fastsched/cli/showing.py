"""Commands that describe things: info, solvers, env."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastsched.cli import inputs, shell
from fastsched.cli.making import plain_decimals, summary

if TYPE_CHECKING:
    from fastsched.measurement.statistics import PathStatistics

#: Longer lists are shown by their length, first and last value.
LONG = 64
#: Packages whose versions matter in a bug report.
PACKAGES = ("torch", "triton", "numpy", "scipy", "safetensors", "diffusers", "transformers", "matplotlib", "typer")


def info(
    file: Annotated[
        Path,
        typer.Argument(help="Statistics (.safetensors), a schedule (.json), or a pipeline folder.", metavar="FILE"),
    ],
    as_json: shell.AsJson = False,
) -> None:
    """Describe statistics, a schedule or a pipeline folder.

    \b
    fastsched info stats.safetensors
    fastsched info schedule.json --json
    fastsched info my_pipeline_folder
    """
    from fastsched.sampling.files import kind_of

    kind = kind_of(file) or {".json": "schedule", ".safetensors": "statistics"}.get(file.suffix)
    if file.is_dir():
        found = _pipeline(file)
    elif kind == "schedule":
        found = {"kind": "schedule", **summary(inputs.load_schedule(file))}
        entries = json.loads(file.read_text(encoding="utf-8-sig"))
        found |= {key: value for key, value in entries.items() if key not in found and key != "format"}
    elif kind == "statistics":
        found = _statistics(file, inputs.load_statistics(file))
    elif not file.exists():
        raise FileNotFoundError(f"no such file: {file}")
    else:
        wanted = "file must be statistics (.safetensors), a schedule (.json) or a pipeline folder"
        raise ValueError(f"{wanted}, got {str(file)!r}")
    if as_json:
        shell.print_json(found)
    else:
        # The origin's entries become rows. Two are renamed, to differ from the file's own entries.
        names = {"model_calls": "calls to choose", "version": "by fastsched"}
        flat = {key: value for key, value in found.items() if key != "origin"}
        flat |= {names.get(key) or key: value for key, value in found.get("origin", {}).items()}
        shell.print_table(("", str(file)), [(key, _cell(value)) for key, value in flat.items()], left=2)


def solvers(as_json: shell.AsJson = False) -> None:
    """List the solvers. Gives their order, model calls for n steps, other names and source.

    Names from sampler menus and from diffusers are understood too: "DPM++ 2M Karras", DPMSolverMultistepScheduler.

    \b
    fastsched solvers
    """
    from fastsched.sampling.solvers import ALIASES, FITTED, SOLVERS, STOCHASTIC_SOLVERS

    rows: list[tuple[Any, ...]] = []
    for name, solver in SOLVERS.items():
        aliases = [alias for alias, known in ALIASES.items() if known == name]
        rows.append((name, solver.order, "n" if solver.stage is None else "2n - 1", aliases, solver.source))
    rows += [(name, None, "n", [], "stochastic; for fastsched.select") for name in STOCHASTIC_SOLVERS]
    rows.append((FITTED, None, "n", [], "weights fitted to the model, kept in the schedule"))
    if as_json:
        names = ("name", "order", "calls", "aliases", "source")
        shell.print_json([dict(zip(names, row, strict=True)) for row in rows])
    else:
        cells = [[_cell(value) for value in row] for row in rows]
        shell.print_table(("solver", "order", "calls", "other names", "source"), cells, left=5)


def env(as_json: shell.AsJson = False) -> None:
    """Print versions and devices, for a bug report.

    \b
    fastsched env
    """
    import importlib.metadata
    import platform

    import torch

    from fastsched import __version__

    found: dict[str, Any] = {
        "fastsched": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["torch"] = str(torch.__version__)  # with its build, such as +cu130, which PyPI's metadata omits
    found["cpu threads"] = torch.get_num_threads()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found["cuda"] = [torch.cuda.get_device_name(n) for n in range(count)]
    found["mps"] = torch.backends.mps.is_available()
    if as_json:
        shell.print_json(found)
    else:
        rows = [(key, "not installed" if value is None else _cell(value)) for key, value in found.items()]
        shell.print_table(("what", "here"), rows, left=2)


def _statistics(file: Path, stats: PathStatistics) -> dict[str, Any]:
    """The contents of statistics; unknown entries of the file's header are shown as they are."""
    from fastsched.measurement.statistics_files import opened

    found = {
        "kind": "statistics",
        "noise": stats.process.kind,
        "shape": list(stats.shape),
        "levels": stats.levels,
        "noise levels": [float(stats.s[0]), float(stats.s[-1])],
        "samples": stats.samples,
        "responses": bool(stats.deviated),
        "data_std": stats.data_std,
        "model_calls": stats.model_calls,
    }
    # A file of a newer version may have entries that this version does not know.
    with opened(str(file)) as content:
        header = json.loads((content.metadata() or {}).get("fastsched", "{}"))
    return found | {key: value for key, value in header.items() if key not in found and key != "format"}


def _pipeline(folder: Path) -> dict[str, Any]:
    """Describe a saved pipeline or scheduler; weights are not read."""
    scheduler = inputs.load_scheduler(str(folder))
    kind, _ = inputs.pipeline_call(str(folder))
    from fastsched.diffusers.conventions import describe, solver_of

    process = describe(scheduler).process
    return {
        "kind": "pipeline" if (folder / "model_index.json").is_file() else "scheduler",
        "class": kind,
        "scheduler": type(scheduler).__name__,
        "solver": solver_of(scheduler),
        "noise": process.kind,
        "noise levels": [process.s_max, process.s_min],
    }


def _cell(value: Any) -> str:
    """A value as the text of a table cell; long lists are abbreviated."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return _list_cell(value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(entry)}" for key, entry in value.items())
    return str(value)


def _list_cell(values: list[Any]) -> str:
    if len(values) > LONG:
        return f"{len(values)} values, {_cell(values[0])} ... {_cell(values[-1])}"
    if values and all(isinstance(entry, float) for entry in values):
        return plain_decimals(values)
    return ", ".join(f"({_cell(entry)})" if isinstance(entry, list) else _cell(entry) for entry in values) or "-"
