"""The nodes: fit, load, save, inspect, steps needed."""

from __future__ import annotations

from typing import Any

import torch

from fastsched.fitting.loop import MODEL_CALLS
from fastsched.sampling.solvers import FITTED
from fastsched.selection.planning import COMMON, error_curve, steps_needed

from . import files
from .fastsched_schedule import FastschedScheduleLoader, readable
from .files import Found
from .fitting import fit, guider_of
from .measuring import Settings
from .samplers import CHOICES, sampler_for

CATEGORY = "sampling/fastsched"
#: The type of a schedule together with its measurement (`files.Found`).
FOUND = "FASTSCHED_SCHEDULE"
#: What the input ``decoupled`` does.
DECOUPLED = (
    "Also tune the sigma that the model is told at each step, apart from the state's: a lower error, for samplers with "
    "one call a step. Use the SAMPLER output: others ask at the state's sigma."
)


def _settings() -> dict[str, Any]:
    """Inputs that the two fitting nodes have in common."""
    return {
        "latent": ("LATENT", {"tooltip": "Gives the size of an image; its batch is how many run at once."}),
        "steps": ("INT", {"default": 8, "min": 1, "max": 40}),
        "sampler": (list(CHOICES), {"default": CHOICES[0]}),
        "seed": ("INT", {"default": 0, "min": 0, "max": 2**31 - 1}),
    }


def _more_settings() -> dict[str, Any]:
    tuning = {"default": MODEL_CALLS, "min": 0, "max": 100_000, "tooltip": "0 only measures and selects."}
    return {
        "samples": ("INT", {"default": 4, "min": 1, "max": 64, "tooltip": "The number of images that are measured."}),
        "tuning_calls": ("INT", tuning),
        "save_as": ("STRING", {"default": "", "tooltip": "A file name, or empty: no file."}),
        "decoupled": ("BOOLEAN", {"default": False, "tooltip": DECOUPLED}),
    }


class FitGuider:
    """Fit SIGMAS and SAMPLER to a guider of the workflow."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Like Fit Schedule, for any guider: with one condition (Flux), two prompts, or from another package."
    FUNCTION = "fit"
    RETURN_TYPES = ("SIGMAS", "SAMPLER", "STRING", FOUND)
    RETURN_NAMES = ("sigmas", "sampler", "text", "schedule")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The node's inputs."""
        return {"required": {"guider": ("GUIDER",), **_settings()}, "optional": _more_settings()}

    def fit(
        self,
        guider: Any,
        latent: dict[str, Any],
        steps: int,
        sampler: str,
        seed: int,
        samples: int = 4,
        tuning_calls: int = MODEL_CALLS,
        save_as: str = "",
        decoupled: bool = False,
    ) -> tuple[Any, ...]:
        """Fit, or find what was fitted before."""
        if save_as.strip():
            files.checked_name(save_as)
        settings = Settings(sampler, steps, seed, samples=samples, model_calls=tuning_calls, decoupled=decoupled)
        found, words = fit(guider, latent, settings)
        chosen, name = sampler_for(found)
        words = [*words, f"SAMPLER is {name}"]
        if save_as.strip():
            try:
                words.append(f"saved as {files.save(found.schedule, save_as)}")
            except OSError as error:  # the fit must not be lost because of its file
                words.append(f"warning: not saved ({error})")
        return (found.sigmas(), chosen, "; ".join(words), found)


class FitSchedule:
    """Fit SIGMAS and SAMPLER to a model of the workflow."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Measures the model with its patches, conditions and guidance, and finds the noise levels with which the "
        "sampler gets nearest to the converged image in this number of steps. Takes a few hundred model calls, but "
        "only once: results for the same model, prompts and settings are remembered."
    )
    FUNCTION = "fit"
    RETURN_TYPES = FitGuider.RETURN_TYPES
    RETURN_NAMES = FitGuider.RETURN_NAMES

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The node's inputs."""
        model = {
            "model": ("MODEL",),
            "positive": ("CONDITIONING",),
            "negative": ("CONDITIONING",),
            "cfg": ("FLOAT", {"default": 8.0, "min": 0.0, "max": 100.0, "step": 0.1, "round": 0.01}),
        }
        return {"required": {**model, **_settings()}, "optional": _more_settings()}

    def fit(
        self,
        model: Any,
        positive: Any,
        negative: Any,
        cfg: float,
        latent: dict[str, Any],
        steps: int,
        sampler: str,
        seed: int,
        samples: int = 4,
        tuning_calls: int = MODEL_CALLS,
        save_as: str = "",
        decoupled: bool = False,
    ) -> tuple[Any, ...]:
        """Fit, or find what was fitted before."""
        guider = guider_of(model, positive, negative, cfg)
        return FitGuider().fit(guider, latent, steps, sampler, seed, samples, tuning_calls, save_as, decoupled)


