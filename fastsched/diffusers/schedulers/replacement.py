"""Find a scheduler that could take the place of one that cannot use a schedule."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import diffusers

from fastsched.diffusers.conventions import Convention, describe, solver_of

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
        works: Tells whether a scheduler can be used; a ValueError counts as no. A class may lack a beta schedule.

    Returns:
        An instruction that names the first class for which ``works`` is true, or general advice if there is none.
    """
    own = describe(scheduler)
    random = scheduler.config.get("stochastic_sampling")
    for name in CLASSES[own.process.kind]:
        with contextlib.suppress(ValueError, TypeError, NotImplementedError), _quiet():
            kind = getattr(diffusers, name)
            taken = inspect.signature(kind.__init__).parameters
            settings = {"stochastic_sampling": False} if random and "stochastic_sampling" in taken else {}
            other = kind.from_config(scheduler.config, **settings)
            convention = describe(other)
            if _alike(convention, own) and solver_of(other) is not None and works(other):
                given = "".join(f", {key}={value}" for key, value in settings.items())
                return f"change the scheduler: pipe.scheduler = {name}.from_config(pipe.scheduler.config{given})"
    return "change the scheduler for another one of the same model (docs/schedulers.md lists what works)"


def _alike(one: Convention, other: Convention) -> bool:
    """Whether two schedulers have the same prediction, kind of noise process and range of levels."""
    same = one.denoiser.prediction == other.denoiser.prediction and one.process.kind == other.process.kind
    ends = [(each.process.s_min, each.process.s_max) for each in (one, other)]
    return same and all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(*ends, strict=True))


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
