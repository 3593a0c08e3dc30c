"""How many paths does a measurement need if samples have few elements?

    python -m benchmarks.experiments.few_elements

Errors of `fs.optimal_schedule` from 8 to 64 paths. Data: two sets of points in the plane, the benchmark's flow network,
and mixtures whose modes have distances and widths over two decades.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch

import fastsched as fs
from benchmarks.experiments.common import arguments, points_mixture, report
from benchmarks.experiments.two_dimensional import data_sets
from benchmarks.quality.models import Model, flow

PATHS = (8, 16, 32, 64)
SOLVERS, STEPS = ("ddim", "dpmpp_2m", "unipc"), (5, 8, 12)
SIGMA_MIN, SIGMA_MAX = 0.005, 80.0


def modes_of_many_widths(elements: int) -> fs.oracles.GaussianMixture:
    """40 modes with log-normal distances from 0 and log-normal widths."""
    generator = torch.Generator().manual_seed(elements)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)
    means = draw(40, elements) * draw(40, 1).exp()
    variances = (0.05 * draw(40).exp()).square()
    covariances = variances[:, None, None] * torch.eye(elements, dtype=torch.float64)
    return fs.oracles.GaussianMixture(torch.ones(40), means, covariances)


def models() -> dict[str, Model]:
    sets = data_sets(200)
    oracles = {name: points_mixture(sets[name], 0.03) for name in ("moons", "spiral")}
    oracles |= {f"modes of many widths, d = {d}": modes_of_many_widths(d) for d in (2, 4, 8, 16)}
    known = {
        name: Model(fs.Denoiser.from_denoiser(each.denoise, SIGMA_MIN, SIGMA_MAX), (each.means.shape[1],))
        for name, each in oracles.items()
    }
    return {"flow": flow()} | known


def main() -> None:
    args = arguments(__doc__)
    seeds, unseen = (1, 64) if args.quick else (3, 512)
    steps = STEPS[:1] if args.quick else STEPS
    rows: list[dict[str, Any]] = []
    for name, model in models().items():
        noises = range(5000, 5000 + unseen)  # that no measurement sees
        reference = fs.converged_reference(model.denoiser, model.shape, samples=noises, progress=False)
        cells = [*product(range(seeds), SOLVERS, steps)]
        errors = {}
        for seed in range(seeds):
            stats = fs.measure(model.denoiser, model.shape, samples=PATHS[-1], seed=seed, progress=False)
            for paths, solver, count in product(PATHS, SOLVERS, steps):
                schedule = {"chosen": fs.optimal_schedule(stats.select(range(paths)), count, solver)}
                found = fs.compare(model.denoiser, schedule, reference=reference, progress=False)["chosen"]
                errors[paths, seed, solver, count] = found.typical_error, found.mean_error
        for paths in PATHS[1:]:
            pairs = [(errors[(paths, *cell)], errors[(8, *cell)]) for cell in cells]
            ratios = [[math.log(one[k] / eight[k]) for one, eight in pairs] for k in (0, 1)]
            typical, mean = (math.exp(sum(each) / len(each)) for each in ratios)
            rows.append({"data": name, "paths": paths, "typical, over 8 paths": typical, "mean, over 8 paths": mean})
    report("few_elements", rows, ("data", "paths"), quick=args.quick)


if __name__ == "__main__":
    main()
