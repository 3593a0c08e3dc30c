"""Error over the number of steps, 4 to 100, on digits.

python -m benchmarks.experiments.steps
"""

from __future__ import annotations

from typing import Any

import fastsched as fs
from benchmarks.experiments.common import SHAPE, SIGMA_MAX, SIGMA_MIN, arguments, axes, report
from fastsched.denoisers.digits import digits_denoiser

SOLVERS = ("ddim", "dpmpp_2m")


def main() -> None:
    args = arguments(__doc__)
    counts = (4, 10, 24) if args.quick else (4, 5, 6, 8, 10, 14, 20, 28, 40, 60, 80, 100)
    denoiser = digits_denoiser()
    # The reference must be finer than the finest schedule.
    reference = fs.converged_reference(
        denoiser, SHAPE, samples=32 if args.quick else 256, steps=150 if args.quick else 600, progress=False
    )
    levels = 32 if args.quick else 128  # dynamic programming needs more levels than steps
    cost = fs.costs.stein_corrector(denoiser, shape=SHAPE, sigmas=denoiser.levels(levels), samples=16, progress=False)
    stats = fs.measure(denoiser, SHAPE, levels=levels, samples=4, progress=False)
    rows: list[dict[str, Any]] = []
    figure, panels = axes(len(SOLVERS))
    for solver, ax in zip(SOLVERS, panels, strict=True):
        for steps in counts:
            schedules = {
                "karras rho 7": fs.baselines.karras(steps, SIGMA_MIN, SIGMA_MAX),
                "karras rho 7, to zero": fs.baselines.karras(steps, SIGMA_MIN, SIGMA_MAX, spare_last=True),
                "exponential, to zero": fs.baselines.exponential(steps, SIGMA_MIN, SIGMA_MAX, spare_last=True),
                "corrector, to zero": fs.select(cost, steps, method="arc_length"),
                "solver-aware": fs.optimal_schedule(stats, steps, solver),
            }
            for row in fs.compare(denoiser, schedules, solver, reference=reference, progress=False).rows:
                found = {error: getattr(row, error) for error in ("typical_error", "mean_error", "frechet")}
                rows.append({"solver": solver, "steps": steps, "schedule": row.name, **found})
        for name in dict.fromkeys(row["schedule"] for row in rows):
            line = [row for row in rows if row["solver"] == solver and row["schedule"] == name]
            ax.loglog([row["steps"] for row in line], [row["typical_error"] for row in line], "o-", ms=3, label=name)
        ax.set_title(solver)
        ax.set_xlabel("steps")
        ax.set_ylabel("typical error")
    panels[0].legend(fontsize=7)
    report("steps", rows, ("solver", "steps", "schedule"), quick=args.quick, figure=figure)


if __name__ == "__main__":
    main()
