"""Run the shell's commands in tests."""

from typer.testing import CliRunner

from fastsched.cli.commands import app

MODEL = """
import fastsched as fs

oracle = fs.oracles.Gaussian(0.5, (2, 3))

def build():
    return fs.Denoiser.from_denoiser(oracle.denoise, 0.002, 80.0)

def flow():
    return fs.Denoiser.from_velocity(lambda x, t: x * (2 * t[:, None, None] - 1))

def wrong():
    return 3

number = 3
"""


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def one_line(result) -> str:
    """The single line on stderr of a failed command, apart from the line of its cost; there must be no traceback."""
    lines = [line for line in result.stderr.strip().splitlines() if not line.startswith("model calls")]
    assert len(lines) == 1, result.stderr
    return lines[0]
