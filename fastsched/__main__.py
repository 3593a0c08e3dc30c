"""``python -m fastsched``: the same as the command ``fastsched``."""

import os
import sys

if __name__ == "__main__":
    # For ``-m`` Python searches the current folder first, where a file such as safetensors.py would hide an installed
    # package. For the command ``fastsched`` it does not search that folder.
    if sys.path and sys.path[0] in ("", os.getcwd()):
        sys.path.append(sys.path.pop(0))
    from fastsched.cli.commands import app

    app(prog_name="fastsched")
