"""Optimal noise schedules for diffusion and flow models.

    >>> import fastsched as fs
    >>> denoiser = fs.Denoiser.from_epsilon(unet, alphas_cumprod)
    >>> stats = fs.measure(denoiser, shape=(4, 64, 64))
    >>> schedule = fs.optimal_schedule(stats, steps=8, solver="dpmpp_2m")

Names are imported on first use, so that ``import fastsched`` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastsched import baselines, costs, diffusers, metrics, oracles, plot
    from fastsched.auditioning import audition
    from fastsched.comparison import Comparison, compare, converged_reference
    from fastsched.denoiser import Denoiser
    from fastsched.fitting import fit
    from fastsched.fixed_point import refine_schedule
    from fastsched.measurement import measure
    from fastsched.online import AdaptiveSchedule
    from fastsched.optimal import optimal_schedule, score_optimal_schedule, select
    from fastsched.path_statistics import PathStatistics
    from fastsched.planning import error_curve, steps_needed
    from fastsched.prediction import predict_error
    from fastsched.sampling import sample
    from fastsched.schedule import Schedule
    from fastsched.tuning import tune
    from fastsched.uncertainty import standard_errors

__version__ = "0.1.0"

_HOME = {
    "AdaptiveSchedule": "online",
    "Comparison": "comparison",
    "Denoiser": "denoiser",
    "PathStatistics": "path_statistics",
    "Schedule": "schedule",
    "audition": "auditioning",
    "compare": "comparison",
    "converged_reference": "comparison",
    "error_curve": "planning",
    "fit": "fitting",
    "measure": "measurement",
    "optimal_schedule": "optimal",
    "predict_error": "prediction",
    "refine_schedule": "fixed_point",
    "sample": "sampling",
    "score_optimal_schedule": "optimal",
    "select": "optimal",
    "standard_errors": "uncertainty",
    "steps_needed": "planning",
    "tune": "tuning",
}
_MODULES = ("baselines", "costs", "diffusers", "metrics", "oracles", "plot")

__all__ = [
    "AdaptiveSchedule",
    "Comparison",
    "Denoiser",
    "PathStatistics",
    "Schedule",
    "audition",
    "baselines",
    "compare",
    "converged_reference",
    "costs",
    "diffusers",
    "error_curve",
    "fit",
    "measure",
    "metrics",
    "optimal_schedule",
    "oracles",
    "plot",
    "predict_error",
    "refine_schedule",
    "sample",
    "score_optimal_schedule",
    "select",
    "standard_errors",
    "steps_needed",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"fastsched.{name}")
    if name in _HOME:
        value = getattr(importlib.import_module(f"fastsched.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'fastsched' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
