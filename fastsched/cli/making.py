"""Commands that make statistics and schedules: measure, fit, select, merge."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from fastsched.cli import inputs, shell, spending
from fastsched.cli.shell import note

if TYPE_CHECKING:
    from fastsched.measurement.statistics import PathStatistics
    from fastsched.sampling.schedule import Schedule

#: Defaults of `fastsched.measure` and `fastsched.diffusers.measure`, repeated here so that --help imports neither.
LEVELS, SAMPLES, PIPELINE_SAMPLES = 48, 8, 4

Levels = Annotated[int, typer.Option(help="Number of noise levels; 32 to 64 are enough.", min=3, max=1_000_000)]
Paths = Annotated[
    Optional[str],
    typer.Option(
        help="Number of paths, 4 to 16 are enough; or A:B, paths A to B - 1, for 'fastsched merge'.  "
        "[default: 8; pipelines: 4]"
    ),
]
ModelCalls = Annotated[
    Optional[int],
    typer.Option(
        help="The most model calls in all.  [default: 800, 100 a prompt if that is more; with --stats 740 more]", min=0
    ),
]
FitSeed = Annotated[Optional[int], typer.Option(help="Seed of the noises.  [default: 0]", min=0, max=2**31 - 1)]
Solver = Annotated[str, typer.Option(help="Such as ddim, heun, dpmpp_2m or ipndm; 'fastsched solvers' lists all.")]


@shell.errors_in_a_line("interrupted; 'fastsched measure --resume' continues from the last saved batch, if any")
def measure(
    denoiser: shell.DenoiserName,
    output: Annotated[Optional[Path], typer.Option("--output", "-o", help="The statistics file to write.")] = None,
    shape: shell.Shape = None,
    levels: Levels = LEVELS,
    samples: Paths = None,
    seed: shell.Seed = 0,
    responses: Annotated[
        Optional[bool],
        typer.Option(
            "--responses/--no-responses",
            help="Measure how errors are passed on, which is half of the cost.  [default: responses]",
        ),
    ] = None,
    batch_size: Annotated[
        Optional[int], typer.Option(help="Paths per batch; the file is saved after each batch.  [default: 4]", min=1)
    ] = None,
    device: shell.Device = None,
    dtype: shell.DType = None,
    prompt: shell.Prompts = None,
    call: shell.CallOptions = None,
    scheduler: shell.Scheduler = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the measurement in OUTPUT, if any.")] = False,
    overwrite: shell.Overwrite = False,
    dry_run: shell.DryRun = False,
    quiet: shell.Quiet = False,
) -> None:
    """Measure a model, once for all schedules. Takes 2 LEVELS - 2 model calls per sample and 7 checks.

    For a pipeline it is 2 LEVELS per sample.

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
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other: --resume goes on, --overwrite starts over")
    ways = "resume it (--resume), replace it (--overwrite)"
    checks = {"overwrite": overwrite or resume, "replace": ways, "sources": inputs.model_files(denoiser)}
    file = shell.output_file(output, dry_run, **checks)
    source = inputs.Source(denoiser, shape, device, dtype, batch_size, prompt, call, quiet, scheduler)
    if source.is_pipeline:
        inputs.not_for_pipelines(responses=responses)
        stats = _measured_pipeline(source, samples, dry_run, file, levels=levels, seed=seed, resume=resume)
    else:
        settings = {"levels": levels, "seed": seed, "resume": resume, "overwrite": overwrite}
        stats = _measured_denoiser(source, samples, dry_run, file, responses=responses is not False, **settings)
    note(f"{stats.samples} paths over {stats.levels} levels, {stats.model_calls:,} model calls; wrote {file}")


@shell.while_a_model_runs()
def _measured_pipeline(
    source: inputs.Source, samples: str | None, dry_run: bool, output: Path, **settings: Any
) -> PathStatistics:
    """Statistics of a pipeline, written to a file call by call."""
    from fastsched.diffusers.pipelines.measurement import measured_pipeline

    count, output = inputs.sample_range(samples, PIPELINE_SAMPLES), output.absolute()  # the model may change the folder
    pipe, arguments = source.pipeline()
    levels, calls = settings["levels"], spending.calibrating(pipe, source.prompts, arguments)[1]
    left = calls(levels, count) - calls(levels, range(inputs.known_samples(output) if settings["resume"] else 0))
    spending.say(f"{max(0, left):,} to measure", dry_run)
    settings |= {"samples": count, "prompts": source.prompts, "checkpoint": output, "progress": not source.quiet}
    with inputs.named_as_options():
        return measured_pipeline(pipe, arguments, keep_increments=False, prompts_per_call=None, **settings)


