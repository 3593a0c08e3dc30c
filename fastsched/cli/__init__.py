"""The shell: ``fastsched measure``, ``select``, ``plan``, ``compare``, ``plot``, ``demo``."""

from fastsched.cli.commands import app

__all__ = ["app"]
