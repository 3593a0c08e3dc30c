"""``python -m fastsched``: the same as the command ``fastsched``."""

import os
import signal
import sys


def main() -> None:
    """Run the command. Until its code is loaded Ctrl-C ends it at once, as nothing has begun."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # else the caller ignores it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from fastsched.cli.commands import app

    app(prog_name="fastsched")


if __name__ == "__main__":
    # For ``-m`` Python searches the current folder first, where a file such as safetensors.py would hide an installed
    # package. For the command ``fastsched`` it does not search that folder.
    if sys.path and sys.path[0] in ("", os.getcwd()):
        sys.path.append(sys.path.pop(0))
    main()
