"""How well does each cost predict quality? Rank correlation with sampling error, on digits.

    python -m benchmarks.experiments.costs

Every cost is measured on one grid of levels. A pool of schedules on that grid (karras and exponential curves, random
warps, and each cost's own choices) is run with each solver. Spearman's rho compares a cost's total over the steps of a
schedule with the sampling error: for deterministic solvers the typical distance to the converged sample, for stochastic
ones the Frechet distance to converged samples. Also reported: the error of the cost's own schedules, by Algorithm 1 and
by dynamic programming, the model calls that the cost took, and the relative standard error of the cost of a step
between neighbouring levels (median).
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np
import scipy.stats
import torch
from torch import Tensor

import fastsched as fs
from benchmarks.experiments.common import SHAPE, arguments, axes, number_decades, report
from benchmarks.train.digits import digits_data
from fastsched import metrics
from fastsched.costs import CostMatrix, PathCost
from fastsched.denoisers.digits import digits_denoiser
from fastsched.measurement.converged_samples import Reference

STEPS = 8
SOLVERS = ("ddim", "heun", "dpmpp_2m", "ipndm", "sde_dpmpp_2m", "ancestral")
STOCHASTIC = SOLVERS[4:]


def measure_costs(denoiser: fs.Denoiser, s: Tensor, quick: bool) -> dict[str, CostMatrix]:
    """The costs that `fastsched.select` takes, on the levels ``s``."""
    shared: dict[str, Any] = {"shape": SHAPE, "sigmas": s, "data": digits_data(), "progress": False}
    corrector, predictor = fs.costs.stein_corrector, fs.costs.stein_predictor
    estimates = {
        "stein corrector": lambda: corrector(denoiser, samples=4 if quick else 32, pairs="all", **shared),
        # Conjugate gradients fail on long steps, because the network's Jacobian is far from symmetric: use all of it.
        "stein predictor": lambda: predictor(denoiser, samples=1 if quick else 4, pairs="all", probes=None, **shared),
        "fisher-rao": lambda: fs.costs.fisher_rao(denoiser, samples=16 if quick else 256, probes=4, **shared),
        "klub": lambda: fs.costs.klub(denoiser, samples=16 if quick else 128, **shared),
    }
    costs = {}
    for name, estimate in estimates.items():
        start = time.perf_counter()
        costs[name] = estimate()
        print(f"{name}: {time.perf_counter() - start:.1f} s, {costs[name].calls}")
    return costs


def total(cost: CostMatrix | PathCost, nodes: list[int], last_step: bool) -> float:
    """The cost of the schedule with the levels ``nodes`` and then sigma 0.

    Score costs have no level 0, so their last step ends at the lowest level. ``last_step=False`` leaves it out.
    """
    if isinstance(cost, PathCost):
        return float(cost.of([*nodes, cost.levels])[: None if last_step else -1].sum())
    last = len(cost.s) - 1
    steps = list(itertools.pairwise([*nodes, last] if last_step and nodes[-1] != last else nodes))
    if cost.name == "fisher_rao":  # a metric: the squared length of each step
        length = np.concatenate([[0.0], np.cumsum(cost.lengths.numpy())])
        return sum(float(length[j] - length[i]) ** 2 for i, j in steps)
    return sum(max(0.0, float(cost.matrix[i, j])) for i, j in steps)


def on_grid(sigmas: Tensor, s: Tensor) -> list[int] | None:
    """Positions of the nearest levels of the grid; None if two nodes share a level."""
    nodes = [int((s.log() - value.log()).abs().argmin()) for value in sigmas[:-1]]
    return nodes if len(set(nodes)) == len(nodes) else None


def pool(s: Tensor, chosen: list[Tensor], count: int) -> list[list[int]]:
    """Distinct schedules of `STEPS` nodes on the grid: ``chosen``, known curves, and random warps of log-uniform."""
    low, high = float(s[-1]), float(s[0])
    curves = [*chosen, fs.baselines.exponential(STEPS, low, high, spare_last=True)]
    curves += [fs.baselines.karras(STEPS, low, high, rho=rho, spare_last=True) for rho in (2, 3, 4, 5, 7, 9, 14)]
    curves += [fs.baselines.kl_optimal(STEPS, low, high, std, spare_last=True) for std in (0.3, 1.0, 3.0)]
    generator = np.random.default_rng(0)
    while len(curves) < count:
        gaps = generator.dirichlet(np.full(STEPS, 6.0))
        place = np.concatenate([[0.0], np.cumsum(gaps)[:-1]]) ** np.exp(generator.normal(0.0, 0.4))
        warped = np.exp(np.log(high) + place * np.log(low / high))
        curves.append(torch.tensor([*warped, 0.0], dtype=torch.float64))
    found = {tuple(nodes) for curve in curves if (nodes := on_grid(curve, s)) is not None}
    return [list(nodes) for nodes in sorted(found)]


def sampling_error(denoiser: fs.Denoiser, sigmas: Tensor, solver: str, reference: Reference) -> float:
    samples = fs.sample(denoiser, sigmas, solver, reference.noise)
    if solver in STOCHASTIC:
        return metrics.frechet_distance(samples, reference.ends)
    return metrics.geometric_mean(metrics.squared_distances(samples, reference.ends))


def main() -> None:
    args = arguments(__doc__)
    denoiser = digits_denoiser()
    s = denoiser.levels(12 if args.quick else 24)
    solvers = ("ddim", "sde_dpmpp_2m") if args.quick else SOLVERS
    reference = fs.converged_reference(
        denoiser, SHAPE, samples=64 if args.quick else 512, steps=100 if args.quick else 300, progress=False
    )
    costs = measure_costs(denoiser, s, args.quick)
    stats = fs.measure(denoiser, SHAPE, levels=s, samples=8, progress=False)
    picks: dict[tuple[str, str], Tensor] = {}
    for name, cost in costs.items():
        picks[name, "algorithm 1"] = fs.select(cost, STEPS, method="arc_length").sigmas
        if name != "fisher-rao":
            picks[name, "dynamic programming"] = fs.select(cost, STEPS).sigmas
    schedules = pool(s, list(picks.values()), 24 if args.quick else 160)
    rows: list[dict[str, Any]] = []
    figure, panels = axes(len(solvers), len(costs) + 1, width=2.4, height=2.2)
    for column, solver in enumerate(solvers):
        along = [sampling_error(denoiser, torch.cat([s[n], s.new_zeros(1)]), solver, reference) for n in schedules]
        own = "dpmpp_2m" if solver == "sde_dpmpp_2m" else "ddim" if solver == "ancestral" else solver
        everyone = {**costs, "path cost": fs.costs.path_cost(stats, own)}
        for place, (name, cost) in enumerate(everyone.items()):
            totals, inner = ([total(cost, nodes, last) for nodes in schedules] for last in (True, False))
            row: dict[str, Any] = {"solver": solver, "cost": name, "schedules": len(schedules)}
            row["spearman"] = float(scipy.stats.spearmanr(totals, along)[0])  # type: ignore[arg-type]  # a float
            row["without_last_step"] = float(scipy.stats.spearmanr(inner, along)[0])  # type: ignore[arg-type]  # a float
            if isinstance(cost, CostMatrix):
                row |= {f"{kind}_calls": count for kind, count in cost.calls._asdict().items()}
                row["samples"] = len(cost.per_sample)
                row["relative_stderr"] = float((cost.stderr.diagonal(1) / cost.adjacent.abs()).median())
            else:
                row |= {"forward_calls": stats.model_calls, "jvp_calls": 0, "gradient_calls": 0, "samples": 8}
                picks[name, "dynamic programming"] = fs.optimal_schedule(stats, STEPS, own).sigmas
            for method in ("algorithm 1", "dynamic programming"):
                sigmas = picks.get((name, method))
                row[method] = "" if sigmas is None else sampling_error(denoiser, sigmas, solver, reference)
            row["best_of_pool"] = min(along)
            rows.append(row)
            ax = panels[place * len(solvers) + column]
            ax.loglog(totals, along, ".", ms=3)
            ax.set_title(f"{solver}: {row['spearman']:.2f}", fontsize=8)
            ax.set_xlabel(name, fontsize=7)
            ax.tick_params(which="both", labelsize=6)
            number_decades(ax)
            if column == 0:
                ax.set_ylabel("sampling error", fontsize=7)
    report("costs", rows, ("solver", "cost"), quick=args.quick, figure=figure)


if __name__ == "__main__":
    main()
