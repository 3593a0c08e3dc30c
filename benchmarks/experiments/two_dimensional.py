"""Two-dimensional data sets and the schedules that each cost induces.

    python -m benchmarks.experiments.two_dimensional

Exact denoisers of blurred point sets are sampled in 10 DDIM steps. Algorithm 1 on the corrector, the predictor (exact
Jacobians) and the Fisher-Rao cost is compared with fastsched's solver-aware schedule and two common ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import fastsched as fs
from benchmarks.experiments.common import arguments, axes, points_mixture, report
from fastsched import metrics

STEPS = 10
SIGMA_MIN, SIGMA_MAX = 0.005, 20.0


def data_sets(n: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    u, v = generator.random(n), generator.random(n)
    side = np.where(generator.random(n) < 0.5, -1, 1)
    moon = np.pi * u
    moons = np.stack([side * (np.cos(moon) - 0.5), side * (np.sin(moon) - 0.25)], 1)
    turn = 3 * np.pi * np.sqrt(u)
    spiral = (turn / (3 * np.pi))[:, None] * np.stack([np.cos(turn), np.sin(turn)], 1)
    rings = np.where(side > 0, 1.0, 0.4)[:, None] * np.stack([np.cos(2 * np.pi * v), np.sin(2 * np.pi * v)], 1)
    cells = generator.integers(0, 2, n) * 2 + (row := generator.integers(0, 4, n)) % 2
    board = np.stack([(cells + u) / 2 - 1, (row + v) / 2 - 1], 1)
    angles = 2 * np.pi * generator.integers(0, 8, n) / 8
    eight = np.stack([np.cos(angles), np.sin(angles)], 1)
    return {"moons": moons, "spiral": spiral, "rings": rings, "checkerboard": board, "eight modes": eight}


def main() -> None:
    args = arguments(__doc__)
    points, count = (100, 128) if args.quick else (200, 512)
    rows = []
    sets = data_sets(points)
    figure, panels = axes(len(sets), 2, width=3.2, height=2.8)
    for column, (name, values) in enumerate(sets.items()):
        oracle = points_mixture(values, 0.03)
        denoiser = fs.Denoiser.from_denoiser(oracle.denoise, SIGMA_MIN, SIGMA_MAX)
        s = denoiser.levels(24 if args.quick else 48)
        shared: dict[str, Any] = {"shape": (2,), "sigmas": s, "dtype": torch.float64, "progress": False}
        shared["data"] = oracle.sample(4096, seed=1, dtype=torch.float64)
        samples = 50 if args.quick else 200
        costs = {
            "corrector": fs.costs.stein_corrector(denoiser, samples=samples, **shared),
            "predictor": fs.costs.stein_predictor(denoiser, samples=samples, probes=None, **shared),
            "fisher-rao": fs.costs.fisher_rao(denoiser, samples=samples, **shared),
        }
        stats = fs.measure(denoiser, (2,), levels=s, samples=16, progress=False)
        schedules = {
            "karras rho 7": fs.baselines.karras(STEPS, SIGMA_MIN, SIGMA_MAX, spare_last=True),
            "exponential": fs.baselines.exponential(STEPS, SIGMA_MIN, SIGMA_MAX, spare_last=True),
            **{key: fs.select(cost, STEPS, method="arc_length").sigmas for key, cost in costs.items()},
            "solver-aware": fs.optimal_schedule(stats, STEPS, "ddim").sigmas,
        }
        reference = fs.converged_reference(denoiser, (2,), samples=count, steps=150, progress=False)
        compared = fs.compare(denoiser, schedules, "ddim", reference=reference, progress=False)
        truth = oracle.sample(count, seed=9)
        for place, row in enumerate(compared.rows):
            made = fs.sample(denoiser, schedules[row.name], "ddim", reference.noise)
            inner = schedules[row.name][1:-1]
            rows.append(
                {
                    "data": name,
                    "schedule": row.name,
                    "typical_error": row.typical_error,
                    "mean_error": row.mean_error,
                    "sliced_wasserstein": metrics.sliced_wasserstein(made, truth),
                    "sigmas": " ".join(f"{value:.3g}" for value in schedules[row.name].tolist()),
                }
            )
            panels[len(sets) + column].plot(inner, [place] * len(inner), "o", ms=3)
        panels[column].plot(values[:, 0], values[:, 1], ".", ms=3)
        panels[column].set_title(name, fontsize=9)
        panels[column].set_aspect("equal", adjustable="datalim")
        panels[column].tick_params(labelsize=7)
        below = panels[len(sets) + column]
        below.set_xscale("log")
        below.invert_xaxis()
        below.tick_params(labelsize=7)
        below.set_xlabel("s")
        below.set_yticks(range(len(schedules)), list(schedules) if column == 0 else [""] * len(schedules), fontsize=7)
    report("two_dimensional", rows, ("data", "schedule"), quick=args.quick, figure=figure)


if __name__ == "__main__":
    main()
