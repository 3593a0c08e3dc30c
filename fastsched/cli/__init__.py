"""The shell: ``fastsched measure``, ``fit``, ``select``, ``plan``, ``compare``, ``plot``, ``export``, ``info``, ..."""

from fastsched.cli.commands import app

__all__ = ["app"]
