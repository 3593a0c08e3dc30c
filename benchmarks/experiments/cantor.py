"""The mollified Cantor distribution: a schedule must find structure at every scale.

    python -m benchmarks.experiments.cantor

The data are the middle-third Cantor measure in one dimension, cut off at depth 6 and blurred to 64 Gaussians, whose
exact denoiser is known. Its structure repeats in ``log s`` with period ``log 3``. Reported for several numbers of
steps: the Wasserstein distance of DDIM samples to the distribution, and the typical distance to the converged sample.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

import fastsched as fs
from benchmarks.experiments.common import arguments, axes, points_mixture, report
from fastsched import metrics

DEPTH = 6
SIGMA_MIN, SIGMA_MAX = 2e-4, 10.0


def cantor_points(depth: int) -> np.ndarray:
    """Centres of the intervals that remain at ``depth``, scaled to [-1, 1]; [2^depth, 1]."""
    points = np.zeros(1)
    for n in range(1, depth + 1):
        points = np.concatenate([points - 2 / 3**n, points + 2 / 3**n])
    return np.sort(points)[:, None]


def main() -> None:
    args = arguments(__doc__)
    count = 500 if args.quick else 2000
    oracle = points_mixture(cantor_points(DEPTH), 0.3 * 3.0**-DEPTH)
    denoiser = fs.Denoiser.from_denoiser(oracle.denoise, SIGMA_MIN, SIGMA_MAX)
    data = oracle.sample(4096, seed=1, dtype=torch.float64)
    shared: dict[str, Any] = {"shape": (1,), "data": data, "dtype": torch.float64, "progress": False}
    levels = denoiser.levels(64 if args.quick else 160)
    cost = fs.costs.stein_corrector(denoiser, sigmas=levels, samples=500 if args.quick else 4000, **shared)
    predictor = fs.costs.stein_predictor(
        denoiser, sigmas=levels, samples=100 if args.quick else 500, probes=None, **shared
    )
    stats = fs.measure(denoiser, (1,), levels=levels, samples=16 if args.quick else 64, progress=False)
    noise = torch.randn(count, 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    fine = fs.baselines.exponential(400 if args.quick else 1500, SIGMA_MIN, SIGMA_MAX)
    converged = fs.sample(denoiser, fine, "dpmpp_2m", noise)
    quantiles = oracle.sample(200_000, seed=7, dtype=torch.float64).flatten().sort().values
    exact = quantiles[((torch.arange(count) + 0.5) / count * len(quantiles)).long()]
    estimate = partial(fs.costs.stein_corrector, denoiser, samples=500, **shared)
    rows, schedules = [], {}
    for steps in (16,) if args.quick else (8, 16, 32, 64):
        start = torch.cat([levels[:1], levels[:: len(levels) // steps][1:steps], levels[-1:]])
        refined = fs.refine_schedule(estimate, start, iterations=8)
        schedules = {
            "karras rho 7": fs.baselines.karras(steps, SIGMA_MIN, SIGMA_MAX, spare_last=True),
            "exponential": fs.baselines.exponential(steps, SIGMA_MIN, SIGMA_MAX, spare_last=True),
            "corrector": fs.select(cost, steps).sigmas,
            "corrector, fixed point": torch.cat([refined.sigmas[:-1], torch.zeros(1, dtype=torch.float64)]),
            "predictor": fs.select(predictor, steps).sigmas,
            "solver-aware": fs.optimal_schedule(stats, steps, "ddim").sigmas if steps < len(levels) else None,
        }
        for name, sigmas in schedules.items():
            if sigmas is None:
                continue
            samples = fs.sample(denoiser, sigmas, "ddim", noise)
            distance = float((samples.flatten().sort().values - exact).abs().mean())
            error = metrics.geometric_mean(metrics.squared_distances(samples, converged).clamp_min(1e-20))
            rows.append({"steps": steps, "schedule": name, "wasserstein_1": distance, "typical_error": error})
    figure, (density, nodes) = axes(2)
    speed = cost.lengths / -levels.log().diff()
    density.plot((levels[1:] * levels[:-1]).sqrt(), speed / speed.max(), label="corrector, order 2")
    speed = predictor.lengths / -levels.log().diff()
    density.plot((levels[1:] * levels[:-1]).sqrt(), speed / speed.max(), label="predictor, order 4")
    density.legend(fontsize=8)
    density.set_ylabel("length per log s")
    for place, sigmas in enumerate(schedules.values()):
        if sigmas is not None:
            nodes.plot(sigmas[:-1], [place] * (len(sigmas) - 1), "o", ms=3)
    nodes.set_title(f"{rows[-1]['steps']} steps", fontsize=9)
    nodes.set_yticks(range(len(schedules)), list(schedules))
    for ax in (density, nodes):
        ax.set_xscale("log")
        ax.invert_xaxis()
        ax.set_xlabel("s")
    report("cantor", rows, ("steps", "schedule"), quick=args.quick, figure=figure)


if __name__ == "__main__":
    main()
