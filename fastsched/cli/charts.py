"""Charts as inline SVG, and images as data URIs: what a page shows without other files or a network.

Colours are classes (``c0`` to ``c7``) whose values the page sets, for light and for dark.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

WIDTH = 440  # narrow, so that text stays readable when a phone scales a chart to its width
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 12, 44
STYLES = 8


@dataclass(frozen=True)
class Axis:
    """A scale from values to positions.

    Attributes:
        low: The value at ``start``.
        high: The value at ``end``; above or below ``low``.
        start: A position.
        end: A position.
        log: Whether it is logarithmic; then values are positive.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The position of ``value``."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        at = math.log(value) if self.log else value
        return self.start + (self.end - self.start) * (at - low) / (high - low)

    def ticks(self, most: int = 8) -> list[float]:
        """Round values within it, at most ``most``: powers of 10, or multiples of 1, 2 or 5 times one."""
        low, high = sorted((self.low, self.high))
        if self.log:
            powers = [
                10.0**n for n in range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
            ]
            if len(powers) > 1:
                return powers[:: math.ceil(len(powers) / most)]
            return [low, high]
        step = 10.0 ** math.floor(math.log10((high - low) / most))
        step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= most)
        return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: For the legend.
        x: Values along.
        y: Values up.
        style: Its colour, a number.
        band: Lower and upper values around ``y``.
        line: Whether points are joined.
        dots: Whether points are marked.
        dashed: Whether the line is dashed.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: int
    band: tuple[Sequence[float], Sequence[float]] | None = None
    line: bool = True
    dots: bool = False
    dashed: bool = False


def chart(
    series: Sequence[Series], x: tuple[float, float, bool], y: tuple[float, float, bool], x_label: str, y_label: str
) -> str:
    """Lines over two axes, each given as its first value, its last and whether it is logarithmic; then a legend."""
    height = 290
    across = Axis(x[0], x[1], LEFT, WIDTH - RIGHT, x[2])
    up = Axis(y[0], y[1], height - BOTTOM, TOP, y[2])
    parts = [_frame(across, up, x_label, height)]
    for line in series:
        inside = [(a, b) for a, b in zip(line.x, line.y, strict=True) if min(y[:2]) <= b <= max(y[:2])]
        points = [f"{across(a):.1f},{up(b):.1f}" for a, b in inside]
        if line.band is not None:
            bounds = [[min(max(value, min(y[:2])), max(y[:2])) for value in bound] for bound in line.band]
            edge = [*zip(line.x, bounds[0], strict=True), *reversed(list(zip(line.x, bounds[1], strict=True)))]
            shape = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in edge)
            parts.append(f'<polygon class="band c{line.style}" points="{shape}"/>')
        if line.line:
            dash = ' stroke-dasharray="5 4"' if line.dashed else ""
            parts.append(f'<polyline class="line c{line.style}" points="{" ".join(points)}"{dash}/>')
        if line.dots:
            parts += [_dot(line, across(a), up(b), f"{line.name}: {_number(b)} at {_number(a)}") for a, b in inside]
    return f'<p class="axis">{escape(y_label)}</p>{_svg(height, parts, y_label)}{legend(series)}'


def _dot(series: Series, x: float, y: float, title: str) -> str:
    """A point of a line, or a diamond where there is no line; with a tooltip."""
    inside = f"<title>{escape(title)}</title>"
    if series.line:
        return f'<circle class="dot c{series.style}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">{inside}</circle>'
    corners = f"{x:.1f},{y - 6:.1f} {x + 6:.1f},{y:.1f} {x:.1f},{y + 6:.1f} {x - 6:.1f},{y:.1f}"
    return f'<polygon class="dot c{series.style}" points="{corners}">{inside}</polygon>'


