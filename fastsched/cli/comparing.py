"""Commands that compare and plot schedules: demo, compare, plot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from fastsched.cli import inputs, shell, spending
from fastsched.cli.shell import note

if TYPE_CHECKING:
    from fastsched.comparison import Comparison
    from fastsched.denoisers.noise import NoiseProcess
    from fastsched.sampling.schedule import Schedule

    #: The schedules to compare, with baselines for a model's noise process.
    Schedules = Callable[[NoiseProcess], dict[str, Schedule]]

#: Defaults of `compare` for denoisers, and for pipelines, whose calls are slower.
SAMPLES, REFERENCE_STEPS = 256, 300
PIPELINE_SAMPLES, PIPELINE_REFERENCE_STEPS = 8, 100

Baselines = Annotated[
    str,
    typer.Option(
        help="Common schedules to add, or none: karras, exponential, linear, kl_optimal, vp_uniform, cosine, beta; "
        "for flow models also uniform and flow_shift, and all are in flow times."
    ),
]


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the figure and the schedules.")] = Path(
        "demo-output"
    ),
    samples: Annotated[int, typer.Option(help="Number of noises to compare over.", min=2)] = 1024,
    as_json: shell.AsJson = False,
    quiet: shell.Quiet = False,
) -> None:
    """Try everything on handwritten digits, on a CPU. Prints a table of errors and draws a figure.

    \b
    fastsched demo
    fastsched demo --output out --samples 256
    """
    import torch

    from fastsched.cli.demo import run_demo
    from fastsched.plot import check_matplotlib

    check_matplotlib()
    torch.set_num_threads(1)  # the digits network is so small that threads make it slower
    found = run_demo(output, samples=samples, progress=not quiet, say=note if as_json else typer.echo)
    if as_json:
        each = found.comparisons.values()
        shell.print_json([row for runs in each for comparison in runs.values() for row in comparison.to_dicts()])


def compare(
    denoiser: shell.DenoiserName,
    schedules: Annotated[list[Path], shell.SCHEDULE],
    baselines: Baselines = "karras,exponential",
    spare_last: Annotated[bool, typer.Option(help="Replace sigma_min by 0 in the baselines.")] = False,
    solver: Annotated[Optional[str], typer.Option(help="Run all with this solver.  [default: their own]")] = None,
    shape: shell.Shape = None,
    samples: Annotated[
        Optional[int], typer.Option(help="Number of noises to compare over.  [default: 256; pipelines: 8]", min=2)
    ] = None,
    seed: shell.Seed = 0,
    reference_steps: Annotated[
        Optional[int], typer.Option(help="Steps of the converged run.  [default: 300; pipelines: 100]", min=1)
    ] = None,
    batch_size: shell.Batch = None,
    device: shell.Device = None,
    dtype: shell.DType = None,
    prompt: shell.Prompts = None,
    call: shell.CallOptions = None,
    scheduler: shell.Scheduler = None,
    csv: Annotated[Optional[Path], typer.Option(help="Also write the table as CSV.")] = None,
    dry_run: shell.DryRun = False,
    as_json: shell.AsJson = False,
    quiet: shell.Quiet = False,
) -> None:
    """Rank schedules by running the sampler. Errors are distances to the converged samples of the same noise.

    The cost in model calls is printed first: most of it is the converged run, SAMPLES times REFERENCE_STEPS.

    \b
    fastsched compare digits schedule.json
    fastsched compare my_model.py:build a.json b.json --shape 4,64,64 --baselines karras --csv errors.csv
    fastsched compare my_pipeline_folder schedule.json --prompt "a cat" --samples 4
    """
    shell.writable(csv, sources=[*inputs.model_files(denoiser), *schedules], name="csv")
    named = inputs.named_schedules(schedules)
    names = [] if baselines == "none" else [name.strip() for name in baselines.split(",")]
    source = inputs.Source(denoiser, shape, device, dtype, batch_size, prompt, call, quiet, scheduler)
    usual = (PIPELINE_SAMPLES, PIPELINE_REFERENCE_STEPS) if source.is_pipeline else (SAMPLES, REFERENCE_STEPS)
    run = {"samples": samples or usual[0], "reference_steps": reference_steps or usual[1], "seed": seed}
    common = lambda process: named | _baselines(process, names, named, spare_last)
    if source.is_pipeline:
        inputs.not_for_pipelines(solver=solver)
        result = _of_pipeline(source, common, sorted({each.steps for each in named.values()}), run, dry_run)
    else:
        method = None if solver is None else inputs.solver_named(solver)
        result = _of_denoiser(source, common, method, run, dry_run)
    found = {"samples": result.samples, "rows": result.to_dicts()}
    if csv is not None:  # before printing, which ends the command if a reader such as head closed the pipe
        shell.save_or_print(result.to_csv, csv, found)
        shell.wrote(csv)
    if as_json:
        shell.print_json(found)
    else:
        shell.print_table(result.header, result.cells, left=2)
        typer.echo(result.legend)


def plot(
    files: Annotated[
        list[Path],
        typer.Argument(help="Schedules (.json), and statistics (.safetensors) at most once.", metavar="FILE"),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Figure to write: .png, .svg or .pdf.")],
) -> None:
    """Draw schedules and statistics. Schedules are drawn below the cost density of the statistics.

    \b
    fastsched plot stats.safetensors schedule.json -o schedule.png
    fastsched plot a.json b.json -o both.svg
    """
    from fastsched.plot import FORMATS, check_matplotlib, plot_cost_density, plot_schedules

    check_matplotlib()
    shell.writable(output, endings=FORMATS)
    from fastsched.sampling.files import kind_of

    measured = [path for path in files if kind_of(path) == "statistics" or path.suffix == ".safetensors"]
    if len(measured) > 1:
        raise ValueError(f"files must contain at most one file of statistics, got {', '.join(map(str, measured))}")
    stats = inputs.load_statistics(measured[0]) if measured else None
    schedules = inputs.named_schedules([path for path in files if path not in measured])
    figure = plot_cost_density(stats) if stats is not None and not schedules else plot_schedules(schedules, stats=stats)
    shell.save_figure(figure, output)
    shell.wrote(output)


@shell.while_a_model_runs()
def _of_denoiser(
    source: inputs.Source, schedules: Schedules, solver: str | None, run: dict[str, Any], dry_run: bool
) -> Comparison:
    """Print the cost and compare."""
    from fastsched import comparison

    model, shape = source.denoiser()
    named = schedules(model.process)
    sizes = {name: run[name] for name in ("samples", "reference_steps")}
    calls = comparison.comparison_calls(model, named, solver, **sizes)
    spending.say_comparing(*calls, dry_run)
    with shell.joint_bar(sum(calls), not source.quiet, "comparing") as progress:
        return comparison.compare(model, named, solver, shape=shape, **source.running | {"progress": progress}, **run)


@shell.while_a_model_runs()
def _of_pipeline(
    source: inputs.Source, schedules: Schedules, own_steps: list[int], run: dict[str, Any], dry_run: bool
) -> Comparison:
    """Print the cost and compare through the pipeline."""
    from fastsched.cli.pipelines import compare_pipeline, solver_that_runs
    from fastsched.diffusers.conventions import describe
    from fastsched.diffusers.pipelines.prompt_calls import PromptCalls

    pipe, arguments = replace(source, quiet=True).pipeline()  # one progress bar for all runs instead of one for each
    turns = PromptCalls.of(pipe, source.prompts, arguments, None)
    run |= {"samples": max(run["samples"], len(turns.prompts))}  # as in a measurement, no prompt is left out
    named = schedules(describe(pipe.scheduler).process)
    images = run["samples"] * turns.images
    calls = lambda steps, schedule=None: solver_that_runs(pipe, steps, schedule).model_calls(steps) * images
    runs = sum(calls(schedule.steps, schedule) for schedule in named.values()) + sum(map(calls, own_steps))
    spending.say_comparing(calls(run["reference_steps"]), runs, dry_run)
    shown = not source.quiet
    options = {"prompts": source.prompts, "arguments": arguments, "progress": shown}
    with inputs.named_as_options():
        return compare_pipeline(pipe, named, own_steps, **options, **run)


def _baselines(
    process: NoiseProcess, names: list[str], schedules: dict[str, Schedule], spare_last: bool
) -> dict[str, Schedule]:
    """Each baseline at every solver and number of steps of the schedules; dpmpp_2m stands in for the fitted solver.

    A baseline of the same name as a schedule is called ``common NAME``.
    """
    from fastsched import validate
    from fastsched.sampling.schedule import Schedule
    from fastsched.sampling.solvers import FITTED
    from fastsched.selection.starts import common_sigmas

    ranged = ("karras", "exponential", "linear", "kl_optimal", "vp_uniform", "cosine", "beta")
    levels = process.levels(3)  # among them the lowest and the highest finite one
    # The fitted solver's weights belong to one schedule, so no baseline can use them.
    given = schedules.values()
    stock = ["dpmpp_2m" if schedule.solver == FITTED else schedule.solver for schedule in given]
    kinds = list(dict.fromkeys(zip(stock, (schedule.steps for schedule in given), strict=True)))
    added = {}
    for name in names:
        validate.choice("baselines", name, (*ranged, "uniform", "flow_shift"))
        for solver, steps in kinds:
            label = name if len(kinds) == 1 else f"{name}-{solver}-{steps}"
            while label in schedules:
                label = f"common {label}"
            sigmas = common_sigmas(process, levels, name, steps, spare_last=spare_last)
            added[label] = Schedule(sigmas, solver, process.kind)
    return added
