"""The shell: ``fastsched measure``, ``fit``, ``select``, ``plan``, ``compare``, ``plot``, ``report``, ``export``, ..."""

from fastsched.cli.commands import app

__all__ = ["app"]
