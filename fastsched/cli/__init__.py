"""The shell: ``fastsched fit``, ``measure``, ``select``, ``plan``, ``compare``, ``report``, ``export``, ..."""

from fastsched.cli.commands import app

__all__ = ["app"]
