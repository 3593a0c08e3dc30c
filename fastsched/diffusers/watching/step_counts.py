"""How many steps a pipeline makes in a measurement."""

from __future__ import annotations

from torch import Tensor

from fastsched.measurement.deviated_paths import deviated_paths, query_count

#: Why a pipeline may make another number of steps than it is called with.
OWN_LIST = "does it have a list of its own, as sample_sigmas in the config of Qwen-Image 2.1? Leave that out"


def calibration_steps(levels: int | Tensor) -> int:
    """Steps of a measurement at ``levels``: one for the pipeline's own latents, one per query, and a repeated query."""
    count = len(levels) if isinstance(levels, Tensor) else levels
    return query_count(count, deviated_paths(count)) + 2


def levels_of(steps: int | None) -> int:
    """The number of levels that are measured in this number of steps.

    Raises:
        ValueError: If there is none.
    """
    if steps == 0:
        raise ValueError(
            "the pipeline asks its scheduler for the steps of an earlier call, as LEDITS++ does to edit an image that "
            "it has inverted, so it does not start from noise; measure the text-to-image pipeline of the same model"
        )
    count = next((n for n in range(3, steps or 0) if calibration_steps(n) == steps), None)
    if count is None:
        raise ValueError(
            "num_inference_steps must be what a number N of levels takes, 2 N if N is even and 2 N + 1 if it is odd, "
            f"at least 7; the pipeline asks its scheduler for {steps}: {OWN_LIST}"
        )
    return count


def check_steps(steps: int, levels: int | Tensor | None) -> None:
    """ValueError, at the first step, unless a pipeline makes as many steps as it is called with for ``levels``."""
    wanted = steps if levels is None else calibration_steps(levels)
    if steps != wanted:
        raise ValueError(f"the pipeline makes {steps} steps where it is called with {wanted}: {OWN_LIST}")
