"""The command that says where the time of a step goes: profile."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from fastsched.cli import inputs, shell, spending

if TYPE_CHECKING:
    from fastsched.denoisers.denoiser import Denoiser


def profile(
    denoiser: shell.DenoiserName,
    shape: shell.Shape = None,
    steps: Annotated[int, typer.Option(help="Steps of each of the two sampling runs.", min=3)] = 8,
    device: shell.Device = None,
    dtype: shell.DType = None,
    prompt: shell.Prompts = None,
    call: shell.CallOptions = None,
    trace: Annotated[
        Optional[Path], typer.Option(help="A file for a trace of torch.profiler, for Perfetto (.json).")
    ] = None,
    scheduler: shell.Scheduler = None,
    dry_run: shell.DryRun = False,
    as_json: shell.AsJson = False,
    quiet: shell.Quiet = False,
) -> None:
    """Say where the time of a step goes. Also what measuring and fitting cost, and when they pay for themselves.

    About 2 STEPS + 6 real steps are run, or 2 STEPS + 30 on a GPU.

    \b
    fastsched profile my_model.py:build --shape 4,64,64
    fastsched profile my_pipeline_folder --prompt "a cat" --dtype bfloat16 --trace trace.json
    """
    import fastsched as fs
    from fastsched.profiling import steps_run

    shell.writable(trace, endings=(".json",), name="trace")
    trace = None if trace is None else trace.absolute()  # the model may change the folder
    source = inputs.Source(denoiser, shape, device, dtype, None, prompt, call, quiet, scheduler)
    with shell.while_a_model_runs(), inputs.named_as_options():
        if source.is_pipeline:
            model, arguments = source.pipeline()
            arguments |= _one_prompt(prompt)
        else:
            model, sizes = source.denoiser()
            arguments: dict[str, Any] = {"shape": sizes}
            _check_placed(model, device, dtype)
        spending.say(f"about {steps_run(model, steps)}", dry_run)
        try:
            found, failure = fs.profile(model, steps=steps, trace=trace, **arguments), None
        except OSError as error:  # the disk is full, say; the calls need not be repeated for the figures
            found, failure = getattr(error, "partial", None), error
    if isinstance(found, fs.Profile):
        typer.echo(found.to_json() if as_json else str(found))
    if failure is not None:
        raise failure


def _one_prompt(prompts: list[str] | None) -> dict[str, Any]:
    """The prompt as an argument of the call that is timed; ValueError if there are several."""
    if prompts and len(prompts) > 1:
        raise ValueError(f"prompt must be given once here, because one call is timed, got {len(prompts)}")
    return {"prompt": prompts[0]} if prompts else {}


def _check_placed(model: Denoiser, device: str | None, dtype: str | None) -> None:
    """ValueError if a denoiser's network, which is timed as it is, would have to be moved or converted."""
    import torch

    from fastsched.measurement.timeline import device_of

    if dtype is not None:
        raise ValueError("dtype is for pipelines; a denoiser is timed in the dtype of its network")
    if device is not None and torch.device(device).type != device_of(model).type:
        raise ValueError(f"device must be {device_of(model)}, where the denoiser's network is, got {device!r}")
