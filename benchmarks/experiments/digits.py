"""The paper's claim on digits: its schedule against karras with the best rho found by search.

    python -m benchmarks.experiments.digits

For each solver at 10 steps it reports the typical error (geometric mean of the squared distance to the converged sample
of the same noise) of three kinds of schedules: the corrector schedule of Algorithm 1 (mean of five measurements),
karras with rho 3, 5, 7 and 9, and fastsched's own solver-aware schedule. A schedule of 10 steps is 10 nodes and a 0.
There are two ways to place the last node (`fastsched.baselines`): *kept* at sigma_min, or *to zero* (11 nodes, the one
at sigma_min replaced by 0). The last table divides the corrector's error by that of karras rho 3 and of the best rho in
the same placing, and by the best of all eight. "less a call" is the kept corrector schedule without its node at
sigma_min, which shows the effect of this node.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastsched as fs
from benchmarks.experiments.common import SHAPE, SIGMA_MAX, SIGMA_MIN, arguments, axes, report
from fastsched.denoisers.digits import digits_denoiser

SOLVERS = ("ddim", "heun", "dpmpp_2m", "ipndm")
RHOS = (3, 5, 7, 9)
STEPS = 10
PLACINGS = {"kept": False, "to zero": True}


def correctors(denoiser: fs.Denoiser, samples: int, seeds: int) -> dict[tuple[str, str], list[Tensor]]:
    """Schedules of Algorithm 1 by placing, one for each measurement."""
    found = {
        ("corrector", placing): [
            fs.score_optimal_schedule(
                denoiser, STEPS, shape=SHAPE, samples=samples, spare_last=spare, seed=seed, progress=False
            ).sigmas
            for seed in range(seeds)
        ]
        for placing, spare in PLACINGS.items()
    }
    cut = [torch.cat([sigmas[: STEPS - 1], sigmas[-1:]]) for sigmas in found["corrector", "kept"]]
    return {**found, ("corrector, less a call", "kept"): cut}


def claim(rows: list[dict[str, Any]], solver: str, placing: str) -> dict[str, Any]:
    """The corrector's error in one placing against karras'."""
    error = {(row["schedule"], row["placing"]): row["typical_error"] for row in rows if row["solver"] == solver}
    family = {place: {rho: error[f"karras rho {rho}", place] for rho in RHOS} for place in PLACINGS}
    best = min(family[placing], key=family[placing].__getitem__)
    mine = error["corrector", placing]
    return {
        "solver": solver,
        "placing": placing,
        "corrector": mine,
        "karras rho 3": family[placing][3],
        f"best of {RHOS}": f"{family[placing][best]:.4g} (rho {best})",
        "to_karras_3": mine / family[placing][3],
        "to_best_rho": mine / family[placing][best],
        "to_best_of_both": mine / min(min(errors_.values()) for errors_ in family.values()),
    }


def main() -> None:
    args = arguments(__doc__)
    denoiser, rows = digits_denoiser(), []
    reference = fs.converged_reference(denoiser, SHAPE, samples=64 if args.quick else 512, progress=False)
    found = correctors(denoiser, *((4, 2) if args.quick else (32, 5)))
    stats = fs.measure(denoiser, SHAPE, samples=4, progress=False)
    figure, panels = axes(len(SOLVERS), width=3.4, height=4.2)
    for solver, ax in zip(SOLVERS, panels, strict=True):
        trials: dict[tuple[str, str], list[Any]] = {
            (f"karras rho {rho}", placing): [
                fs.baselines.karras(STEPS, SIGMA_MIN, SIGMA_MAX, rho=rho, spare_last=spare)
            ]
            for placing, spare in PLACINGS.items()
            for rho in RHOS
        }
        trials |= {**found, ("solver-aware", ""): [fs.optimal_schedule(stats, STEPS, solver)]}
        flat = {f"{key} {n}": sigmas for key, several in trials.items() for n, sigmas in enumerate(several)}
        compared = fs.compare(denoiser, flat, solver, reference=reference, progress=False)
        shown: dict[str, float] = {}
        for key, several in trials.items():
            runs = [compared[f"{key} {n}"] for n in range(len(several))]
            name, placing = key
            row = {"solver": solver, "schedule": name, "placing": placing, "model_calls": runs[0].model_calls}
            for quantity in ("typical_error", "mean_error", "frechet"):
                row[quantity] = float(np.mean([getattr(run, quantity) for run in runs]))
            row["spread"] = float(np.std([run.typical_error for run in runs]))
            row["measurements"] = len(runs)
            rows.append(row)
            shown[f"{name}, {placing}".removesuffix(", ")] = row["typical_error"]
        names = sorted(shown, key=lambda name: -shown[name])
        colours = ["0.7" if "karras" in name else "C0" if "corrector" in name else "C1" for name in names]
        ax.hlines(names, min(shown.values()) / 2, [shown[name] for name in names], "0.9")
        ax.scatter([shown[name] for name in names], names, color=colours)
        ax.set_xscale("log")
        ax.set_xlim(min(shown.values()) / 2)
        ax.tick_params(axis="y", labelsize=7)
        ax.set_title(f"{solver}, {STEPS} steps")
        ax.set_xlabel("typical error")
    report("digits", rows, ("solver", "schedule", "placing"), quick=args.quick, figure=figure)
    claims = [claim(rows, solver, placing) for solver in SOLVERS for placing in PLACINGS]
    report("digits_claim", claims, ("solver", "placing"), quick=args.quick)


if __name__ == "__main__":
    main()
