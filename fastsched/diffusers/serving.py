"""A schedule as the parameters of a request to a serving engine: vllm-omni, SGLang Diffusion."""

from __future__ import annotations

from typing import Any

from fastsched import validate
from fastsched.diffusers.schedulers.exporter import export
from fastsched.sampling.schedule import Schedule

#: Engines that give a request's list of noise levels to the checkpoint's scheduler.
ENGINES = ("vllm-omni", "sglang")


def serving_parameters(schedule: Schedule, scheduler: Any, engine: str, *, mu: float | None = None) -> dict[str, Any]:
    """The parameters of a request that make a serving engine use ``schedule``, verified on a copy of ``scheduler``.

    Both engines pass the list on to ``scheduler.set_timesteps``, as the pipelines of diffusers do: it is shifted there
    and a 0 is appended. So the list is that of `export`, without the shift and without the 0, and ``docs/serving.md``
    says which requests can hold one.

    Args:
        schedule: The schedule.
        scheduler: The scheduler of the checkpoint that is served. It is not modified.
        engine: ``"vllm-omni"``: arguments of its ``OmniDiffusionSamplingParams``. ``"sglang"``: fields of a request
            to a server with ``--backend diffusers``.
        mu: The shift that the engine will pass, if the scheduler shifts by resolution (``use_dynamic_shifting``).

    Returns:
        Lists and numbers that JSON can hold: ``num_inference_steps`` and, for vllm-omni, ``sigmas``; for SGLang,
        ``diffusers_kwargs`` with the arguments of the pipeline's call.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the engine, or the scheduler (see `export`), cannot use the schedule.
    """
    validate.choice("engine", engine, ENGINES)
    arguments = export(schedule, scheduler, mu=mu).arguments
    name = type(scheduler).__name__
    if engine == "vllm-omni" and name != "FlowMatchEulerDiscreteScheduler":
        raise ValueError(
            "scheduler must be a FlowMatchEulerDiscreteScheduler, the only one whose sigmas vllm-omni takes, "
            f"got {name}"
        )
    if any(not isinstance(value, list) for value in arguments.values()):
        raise ValueError(f"scheduler must take a list, which a request can hold; {name} takes only an array")
    given = arguments if engine == "vllm-omni" else {"diffusers_kwargs": arguments}
    return {"num_inference_steps": schedule.steps, **given}
