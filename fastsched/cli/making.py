"""Commands that make statistics and schedules: measure, fit, select, plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from fastsched.cli import inputs, shell
from fastsched.cli.shell import app, note

if TYPE_CHECKING:
    from torch import Tensor

    from fastsched.measurement.statistics import PathStatistics
    from fastsched.sampling.schedule import Schedule

#: What `fastsched.fit` and `fastsched.diffusers.fit` take by default (said here too, so that help imports neither).
LEVELS, SAMPLES, PIPELINE_SAMPLES, MODEL_CALLS = 48, 8, 4, 740

Levels = Annotated[int, typer.Option(help="Number of noise levels; 32 to 64 are enough.")]
Paths = Annotated[Optional[int], typer.Option(help="Number of paths; 4 to 16 are enough.  [default: 8; pipelines: 4]")]
Solver = Annotated[str, typer.Option(help="Such as ddim, heun, dpmpp_2m or ipndm; 'fastsched solvers' lists all.")]


@app.command()
def measure(
    denoiser: shell.DenoiserName,
    output: Annotated[Path, typer.Option("--output", "-o", help="The statistics file to write.")],
    shape: shell.Shape = None,
    levels: Levels = LEVELS,
    samples: Paths = None,
    seed: shell.Seed = 0,
    responses: Annotated[
        Optional[bool],
        typer.Option(
            "--responses/--no-responses",
            help="Whether to measure how errors are passed on, half of the cost.  [default: responses]",
        ),
    ] = None,
    batch_size: Annotated[
        Optional[int], typer.Option(help="Paths per batch; the file is saved after each batch.  [default: 4]")
    ] = None,
    device: shell.Device = None,
    dtype: shell.DType = None,
    prompt: shell.Prompts = None,
    call: shell.CallOptions = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted measurement in OUTPUT.")] = False,
    overwrite: shell.Overwrite = False,
    dry_run: shell.DryRun = False,
    quiet: shell.Quiet = False,
) -> None:
    """Measure a model, once for all schedules. Takes 2 LEVELS - 2 model calls per sample, no gradients, no data.

    A denoiser is given as a function without arguments that returns a fastsched.Denoiser:

    \b
        # my_model.py
        import fastsched as fs
        def build():
            unet, alphas_cumprod = ...
            return fs.Denoiser.from_epsilon(unet, alphas_cumprod)

    \b
    fastsched measure digits -o digits.safetensors
    fastsched measure my_model.py:build --shape 4,64,64 --dtype float16 -o stats.safetensors
    fastsched measure package.models:build --shape 4,64,64 --samples 16 -o stats.safetensors --resume
    fastsched measure my_pipeline_folder --prompt "a cat" --call guidance_scale=7.5 -o stats.safetensors
    """
    with shell.errors_in_a_line("interrupted; 'fastsched measure --resume' continues from the last saved batch"):
        ways = "resume it (--resume), replace it (--overwrite)"
        shell.writable(output, overwrite=overwrite or resume, replace=ways)
        if inputs.is_pipeline(denoiser):
            inputs.for_denoisers_only(
                shape=shape, responses=responses, batch_size=batch_size, resume="--resume" if resume else None
            )
            pipe = inputs.load_pipeline(denoiser, device, dtype, quiet=quiet)
            stats = _measure_pipeline(pipe, levels, samples, seed, prompt, inputs.call_arguments(call), dry_run)
            if stats is None:
                return
            stats.save(output)
        else:
            from fastsched.measurement.to_file import measure_to_file

            inputs.for_pipelines_only(prompt, call)
            model, sizes = inputs.denoiser_named(denoiser, shape, device)
            wanted = True if responses is None else responses
            count = SAMPLES if samples is None else samples
            left = count - inputs.load_statistics(output).samples if resume and output.exists() else count
            if _spends(_measuring_calls(model, levels, max(left, 0), wanted), dry_run):
                return
            stats = measure_to_file(
                model,
                sizes,
                output,
                levels=levels,
                samples=count,
                responses=wanted,
                seed=seed,
                batch_size=4 if batch_size is None else batch_size,
                device=device,
                dtype=inputs.dtype_named(dtype),
                resume=resume,
                overwrite=overwrite,
                progress=not quiet,
            )
        note(f"{stats.samples} paths over {stats.levels} levels, {stats.model_calls:,} model calls; wrote {output}")


@app.command()
def fit(
    denoiser: shell.DenoiserName,
    steps: Annotated[int, typer.Option(help="Number of steps.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The schedule to write, .json.")],
    solver: Annotated[
        Optional[str], typer.Option(help="The solver to fit for.  [default: dpmpp_2m; pipelines: their scheduler's]")
    ] = None,
    shape: shell.Shape = None,
    stats: Annotated[
        Optional[Path], typer.Option(help="Statistics of this model, instead of a new measurement.")
    ] = None,
    levels: Levels = LEVELS,
    samples: Paths = None,
    model_calls: Annotated[
        int, typer.Option(help="The most model calls after the measurement, to run and tune schedules.")
    ] = MODEL_CALLS,
    seed: shell.Seed = 0,
    batch_size: shell.Batch = None,
    device: shell.Device = None,
    dtype: shell.DType = None,
    prompt: shell.Prompts = None,
    call: shell.CallOptions = None,
    overwrite: shell.Overwrite = False,
    dry_run: shell.DryRun = False,
    as_json: shell.AsJson = False,
    quiet: shell.Quiet = False,
) -> None:
    """Measure a model and fit one schedule to it. Tunes it by running the sampler; prints the sigmas.

    \b
    fastsched fit digits --steps 8 -o schedule.json
    fastsched fit my_model.py:build --steps 8 --shape 4,64,64 --solver dpmpp_2m -o schedule.json
    fastsched fit my_model.py:build --steps 6 --shape 4,64,64 --stats stats.safetensors --model-calls 400 -o six.json
    fastsched fit my_pipeline_folder --steps 8 --prompt "a cat" --call guidance_scale=7.5 -o schedule.json
    """
    with shell.errors_in_a_line():
        import fastsched as fs

        shell.writable(output, overwrite=overwrite, endings=[".json"])
        chosen = None if solver is None else inputs.solver_named(solver)
        known = None if stats is None else inputs.load_statistics(stats)
        common = {"stats": known, "levels": levels, "model_calls": model_calls, "seed": seed}
        if inputs.is_pipeline(denoiser):
            inputs.for_denoisers_only(shape=shape, batch_size=batch_size)
            arguments = inputs.call_arguments(call)
            pipe = inputs.load_pipeline(denoiser, device, dtype, quiet=quiet)
            count = PIPELINE_SAMPLES if samples is None else samples
            if _spends(0 if known else _calibration_calls(levels, count), dry_run, model_calls):
                return
            schedule = fs.diffusers.fit(
                pipe, steps, solver=chosen, samples=count, prompts=prompt, **common, **arguments
            )
        else:
            inputs.for_pipelines_only(prompt, call)
            model, sizes = inputs.denoiser_named(denoiser, shape, device)
            count = SAMPLES if samples is None else samples
            if known is None:
                measuring = _measuring_calls(model, levels, count, True)
            else:  # a file does not hold the increments that tuning needs: the same paths are followed again
                measuring = _measuring_calls(model, known.s, known.samples, bool(known.deviated)) if model_calls else 0
            if _spends(measuring, dry_run, model_calls):
                return
            options = {"device": device, "dtype": inputs.dtype_named(dtype), "progress": not quiet}
            schedule = fs.fit(
                model, sizes, steps, chosen or "dpmpp_2m", samples=count, batch_size=batch_size, **common, **options
            )
        schedule.save(output)
        _show(schedule, as_json)
        note(f"wrote {output}")


@app.command()
def select(
    statistics: Annotated[Path, typer.Argument(help="Statistics that 'fastsched measure' wrote.")],
    steps: Annotated[str, typer.Option(help="Number of steps: 8, or several: 6,8,10.")],
    solver: Solver = "dpmpp_2m",
    output: Annotated[
        Optional[Path],
        typer.Option("--output", "-o", help="Schedule to write; with several steps NAME.json becomes NAME-6.json ..."),
    ] = None,
    as_json: shell.AsJson = False,
) -> None:
    """Select a schedule from statistics. No model calls; prints the sigmas, the last of them 0.

    \b
    fastsched select stats.safetensors --steps 8 -o schedule.json
    fastsched select stats.safetensors --steps 6,8,10 --solver ddim -o ddim.json
    """
    with shell.errors_in_a_line():
        from fastsched.selection.optimal import optimal_schedule

        counts = inputs.integers("steps", steps)
        shell.writable(output)
        method = inputs.solver_named(solver)
        stats = inputs.load_statistics(statistics)
        schedules = []
        for count in counts:
            schedule = optimal_schedule(stats, count, method)
            schedules.append(schedule)
            if not as_json:
                _show(schedule, as_json)
            if output is not None:
                path = output if len(counts) == 1 else output.with_name(f"{output.stem}-{count}{output.suffix}")
                schedule.save(path)
                note(f"wrote {path}")
        if as_json:
            shell.print_json([summary(schedule) for schedule in schedules])


@app.command()
def plan(
    stats: Annotated[Path, typer.Argument(help="Statistics that 'fastsched measure' wrote.")],
    solver: Annotated[
        str, typer.Option(help="ddim, dpmpp_2m, ipndm, heun, ... or several, comma-separated.")
    ] = "dpmpp_2m",
    max_steps: Annotated[int, typer.Option(help="Largest number of steps.")] = 20,
    target: Annotated[
        Optional[str],
        typer.Option(help="Print how many steps reach this error, or the error of a schedule such as karras:20."),
    ] = None,
    output: Annotated[Optional[Path], typer.Option("--output", "-o", help="Figure to write.")] = None,
    as_json: shell.AsJson = False,
) -> None:
    """Predict the error at every number of steps. Also how many steps reach a target; no model calls.

    \b
    fastsched plan stats.safetensors --solver ddim,dpmpp_2m -o plan.png
    fastsched plan stats.safetensors --target karras:20
    """
    with shell.errors_in_a_line():
        import fastsched as fs
        from fastsched.plot import FORMATS, check_matplotlib, plot_error_curves

        if output is not None:
            check_matplotlib()
            shell.writable(output, endings=FORMATS)
        goal = None if target is None else _target(target)
        loaded = inputs.load_statistics(stats)
        curves = [fs.error_curve(loaded, inputs.solver_named(name.strip()), max_steps) for name in solver.split(",")]
        found = []
        for curve in curves:
            rows = list(zip(curve.steps, curve.model_calls, curve.predicted_errors, strict=True))
            entry: dict[str, Any] = {
                "solver": curve.solver,
                "curve": [{"steps": n, "model_calls": calls, "predicted_error": error} for n, calls, error in rows],
            }
            if not as_json:
                cells = [(str(n), f"{calls}", f"{error:.4g}") for n, calls, error in rows]
                shell.print_table((f"{curve.solver}: steps", "model calls", "predicted error"), cells, left=0)
            if goal is not None:
                entry |= {
                    "target": target,
                    "steps_needed": fs.steps_needed(loaded, curve.solver, target=goal, max_steps=max_steps),
                }
                if not as_json:
                    typer.echo(f"{curve.solver} needs {entry['steps_needed']} steps for {target}")
            found.append(entry)
        if as_json:
            shell.print_json(found)
        if output is not None:
            plot_error_curves(curves).savefig(output)
            note(f"wrote {output}")


def summary(schedule: Schedule) -> dict[str, Any]:
    """A schedule as plain values."""
    return {
        "solver": schedule.solver,
        "noise": schedule.noise,
        "steps": schedule.steps,
        "model_calls": schedule.model_calls,
        "sigmas": schedule.sigmas.tolist(),
        "timesteps": None if schedule.timesteps is None else schedule.timesteps.tolist(),
        "predicted_error": schedule.predicted_error,
        "measured_error": schedule.measured_error,
    }


def plain_decimals(values: list[float], digits: int = 6) -> str:
    """``values`` separated by commas, without exponents, which some programs cannot read."""
    import numpy as np

    return ", ".join(np.format_float_positional(v, precision=digits, fractional=False, trim="0") for v in values)


def _show(schedule: Schedule, as_json: bool) -> None:
    """The schedule on stdout, and its errors on stderr."""
    if as_json:
        shell.print_json(summary(schedule))
        return
    errors = {"predicted": schedule.predicted_error, "measured": schedule.measured_error}
    known = [f", {name} squared error {value:.4g}" for name, value in errors.items() if value is not None]
    note(f"{schedule.solver}, {schedule.steps} steps{''.join(known)}")
    typer.echo(plain_decimals(schedule.sigmas.tolist()))


def _measuring_calls(model: Any, levels: int | Tensor, samples: int, responses: bool) -> int:
    """The model calls of a measurement, counted per sample."""
    from fastsched.measurement.measuring import measured_levels, measurement_of

    return samples * measurement_of(model, measured_levels(model, levels), responses=responses).calls


def _calibration_calls(levels: int, samples: int) -> int:
    """The model calls of a pipeline's measurement, counted per sample."""
    from fastsched.diffusers.calibration import calibration_steps

    return samples * calibration_steps(levels)


def _spends(measuring: int, dry_run: bool, later: int | None = None) -> bool:
    """Say what a command is about to spend; whether it should stop there."""
    parts = [f"{measuring:,} to measure"] + (
        [f"at most {later:,} to run and tune schedules"] if later is not None else []
    )
    note(f"model calls, counted per sample: {', '.join(parts)}")
    return dry_run


def _measure_pipeline(
    pipe: Any,
    levels: int,
    samples: int | None,
    seed: int,
    prompts: list[str] | None,
    arguments: dict[str, Any],
    dry_run: bool,
) -> PathStatistics | None:
    """The statistics of a pipeline, after a line about the cost; None if only that is wanted."""
    import fastsched as fs

    count = PIPELINE_SAMPLES if samples is None else samples
    if _spends(_calibration_calls(levels, count), dry_run):
        return None
    return fs.diffusers.measure(pipe, levels=levels, samples=count, prompts=prompts, seed=seed, **arguments)


def _target(text: str) -> float | tuple[str, int]:
    """An error, or the name and steps of a common schedule."""
    name, colon, steps = text.partition(":")
    try:
        return (name, int(steps)) if colon else float(text)
    except ValueError:
        raise ValueError(f"target must be an error such as 0.05, or karras:20, got {text!r}") from None
