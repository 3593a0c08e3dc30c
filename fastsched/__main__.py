"""``python -m fastsched``: the same as the command ``fastsched``."""

from fastsched.cli.commands import app

if __name__ == "__main__":
    app(prog_name="fastsched")
