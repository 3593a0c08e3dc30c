"""Shared by all commands: options, and how results and errors are printed.

Results go to stdout, everything else to stderr, so that a command can be piped.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from fastsched.sampling.display import printable, printable_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fastsched.sampling.progress import Progress

DENOISER = (
    "'digits' (in the package), package.module:function, path/to/file.py:function, or a diffusers pipeline folder."
)
DenoiserName = Annotated[str, typer.Argument(help=DENOISER, metavar="MODEL")]
StatisticsFile = Annotated[Path, typer.Argument(help="Statistics that 'fastsched measure' wrote.", metavar="STATS")]
SCHEDULE = typer.Argument(help="A schedule that 'fastsched fit' or 'select' wrote.", metavar="SCHEDULE")
Shape = Annotated[
    Optional[str], typer.Option(help="Shape of one sample, such as 4,64,64; not for digits or pipelines.")
]
Batch = Annotated[Optional[int], typer.Option(help="Samples per batch.  [default: all]", min=1)]
Device = Annotated[Optional[str], typer.Option(help="Such as cuda.  [default: the network's]")]
DType = Annotated[Optional[str], typer.Option(help="Such as bfloat16.  [default: the network's]")]
Seed = Annotated[int, typer.Option(help="Seed of the noises.", min=0, max=2**31 - 1)]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        help="No progress bars; without a terminal there are none.",
        callback=lambda quiet: quiet or not sys.stderr.isatty(),
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Checkpoint = Annotated[
    Optional[Path], typer.Option(help="A file that keeps finished work; the same command goes on from it.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the cost in model calls and stop.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT if it exists.")]
Prompts = Annotated[
    Optional[list[str]],
    typer.Option("--prompt", metavar="TEXT", help="Pipelines: a prompt; repeat the option for several."),
]
Scheduler = Annotated[
    Optional[str],
    typer.Option(
        metavar="CLASS",
        help="Pipelines: a scheduler in place of the folder's, with its settings, as DPMSolverMultistepScheduler.",
    ),
]
CallOptions = Annotated[
    Optional[list[str]],
    typer.Option(
        "--call", metavar="NAME=VALUE", help="Pipelines: an argument of the call, guidance_scale=7.5; repeatable."
    ),
]

#: Whether an error shows Python's traceback, which ``--traceback`` sets, and whether a signal interrupted the command.
STATE = {"traceback": False, "interrupted": False}


def interrupted_by_signals() -> None:
    """Let SIGTERM, by which job schedulers end programs, interrupt as Ctrl-C does, so that finished work is written."""
    if threading.current_thread() is not threading.main_thread():
        return  # only the main thread may handle signals
    STATE["interrupted"] = False  # of an earlier command in this process

    def interrupt(*_: object) -> None:
        STATE["interrupted"] = True
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, signal.SIG_DFL):  # else the caller ignores it
        signal.signal(signal.SIGINT, interrupt)
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, interrupt)
        if hasattr(os, "register_at_fork"):  # a model's workers are ended by it
            os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))


#: The files that commands in this process have written.
WRITTEN: list[str] = []


@contextlib.contextmanager
def errors_in_a_line(on_interrupt: str | None = None) -> Iterator[None]:
    """Print an error as one line on stderr and exit: status 2 for a bad argument, 1 for anything else.

    After Ctrl-C ``on_interrupt`` is printed, or when None what was written, and the status is 130.
    """
    before = len(WRITTEN)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _say_warning
            with _no_exits():
                yield
    except KeyboardInterrupt:
        new = WRITTEN[before:]
        done = f"written: {', '.join(new)}" if new else "nothing was written"
        say(logging.WARNING, on_interrupt or f"interrupted; {done}")
        raise typer.Exit(130) from None
    except (typer.Exit, typer.Abort):
        raise
    except BrokenPipeError:  # a reader such as head closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more at exit
        raise typer.Exit(1) from None
    except Exception as error:
        if STATE["traceback"]:
            raise
        known = isinstance(error, (ValueError, TypeError, ImportError, OSError))
        text = _with_options(" ".join(str(error).split()))
        if isinstance(error, OSError) and error.strerror:  # str(error) begins with a number
            text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        where = "" if known and error.__cause__ is None else " (use fastsched --traceback to see where)"
        say(logging.ERROR, f"error: {text if known else f'{type(error).__name__}: {text}'}{where}")
        raise typer.Exit(2 if isinstance(error, (ValueError, TypeError)) else 1) from None


@contextlib.contextmanager
def _no_exits() -> Iterator[None]:
    """Report it as an error if a model ends the program, as ``sys.exit(0)`` does: nothing was written."""
    try:
        yield
    except (SystemExit, GeneratorExit) as error:
        raise RuntimeError(f"the model ended the command by {type(error).__name__}({error})") from error


def _say_warning(message: Warning | str, *_: Any) -> None:
    """Print a warning on one line, without its place in the code."""
    say(logging.WARNING, f"warning: {_with_options(' '.join(str(message).split()))}")


def _with_options(text: str) -> str:
    """A message of the library that names options where it advises Python code."""
    text = re.sub(r"\bdtype=torch\.(\w+)", r"--dtype \1", text).replace("batch_size=1", "--batch-size 1")
    text = text.replace("fit(checkpoint=PATH)", "--checkpoint FILE").replace(" (a call of checks=True)", "")
    return text.replace("fit one with decoupled=False", "fit one without --decoupled")


class StandardError(logging.StreamHandler):  # type: ignore[type-arg]  # not generic before Python 3.11
    """Writes to the current ``sys.stderr``, which may change after the handler is made."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        self.stream = sys.stderr  # setStream would flush the previous stream, which may be closed
        super().emit(record)


