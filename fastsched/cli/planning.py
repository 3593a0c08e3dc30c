"""The command that predicts the error of each number of steps: plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from fastsched.cli import inputs, shell


def plan(
    stats: shell.StatisticsFile,
    solver: Annotated[
        str, typer.Option(help="ddim, dpmpp_2m, ipndm, heun, ... or several, comma-separated.")
    ] = "dpmpp_2m",
    max_steps: Annotated[
        Optional[int], typer.Option(help="Largest number of steps.  [default: at most 20]", min=1)
    ] = None,
    target: Annotated[
        Optional[str],
        typer.Option(
            help="Print how many steps reach this error, or that of a common schedule, as karras:20: karras, "
            "exponential, linear or kl_optimal; for flow models, in flow times, also uniform."
        ),
    ] = None,
    output: Annotated[Optional[Path], typer.Option("--output", "-o", help="Figure to write.")] = None,
    quiet: shell.Quiet = False,
    as_json: shell.AsJson = False,
) -> None:
    """Predict the error at every number of steps. Also how many steps reach a target; no model calls.

    \b
    fastsched plan stats.safetensors --solver ddim,dpmpp_2m -o plan.png
    fastsched plan stats.safetensors --target karras:20
    """
    import fastsched as fs
    from fastsched.cli.report_data import steps_within
    from fastsched.plot import FORMATS, check_matplotlib, plot_error_curves
    from fastsched.selection.planning import not_reached, target_error

    if output is not None:
        check_matplotlib()
        shell.writable(output, endings=FORMATS)
    goal = None if target is None else _target(target)
    loaded = inputs.load_statistics(stats)
    most = min(20, loaded.levels - 1) if max_steps is None else max_steps
    names = inputs.solvers_to_fit(solver)
    errors = [None if goal is None else target_error(loaded, name, goal) for name in names]  # before the slow curves
    with shell.joint_bar(most * len(names), not quiet, "predicting", "schedule") as progress:
        curves = [fs.error_curve(loaded, name, most, progress=progress) for name in names]
    if output is not None:  # before printing, which ends the command if a reader such as head closed the pipe
        shell.save_figure(plot_error_curves(curves), output)
        shell.wrote(output)
    found, missed = [], []
    for curve, error in zip(curves, errors, strict=True):
        rows = zip(curve.steps, curve.model_calls, curve.predicted_errors, strict=True)
        points = [{"steps": n, "model_calls": calls, "predicted_error": value} for n, calls, value in rows]
        entry: dict[str, Any] = {"solver": curve.solver, "curve": points}
        if error is not None:
            enough = steps_within(curve, error)
            entry |= {"target": target, "steps_needed": enough}
            missed += [] if enough else [not_reached(curve.solver, most, error, curve.predicted_errors[-1])]
        found.append(entry)
    if as_json:
        shell.print_json(found)
    else:
        for entry in found:
            _print_curve(entry)
    if missed:  # after the results of the other solvers
        raise missed[0]


def _print_curve(entry: dict[str, Any]) -> None:
    """Print what `plan` has found for a solver."""
    rows = (each.values() for each in entry["curve"])
    cells = [(str(steps), str(calls), f"{error:.4g}") for steps, calls, error in rows]
    shell.print_table((f"{entry['solver']}: steps", "model calls", "predicted error"), cells, left=0)
    if entry.get("steps_needed"):
        typer.echo(f"{entry['solver']} needs {entry['steps_needed']} steps for {entry['target']}")


def _target(text: str) -> float | tuple[str, int]:
    """An error, or the name and steps of a common schedule."""
    name, colon, steps = text.partition(":")
    try:
        return (name, int(steps)) if colon else float(text)
    except ValueError:
        raise ValueError(f"target must be an error such as 0.05, or karras:20, got {text!r}") from None
