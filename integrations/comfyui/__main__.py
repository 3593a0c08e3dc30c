"""``python -m fastsched_comfyui DIR``: tell the ComfyUI in ``DIR`` of the installed nodes."""

import argparse
from pathlib import Path

TEXT = '"""The nodes of the installed package."""\n\nfrom fastsched_comfyui import *  # noqa: F403 - all of them\n'


def main() -> None:
    """Write a file of one import into the folder of custom nodes."""
    parser = argparse.ArgumentParser(prog="python -m fastsched_comfyui", description=__doc__)
    parser.add_argument("comfyui", type=Path, help="The folder of ComfyUI, which holds custom_nodes.")
    folder = parser.parse_args().comfyui / "custom_nodes"
    if not folder.is_dir():
        parser.error(f"comfyui must be a folder that holds custom_nodes, got {folder.parent}")
    path = folder / "fastsched_nodes.py"
    path.write_text(TEXT, encoding="utf-8")
    print(f"wrote {path}; restart ComfyUI")


if __name__ == "__main__":
    main()