def prepare_streams() -> None:
    """Let stdout write characters that its encoding lacks as escapes, and replace a stderr that a service closed."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # open until the command ends
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does


LOG_LEVELS = ("debug", "info", "warning", "error")
#: Messages of commands besides their results. ``fastsched --log-level warning`` shows only warnings and errors.
LOGGER = logging.getLogger("fastsched")


def _as_text(record: logging.LogRecord) -> bool:
    """Escape what is no text, as in names of files: terminals obey control codes, handlers may not write bytes."""
    record.msg = printable_lines(str(record.msg))
    return True


LOGGER.addFilter(_as_text)


def say_on_stderr(level: str) -> None:
    """Print log messages of this level and above on stderr; ValueError if there is no such level."""
    if level not in LOG_LEVELS:  # fastsched.validate would load PyTorch for every --help
        raise ValueError(f"log-level must be one of {', '.join(LOG_LEVELS)}, got {level!r}")
    LOGGER.setLevel(level.upper())
    if not any(isinstance(handler, StandardError) for handler in LOGGER.handlers):
        LOGGER.addHandler(StandardError())
    LOGGER.propagate = False  # else a model's logging.basicConfig has each line printed twice


def say(level: int, text: str) -> None:
    """Log a line, also after a model's code has turned loggers off: `logging.config.dictConfig` does so by default."""
    LOGGER.disabled = False
    if level >= LOGGER.getEffectiveLevel():
        LOGGER.handle(LOGGER.makeRecord(LOGGER.name, level, __file__, 0, text, (), None))


@contextlib.contextmanager
def while_a_model_runs() -> Iterator[None]:
    """What a model prints goes to stderr, as stdout is for results only; changes of the folder and path are undone."""
    folder, searched = os.getcwd(), list(sys.path)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.chdir(folder)  # names of outputs are relative to it
        sys.path[:] = searched


def note(text: str) -> None:
    """Print a line on stderr: stdout is for results only."""
    say(logging.INFO, text)


def wrote(path: Path) -> None:
    """Say that a file was written."""
    WRITTEN.append(str(path))
    note(f"wrote {path}")


@contextlib.contextmanager
def joint_bar(total: int, show: bool, what: str, unit: str = "call") -> Iterator[Progress]:
    """One progress bar over the ``total`` units of several parts, which each report how many of their own are done."""
    from fastsched.sampling.progress import progress_bar

    part_total, part_done = 0, 0

    def update(done: int, of: int) -> None:
        nonlocal part_total, part_done
        advance(done if of != part_total or done < part_done else done - part_done)
        part_total, part_done = of, done

    with progress_bar(total, show, what, unit) as advance:
        yield update if show else False


def print_json(value: Any) -> None:
    """Print ``value`` as JSON, with null for NaN and "inf" for infinity, which JSON does not have."""
    typer.echo(json_text(value))


