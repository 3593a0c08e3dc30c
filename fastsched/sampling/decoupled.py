"""Decoupled levels for samplers that give the model the sigma of their state, such as those of k-diffusion."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastsched import validate
from fastsched.sampling.schedule import Schedule

#: Largest relative difference between a sampler's sigma and the schedule's; bfloat16 rounds by up to 0.004.
SAME = 0.01


class DecoupledModel:
    """A model whose sigmas are looked up: where a sampler asks at ``sigmas[n]``, it is asked at ``network_sigmas[n]``.

    Other attributes are the model's own.
    """

    def __init__(self, model: Callable[..., Tensor], schedule: Schedule) -> None:
        self._model, self._schedule = model, schedule
        assert schedule.network_sigmas is not None
        self._pairs = list(zip(schedule.sigmas.tolist(), schedule.network_sigmas.tolist(), strict=False))

    def __call__(self, x: Tensor, sigma: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The denoised image at the network's sigma; ValueError if ``sigma`` is none of the schedule's."""
        given = validate.tensor("sigma", sigma).flatten().tolist() or [math.nan]  # whole numbers would round `told`
        own, told = min(self._pairs, key=lambda pair: abs(pair[0] - given[0]))
        other = [each for each in given if not (each == own or abs(each - own) <= SAME * own)]  # also NaN
        if other:
            raise ValueError(
                f"the sampler asks at sigma = {other[0]:g}, which is none of the schedule's (or not for all samples); "
                "give it schedule.sigmas, whole and unchanged, and use a sampler with one call a step"
            )
        return self._model(x, sigma.new_full(sigma.shape, told), *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # also while a copy is made, which has no model yet
            raise AttributeError(name)
        return getattr(self._model, name)


def decoupled_model(model: Callable[..., Tensor], schedule: Schedule) -> DecoupledModel:
    """``model`` for samplers of k-diffusion that use a schedule with decoupled levels.

    ``sample_euler(fs.decoupled_model(model, schedule), x, schedule.sigmas)`` steps between the sigmas, while the model
    gets the state of ``sigmas[n]`` with ``network_sigmas[n]``: the step uses ``D(z; s')`` in place of ``D(z; s)``.

    Args:
        model: ``model(x, sigma, ...)`` is the denoised image; ``sigma`` has shape [B].
        schedule: A schedule of ``fastsched.fit(..., decoupled=True)``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the schedule's levels are not decoupled, or only its timesteps are; later, if a sampler asks at
            a sigma that the schedule does not have.
    """
    validate.function("model", model)
    validate.instance("schedule", schedule, Schedule, "fastsched.fit returns one")
    if schedule.decoupled != "denoiser":
        what = "only decoupled timesteps" if schedule.decoupled else "no decoupled levels: use the model itself"
        raise ValueError(f"schedule has {what}; fit one with decoupled=True")
    return DecoupledModel(model, schedule)
