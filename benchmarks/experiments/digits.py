"""The paper's claim on digits: its schedule against karras with the best rho found by search.

    python -m benchmarks.experiments.digits

For each solver at 10 steps: the typical error (geometric mean of the squared distance to the converged sample, same
noise) of the corrector schedule, of karras with rho 3, 5, 7, 9 in both placements of the last node, and of fastsched's
own solver-aware schedule. The last columns are the schedule's error against karras rho 3 and the best karras.
"""

from __future__ import annotations

from typing import Any

import fastsched as fs
from benchmarks.experiments.common import SHAPE, arguments, axes, digits_denoiser, errors, karras_family, report

SOLVERS = ("ddim", "heun", "dpmpp_2m", "ipndm")
STEPS = 10


def schedules_for(denoiser: fs.Denoiser, solver: str, samples: int) -> dict[str, Any]:
    settings: dict[str, Any] = {"shape": SHAPE, "samples": samples, "progress": False}
    stats = fs.measure(denoiser, SHAPE, samples=4, progress=False)
    return {
        **karras_family(STEPS),
        "corrector": fs.score_optimal_schedule(denoiser, STEPS, spare_last=False, **settings),
        "corrector, spared": fs.score_optimal_schedule(denoiser, STEPS, **settings),
        "solver-aware": fs.optimal_schedule(stats, STEPS, solver),
    }


def main() -> None:
    args = arguments(__doc__)
    denoiser, rows = digits_denoiser(), []
    count = 64 if args.quick else 512
    reference = fs.converged_reference(denoiser, SHAPE, samples=count, progress=False)
    figure, panels = axes(len(SOLVERS), width=3.4, height=4.2)
    for solver, ax in zip(SOLVERS, panels, strict=True):
        found = errors(denoiser, schedules_for(denoiser, solver, 4 if args.quick else 32), solver, reference)
        karras = {name: row for name, row in found.items() if name.startswith("karras")}
        third = min(row.typical_error for name, row in karras.items() if name.startswith("karras rho 3"))
        best = min(row.typical_error for row in karras.values())
        for name, row in found.items():
            rows.append(
                {
                    "solver": solver,
                    "schedule": name,
                    "model_calls": row.model_calls,
                    "typical_error": row.typical_error,
                    "mean_error": row.mean_error,
                    "frechet": row.frechet,
                    "to_karras_3": row.typical_error / third,
                    "to_best_karras": row.typical_error / best,
                }
            )
        names = sorted(found, key=lambda name: -found[name].typical_error)
        colours = ["0.7" if name in karras else "C0" if "corrector" in name else "C1" for name in names]
        ax.hlines(names, 0, [found[name].typical_error for name in names], "0.9")
        ax.scatter([found[name].typical_error for name in names], names, color=colours)
        ax.set_xscale("log")
        ax.set_title(f"{solver}, {STEPS} steps")
        ax.set_xlabel("typical error")
    columns = ("solver", "schedule", "model_calls", "typical_error", "mean_error", "frechet", "to_karras_3")
    report("digits", rows, (*columns, "to_best_karras"), ("solver", "schedule"), quick=args.quick, figure=figure)


if __name__ == "__main__":
    main()
