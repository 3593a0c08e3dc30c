"""Measure a diffusers pipeline through its own loop, and apply schedules to its scheduler, each one verified.

Needs the extra: ``pip install "fastsched[diffusers]"``.
"""

try:
    import diffusers as _diffusers  # noqa: F401 - the library, not this package
except ImportError as error:
    raise ImportError(f'fastsched.diffusers needs diffusers ({error}): pip install "fastsched[diffusers]"') from error

from fastsched.diffusers.applier import apply
from fastsched.diffusers.calibration import CalibrationScheduler
from fastsched.diffusers.fitted_scheduler import FittedScheduler
from fastsched.diffusers.pipelines.fit import fit
from fastsched.diffusers.pipelines.measurement import measure
from fastsched.diffusers.schedulers.exporter import Export, export
from fastsched.diffusers.serving import serving_parameters

__all__ = [
    "CalibrationScheduler",
    "Export",
    "FittedScheduler",
    "apply",
    "export",
    "fit",
    "measure",
    "serving_parameters",
]
