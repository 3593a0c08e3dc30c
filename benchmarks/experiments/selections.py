"""Algorithm 1 against dynamic programming: when and by how much do they differ?

    python -m benchmarks.experiments.selections

Both choose K levels from the highest to the lowest to make ``sum_n L(k_n, k_{n+1})`` small. Algorithm 1 makes
``L^(1/p)`` of all steps equal, interpolated from neighbouring levels. This is right for short steps, and nodes need not
lie on the grid. Dynamic programming uses the cost of every step between levels of the grid. The third method iterates
Algorithm 1 to its fixed point on the schedule's own steps. Each schedule's total cost is estimated again on its own
levels, with the same states for all three, and divided by that of dynamic programming. Also reported: the largest ratio
between corresponding levels of Algorithm 1 and dynamic programming, and the typical error of DDIM samples. The data are
a Gaussian in 16 dimensions, the checkerboard in 2, and the network of digits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastsched as fs
from benchmarks.experiments.common import SHAPE, arguments, axes, number_decades, points_mixture, report
from benchmarks.experiments.two_dimensional import data_sets
from benchmarks.train.digits import digits_data
from fastsched import metrics
from fastsched.costs import CostMatrix
from fastsched.denoisers.digits import digits_denoiser

COUNTS = (3, 4, 6, 8, 12, 16, 24)

Case = tuple[fs.Denoiser, tuple[int, ...], Callable[..., CostMatrix], int]


def cases(quick: bool) -> dict[tuple[str, str], Case]:
    """The denoiser, its shape, the estimate of the cost, and the number of levels of the grid, by data and cost."""
    gaussian = fs.oracles.Gaussian(0.5, (16,))
    board = points_mixture(data_sets(100 if quick else 200)["checkerboard"], 0.03)
    exact = {"dtype": torch.float64, "progress": False}
    found: dict[tuple[str, str], Case] = {}
    for data, oracle, shape, low in (("gaussian", gaussian, (16,), 0.002), ("checkerboard", board, (2,), 0.005)):
        denoiser = fs.Denoiser.from_denoiser(oracle.denoise, low, 80.0 if data == "gaussian" else 20.0)
        shared = {"shape": shape, "data": oracle.sample(1024, seed=1, dtype=torch.float64), **exact}
        corrector = partial(fs.costs.stein_corrector, denoiser, samples=64 if quick else 512, **shared)
        predictor = partial(fs.costs.stein_predictor, denoiser, samples=16 if quick else 64, probes=None, **shared)
        levels = 24 if quick else 64
        found[data, "corrector"] = (denoiser, shape, corrector, levels)
        found[data, "predictor"] = (denoiser, shape, predictor, 16 if quick else 32)
    digits = digits_denoiser()
    shared = {"shape": SHAPE, "data": digits_data(), "progress": False}
    corrector = partial(fs.costs.stein_corrector, digits, samples=8 if quick else 64, **shared)
    found["digits", "corrector"] = (digits, SHAPE, corrector, 24 if quick else 64)
    if not quick:
        predictor = partial(fs.costs.stein_predictor, digits, samples=4, probes=None, **shared)
        found["digits", "predictor"] = (digits, SHAPE, predictor, 24)
    return found


def total(estimate: Callable[..., CostMatrix], nodes: Tensor) -> float:
    """The cost of the steps between ``nodes``. Unbiased estimates near 0 can be negative and then count as 0."""
    return float(estimate(sigmas=nodes).adjacent.clamp_min(0).sum())


def main() -> None:
    args = arguments(__doc__)
    rows: list[dict[str, Any]] = []
    everything = cases(args.quick)
    figure, panels = axes(3, 2, width=3.6, height=2.8)
    for (data, cost), (denoiser, shape, estimate, levels) in everything.items():
        matrix = estimate(sigmas=denoiser.levels(levels), pairs="all")
        reference = fs.converged_reference(
            denoiser, shape, samples=64 if args.quick else 512, steps=100 if args.quick else 300, progress=False
        )

        def error(nodes: Tensor, model: fs.Denoiser = denoiser, reference: Any = reference) -> float:
            samples = fs.sample(model, torch.cat([nodes, nodes.new_zeros(1)]), "ddim", reference.noise)
            return metrics.geometric_mean(metrics.squared_distances(samples, reference.ends))

        for steps in COUNTS[:4] if args.quick else COUNTS:
            if steps >= levels - 1:
                continue
            arc, dp = (
                fs.select(matrix, steps + 1, method=method, spare_last=False).sigmas[:-1]
                for method in ("arc_length", "dynamic_programming")
            )
            fixed = fs.refine_schedule(estimate, arc, iterations=8).sigmas
            arc_cost, dp_cost, fixed_cost = (total(estimate, nodes) for nodes in (arc, dp, fixed))
            rows.append(
                {
                    "data": data,
                    "cost": cost,
                    "levels": levels,
                    "steps": steps,
                    "dynamic_programming": dp_cost,
                    "algorithm_1": arc_cost / dp_cost,
                    "fixed_point": fixed_cost / dp_cost,
                    "furthest_node": float((arc / dp).log().abs().max().exp()),
                    "error_dynamic_programming": error(dp),
                    "error_algorithm_1": error(arc),
                    "error_fixed_point": error(fixed),
                }
            )
    kinds = [(data, cost) for cost in ("corrector", "predictor") for data in dict.fromkeys(row["data"] for row in rows)]
    for ax, (data, cost) in zip(panels, kinds, strict=True):
        lines = [row for row in rows if (row["data"], row["cost"]) == (data, cost)]
        at = [row["steps"] for row in lines]
        for name, colour in (("algorithm_1", "C0"), ("fixed_point", "C2")):
            ax.loglog(at, [row[name] for row in lines], "o-", color=colour, ms=3, label=name.replace("_", " "))
        ax.axhline(1.0, color="0.6", lw=1)
        ax.set_title(f"{data}, {cost}", fontsize=9)
        ax.set_xlabel("steps")
        ax.set_ylabel("total cost, against DP", fontsize=8)
        number_decades(ax)
        ax.set_xticks(COUNTS, [str(count) for count in COUNTS], minor=False)
        ax.tick_params(axis="x", which="minor", labelbottom=False)
    panels[0].legend(fontsize=8)
    report("selections", rows, ("data", "cost", "steps"), quick=args.quick, figure=figure)


if __name__ == "__main__":
    main()
