"""The command export: a schedule in the form that other programs take."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from fastsched.cli import inputs, shell
from fastsched.cli.shell import note

if TYPE_CHECKING:
    from torch import Tensor

    from fastsched.sampling.schedule import Schedule

#: The engines of `fastsched.diffusers.serving`, repeated here because the shell starts without importing diffusers.
ENGINES = ("vllm-omni", "sglang")
#: By solver, the sampler of each of `PROGRAMS` that takes the same steps; None if there is none.
SAMPLERS = {
    "ddim": ("sample_euler", "euler", "euler"),
    "heun": ("sample_heun", "heun", "heun"),
    "dpm_2": ("sample_dpm_2", "dpm_2", "dpm2"),
    "dpmpp_2m": ("sample_dpmpp_2m", "dpmpp_2m", "dpm++2m"),
    "ipndm": (None, "ipndm", "ipndm"),
    "lms": (None, "lms", None),
    "ancestral": ("sample_euler_ancestral", "euler_ancestral", "euler_a"),
    "sde_dpmpp_2m": ("sample_dpmpp_2m_sde", "dpmpp_2m_sde", None),
}
PROGRAMS = ("k-diffusion", "ComfyUI", "stable-diffusion.cpp")
#: Advice for schedules whose solver is not a sampler of ComfyUI.
NODE = "use the file in the node Load Schedule (integrations/comfyui), which gives the SAMPLER too"
#: The code that imports and makes an array of levels, by its class, for schedulers that fail with a list.
ARRAYS = {
    "ndarray": ("import numpy as np\n\n", "np.array({})"),  # UniPC
    "Tensor": ("import torch\n\n", "torch.tensor({}, dtype=torch.float64)"),  # EDMEuler
}
#: Solvers whose samplers in ComfyUI (docs/comfyui.md) and stable-diffusion.cpp differ from them for flow times.
NOT_FOR_FLOW = ("dpmpp_2m", "ancestral", "sde_dpmpp_2m")


def export(
    schedule: Annotated[Path, shell.SCHEDULE],
    to: Annotated[
        str,
        typer.Option(
            *("--to",),
            help="diffusers, comfyui, vllm-omni, sglang, k-diffusion, flow-matching, sd.cpp or text.",
            autocompletion=lambda incomplete: [name for name in TARGETS if name.startswith(incomplete)],
        ),
    ],
    scheduler: Annotated[
        Optional[str], typer.Option(help="diffusers, engines: a pipeline or scheduler folder; prints exact arguments.")
    ] = None,
    mu: Annotated[Optional[float], typer.Option(help="With --scheduler: the shift of use_dynamic_shifting.")] = None,
    output: Annotated[Optional[Path], typer.Option("--output", "-o", help="File to write.  [default: print]")] = None,
    as_json: shell.AsJson = False,
) -> None:
    """Write a schedule for another program. Gives its noise levels in that program's convention, and the sampler.

    \b
    fastsched export schedule.json --to text
    fastsched export schedule.json --to comfyui
    fastsched export schedule.json --to diffusers --scheduler my_pipeline_folder
    fastsched export flow.json --to vllm-omni --scheduler my_flow_pipeline_folder --mu 1.15
    fastsched export schedule.json --to k-diffusion -o sample.py
    """
    from fastsched import validate
    from fastsched.sampling.files import write_whole

    validate.choice("to", to, TARGETS)
    if to not in ("diffusers", *ENGINES) and (scheduler is not None or mu is not None):
        raise ValueError("scheduler and mu are for --to diffusers, vllm-omni and sglang only")
    shell.writable(output, sources=[schedule])
    loaded = inputs.load_schedule(schedule)
    if to != "diffusers":
        _check_list(loaded, to)
    if to == "diffusers":
        text, values = _diffusers(loaded, schedule, scheduler, mu)
    elif to in ENGINES:
        text, values = _engine(loaded, to, scheduler, mu)
    else:
        text, values = FORMS[to](loaded)
    if as_json:
        text = shell.json_text({"to": to, "solver": loaded.solver, **values})
    if output is None:
        typer.echo(text)
    else:
        write_whole(output, f"{text}\n".encode())
        shell.wrote(output)


def _check_list(schedule: Schedule, program: str) -> None:
    """ValueError if one list of levels cannot hold the schedule; it names what else the program can use."""
    fitted, ways = schedule.weights is not None, {}
    if schedule.decoupled == "denoiser" or (fitted and schedule.decoupled is None):
        ways["comfyui"] = NODE
        if fitted:
            ways["k-diffusion"] = "sample by fastsched.sampling.k_diffusion.sample_fitted(model, x, schedule)"
        elif schedule.noise != "flow":
            ways["k-diffusion"] = "give its sampler fs.decoupled_model(model, schedule) and schedule.sigmas"
    instead = f"{ways[program]}, or " if program in ways else ""
    if fitted:
        raise ValueError(
            f"schedule is for the fitted solver, whose weights {program} cannot take; {instead}fit one for a stock "
            "solver"
        )
    schedule.check_coupled(program, instead)


def _text(schedule: Schedule) -> tuple[str, dict[str, Any]]:
    """The sigmas in plain decimals, with every digit."""
    import numpy as np

    sigmas = schedule.sigmas.tolist()
    return ", ".join(np.format_float_positional(value, trim="0") for value in sigmas), {"sigmas": sigmas}


def _comfyui(schedule: Schedule) -> tuple[str, dict[str, Any]]:
    """The text of ComfyUI's node ManualSigmas."""
    known = _samplers(schedule, "ComfyUI")
    sampler = known.get(schedule.solver)
    if sampler is None:
        where = _where(schedule)
        note(
            f"ComfyUI has no sampler that is {schedule.solver}{where}, and these sigmas suit no other sampler; {NODE}, "
            f"or {_fit_one_of(known)}"
        )
    else:
        note(f"paste into ManualSigmas, and choose the sampler {sampler}")
    found = schedule.to_comfyui()
    return found.text, {"sigmas": found.sigmas.tolist(), "sampler": sampler}