class LoadSchedule:
    """Load SIGMAS and SAMPLER from a file."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Loads a schedule that fastsched saved, from ComfyUI's input folder or from where Save Schedule puts it. If a "
        "model is connected, the schedule is checked against it, and sigmas are moved to the model's trained levels."
    )
    FUNCTION = "load"
    RETURN_TYPES = ("SIGMAS", "SAMPLER", "STRING", FOUND)
    RETURN_NAMES = ("sigmas", "sampler", "text", "schedule")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The node's inputs."""
        return {"required": {"file": (files.listed(),)}, "optional": {"model": ("MODEL",)}}

    @classmethod
    def VALIDATE_INPUTS(cls, file: Any) -> bool | str:
        """True, or a message that ComfyUI shows before it runs anything."""
        return readable(files.load, file)

    @classmethod
    def IS_CHANGED(cls, file: Any, model: Any = None) -> str | float:
        """A digest of the file."""
        return FastschedScheduleLoader.IS_CHANGED(file)

    def load(self, file: str, model: Any = None) -> tuple[Any, ...]:
        """The schedule, moved to a model's trained levels if a model is connected."""
        found, words = files.load(file), []
        if model is None:
            words = found.rounding()
        else:
            found, words = found.on_model(model.get_model_object("model_sampling"))
        chosen, name = sampler_for(found)
        return (found.sigmas(), chosen, "; ".join([found.summary(), *words, f"SAMPLER is {name}"]), found)


class SaveSchedule:
    """Save a schedule to a file."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Saves a schedule in output/fastsched, for Load Schedule and for other programs that read fastsched."
    FUNCTION = "save"
    OUTPUT_NODE = True
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("file",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The node's inputs."""
        return {"required": {"schedule": (FOUND,), "name": ("STRING", {"default": "schedule"})}}

    @classmethod
    def VALIDATE_INPUTS(cls, name: Any) -> bool | str:
        """True, or what is wrong with the name; ``name`` is None if it is connected."""
        try:
            return name is None or bool(files.checked_name(name))
        except ValueError as error:
            return str(error)

    def save(self, schedule: Found, name: str) -> dict[str, Any]:
        """Save under a name that no file has yet."""
        file = files.save(schedule.schedule, name)
        return {"ui": {"text": [file]}, "result": (file,)}


class InspectSchedule:
    """A picture of a schedule."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Draws the noise levels, and for a fitted schedule the predicted error against the number of steps."
    FUNCTION = "inspect"
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("image", "text")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The node's inputs."""
        most = ("INT", {"default": 16, "min": 1, "max": 40})
        return {"required": {"schedule": (FOUND,)}, "optional": {"max_steps": most}}

    def inspect(self, schedule: Found, max_steps: int = 16) -> tuple[torch.Tensor, str]:
        """The picture, and its numbers."""
        from .drawing import picture

        lines = [schedule.summary(), "sigmas " + ", ".join(f"{value:.5g}" for value in schedule.sigmas().tolist())]
        curve = None
        if schedule.stats is not None:
            most = min(max(max_steps, schedule.schedule.steps), schedule.stats.levels - 1)
            curve = error_curve(schedule.stats, schedule.schedule.solver, most)
            lines.append(str(curve))
        return picture(schedule.schedule, curve), "\n".join(lines)


class StepsNeeded:
    """How many fitted steps are as good as steps of a common schedule."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "How many steps of a fitted schedule are predicted to be as near to the converged image as a given number of "
        "steps of a common scheduler with the same sampler (dpmpp_2m for the fitted solver), with a margin. No model "
        "calls."
    )
    FUNCTION = "needed"
    RETURN_TYPES = ("INT", "STRING")
    RETURN_NAMES = ("steps", "text")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The node's inputs."""
        return {
            "required": {
                "schedule": (FOUND, {"tooltip": "From Fit Schedule: a file holds no measurement."}),
                "as_good_as": (list(COMMON),),
                "of_steps": ("INT", {"default": 20, "min": 1, "max": 200}),
            }
        }

    def needed(self, schedule: Found, as_good_as: str, of_steps: int) -> tuple[int, str]:
        """The number, and a line about it."""
        if schedule.stats is None:
            raise ValueError("schedule must come from Fit Schedule: a file holds no measurement to predict errors from")
        solver = schedule.schedule.solver
        steps = steps_needed(schedule.stats, solver, target=(as_good_as, of_steps))
        other = " with dpmpp_2m" if solver == FITTED else ""
        return steps, f"{steps} fitted steps of {solver} are as good as {of_steps} of {as_good_as}{other}"


_ALL: dict[str, tuple[type, str]] = {
    "FastschedFit": (FitSchedule, "Fit Schedule (fastsched)"),
    "FastschedFitGuider": (FitGuider, "Fit Schedule for Guider (fastsched)"),
    "FastschedLoad": (LoadSchedule, "Load Schedule (fastsched)"),
    "FastschedSave": (SaveSchedule, "Save Schedule (fastsched)"),
    "FastschedInspect": (InspectSchedule, "Inspect Schedule (fastsched)"),
    "FastschedStepsNeeded": (StepsNeeded, "Steps Needed (fastsched)"),
}
NODE_CLASS_MAPPINGS: dict[str, type] = {name: each for name, (each, _) in _ALL.items()}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {name: shown for name, (_, shown) in _ALL.items()}
