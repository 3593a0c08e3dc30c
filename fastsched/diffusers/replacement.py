"""Find a scheduler that could take the place of one that cannot use a schedule."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import diffusers

from fastsched.diffusers.conventions import describe, solver_of

#: Classes to try, for each kind of noise process, the best first.
CLASSES = {
    "vp": ("DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "DDIMScheduler", "CogVideoXDDIMScheduler"),
    "flow": ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "UniPCMultistepScheduler"),
    "ve": ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler", "EulerDiscreteScheduler"),
}


def replacement(scheduler: Any, works: Callable[[Any], object]) -> str:
    """How to replace ``scheduler`` by one of the same noise process and prediction for which ``works`` is true.

    Args:
        scheduler: A supported scheduler.
        works: Tells whether a scheduler can be used; a ValueError counts as no.

    Returns:
        An instruction that names the first class for which ``works`` is true, or general advice if there is none.
    """
    process, prediction = describe(scheduler).process, describe(scheduler).denoiser.prediction
    random = [name for name in ("stochastic_sampling",) if scheduler.config.get(name)]
    for name in CLASSES[process.kind]:
        with contextlib.suppress(ValueError, TypeError), _quiet():
            kind = getattr(diffusers, name)
            taken = inspect.signature(kind.__init__).parameters
            settings = {name: False for name in random if name in taken}
            other = kind.from_config(scheduler.config, **settings)
            convention = describe(other)
            same = convention.denoiser.prediction == prediction and convention.process.kind == process.kind
            ends = [(each.s_min, each.s_max) for each in (convention.process, process)]
            same = same and all(math.isclose(one, other, rel_tol=1e-6) for one, other in zip(*ends, strict=True))
            if same and solver_of(other) is not None and works(other):
                given = "".join(f", {key}={value}" for key, value in settings.items())
                return f"change the scheduler: pipe.scheduler = {name}.from_config(pipe.scheduler.config{given})"
    return "change the scheduler for another one of the same model (docs/schedulers.md lists what works)"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress diffusers' warnings about config entries that another class does not have."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