def _k_diffusion(schedule: Schedule) -> tuple[str, dict[str, Any]]:
    """Python for k-diffusion."""
    if schedule.noise == "flow":
        raise ValueError("k-diffusion samples in sigmas and this schedule is of flow times; use --to flow-matching")
    sampler = _sampler(schedule, "k-diffusion")
    if not bool(schedule.sigmas.isfinite().all()):
        raise ValueError("k-diffusion starts from a finite sigma, and this schedule from pure noise, sigma = inf")
    _check_float32(schedule.sigmas, "sigmas", "k-diffusion")
    sigmas, values = _text(schedule)
    text = (
        "import torch\nfrom k_diffusion import sampling\n\n"
        f"sigmas = torch.tensor([{sigmas}], device=noise.device)\n"
        f"samples = sampling.{sampler}(model, noise * sigmas[0], sigmas)  # model(x, sigma) is the denoised image"
    )
    return text, {**values, "sampler": sampler}


def _flow_matching(schedule: Schedule) -> tuple[str, dict[str, Any]]:
    """Python for flow_matching, where time runs from noise at 0 to data at 1."""
    if schedule.noise != "flow":
        raise ValueError(f"flow_matching takes flow times and this schedule is of a {schedule.noise!r} noise process")
    if schedule.solver != "ddim":
        raise ValueError(
            f"flow_matching's solver 'euler' is ddim and this schedule is for {schedule.solver}; fit one with "
            "--solver ddim"
        )
    _check_float32(1 - schedule.sigmas, "times", "flow_matching")
    grid, first = (1 - schedule.sigmas).tolist(), float(schedule.sigmas[0])
    start = "noise" if first == 1 else f"{first} * noise"
    text = (
        "import torch\nfrom flow_matching.solver import ODESolver\n\n"
        f"time_grid = torch.tensor({grid}, device=noise.device)\n"
        f'samples = ODESolver(velocity_model).sample({start}, step_size=None, method="euler", time_grid=time_grid)'
    )
    return text, {"time_grid": grid, "sampler": "euler"}


def _sd_cpp(schedule: Schedule) -> tuple[str, dict[str, Any]]:
    """Options of stable-diffusion.cpp's command."""
    sampler = _sampler(schedule, "stable-diffusion.cpp")
    if not bool(schedule.sigmas.isfinite().all()):
        raise ValueError(
            "stable-diffusion.cpp has no models of zero terminal SNR, and this schedule is of one: it starts at inf"
        )
    _check_float32(schedule.sigmas, "sigmas", "stable-diffusion.cpp")
    found = schedule.to_comfyui()  # float32 in plain decimals, which stable-diffusion.cpp parses
    sigmas = found.text.replace(" ", "")
    options = f'--sampling-method {sampler} --steps {schedule.steps} --sigmas "{sigmas}"'
    return options, {"sigmas": found.sigmas.tolist(), "sampler": sampler}


