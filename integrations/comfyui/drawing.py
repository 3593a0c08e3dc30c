"""A picture of a schedule and of its error curve, drawn with Pillow, which ComfyUI has."""

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
#: The picture is drawn this many times as large and then reduced, so that lines are smooth.
FINER = 2
#: Width and height of a panel, and its margins: left, top, right, bottom.
PANEL, HEIGHT, MARGIN = 620, 460, (74, 46, 24, 58)

Points = Sequence[tuple[float, float]]


def picture(schedule: Schedule, curve: ErrorCurve | None) -> Tensor:
    """IMAGE [1, H, W, 3] within [0, 1]: the sigmas of each step and, with a curve, the error against the steps."""
    panels = 1 if curve is None else 2
    image = Image.new("RGB", (FINER * PANEL * panels, FINER * HEIGHT), PAPER)
    draw = ImageDraw.Draw(image)
    kind = "flow times" if schedule.noise == "flow" else "sigmas"
    solver = "euler" if schedule.solver == "ddim" else schedule.solver  # as ComfyUI calls it
    # Sigma 0 at the end and the infinite sigma of pure noise have no finite logarithm.
    points = [(float(n), value) for n, value in enumerate(schedule.sigmas.tolist()) if 0 < value < math.inf]
    left = _Panel(draw, 0, f"{kind} of {solver}, {schedule.steps} steps; the last is 0", "step")
    left.plot(points, (0, schedule.steps), points)
    if curve is not None:
        pairs = [pair for pair in zip(map(float, curve.steps), curve.predicted_errors, strict=True) if pair[1] > 0]
        marks = [(float(schedule.steps), schedule.measured_error)] if schedule.measured_error else []
        right = _Panel(draw, PANEL, "predicted squared error of the best schedules", "steps")
        right.plot(pairs, (1, max(curve.steps)), marks)
        if marks:
            right.note("dot: this schedule, on the noises of its fit")
    image = image.resize((PANEL * panels, HEIGHT), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)[None]


class _Panel:
    """Axes: horizontal linear, vertical logarithmic."""

    def __init__(self, draw: Any, offset: int, title: str, right: str) -> None:
        self.draw = draw
        self.large, self.small = ImageFont.load_default(18 * FINER), ImageFont.load_default(14 * FINER)
        left, top, off, low = MARGIN
        x0, y0, x1, y1 = offset + left, top, offset + PANEL - off, HEIGHT - low
        self.box = (x0 * FINER, y0 * FINER, x1 * FINER, y1 * FINER)
        draw.text((x0 * FINER, 14 * FINER), title, fill=INK, font=self.large)
        middle = (x0 + x1) / 2 * FINER
        draw.text((middle, (HEIGHT - 20) * FINER), right, fill=INK, font=self.small, anchor="mm")

    def plot(self, points: Points, across: tuple[int, int], marks: Points) -> None:
        """A line through ``points`` and dots at ``marks``."""
        logs = [math.log10(value) for _, value in (*points, *marks)] or [0.0]
        margin = 0.06 * max(max(logs) - min(logs), 0.5)
        self.across, self.up = across, (min(logs) - margin, max(logs) + margin)
        for value in self._values():
            self._level(value)
        for tick in range(across[0], across[1] + 1, max(1, math.ceil((across[1] - across[0]) / 10))):
            self._tick(tick)
        self.draw.rectangle(self.box, outline=INK, width=FINER)
        self.draw.line([self._at(*point) for point in points], fill=LINE, width=3 * FINER, joint="curve")
        for mark in marks:
            x, y = self._at(*mark)
            self.draw.ellipse((x - 5 * FINER, y - 5 * FINER, x + 5 * FINER, y + 5 * FINER), fill=MARK)

    def note(self, text: str) -> None:
        """A line of text in the upper right corner."""
        corner = (self.box[2] - 8 * FINER, self.box[1] + 8 * FINER)
        self.draw.text(corner, text, fill=MARK, font=self.small, anchor="ra")

    def _values(self) -> list[float]:
        """Round numbers within the axis: powers of ten, and 2 and 5 times them where there are few."""
        low, high = self.up
        digits = (1, 2, 5) if high - low < 3 else (1,)
        powers = range(math.floor(low), math.ceil(high) + 1)
        every = max(1, math.ceil((high - low) / 8))
        values = [digit * 10.0**power for power in powers if power % every == 0 for digit in digits]
        return [value for value in values if low <= math.log10(value) <= high]

    def _at(self, right: float, value: float) -> tuple[float, float]:
        x0, y0, x1, y1 = self.box
        first, last = self.across
        part = (right - first) / max(last - first, 1)
        height = (math.log10(value) - self.up[0]) / (self.up[1] - self.up[0])
        return x0 + part * (x1 - x0), y1 - height * (y1 - y0)

    def _level(self, value: float) -> None:
        _, y = self._at(self.across[0], value)
        self.draw.line((self.box[0], y, self.box[2], y), fill=FAINT, width=FINER)
        self.draw.text((self.box[0] - 8 * FINER, y), f"{value:g}", fill=INK, font=self.small, anchor="rm")

    def _tick(self, right: int) -> None:
        x, _ = self._at(right, 10 ** self.up[0])
        self.draw.line((x, self.box[1], x, self.box[3]), fill=FAINT, width=FINER)
        self.draw.text((x, self.box[3] + 8 * FINER), str(right), fill=INK, font=self.small, anchor="ma")
