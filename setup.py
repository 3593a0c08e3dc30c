"""The list of packages, and the description for package indexes; everything else is in pyproject.toml.

``kernels/`` is installed as ``fastsched.kernels``. The link ``fastsched/kernels`` cannot be relied on for that: where
``core.symlinks`` is false (the default on Windows) git writes it as a text file, and the wheel would lack the kernels.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.editable_wheel import editable_wheel
from setuptools.errors import SetupError


class LinkedEditableWheel(editable_wheel):
    """An editable install imports the checkout as it is, so there the link itself has to be a folder."""

    def run(self) -> None:
        """Build it, or say which step the checkout lacks."""
        if not Path("fastsched", "kernels").is_dir():
            raise SetupError(
                "an editable install needs fastsched/kernels as a symbolic link to ../kernels, and here it is a file; "
                "run `git config core.symlinks true && rm fastsched/kernels && git checkout fastsched/kernels`, "
                "or install without --editable"
            )
        super().run()


def description() -> str:
    """README.md for a page without the other files: links to them become their names, and pictures of them go."""
    text = Path("README.md").read_text(encoding="utf-8")
    text = re.sub(r"^!\[[^\]]*\]\((?!https?:)[^)]*\)\n+", "", text, flags=re.MULTILINE)
    return re.sub(r"(?<!!)\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", text)


setup(
    long_description=description(),
    long_description_content_type="text/markdown",
    packages=[*find_packages(include=["fastsched", "fastsched.*"]), "fastsched.kernels"],
    package_dir={"fastsched.kernels": "kernels"},
    cmdclass={"editable_wheel": LinkedEditableWheel},
)
