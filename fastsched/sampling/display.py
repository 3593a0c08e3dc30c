"""HTML of schedules and statistics for notebooks, access to their figures, labels, and tables of text."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any


def figure(function: str, *arguments: Any, **options: Any) -> Any:
    """The matplotlib figure that a function of `fastsched.plot` draws."""
    # Imported here by name, because fastsched.plot depends on this layer.
    return getattr(importlib.import_module("fastsched.plot"), function)(*arguments, **options)


def table(title: str, rows: Mapping[str, object]) -> str:
    """An HTML table of names and values; rows with the value None are left out."""
    cells = "".join(
        f'<tr><th style="text-align:left">{escape(key)}</th><td style="text-align:left">{escape(str(value))}</td></tr>'
        for key, value in rows.items()
        if value is not None
    )
    return f"<table><thead><tr><th colspan=2 style='text-align:left'>{escape(title)}</th></tr></thead>{cells}</table>"


def node_line(sigmas: Sequence[float], flow: bool) -> str:
    """SVG with a dot for each positive finite sigma, noise on the left; the axis is flow time or ``log sigma``."""
    kept = [value for value in sigmas if value > 0 and math.isfinite(value)]
    places = [-value if flow else -math.log(value) for value in kept]
    low, high = min(places, default=0.0), max(places, default=0.0)
    dots = "".join(
        f'<circle cx="{10 + 380 * (place - low) / ((high - low) or 1):.1f}" cy="12" r="4" fill="#0072B2">'
        f"<title>{value:.6g}</title></circle>"
        for place, value in zip(places, kept, strict=True)
    )
    line = '<line x1="10" x2="390" y1="12" y2="12" stroke="#999999"/>'
    return f'<svg viewBox="0 0 400 24" style="width:100%;max-width:400px">{line}{dots}</svg>'


def brief(value: float | None) -> str | None:
    """Four significant digits; None for None."""
    return None if value is None else f"{value:.4g}"


def printable(text: str) -> str:
    """``text`` on one line: line breaks and unprintable characters are escaped."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def printable_lines(text: str) -> str:
    """``text`` with unprintable characters escaped, except line breaks."""
    return "\n".join(map(printable, text.split("\n")))


def as_label(name: str) -> str:
    """A label for matplotlib: dollars, which enclose formulas, are escaped.

    A name like _a gets a space in front, because legends leave out labels that start with an underscore.
    """
    text = printable_lines(name)
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def aligned(rows: Sequence[Sequence[str]], left: int) -> str:
    """Rows of text in columns: the first ``left`` columns aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = [cell.ljust(w) if n < left else cell.rjust(w) for n, (cell, w) in enumerate(zip(row, widths))]  # noqa: B905 - rows may be short
        return "  ".join(cells).rstrip()

    return "\n".join(map(line, rows))