@shell.while_a_model_runs()
def _measured_denoiser(
    source: inputs.Source, samples: str | None, dry_run: bool, output: Path, **settings: Any
) -> PathStatistics:
    """Statistics of a denoiser, written to a file batch by batch."""
    from fastsched.measurement.to_file import measure_to_file

    count, output = inputs.sample_range(samples, SAMPLES), output.absolute()  # the model may change the folder
    model, sizes = source.denoiser()
    known = inputs.known_samples(output) if settings["resume"] else 0
    left = max(0, (len(count) if isinstance(count, range) else count) - known)
    calls = spending.measuring_calls(model, settings["levels"], left, settings["responses"])
    spending.say(f"{calls:,} to measure", dry_run)
    settings |= source.running | {"samples": count, "batch_size": source.batch_size or 4}
    return measure_to_file(model, sizes, output, **settings)


def fit(
    denoiser: shell.DenoiserName,
    steps: Annotated[int, typer.Option(help="Number of steps.", min=1)],
    output: Annotated[Optional[Path], typer.Option("--output", "-o", help="The schedule to write, .json.")] = None,
    solver: Annotated[
        Optional[str], typer.Option(help="The solver to fit for.  [default: dpmpp_2m; pipelines: their scheduler's]")
    ] = None,
    shape: shell.Shape = None,
    stats: Annotated[
        Optional[Path], typer.Option(help="Statistics of this model; a denoiser's paths are followed once more.")
    ] = None,
    levels: Annotated[
        Optional[int], typer.Option(help="Number of noise levels.  [default: by the calls]", min=3)
    ] = None,
    samples: Annotated[Optional[int], typer.Option(help="Number of paths.  [default: by the calls]", min=1)] = None,
    model_calls: ModelCalls = None,
    decoupled: Annotated[
        bool, typer.Option("--decoupled", help="Also tune the level at which the network is asked in each step.")
    ] = False,
    decoupled_timesteps: Annotated[
        bool, typer.Option("--decoupled-timesteps", help="The same for stock schedulers of diffusers: timesteps only.")
    ] = False,
    seed: FitSeed = None,
    batch_size: shell.Batch = None,
    device: shell.Device = None,
    dtype: shell.DType = None,
    prompt: shell.Prompts = None,
    call: shell.CallOptions = None,
    scheduler: shell.Scheduler = None,
    checkpoint: shell.Checkpoint = None,
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
    fastsched fit my_pipeline_folder --steps 8 --prompt "a cat" --checkpoint unfinished.safetensors -o schedule.json
    """
    file = shell.output_file(output, dry_run, overwrite=overwrite, endings=[".json"])
    kept = shell.checkpoint_file(checkpoint, file, [*inputs.model_files(denoiser), *([stats] if stats else [])])
    source = inputs.Source(denoiser, shape, device, dtype, batch_size, prompt, call, quiet, scheduler)
    # Files and names are checked before the model loads, which may take minutes.
    chosen = None if solver is None else inputs.solver_to_fit(solver)
    paths = {"levels": levels, "samples": samples, "seed": seed}
    for option in (name for name, value in paths.items() if stats and value is not None):
        raise ValueError(f"{option} must be left out with --stats, whose levels and paths are used")
    options = {"stats": None if stats is None else inputs.load_statistics(stats), **paths, "seed": seed or 0}
    options |= {"decoupled": _one_way(decoupled, decoupled_timesteps), "checkpoint": kept, "model_calls": model_calls}
    schedule = _fitted(source, steps, chosen, dry_run, options)
    shell.save_or_print(schedule.save, file, summary(schedule))
    if as_json:
        shell.print_json(summary(schedule))
    else:
        _show(schedule)
    shell.wrote(file)


def _one_way(decoupled: bool, timesteps: bool) -> bool | str:
    """The argument ``decoupled`` of a fit."""
    if decoupled and timesteps:
        raise ValueError("--decoupled and --decoupled-timesteps exclude each other; give one")
    return "timestep" if timesteps else decoupled


@shell.while_a_model_runs()
def _fitted(source: inputs.Source, steps: int, solver: str | None, dry_run: bool, options: dict[str, Any]) -> Schedule:
    """The schedule of a pipeline or a denoiser, under one progress bar."""
    import fastsched as fs
    from fastsched.fitting.budget import default_total, planned

    model: Any
    given: Any  # arguments of a pipeline's call, or the shape of a denoiser's samples
    model, given = source.pipeline() if source.is_pipeline else source.denoiser()
    if source.is_pipeline:
        from fastsched.diffusers.pipelines.fit import checked_fit

        least, calls = spending.calibrating(model, source.prompts, given)
        if options["stats"] is None:
            budget = default_total(least) if options["model_calls"] is None else options["model_calls"]
            levels, samples = planned(budget, steps, options["levels"], options["samples"], least=least)
            options |= {"model_calls": budget, "levels": levels, "samples": samples}
        with inputs.named_as_options(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the fit repeats them
            checked_fit(model, steps, solver, options["checkpoint"], audition=True, decoupled=options["decoupled"])
        cost = spending.pipeline_fit_calls(calls, options)
        options = {"solver": solver, "prompts": source.prompts, **given} | options
    else:
        options = source.running | options | {"shape": given, "solver": solver or "dpmpp_2m"}
        cost = spending.denoiser_fit_calls(model, steps, options)
    total = spending.say_fitting(*cost, options, dry_run)
    kept = "nothing was written" if options["checkpoint"] is None else "the same command goes on from the checkpoint"
    with (
        shell.errors_in_a_line(f"interrupted; {kept}"),
        shell.joint_bar(total, not source.quiet, "fitting") as progress,
        inputs.named_as_options(),
    ):
        run: Any = fs.diffusers.fit if source.is_pipeline else fs.fit
        return run(model, steps=steps, **options | {"progress": progress})


def select(
    statistics: shell.StatisticsFile,
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
    from fastsched.selection.optimal import optimal_schedule

    counts = list(dict.fromkeys(inputs.integers("steps", steps)))
    files = [None if output is None else _numbered(output, count, len(counts)) for count in counts]
    for file in files:
        shell.writable(file, sources=[statistics])
    method = inputs.solver_named(solver)
    stats = inputs.load_statistics(statistics)
    schedules = []
    for count, file in zip(counts, files, strict=True):
        schedules.append(optimal_schedule(stats, count, method))
        if file is not None:
            schedules[-1].save(file)
            shell.wrote(file)
    # After the files, because a reader that closes the pipe, such as head, ends the command here.
    if as_json:
        shell.print_json([summary(schedule) for schedule in schedules])
    else:
        for schedule in schedules:
            _show(schedule)


def _numbered(output: Path, steps: int, several: int) -> Path:
    """The file of one of several schedules: NAME-6.json of NAME.json."""
    return output if several == 1 else output.with_name(f"{output.stem}-{steps}{output.suffix}")


def merge(
    statistics: Annotated[
        list[Path], typer.Argument(help="Statistics of different samples of one model.", metavar="STATS")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The statistics file to write.")],
    overwrite: shell.Overwrite = False,
) -> None:
    """Merge statistics of different samples. They may come from several machines; no model calls.

    \b
    fastsched measure my_model.py:build --shape 4,64,64 --samples 0:8 -o a.safetensors
    fastsched measure my_model.py:build --shape 4,64,64 --samples 8:16 -o b.safetensors
    fastsched merge a.safetensors b.safetensors -o whole.safetensors
    """
    shell.writable(output, overwrite=overwrite)
    whole = None
    for path in statistics:
        part = inputs.load_statistics(path)
        try:
            whole = part if whole is None else whole.merge(part)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    assert whole is not None  # typer requires at least one file
    whole.save(output, vectors=whole.increments is not None)
    note(f"{whole.samples} paths over {whole.levels} levels; wrote {output}")


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
        **({} if schedule.origin is None else {"origin": schedule.origin.to_dict()}),
        **({} if schedule.weights is None else {"weights": schedule.weights.tolist()}),
        **({} if schedule.network_sigmas is None else {"network_sigmas": schedule.network_sigmas.tolist()}),
        **({} if schedule.decoupled is None else {"decoupled": schedule.decoupled}),
    }


def plain_decimals(values: list[float]) -> str:
    """``values`` of six digits, separated by commas, without exponents, which some programs cannot read."""
    import numpy as np

    return ", ".join(np.format_float_positional(v, precision=6, fractional=False, trim="0") for v in values)


def _show(schedule: Schedule) -> None:
    """Print the schedule on stdout, and its errors on stderr."""
    errors = {"predicted": schedule.predicted_error, "on the noises of its fit": schedule.measured_error}
    known = [f", squared error {value:.4g} {name}" for name, value in errors.items() if value is not None]
    note(f"{schedule.solver}, {schedule.steps} steps{''.join(known)}")
    typer.echo(plain_decimals(schedule.sigmas.tolist()))
    if schedule.network_sigmas is not None:
        note(f"the network is told {plain_decimals(schedule.network_sigmas.tolist())}")