def legend(series: Sequence[Series]) -> str:
    """The names of lines beside their colours, as text that wraps."""
    items = [
        f'<li><span class="key{" dashed" if line.dashed else ""}{"" if line.line else " diamond"} c{line.style}">'
        f"</span>{escape(line.name)}</li>"
        for line in series
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def node_rows(rows: Mapping[str, Sequence[float]], x: tuple[float, float, bool], x_label: str) -> str:
    """A row of dots for each name, the first on top, its name above it."""
    step = 40
    height = step * len(rows) + BOTTOM + 8
    across = Axis(x[0], x[1], LEFT, WIDTH - RIGHT, x[2])
    parts = [_x_ticks(across, 4, height - BOTTOM), _x_label(x_label, height)]
    for n, (name, values) in enumerate(rows.items()):
        y = step * n + 30
        parts.append(f'<text class="name" x="{LEFT}" y="{y - 12}">{escape(name)}</text>')
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts += [
            f'<circle class="dot c{n % STYLES}" cx="{across(value):.1f}" cy="{y}" r="4">'
            f"<title>{_number(value)}</title></circle>"
            for value in values
        ]
    return _svg(height, parts, "noise levels of each schedule")


def weight_map(weights: NDArray, levels: Sequence[float]) -> str:
    """A lower triangular matrix as coloured cells, with its values; rows and columns are named by ``levels``."""
    steps = len(weights)
    largest = float(np.abs(weights).max())
    cell = (WIDTH - LEFT - RIGHT) / steps
    height = int(TOP + steps * min(cell, 44) + 52)
    tall = min(cell, 44)
    parts = []
    for n in range(steps):
        y = TOP + n * tall
        parts.append(f'<text class="tick" x="{LEFT - 4}" y="{y + tall / 2 + 4:.1f}" text-anchor="end">{n + 1}</text>')
        for m in range(n + 1):
            value, x = float(weights[n, m]), LEFT + m * cell
            kind = "positive" if value >= 0 else "negative"
            parts.append(
                f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{cell - 1:.1f}" height="{tall - 1:.1f}" '
                f'fill-opacity="{abs(value) / largest:.3f}"><title>{value:.4f}</title></rect>'
            )
            if steps <= 10:
                strong = " strong" if abs(value) > 0.85 * largest else ""
                parts.append(
                    f'<text class="value{strong}" x="{x + cell / 2:.1f}" y="{y + tall / 2 + 4:.1f}">'
                    f"{value + 0.0:.2f}</text>"
                )
    every = math.ceil(steps / 10)
    for m in range(0, steps, every):
        x = LEFT + (m + 0.5) * cell
        parts.append(f'<text class="tick" x="{x:.1f}" y="{TOP + steps * tall + 17:.1f}">{levels[m]:.2g}</text>')
    parts.append(_x_label("output at noise level", height))
    return f'<p class="axis">step</p>{_svg(height, parts, "weights of the fitted solver")}'


def cosine_map(matrix: NDArray, levels: Sequence[float]) -> str:
    """The cosines ``G_pq / sqrt(G_pp G_qq)`` of a Gram matrix as an image: blue 1, white 0, red -1."""
    norms = np.sqrt(np.maximum(matrix.diagonal(), np.finfo(float).tiny))
    cosines = np.clip(matrix / norms[:, None] / norms, -1, 1)
    positive, negative = np.array([0, 114, 178]), np.array([213, 94, 0])
    ends = np.where(cosines[..., None] >= 0, positive, negative)
    pixels = np.rint(255 + np.abs(cosines)[..., None] * (ends - 255)).astype(np.uint8)
    names = [_number(levels[n]) for n in (0, len(levels) // 2, len(levels) - 1)]
    ticks = "".join(f"<span>{name}</span>" for name in names)
    return (
        f'<div class="map"><div class="ticks down">{ticks}</div>'
        f'<img class="pixels" alt="cosines between increments" src="{data_uri(png(pixels), "image/png")}">'
        f'<div class="ticks">{ticks}</div></div>'
    )


def png(pixels: NDArray) -> bytes:
    """A PNG file of 8-bit colours, from [height, width, 3]."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in np.ascontiguousarray(pixels, dtype=np.uint8))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows, 9))]
    found = b"\x89PNG\r\n\x1a\n"
    for kind, content in [*chunks, (b"IEND", b"")]:
        found += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return found


def data_uri(content: bytes, kind: str) -> str:
    """A file within a page: its content as base64 behind its media type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _frame(across: Axis, up: Axis, x_label: str, height: int) -> str:
    lines = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(value):.1f}" y2="{up(value):.1f}"/>'
        f'<text class="tick" x="{LEFT - 5}" y="{up(value) + 4:.1f}" text-anchor="end">{_number(value)}</text>'
        for value in up.ticks()
    ]
    return "".join(lines) + _x_ticks(across, TOP, height - BOTTOM) + _x_label(x_label, height)


def _x_ticks(across: Axis, top: float, bottom: float) -> str:
    return "".join(
        f'<line class="grid" x1="{across(value):.1f}" x2="{across(value):.1f}" y1="{top}" y2="{bottom}"/>'
        f'<text class="tick" x="{across(value):.1f}" y="{bottom + 17}">{_number(value)}</text>'
        for value in across.ticks()
    )


def _x_label(text: str, height: int) -> str:
    return f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{height - 6}">{escape(text)}</text>'


def _svg(height: float, parts: Sequence[str], label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _number(value: float) -> str:
    return f"{value:.3g}"


def positive_range(values: Sequence[float], *, margin: float = 1.3) -> tuple[float, float]:
    """The range of the finite positive values, a factor ``margin`` wider at both ends."""
    kept = [value for value in values if math.isfinite(value) and value > 0]
    return min(kept) / margin, max(kept) * margin
