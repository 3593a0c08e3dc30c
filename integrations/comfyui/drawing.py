"""A picture of a schedule and of its error curve, drawn with what ComfyUI has: Pillow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastsched.sampling.schedule import Schedule
from fastsched.selection.planning import ErrorCurve

PAPER, INK, FAINT, LINE, MARK = "#ffffff", "#202124", "#d5d8dc", "#1f6feb", "#d1242f"
PANEL, HEIGHT, MARGIN = 620, 460, (78, 46, 22, 58)  # of a panel: left, top, right, bottom


def picture(schedule: Schedule, curve: ErrorCurve | None) -> Tensor:
    """IMAGE [1, H, W, 3] within [0, 1]: the sigmas of each step and, with a curve, the error against the steps."""
    panels = 1 if curve is None else 2
    image = Image.new("RGB", (PANEL * panels, HEIGHT), PAPER)
    draw = ImageDraw.Draw(image)
    left = _Panel(draw, 0, f"{schedule.solver}, {schedule.steps} steps", "step", "sigma")
    sigmas = schedule.sigmas.tolist()
    # The end at 0 has no logarithm, pure noise in a variance-preserving process neither.
    points = [(float(n), value) for n, value in enumerate(sigmas) if 0 < value < math.inf]
    left.plot(points, (0, max(schedule.steps, 1)), marks=points)
    if curve is not None:
        right = _Panel(draw, PANEL, "predicted error against steps", "steps", "squared error")
        pairs = list(zip(map(float, curve.steps), curve.predicted_errors, strict=True))
        marks = [(float(schedule.steps), schedule.measured_error)] if schedule.measured_error else []
        right.plot([pair for pair in pairs if pair[1] > 0], (1, max(curve.steps)), marks=marks)
        if marks:
            right.note("dot: measured, this schedule")
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)[None]


class _Panel:
    """Axes, linear to the right and logarithmic upwards."""

    def __init__(self, draw: Any, offset: int, title: str, right: str, up: str) -> None:
        self.draw, self.font, self.small = draw, ImageFont.load_default(18), ImageFont.load_default(14)
        left, top, off, low = MARGIN
        self.box = (offset + left, top, offset + PANEL - off, HEIGHT - low)
        draw.text((offset + left, 14), title, fill=INK, font=self.font)
        draw.text(((self.box[0] + self.box[2]) / 2, HEIGHT - 22), right, fill=INK, font=self.small, anchor="mm")
        draw.text((offset + 8, 30), up, fill=INK, font=self.small)

    def plot(
        self, points: Sequence[tuple[float, float]], across: tuple[int, int], marks: Sequence[tuple[float, float]]
    ) -> None:
        """A line through ``points`` and dots at ``marks``."""
        values = [value for _, value in (*points, *marks)] or [1.0]
        low, high = math.floor(math.log10(min(values)) * 4) / 4, math.ceil(math.log10(max(values)) * 4) / 4
        self.across, self.up = across, (low, max(high, low + 0.5))
        for power in range(math.ceil(self.up[0]), math.floor(self.up[1]) + 1):
            for digit in (1, 2, 5) if self.up[1] - self.up[0] < 3 else (1,):
                self._level(digit * 10.0**power)
        every = max(1, math.ceil((across[1] - across[0]) / 10))
        for tick in range(across[0], across[1] + 1, every):
            self._tick(tick)
        x0, y0, x1, y1 = self.box
        self.draw.rectangle((x0, y0, x1, y1), outline=INK)
        self.draw.line([self._at(*point) for point in points], fill=LINE, width=3)
        for mark in marks:
            x, y = self._at(*mark)
            self.draw.ellipse((x - 5, y - 5, x + 5, y + 5), fill=MARK)

    def note(self, text: str) -> None:
        """A line in the upper right corner."""
        self.draw.text((self.box[2] - 8, self.box[1] + 8), text, fill=MARK, font=self.small, anchor="ra")

    def _at(self, right: float, value: float) -> tuple[float, float]:
        x0, y0, x1, y1 = self.box
        first, last = self.across
        part = (right - first) / max(last - first, 1)
        height = (math.log10(value) - self.up[0]) / (self.up[1] - self.up[0])
        return x0 + part * (x1 - x0), y1 - height * (y1 - y0)

    def _level(self, value: float) -> None:
        if self.up[0] <= math.log10(value) <= self.up[1]:
            _, y = self._at(self.across[0], value)
            self.draw.line((self.box[0], y, self.box[2], y), fill=FAINT)
            self.draw.text((self.box[0] - 8, y), f"{value:g}", fill=INK, font=self.small, anchor="rm")

    def _tick(self, right: int) -> None:
        x, _ = self._at(right, 10 ** self.up[0])
        self.draw.line((x, self.box[1], x, self.box[3]), fill=FAINT)
        self.draw.text((x, self.box[3] + 8), str(right), fill=INK, font=self.small, anchor="ma")
