"""The ``fastsched`` command. Heavy imports are inside the commands, so that ``--help`` is fast."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    import torch

    from fastsched.denoisers.denoiser import Denoiser
    from fastsched.measurement.statistics import PathStatistics
    from fastsched.sampling.schedule import Schedule

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

_DENOISER = "'digits' (in the package), package.module:function, or path/to/file.py:function."
DenoiserName = Annotated[str, typer.Argument(help=_DENOISER)]
Shape = Annotated[Optional[str], typer.Option(help="Shape of one sample, such as 4,64,64; digits knows its own.")]
Batch = Annotated[Optional[int], typer.Option(help="Samples per batch.  [default: all]")]
Device = Annotated[Optional[str], typer.Option(help="Such as cuda.  [default: the network's]")]
DType = Annotated[Optional[str], typer.Option(help="Such as bfloat16.  [default: the network's]")]
Seed = Annotated[int, typer.Option(help="Seed of the noises.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]

#: Whether an error shows Python's traceback; set by the option of that name.
_STATE = {"traceback": False}


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show Python's traceback of an error.")] = False,
) -> None:
    """Choose noise levels for a diffusion or flow model: measure it once, then select for any solver and steps.

    \b
    Try it:      fastsched demo --output demo-output
    Your model:  fastsched measure my_model.py:build --shape 4,64,64 -o stats.safetensors
                 fastsched select stats.safetensors --steps 8 --solver dpmpp_2m -o schedule.json
                 fastsched compare my_model.py:build schedule.json --shape 4,64,64
                 fastsched plot stats.safetensors schedule.json -o schedule.png

    Exit status: 0, 2 for a bad argument, 1 for anything else that went wrong.
    """
    _STATE["traceback"] = traceback
    if version:
        from fastsched import __version__

        typer.echo(f"fastsched {__version__}")
        raise typer.Exit


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the figure and the schedules.")] = Path(
        "demo-output"
    ),
    samples: Annotated[int, typer.Option(help="Number of noises to compare over.")] = 1024,
    quiet: Quiet = False,
) -> None:
    """Measure, select, compare and plot on handwritten digits, on a CPU.

    \b
    fastsched demo
    fastsched demo --output out --samples 256
    """
    with _errors_in_a_line():
        import torch

        from fastsched.cli.demo import run_demo

        torch.set_num_threads(1)  # the digits network is so small that threads make it slower
        run_demo(output, samples=samples, progress=not quiet, say=typer.echo)


@app.command()
def measure(
    denoiser: DenoiserName,
    output: Annotated[Path, typer.Option("--output", "-o", help="The statistics file to write.")],
    shape: Shape = None,
    levels: Annotated[int, typer.Option(help="Number of noise levels; 32 to 64 are enough.")] = 48,
    samples: Annotated[int, typer.Option(help="Number of paths; 4 to 16 are enough.")] = 8,
    seed: Seed = 0,
    responses: Annotated[bool, typer.Option(help="Measure how errors are passed on.")] = True,
    batch_size: Annotated[int, typer.Option(help="Paths followed at once; what is whole is saved after each.")] = 4,
    device: Device = None,
    dtype: DType = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted measurement in OUTPUT.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT if it exists.")] = False,
    quiet: Quiet = False,
) -> None:
    """Measure a denoiser, once for all schedules. (2 LEVELS - 1) model calls per sample, no gradients, no data.

    The denoiser is given as a function without arguments that returns a fastsched.Denoiser:

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
    """
    with _errors_in_a_line():
        from fastsched.measurement.to_file import measure_to_file

        model, sizes = _denoiser(denoiser, shape, device)
        stats = measure_to_file(
            model,
            sizes,
            output,
            levels=levels,
            samples=samples,
            responses=responses,
            seed=seed,
            batch_size=batch_size,
            device=device,
            dtype=_dtype(dtype),
            resume=resume,
            overwrite=overwrite,
            progress=not quiet,
        )
        _note(f"{stats.samples} paths over {stats.levels} levels, {stats.model_calls} model calls; wrote {output}")


@app.command()
def select(
    statistics: Annotated[Path, typer.Argument(help="Statistics that 'fastsched measure' wrote.")],
    steps: Annotated[str, typer.Option(help="Number of steps: 8, or several: 6,8,10.")],
    solver: Annotated[str, typer.Option(help="Such as ddim, heun, dpmpp_2m or ipndm.")] = "dpmpp_2m",
    weight: Annotated[str, typer.Option(help="geometric, isotropic, directional or none.")] = "geometric",
    output: Annotated[
        Optional[Path],
        typer.Option("--output", "-o", help="Schedule to write; with several steps NAME.json becomes NAME-6.json ..."),
    ] = None,
) -> None:
    """Select the schedule with the least predicted error. No model calls. Prints the sigmas, the last of them 0.

    \b
    fastsched select stats.safetensors --steps 8 -o schedule.json
    fastsched select stats.safetensors --steps 6,8,10 --solver ddim -o ddim.json
    """
    with _errors_in_a_line():
        import numpy as np

        from fastsched.measurement.statistics import PathStatistics
        from fastsched.selection.optimal import optimal_schedule

        counts = _integers("steps", steps)
        stats = PathStatistics.load(statistics)
        for count in counts:
            schedule = optimal_schedule(stats, count, solver, weight=None if weight == "none" else weight)
            _note(f"{schedule.solver}, {count} steps, predicted squared error {schedule.predicted_error:.4g}")
            numbers = [
                np.format_float_positional(value, precision=6, fractional=False, trim="0")
                for value in schedule.sigmas.tolist()
            ]
            typer.echo(", ".join(numbers))
            if output is not None:
                path = output if len(counts) == 1 else output.with_name(f"{output.stem}-{count}{output.suffix}")
                schedule.save(path)
                _note(f"wrote {path}")


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
) -> None:
    """Predict the error at every number of steps, and how many steps reach a target. No model calls.

    \b
    fastsched plan stats.safetensors --solver ddim,dpmpp_2m -o plan.png
    fastsched plan stats.safetensors --target karras:20
    """
    with _errors_in_a_line():
        from fastsched.measurement.statistics import PathStatistics
        from fastsched.plot import plot_error_curves
        from fastsched.selection.planning import error_curve, steps_needed

        loaded = PathStatistics.load(stats)
        curves = [error_curve(loaded, name, max_steps) for name in solver.split(",")]
        for curve in curves:
            typer.echo(str(curve))
            if target is not None:
                steps = steps_needed(loaded, curve.solver, target=_target(target), max_steps=max_steps)
                typer.echo(f"{curve.solver} needs {steps} steps for {target}")
        if output is not None:
            plot_error_curves(curves).savefig(output)
            _note(f"wrote {output}")


def _target(text: str) -> float | tuple[str, int]:
    """An error, or the name and steps of a common schedule."""
    name, colon, steps = text.partition(":")
    try:
        return (name, int(steps)) if colon else float(text)
    except ValueError:
        raise ValueError(f"target must be an error such as 0.05, or karras:20, got {text!r}") from None


@app.command()
def compare(
    denoiser: DenoiserName,
    schedules: Annotated[list[Path], typer.Argument(help="Schedules that 'fastsched select' wrote.")],
    baselines: Annotated[str, typer.Option(help="Common schedules to add, by name, or none.")] = "karras,exponential",
    spare_last: Annotated[bool, typer.Option(help="Replace sigma_min by 0 in the baselines.")] = False,
    solver: Annotated[Optional[str], typer.Option(help="Run all with this solver.  [default: their own]")] = None,
    shape: Shape = None,
    samples: Annotated[int, typer.Option(help="Number of noises to compare over.")] = 256,
    seed: Seed = 0,
    reference_steps: Annotated[int, typer.Option(help="Number of steps of the converged run.")] = 300,
    batch_size: Batch = None,
    device: Device = None,
    dtype: DType = None,
    csv: Annotated[Optional[Path], typer.Option(help="Also write the table as CSV.")] = None,
    quiet: Quiet = False,
) -> None:
    """Run the sampler with each schedule and rank them by the distance to the converged samples of the same noise.

    \b
    fastsched compare digits schedule.json
    fastsched compare my_model.py:build a.json b.json --shape 4,64,64 --baselines karras --csv errors.csv
    """
    with _errors_in_a_line():
        from fastsched import comparison
        from fastsched.sampling.schedule import Schedule

        named: dict[str, Schedule] = {}
        for path in schedules:
            named[path.stem if path.stem not in named else str(path)] = Schedule.load(path)
        model, sizes = _denoiser(denoiser, shape, device)
        names = [] if baselines == "none" else baselines.split(",")
        result = comparison.compare(
            model,
            {**named, **_baselines(model, names, list(named.values()), spare_last)},
            solver,
            shape=sizes,
            samples=samples,
            seed=seed,
            reference_steps=reference_steps,
            batch_size=batch_size,
            device=device,
            dtype=_dtype(dtype),
            progress=not quiet,
        )
        typer.echo(str(result))
        if csv is not None:
            result.to_csv(csv)
            _note(f"wrote {csv}")


@app.command()
def plot(
    files: Annotated[list[Path], typer.Argument(help="Schedules (.json), and statistics (.safetensors) at most once.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Figure to write: .png, .svg or .pdf.")],
) -> None:
    """Draw schedules, statistics, or schedules under the cost density of statistics.

    \b
    fastsched plot stats.safetensors schedule.json -o schedule.png
    fastsched plot a.json b.json -o both.svg
    """
    with _errors_in_a_line():
        from fastsched.measurement.statistics import PathStatistics
        from fastsched.plot import plot_cost_density, plot_schedules
        from fastsched.sampling.schedule import Schedule

        measured = [path for path in files if path.suffix == ".safetensors"]
        if len(measured) > 1:
            raise ValueError(f"files must contain at most one file of statistics, got {', '.join(map(str, measured))}")
        if output.suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"output must end in .png, .svg or .pdf, got {str(output)!r}")
        stats: PathStatistics | None = PathStatistics.load(measured[0]) if measured else None
        schedules = {str(path.with_suffix("")): Schedule.load(path) for path in files if path not in measured}
        if stats is not None and not schedules:
            figure = plot_cost_density(stats)
        else:
            figure = plot_schedules(schedules, stats=stats)
        figure.savefig(output)
        _note(f"wrote {output}")


@contextlib.contextmanager
def _errors_in_a_line() -> Iterator[None]:
    """Print an error as one line on stderr and exit: status 2 for a bad argument, 1 for anything else."""
    try:
        yield
    except KeyboardInterrupt:
        _note("interrupted; 'fastsched measure --resume' continues from the last saved batch")
        raise typer.Exit(130) from None
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if _STATE["traceback"]:
            raise
        known = isinstance(error, (ValueError, TypeError, ImportError, OSError))
        text = " ".join(str(error).split())
        _note(f"error: {text}" if known else f"error: {type(error).__name__}: {text} (use --traceback to see where)")
        raise typer.Exit(2 if isinstance(error, (ValueError, TypeError)) else 1) from None


def _note(text: str) -> None:
    """Print a line on stderr: stdout is for results only."""
    print(text, file=sys.stderr)


def _denoiser(name: str, shape: str | None, device: str | None) -> tuple[Denoiser, tuple[int, ...]]:
    from fastsched.denoisers.loading import load_denoiser

    denoiser, own = load_denoiser(name, device)
    if shape is None and own is None:
        raise ValueError("shape must be given for this denoiser: --shape 4,64,64, the shape of one sample")
    return denoiser, own if shape is None else tuple(_integers("shape", shape))  # type: ignore[return-value]  # not both None


def _integers(name: str, text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} must be integers separated by commas, such as 6,8,10, got {text!r}") from None
    if min(values) < 1:
        raise ValueError(f"{name} must be at least 1, got {min(values)}")
    return values


def _dtype(name: str | None) -> torch.dtype | None:
    import torch

    from fastsched import validate

    known = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
    return None if name is None else known[validate.choice("dtype", name, known)]


def _baselines(denoiser: Denoiser, names: list[str], schedules: list[Schedule], spare_last: bool) -> dict:
    """Each baseline for every solver and number of steps among the schedules."""
    from fastsched import baselines, validate
    from fastsched.sampling.schedule import Schedule

    ranged = ("karras", "exponential", "linear", "kl_optimal", "vp_uniform", "cosine", "beta")
    kinds = list(dict.fromkeys((schedule.solver, schedule.steps) for schedule in schedules))
    added = {}
    for name in names:
        validate.choice("baselines", name, (*ranged, "flow_shift"))
        for solver, steps in kinds:
            if name == "flow_shift":
                sigmas = baselines.flow_shift(steps)
            else:
                low, high = _range(denoiser)
                sigmas = getattr(baselines, name)(steps, low, high, spare_last=spare_last)
            label = name if len(kinds) == 1 else f"{name}-{solver}-{steps}"
            added[label] = Schedule(sigmas, solver, denoiser.process.kind)
    return added


def _range(denoiser: Denoiser) -> tuple[float, float]:
    """The lowest and highest sampler sigma of the denoiser."""
    import torch

    levels = torch.tensor([denoiser.process.s_min, denoiser.process.s_max], dtype=torch.float64)
    low, high = denoiser.process.sampler_sigma(levels).tolist()
    return low, high
