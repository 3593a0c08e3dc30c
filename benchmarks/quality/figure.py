"""The figure of the quality benchmark: typical error over model calls, one panel for each denoiser."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.quality import glossary

if TYPE_CHECKING:
    from benchmarks.quality.summary import Results

#: Colour, marker and dashes of every line. Each of the three alone distinguishes the lines.
LINES = {
    "karras_7": ("0.45", "o", ":"),
    "paper": ("#117733", "s", (0, (5, 1.5))),
    "gits": ("#AA4499", "^", (0, (3, 1, 1, 1))),
    "dmn": ("#999933", "v", (0, (1, 1))),
    "oss": ("#332288", "D", (0, (5, 1, 1, 1, 1, 1))),
    "optimal_schedule": ("#DD7700", "P", (0, (6, 1))),
    "fit": ("#CC0022", "X", "-"),
}
OURS = ("optimal_schedule", "fit")


def plot(results: Results, path: Path, solver: str = "dpmpp_2m") -> None:
    """Write the figure for one solver. Bands show the range over seeds of our methods."""
    from matplotlib.figure import Figure

    denoisers = list(dict.fromkeys(cell[0] for cell in results.cells))
    figure = Figure(figsize=(8.5, 5.8), layout="constrained")
    panels = np.ravel(figure.subplots(2, -(-len(denoisers) // 2), squeeze=False))
    for ax, denoiser in zip(panels, denoisers, strict=False):
        cells = sorted(cell for cell in results.cells if cell[:2] == (denoiser, solver))
        calls = [cell[2] for cell in cells]
        for name, (colour, marker, dashes) in LINES.items():
            errors = [results.error("typical_error", cell, name) for cell in cells]
            width = 2.0 if name in OURS else 1.1
            style = {"color": colour, "marker": marker, "ls": dashes, "lw": width, "ms": 5 if name in OURS else 4}
            ax.plot(calls, errors, label=glossary.title(name), **style)
            seeds = [results.values["typical_error"][cell].get(name, ()) for cell in cells]
            if name in OURS and all(seeds):
                ax.fill_between(calls, [min(s) for s in seeds], [max(s) for s in seeds], color=colour, alpha=0.2, lw=0)
        limit = [results.error("typical_error", cell, "limit") for cell in cells]
        ax.plot(calls, limit, "*", color="k", ms=9, label=glossary.title("limit"), zorder=3)
        ax.set(title=denoiser, xscale="log", yscale="log", xticks=calls, xticklabels=map(str, calls))
        ax.minorticks_off()
        ax.spines[["top", "right"]].set_visible(False)
    for ax in panels[len(denoisers) :]:
        ax.set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=9)
    figure.supxlabel(f"model calls of {solver}", fontsize=10)
    figure.supylabel("typical squared distance to the converged sample", fontsize=10)
    figure.savefig(path, dpi=110)
