"""Draw the pictures of docs/method.md: ``python examples/method_figures.py docs``.

The pictures show a measured path of a mixture of Gaussians and its two deviated paths, cosines between the increments
of the denoised image, and predicted and measured errors of schedules.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import fastsched as fs
from fastsched.measurement.deviated_paths import deviated_paths, positions

STEPS = (4, 5, 6, 8, 10, 12)


def draw_paths(axes, denoiser) -> None:
    """The first element of the scaled state along the measured path and the deviated paths."""
    s = denoiser.levels(48)
    noise = torch.randn(1, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def path(slopes):
        y, states, answers = noise, [], {}
        for k, used in enumerate([*slopes, []]):
            answers[k] = denoiser.network(s[k] * y, s[k : k + 1])
            states.append(float((s[k] * y / (1 + s[k] ** 2).sqrt())[0, 0]))
            if used:
                y = y + (1 / s[k + 1] - 1 / s[k]) * sum(weight * answers[level] for level, weight in used)
        return states

    lam = positions(s)
    axes.plot(s, path([[(k, 1.0)] for k in range(47)]), color="black", linewidth=2, label="measured path")
    for colour, deviated in zip(("#0072B2", "#D55E00"), deviated_paths(48), strict=True):
        label = f"deviated, order {deviated.order}"
        axes.plot(s, path(deviated.slopes(lam)), color=colour, linewidth=1.3, label=label)
    axes.set(xscale="log", xlabel="noise level", ylabel="state, scaled to unit size")
    axes.invert_xaxis()
    axes.set_title("one sample, one element", fontsize="medium")
    axes.legend(frameon=False, fontsize="small", loc="lower left")


def draw_cosines(axes, stats) -> None:
    """Cosines of the mean Gram matrix."""
    gram = stats.gram.mean(0).numpy()
    size = np.sqrt(gram.diagonal())
    image = axes.imshow(gram / size[:, None] / size, cmap="RdBu", vmin=-1, vmax=1, interpolation="nearest")
    axes.set(xlabel="step between levels", ylabel="step between levels")
    axes.figure.colorbar(image, ax=axes, shrink=0.7)
    axes.set_title("cosines between increments", fontsize="medium")


def draw_errors(axes, denoiser, stats) -> None:
    """Predicted errors of the best schedules as lines, measured ones as dots."""
    for colour, solver in (("#0072B2", "ddim"), ("#E69F00", "dpmpp_2m"), ("#009E73", "fitted")):
        schedules = {str(n): fs.optimal_schedule(stats, n, solver) for n in STEPS}
        found = fs.compare(denoiser, schedules, shape=(16,), samples=256, progress=False)
        axes.plot(STEPS, [schedule.predicted_error for schedule in schedules.values()], color=colour, label=solver)
        axes.plot(STEPS, [found[name].typical_error for name in schedules], "o", color=colour, markersize=4)
    axes.set(yscale="log", xlabel="steps", ylabel="squared error")
    axes.set_title("lines: predicted; dots: sampled", fontsize="medium", pad=24)
    axes.set_xticks(range(4, 13, 2))
    axes.legend(frameon=False, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)


def draw(draw_one, path: Path) -> None:
    """Write one figure."""
    figure = Figure(figsize=(5.6, 3.7), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    draw_one(axes)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main(folder: str = ".") -> None:
    """Measure a mixture of 5 Gaussians in 16 dimensions and draw."""
    oracle = fs.oracles.GaussianMixture.random(16, 5, seed=0)
    denoiser = fs.Denoiser.from_denoiser(oracle.denoise, 0.002, 80.0)
    stats = fs.measure(denoiser, (16,), progress=False)
    draw(lambda axes: draw_paths(axes, denoiser), Path(folder, "method_paths.png"))
    draw(lambda axes: draw_cosines(axes, stats), Path(folder, "method_increments.png"))
    draw(lambda axes: draw_errors(axes, denoiser, stats), Path(folder, "method_errors.png"))


if __name__ == "__main__":
    main(*sys.argv[1:])