def _diffusers(schedule: Schedule, path: Path, scheduler: str | None, mu: float | None) -> tuple[str, dict[str, Any]]:
    """The arguments of one call if the pipeline is known to take them, otherwise Python for any pipeline."""
    any_number = "the next call of pipe uses it, with any num_inference_steps"
    stock = schedule.weights is None and schedule.decoupled != "denoiser"  # else a FittedScheduler
    use = any_number if stock else f"call it with num_inference_steps={schedule.steps}"
    python = (
        "import fastsched as fs\n\n"
        f"schedule = fs.Schedule.load({path.as_posix()!r})\n"
        f"fs.diffusers.apply(schedule, pipe)  # {use}"
    )
    if scheduler is None:
        if mu is not None:
            raise ValueError("mu needs --scheduler, the pipeline whose shift it is")
        if schedule.weights is None and schedule.network_sigmas is None:  # arguments can hold neither
            note("with --scheduler FOLDER the arguments of the pipeline's call are printed instead")
        return python, {"sigmas": schedule.sigmas.tolist()}
    import fastsched as fs
    from fastsched.diffusers.applier import applied

    own = inputs.load_scheduler(scheduler)
    try:
        found = fs.diffusers.export(schedule, own, mu=mu)
    except ValueError as error:
        if mu is not None or schedule.weights is not None or schedule.network_sigmas is not None:
            raise
        used = applied(schedule, own)[1]  # its errors name a scheduler that can take the schedule
        note(f"no arguments can give this schedule, so this code sets it on the scheduler: {error}")
        return python, {"arguments": None, "used": used.sigmas.tolist(), "error": used.error}
    arguments = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in found.arguments.items()}
    values = {"arguments": arguments, "used": found.sigmas.tolist(), "error": found.error}
    name, takes = inputs.pipeline_call(scheduler)
    (argument,) = arguments
    if takes is None:
        note(f"for pipelines whose call takes {argument}=; for others use fs.diffusers.apply(schedule, pipe)")
    elif argument not in takes:
        note(f"the call of {name} takes no {argument}=, so this gives the schedule to its scheduler")
        return python, {**values, "arguments": None}
    first = "" if takes is not None and "prompt" not in takes else "prompt=prompt, "  # some take an image first
    start, given = ARRAYS.get(type(found.arguments[argument]).__name__, ("", "{}"))
    return f"{start}pipe({first}{argument}={given.format(arguments[argument])})", values


def _engine(schedule: Schedule, engine: str, scheduler: str | None, mu: float | None) -> tuple[str, dict[str, Any]]:
    """Python for vllm-omni, fields of a request for SGLang."""
    if scheduler is None:
        raise ValueError(f"--to {engine} needs --scheduler, the served checkpoint, whose scheduler shifts the list")
    import fastsched as fs

    found = fs.diffusers.serving_parameters(schedule, inputs.load_scheduler(scheduler), engine, mu=mu)
    if engine == "sglang":
        return json.dumps(found), {"parameters": found}
    given = ", ".join(f"{key}={value}" for key, value in found.items())
    return f"OmniDiffusionSamplingParams({given})", {"parameters": found}


def _check_float32(values: Tensor, what: str, program: str) -> None:
    """ValueError if two neighbours are equal as float32: samplers divide by their difference."""
    if bool((values.float().diff() == 0).any()):
        raise ValueError(f"{what} must differ as float32, which {program} computes in, got {values.tolist()}")


def _sampler(schedule: Schedule, program: str) -> str:
    """The program's sampler that is the schedule's solver, or ValueError."""
    known = _samplers(schedule, program)
    if schedule.solver not in known:
        raise ValueError(f"{program} has no sampler that is {schedule.solver}{_where(schedule)}; {_fit_one_of(known)}")
    return known[schedule.solver]


def _samplers(schedule: Schedule, program: str) -> dict[str, str]:
    """A program's samplers for the schedule's kind of noise process, by solver."""
    found = {solver: names[PROGRAMS.index(program)] for solver, names in SAMPLERS.items()}
    left_out = NOT_FOR_FLOW if schedule.noise == "flow" else ()
    return {solver: name for solver, name in found.items() if name is not None and solver not in left_out}


def _fit_one_of(solvers: Iterable[str]) -> str:
    """Advice to fit a schedule for one of these solvers, without those that add noise, which cannot be fitted."""
    from fastsched.sampling.solvers import SOLVERS

    return f"fit a schedule for one of {', '.join(name for name in solvers if name in SOLVERS)}"


def _where(schedule: Schedule) -> str:
    return " for flow times" if schedule.noise == "flow" else ""


#: Formats for which the schedule is enough.
FORMS: dict[str, Callable[[Schedule], tuple[str, dict[str, Any]]]] = {
    "comfyui": _comfyui,
    "k-diffusion": _k_diffusion,
    "flow-matching": _flow_matching,
    "sd.cpp": _sd_cpp,
    "text": _text,
}
#: Values of ``--to``.
TARGETS = ("diffusers", *ENGINES, *FORMS)
