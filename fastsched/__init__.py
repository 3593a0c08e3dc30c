"""Optimal noise schedules for diffusion and flow models.

    >>> import fastsched as fs
    >>> denoiser = fs.Denoiser.from_epsilon(unet, alphas_cumprod)
    >>> stats = fs.measure(denoiser, shape=(4, 64, 64))
    >>> schedule = fs.optimal_schedule(stats, steps=8, solver="dpmpp_2m")

Names are imported on first use, so that ``import fastsched`` stays light.
"""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastsched import baselines, costs, diffusers, metrics, plot
    from fastsched.comparison import Comparison, compare
    from fastsched.costs.prediction import predict_error
    from fastsched.denoisers import oracles
    from fastsched.denoisers.denoiser import Denoiser
    from fastsched.fitting.auditioning import audition
    from fastsched.fitting.denoiser_fit import fit
    from fastsched.fitting.tuning import tune
    from fastsched.measurement.converged_samples import converged_reference
    from fastsched.measurement.measuring import measure
    from fastsched.measurement.statistics import PathStatistics
    from fastsched.profiling import Profile, profile
    from fastsched.sampling.decoupled import decoupled_model
    from fastsched.sampling.sampler import sample
    from fastsched.sampling.schedule import Schedule
    from fastsched.selection.fixed_point import refine_schedule
    from fastsched.selection.online import AdaptiveSchedule
    from fastsched.selection.optimal import optimal_schedule
    from fastsched.selection.planning import error_curve, steps_needed
    from fastsched.selection.score_optimal import score_optimal_schedule, select
    from fastsched.selection.uncertainty import standard_errors

__version__ = "0.1.0"

#: The module in which each name is found; the names of modules lead to the modules themselves.
_HOME = {
    "AdaptiveSchedule": "selection.online",
    "Comparison": "comparison",
    "Denoiser": "denoisers.denoiser",
    "PathStatistics": "measurement.statistics",
    "Profile": "profiling",
    "Schedule": "sampling.schedule",
    "audition": "fitting.auditioning",
    "baselines": "baselines",
    "compare": "comparison",
    "converged_reference": "measurement.converged_samples",
    "costs": "costs",
    "decoupled_model": "sampling.decoupled",
    "diffusers": "diffusers",
    "error_curve": "selection.planning",
    "fit": "fitting.denoiser_fit",
    "measure": "measurement.measuring",
    "metrics": "metrics",
    "optimal_schedule": "selection.optimal",
    "oracles": "denoisers.oracles",
    "plot": "plot",
    "predict_error": "costs.prediction",
    "profile": "profiling",
    "refine_schedule": "selection.fixed_point",
    "sample": "sampling.sampler",
    "score_optimal_schedule": "selection.score_optimal",
    "select": "selection.score_optimal",
    "standard_errors": "selection.uncertainty",
    "steps_needed": "selection.planning",
    "tune": "fitting.tuning",
}

__all__ = [
    "AdaptiveSchedule",
    "Comparison",
    "Denoiser",
    "PathStatistics",
    "Profile",
    "Schedule",
    "audition",
    "baselines",
    "compare",
    "converged_reference",
    "costs",
    "decoupled_model",
    "diffusers",
    "error_curve",
    "fit",
    "measure",
    "metrics",
    "optimal_schedule",
    "oracles",
    "plot",
    "predict_error",
    "profile",
    "refine_schedule",
    "sample",
    "score_optimal_schedule",
    "select",
    "standard_errors",
    "steps_needed",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        home = importlib.import_module(f"fastsched.{_HOME[name]}")
        globals()[name] = value = home if _HOME[name].split(".")[-1] == name else getattr(home, name)
        return value
    near = difflib.get_close_matches(name, __all__, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise AttributeError(f"module 'fastsched' has no attribute {name!r}{hint}")


def __dir__() -> list[str]:
    return sorted(__all__)
