"""Inputs of commands: models, statistics, schedules and lists of numbers. Unusable input raises ValueError."""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import json
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsched.cli.shell import note

if TYPE_CHECKING:
    import torch

    from fastsched.denoisers.denoiser import Denoiser
    from fastsched.measurement.statistics import PathStatistics
    from fastsched.sampling.schedule import Schedule


#: What type hints of arguments name: objects that no text stands for, and values that can be written as JSON.
OBJECTS, PLAIN = re.compile("Tensor|Generator|PIL|ndarray"), re.compile(r"\b(str|int|float|bool|[dD]ict|Any)\b")


def solver_named(name: str) -> str:
    """The solver that a user means, with a note on stderr if it is named as in a sampler's menu or another library.

    Unknown names come back as they are, for the library's own error.
    """
    from fastsched.sampling.solver_names import known_as
    from fastsched.sampling.solvers import ALIASES, SOLVERS, STOCHASTIC_SOLVERS

    if name in SOLVERS or name in ALIASES or name in STOCHASTIC_SOLVERS:
        return name
    found, ending = known_as(name, (*ALIASES, *SOLVERS))
    if found is None:
        return name
    instead = "" if ending is None else f"; fastsched's noise levels take the place of the {ending} ones"
    note(f"solver {name!r} is {found} here{instead}")
    return found


def solver_to_fit(name: str) -> str:
    """The solver that a user means; ValueError if no schedule can be fitted for it."""
    from fastsched.sampling.fitted import chosen_solver

    return chosen_solver(solver_named(name)).name


def solvers_to_fit(names: str) -> list[str]:
    """`solver_to_fit` of names separated by commas, each solver once."""
    return list(dict.fromkeys(solver_to_fit(name.strip()) for name in names.split(",")))


@dataclass(frozen=True)
class Source:
    """A model given on a command line, and how to run it. Each field but ``name`` is the option of that name."""

    name: str
    shape: str | None
    device: str | None
    dtype: str | None
    batch_size: int | None
    prompts: list[str] | None
    call: list[str] | None
    quiet: bool
    scheduler: str | None = None

    def __post_init__(self) -> None:
        """Check what can be checked before the model loads, which may take minutes."""
        from fastsched import validate

        validate.CHECKS["device"]("device", self.device)
        if self.dtype is not None:
            validate.choice("dtype", self.dtype, ("float32", "float64", "float16", "bfloat16"))

    @property
    def is_pipeline(self) -> bool:
        """Whether the name is a folder, and so a saved pipeline of diffusers."""
        return bool(self.name) and Path(self.name).is_dir()  # Path("") is the current folder

    @property
    def precision(self) -> torch.dtype | None:
        """`dtype` as a torch.dtype."""
        import torch

        return None if self.dtype is None else getattr(torch, self.dtype)

    @property
    def running(self) -> dict[str, Any]:
        """Keyword arguments of the functions that run a denoiser."""
        placed = {"batch_size": self.batch_size, "device": self.device, "dtype": self.precision}
        return placed | {"progress": not self.quiet}

    def denoiser(self) -> tuple[Denoiser, tuple[int, ...]]:
        """The denoiser and the shape of one sample."""
        from fastsched.denoisers.loading import folder_of, load_denoiser

        given = {"prompt": self.prompts, "call": self.call, "scheduler": self.scheduler}
        for option in (name for name, value in given.items() if value):
            raise ValueError(f"{option} is for pipelines; this model is a denoiser")
        asked = None if self.shape is None else tuple(integers("shape", self.shape, "4,64,64"))
        folder = folder_of(self.name)  # before the model changes the current one
        denoiser, own = load_denoiser(self.name, self.device)
        sys.path.append(folder)  # while it runs, for a network that imports at its first call; last, to hide nothing
        shape = own if asked is None else asked
        if shape is None:
            raise ValueError("shape must be given for this denoiser: --shape 4,64,64, the shape of one sample")
        return denoiser, shape

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        """The pipeline, and arguments for its call."""
        kind = pipeline_class(self.name)
        not_for_pipelines(shape=self.shape, batch_size=self.batch_size)
        arguments = call_arguments(self.call)
        check_parts(self.name)
        replacing = None if self.scheduler is None else scheduler_class(self.scheduler)
        from fastsched.diffusers.pipelines.call import check_arguments

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the call repeats them; errors must come before the model loads
            check_arguments(kind, self.prompts, arguments)
        check_values(kind, arguments)
        precision = {} if self.dtype is None else {"torch_dtype": self.precision}
        try:
            with _quiet_diffusers():  # these options read only safetensors and download nothing
                pipe = kind.from_pretrained(self.name, use_safetensors=True, local_files_only=True, **precision)
        except Exception as error:
            what = f"diffusers cannot load {self.name} as a {kind.__name__}"
            raise ImportError(f"{what}: {type(error).__name__}: {error}") from error
        pipe.set_progress_bar_config(disable=self.quiet)
        if replacing is not None:
            pipe.scheduler = replaced(pipe.scheduler, replacing)
        return pipe if self.device is None else pipe.to(self.device), arguments


