"""The ``fastsched`` command. Each family of commands has a file; heavy imports are inside the commands."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from fastsched.cli import comparing, exporting, making, planning, profiling, report, showing
from fastsched.cli.shell import STATE, errors_in_a_line, interrupted_by_signals, prepare_streams, say_on_stderr


class App(typer.Typer):
    """The command; text that cannot be written, such as the help on a full disk, is an error in one line too."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command."""
        interrupted_by_signals()
        try:
            return super().__call__(*args, **kwargs)
        except SystemExit as end:  # an interrupted fit writes its best schedule and ends without an error
            sys.exit(130 if STATE["interrupted"] and not end.code else end.code)
        except KeyboardInterrupt:  # before the command began; later ones are reported by `errors_in_a_line`
            sys.exit(130)
        except OSError as error:  # the commands' own are reported by `errors_in_a_line`
            if STATE["traceback"]:
                raise
            sys.exit(f"error: {error.strerror or error}")


app = App(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

#: The commands, in the order of the help.
COMMANDS = {
    "demo": comparing.demo,
    "fit": making.fit,
    "measure": making.measure,
    "merge": making.merge,
    "select": making.select,
    "plan": planning.plan,
    "compare": comparing.compare,
    "plot": comparing.plot,
    "report": report.report,
    "profile": profiling.profile,
    "export": exporting.export,
    "info": showing.info,
    "solvers": showing.solvers,
    "env": showing.env,
}
for _name, _command in COMMANDS.items():
    app.command(_name)(errors_in_a_line()(_command))


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show Python's traceback of an error.")] = False,
    log_level: Annotated[str, typer.Option(help="What to say on stderr: debug, info, warning or error.")] = "info",
) -> None:
    """Choose noise levels for a diffusion or flow model.

    \b
    Try it:        fastsched demo --output demo-output
    One schedule:  fastsched fit my_model.py:build --steps 8 --shape 4,64,64 -o schedule.json
                   fastsched fit my_pipeline_folder --steps 8 --prompt "a cat" -o schedule.json
    Several:       fastsched measure my_model.py:build --shape 4,64,64 -o stats.safetensors
                   fastsched select stats.safetensors --steps 6,8,10 --solver dpmpp_2m -o schedule.json
    Look:          fastsched compare my_model.py:build schedule.json --shape 4,64,64
                   fastsched plot stats.safetensors schedule.json -o schedule.png
                   fastsched report stats.safetensors schedule.json -o report.html
    Use:           fastsched export schedule.json --to comfyui

    Exit status: 0, 2 for a bad argument, 130 after Ctrl-C or SIGTERM, 1 for anything else that went wrong.
    """
    STATE["traceback"] = traceback
    prepare_streams()
    say_on_stderr("info")
    with errors_in_a_line():
        say_on_stderr(log_level)
    if version:
        from fastsched import __version__

        typer.echo(f"fastsched {__version__}")
        raise typer.Exit
