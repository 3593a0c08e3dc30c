"""Every argument of the functions for pipelines: a wrong type or value gives an error that names it."""

import math

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from pipelines import unconditional

import fastsched as fs

COUNT = [0, -1, 2.5, "8", None, True, math.nan, 2**40]
WRONG = {
    "steps": COUNT,
    "samples": COUNT,
    "levels": [2, *COUNT, torch.tensor([3.0, 2.0]), torch.tensor([3.0, 2.0, 0.0])],
    "seed": [-1, 2**31, 0.5, "0", None, True],
    "model_calls": [-1, *COUNT[2:]],
    "keep_increments": [None, 1, "yes"],
    "audition": [None, 1, "yes"],
    "prompts": [3, [], [3], {"a": 1}],
    "solver": ["dmpp", 3, ["ddim"]],
    "stats": [3, "x", []],
    "pipe": [None, 3, "x"],
    "schedule": [None, 3, [1.0, 0.0]],
    "scheduler": [None, 3, EulerDiscreteScheduler],
    "mu": ["x", [1.0]],
}
#: Arguments that a function chooses itself when they are None.
CHOSEN = {"fit": ("levels", "samples", "model_calls")}


@pytest.fixture(scope="module")
def right():
    scheduler = EulerDiscreteScheduler()
    pipe, schedule = unconditional(scheduler)[0], fs.Schedule([10.0, 1.0, 0.0], "ddim", "vp", timesteps=[900.0, 100.0])
    return {
        fs.diffusers.measure: {"pipe": pipe, "levels": 4, "samples": 1},
        fs.diffusers.fit: {"pipe": pipe, "steps": 2},
        fs.diffusers.apply: {"schedule": schedule, "pipe": pipe},
        fs.diffusers.export: {"schedule": schedule, "scheduler": scheduler},
    }


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("measure", "pipe levels samples prompts seed keep_increments"),
     ("fit", "pipe steps solver stats levels samples prompts seed audition model_calls"),
     ("apply", "schedule pipe"), ("export", "schedule scheduler mu")],
)  # fmt: skip
def test_a_wrong_argument_is_named(right, name, arguments):
    function, failures = getattr(fs.diffusers, name), []
    for argument in arguments.split():
        for wrong in WRONG[argument]:
            if wrong is None and argument in CHOSEN.get(name, ()):
                continue
            try:
                function(**{**right[function], argument: wrong})
                failures.append(f"{argument}={wrong!r}: no error")
            except (TypeError, ValueError) as error:
                if argument not in str(error):
                    failures.append(f"{argument}={wrong!r}: {error}")
            except Exception as error:
                failures.append(f"{argument}={wrong!r}: {type(error).__name__}: {error}")
    assert not failures, "\n".join(failures)