def model_files(name: str) -> list[Path]:
    """The Python file of a model that is named ``file.py:function``."""
    file = name.rpartition(":")[0]
    return [Path(file)] if file.endswith(".py") else []


def integers(name: str, text: str, example: str = "6,8,10") -> list[int]:
    """The positive integers in ``text``, separated by commas."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} must be integers separated by commas, such as {example}, got {text!r}") from None
    if min(values) < 1:
        raise ValueError(f"{name} must be at least 1, got {min(values)}")
    return values


def sample_range(text: str | None, default: int) -> int | range:
    """The samples that ``text`` names: a count such as 8, or a range such as 8:16 for samples 8 to 15."""
    if text is None:
        return default
    first, colon, stop = text.partition(":")
    try:
        found = range(int(first), int(stop)) if colon else int(first)
    except ValueError:
        raise ValueError(f"samples must be a number, or A:B for numbers A to B - 1, got {text!r}") from None
    from fastsched import validate

    which = validate.sample_range("samples", found)
    return which if colon else len(which)


def load_statistics(path: Path) -> PathStatistics:
    """The statistics in a file; raises what `PathStatistics.load` raises."""
    from fastsched.measurement.statistics import PathStatistics

    return PathStatistics.load(path)


def known_samples(checkpoint: Path | None) -> int:
    """How many samples a measurement that goes on from a file has already; 0 if there is none."""
    return load_statistics(checkpoint).samples if checkpoint is not None and checkpoint.is_file() else 0


def load_schedule(path: Path) -> Schedule:
    """The schedule in a file; raises what `Schedule.load` raises."""
    from fastsched.sampling.schedule import Schedule

    return Schedule.load(path)


def named_schedules(paths: list[Path]) -> dict[str, Schedule]:
    """The schedules in files, by file name without ending; a repeated name is replaced by its path."""
    from fastsched.sampling.display import printable

    named: dict[str, Schedule] = {}
    for path in paths:
        stem = printable(path.stem)
        named[stem if stem not in named else printable(str(path))] = load_schedule(path)
    return named


def load_scheduler(name: str) -> Any:
    """The scheduler of a saved pipeline, or one that was saved alone; the pipeline's weights are not read."""
    places = [Path(name) / "scheduler" / "scheduler_config.json", Path(name) / "scheduler_config.json"]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise ValueError(f"{name} holds no scheduler_config.json; name a saved pipeline or scheduler of diffusers")
    return _class_in(file, "set_timesteps").from_pretrained(str(file.parent))


def scheduler_class(name: str) -> Any:
    """The scheduler of diffusers of that name; ValueError if there is none."""
    with _quiet_diffusers():
        import diffusers

        found = getattr(diffusers, name, None)
        if isinstance(found, type) and hasattr(found, "set_timesteps") and hasattr(found, "from_config"):
            return found
        near = difflib.get_close_matches(name, [each for each in dir(diffusers) if each.endswith("Scheduler")], n=1)
    hint = f"did you mean {near[0]!r}?" if near else "name one such as DPMSolverMultistepScheduler"
    raise ValueError(
        f"scheduler must be a class of diffusers {importlib.metadata.version('diffusers')}, got {name!r}; {hint}"
    )


def replaced(scheduler: Any, kind: Any) -> Any:
    """A scheduler of another class with the settings of ``scheduler``; ValueError if it is for another noise."""
    from fastsched.diffusers.conventions import describe

    other = kind.from_config(scheduler.config)
    before, after = (
        (found.denoiser.prediction, found.process.kind, found.process.s_min, found.process.s_max)
        for found in (describe(scheduler), describe(other))
    )
    if before != after:
        raise ValueError(
            f"scheduler: {kind.__name__} with the settings of the folder's {type(scheduler).__name__} is for another "
            "noise process or prediction than the network; name one that is for the same"
        )
    return other


@contextlib.contextmanager
def named_as_options() -> Iterator[None]:
    """Rewrite errors of pipelines: name the command-line option where they advise Python code."""
    try:
        yield
    except ValueError as error:
        text = re.sub(r"pipe\.scheduler = (\w+)\.from_config\(pipe\.scheduler\.config\)", r"--scheduler \1", str(error))
        text = re.sub(r", or set audition=False.*", "", text).replace("solver='ddim'", "--solver ddim")
        if "Provide either `prompt`" in text:  # an error of diffusers
            text += " Give --prompt TEXT."
        if text != str(error):
            error.args = (text,)
        raise


