"""The command report: one page about a measurement and its schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from fastsched.cli import inputs, shell

#: Media types of pictures that a page can hold.
PICTURES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
SOLVERS = "ddim,dpmpp_2m,unipc,fitted"


def report(
    statistics: shell.StatisticsFile,
    schedules: Annotated[Optional[list[Path]], shell.SCHEDULE] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Page to write, .html.")] = Path("report.html"),
    solver: Annotated[str, typer.Option(help="Solvers of the error curves, separated by commas.")] = SOLVERS,
    max_steps: Annotated[int, typer.Option(help="Largest number of steps of the error curves.", min=1)] = 16,
    errors: Annotated[
        Optional[list[Path]],
        typer.Option("--errors", help="Measured errors, a table of 'fastsched compare --csv'; repeatable."),
    ] = None,
    image: Annotated[
        Optional[list[str]], typer.Option("--image", help="Samples to show, TITLE=FILE.png; repeatable.")
    ] = None,
    title: Annotated[Optional[str], typer.Option(help="Title of the page.  [default: the model]")] = None,
    quiet: shell.Quiet = False,
) -> None:
    """Write a page about statistics and schedules. No model calls; one HTML file that needs no network.

    \b
    fastsched report stats.safetensors -o report.html
    fastsched report stats.safetensors schedule.json -o report.html --errors errors.csv --image "8 steps=samples.png"
    """
    from fastsched.plot import check_matplotlib

    check_matplotlib()
    shell.writable(output, endings=(".html",))
    names = inputs.solvers_to_fit(solver)
    pictures = [_picture(option) for option in image or []]
    stats = inputs.load_statistics(statistics)
    named = inputs.named_schedules(schedules or [])
    from fastsched.cli import report_data, report_page
    from fastsched.sampling.files import write_whole
    from fastsched.selection.planning import error_curve

    report_data.check_schedules(stats, named)
    measured = [row for path in errors or [] for row in report_data.read_errors(path)]
    most = min(max_steps, stats.levels - 1)
    with shell.joint_bar(most * len(names), not quiet, "predicting", "schedule") as progress:
        found = [error_curve(stats, name, most, progress=progress) for name in names]
    page = report_page.page(title, stats, named, found, measured, pictures)
    write_whole(output, page.encode(errors="backslashreplace"))
    shell.wrote(output)


def _picture(option: str) -> tuple[str, str, bytes]:
    """The title, media type and content of a picture named on the command line as TITLE=FILE, or ValueError."""
    name, equals, file = option.rpartition("=")
    path = Path(file)
    kind = PICTURES.get(path.suffix.lower())
    if not equals or not name or kind is None:
        raise ValueError(f"image must be TITLE=FILE with a file ending in {', '.join(PICTURES)}, got {option!r}")
    if not path.is_file():
        raise FileNotFoundError(f"image: no such file: {file}")
    content = path.read_bytes()
    if not content.startswith((b"\x89PNG", b"\xff\xd8", b"RIFF")):
        raise ValueError(f"image {file} is not a picture of the type that its name says")
    return name, kind, content