def json_text(value: Any) -> str:
    """``value`` as `print_json` prints it."""
    return json.dumps(_plain(value), indent=2, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Print a table on stdout: the first ``left`` columns aligned to the left, the others to the right.

    In a terminal cells wrap at its width, and where words of several columns do not fit beside each other, each row is
    a list; elsewhere a row stays on one line, for grep and the like. Cells may hold text of files, so what is not
    printable is escaped.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from fastsched.sampling.display import aligned

    header, *rows = [[printable(cell) for cell in row] for row in (header, *rows)]
    console = Console(file=sys.stdout)
    if not console.is_terminal:
        typer.echo(aligned([header, *rows], left))
        return
    columns = list(zip(header, *rows, strict=True))
    words = [max(map(len, " ".join(column).split(" "))) for column in columns]
    several = len(header) > 2
    if several and sum(words) + 2 * len(words) > console.width:
        typer.echo("\n\n".join(aligned(list(zip(header, row, strict=True)), left=2) for row in rows))
        return
    # No lines around cells, as in `aligned`.
    table = Table(box=None, pad_edge=False, header_style="bold")
    for n, (column, word) in enumerate(zip(columns, words, strict=True)):
        whole = several and word == max(map(len, column))  # there are spaces to break at in other columns
        table.add_column(column[0], justify="left" if n < left else "right", overflow="fold", no_wrap=whole)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: a bracket in a name is not markup
    console.print(table)


def output_file(path: Path | None, dry_run: bool, **checks: Any) -> Path:
    """``path`` after the ``checks`` of `writable`; the null device if a dry run, which writes nothing, omits it."""
    if path is None and not dry_run:
        raise ValueError("output must be given: -o FILE; only --dry-run needs none")
    writable(path, **checks)
    return Path(os.devnull) if path is None else path


def writable(
    path: Path | None,
    *,
    overwrite: bool | None = None,
    endings: Sequence[str] = (),
    replace: str = "replace it (--overwrite)",
    sources: Sequence[Path] = (),
    name: str = "output",
) -> None:
    """Check before any work that ``path`` can be written; None needs no check.

    Args:
        path: The file.
        overwrite: Whether it may exist; None for a command without that option, which replaces all but measurements.
        endings: Allowed endings of the name; any if empty.
        replace: Advice in the error about a file that exists.
        sources: Files that the command reads, none of which ``path`` must be.
        name: The option that names the file, for messages.

    Raises:
        ValueError: If the name has none of ``endings``, or is one of ``sources``.
        FileExistsError: If it exists and must not be replaced.
        OSError: If it is a folder, or its folder is missing or read-only.
    """
    # Without these checks, writing would fail after the model calls, and their results would be lost.
    if path is None:
        return
    from fastsched.sampling.files import check_writable, kind_of

    if str(path) == "-":
        raise ValueError(f"{name}: - is not read as standard output; name a file")
    if endings and path.suffix not in endings:
        ends = f"{', '.join(endings[:-1])} or {endings[-1]}" if len(endings) > 1 else endings[0]
        raise ValueError(f"{name} must end in {ends}, got {str(path)!r}")
    if path.is_dir():
        raise IsADirectoryError(f"{name} is a folder: {path}; name a file in it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{name}: no such folder: {path.parent}; create it first")
    if not os.access(path.parent, os.W_OK) or (os.path.exists(path) and not os.access(path, os.W_OK)):
        raise PermissionError(f"{name}: no permission to write {path}")
    if os.path.exists(path):  # unlike path.exists, False for a name that no file can have
        for source in sources:
            if os.path.exists(source) and os.path.samefile(path, source):
                raise ValueError(f"{name} must be another file than {source}, which is read")
        measured = path.suffix == ".safetensors" or kind_of(path) in ("statistics", "runs")
        if measured and (overwrite is None or endings):
            raise FileExistsError(f"{path} exists, and measurements are not replaced here; name another file")
        if overwrite is False:
            raise FileExistsError(f"{path} exists; {replace}, or name another file")
    check_writable(path, "statistics", "schedule", "runs")


def checkpoint_file(path: Path | None, output: Path, sources: Sequence[Path]) -> Path | None:
    """The absolute path of a checkpoint, because the model may change the folder; checked before any work."""
    writable(path, overwrite=True, sources=sources, name="checkpoint")
    if path is not None and path.absolute() == output.absolute():
        raise ValueError("checkpoint must be another file than output")
    return None if path is None else path.absolute()


def save_or_print(save: Callable[[Path], object], path: Path, value: Any) -> None:
    """``save(path)``; if it fails, as on a full disk, print ``value``, the only copy of what the calls have found."""
    try:
        save(path)
    except (OSError, ValueError):
        print_json(value)
        raise


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the name's ending; an existing file is replaced only by a complete one."""
    from fastsched.sampling.files import write_whole

    content = io.BytesIO()
    figure.savefig(content, format=path.suffix.removeprefix("."))
    write_whole(path, content.getvalue())