def pipeline_class(name: str) -> type:
    """The class of the pipeline saved in a folder; ValueError if diffusers does not have it."""
    index = Path(name) / "model_index.json"
    if not index.is_file():
        raise ValueError(f"{name} is a folder without model_index.json; name one that pipe.save_pretrained wrote")
    found = _class_in(index, "from_pretrained")
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    if not issubclass(found, DiffusionPipeline) or found is DiffusionPipeline:
        raise ValueError(f"{index} names the class {found.__name__!r}, which is no pipeline that can be loaded")
    return found


def check_parts(name: str) -> None:
    """Check that each part of a saved pipeline is there and has no Python code, which the shell does not run."""
    entries = json.loads((Path(name) / "model_index.json").read_text(encoding="utf-8"))
    for part, kind in entries.items():
        if not (isinstance(kind, list) and len(kind) == 2 and all(isinstance(each, str) for each in kind)):
            continue  # a setting, or an optional part that was not saved
        folder = Path(name) / part
        if not folder.is_dir():
            raise ValueError(f"{name} has no folder {part}, which its model_index.json names; save the pipeline again")
        if (folder / f"{kind[0]}.py").exists():
            raise ValueError(
                f"{name} has code of its own, {folder / kind[0]}.py, which the shell does not run; load the pipeline "
                "in Python and use fastsched.diffusers"
            )


def pipeline_call(name: str) -> tuple[str | None, list[str] | None]:
    """Class of the pipeline in a folder and arguments of its call; None for a scheduler or an unknown class."""
    index = Path(name) / "model_index.json"
    kind, known = _named_class(index) if index.is_file() else (None, None)
    if known is None:
        return kind, None
    from fastsched.diffusers.pipelines.call import call_parameters

    return kind, [*call_parameters(known)]


def _class_in(file: Path, method: str) -> Any:
    """The class of diffusers that a file names; ValueError if there is none or it lacks the method."""
    kind, known = _named_class(file)
    if not (isinstance(known, type) and hasattr(known, method)):
        version = importlib.metadata.version("diffusers")
        raise ValueError(f"{file} names the class {kind!r}, which diffusers {version} does not have")
    return known


def _named_class(file: Path) -> tuple[Any, Any]:
    """The class name in a JSON file of diffusers, and the attribute of diffusers of that name, or None."""
    try:
        kind = json.loads(file.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file} is not as diffusers writes it: JSON with the entry _class_name") from None
    with _quiet_diffusers():
        import diffusers

        return kind, getattr(diffusers, str(kind), None)


def call_arguments(options: list[str] | None) -> dict[str, Any]:
    """``--call name=value`` options as keyword arguments. Values that are not JSON are strings."""
    from fastsched.sampling.files import finite_number, not_json

    arguments: dict[str, Any] = {}
    for option in options or []:
        name, equals, value = option.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"call must be NAME=VALUE such as guidance_scale=7.5, got {option!r}")
        if name in arguments:
            raise ValueError(f"call: {name} must be given once, got {option!r} too")
        try:
            arguments[name] = json.loads(value, parse_constant=not_json, parse_float=finite_number)
        except ValueError:
            arguments[name] = value
    return arguments


def check_values(kind: type, arguments: dict[str, Any]) -> None:
    """ValueError if an argument of a call is a string but its default is a number, or can only be an object."""
    from fastsched.diffusers.pipelines.call import call_parameters, call_signature

    usual, signature = call_parameters(kind), call_signature(kind)
    for name, value in arguments.items():
        hint = str(signature[name].annotation) if name in signature else ""
        if value is not None and ("Callable" in hint or (OBJECTS.search(hint) and not PLAIN.search(hint))):
            raise ValueError(
                f"call: {name} takes an object of Python, which cannot be given here; leave it out, or use "
                "fastsched.diffusers in Python"
            )
        if isinstance(value, str) and isinstance(usual.get(name), (int, float)):
            raise ValueError(f"call: {name} must be a value such as {json.dumps(usual[name])}, got {value!r}")


def not_for_pipelines(**options: object) -> None:
    """ValueError if one of these options of denoisers is given; None means not given."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name.replace('_', '-')} is not for pipelines, which decide it themselves; leave it out")


@contextlib.contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Silence diffusers and transformers while they load; ImportError names the extra if they are missing."""
    from fastsched import diffusers as _adapters  # noqa: F401, I001 - says which extra is missing

    import diffusers.utils.logging
    import transformers.utils.logging

    said = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # its import advises to install packages that are not needed
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    for library in libraries:
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # From 0.42 on the argument is called dtype, which older versions do not know.
            warnings.filterwarnings("ignore", ".*torch_dtype.* is deprecated")
            yield
    finally:
        transformers.utils.logging.set_verbosity(said)
        for library in libraries:
            library.enable_progress_bar()
