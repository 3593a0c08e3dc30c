"""The shell: ``fastsched measure``, ``fit``, ``select``, ``plan``, ``compare``, ``plot``, ``export``, ``info``, ..."""

from fastsched.cli.shell import app

__all__ = ["app"]
