"""A node for ComfyUI: load a schedule that fastsched saved.

Put this file into ComfyUI's ``custom_nodes`` folder and a schedule's JSON file into its ``input`` folder, or give a
full path. Connect SIGMAS to a SamplerCustom; the second output names the solver that the schedule was chosen for. It
needs nothing but what ComfyUI has.
"""

import itertools
import json
import os

import torch

FORMAT = "fastsched.schedule"
VERSION = 1


class FastschedScheduleLoader:
    """``Schedule.save``'s JSON in, SIGMAS out: 1-D float32, descending, ``steps + 1`` values, the last 0."""

    CATEGORY = "sampling/schedulers"
    DESCRIPTION = "Load a noise schedule saved by fastsched."
    FUNCTION = "load"
    RETURN_TYPES = ("SIGMAS", "STRING")
    RETURN_NAMES = ("sigmas", "solver")

    @classmethod
    def INPUT_TYPES(cls):
        """The node's only input: the file."""
        return {"required": {"file": ("STRING", {"default": "schedule.json", "multiline": False})}}

    @classmethod
    def VALIDATE_INPUTS(cls, file):
        """True, or what is wrong, shown by ComfyUI before it runs anything.

        A ``file`` that another node will give is None here, and is looked at when it has come.
        """
        if file is None:
            return True
        try:
            read_schedule(file)
        except (OSError, ValueError) as error:
            return str(error)
        return True

    @classmethod
    def IS_CHANGED(cls, file):
        """What changes when the file does, so that ComfyUI reads it again; NaN, which equals nothing, if unknown."""
        if file is None:
            return float("nan")
        path = find(file)
        return os.path.getmtime(path) if os.path.exists(path) else float("nan")

    def load(self, file):
        """The sigmas and the solver's name."""
        sigmas, solver = read_schedule(file)
        return (torch.tensor(sigmas, dtype=torch.float32), solver)


def find(file):
    """``file``, or the file of that name in ComfyUI's input folder."""
    if os.path.isabs(file) or os.path.exists(file):
        return file
    try:
        import folder_paths
    except ImportError:  # outside ComfyUI
        return file
    return os.path.join(folder_paths.get_input_directory(), file)


def read_schedule(file):
    """The sigmas and solver of a saved schedule.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no schedule, comes from a newer version, or starts at an infinite sigma.
    """
    path = find(file)
    with open(path, encoding="utf-8") as stream:
        try:
            entries = json.load(stream)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not a whole JSON file ({error}); save the schedule again") from None
    if not isinstance(entries, dict) or entries.get("format") != FORMAT:
        raise ValueError(f"{path} does not hold a schedule; fastsched's Schedule.save writes them")
    if not isinstance(entries.get("version"), int) or entries["version"] > VERSION:
        raise ValueError(f"{path} has version {entries.get('version')}; the newest known here is {VERSION}")
    sigmas = [float(value) for value in entries.get("sigmas", [])]
    descending = all(a > b for a, b in itertools.pairwise(sigmas))
    if len(sigmas) < 2 or not descending or sigmas[-1] != 0.0 or sigmas[0] == float("inf"):
        raise ValueError(f"{path}: sigmas must be finite, strictly descend and end in 0, got {sigmas}")
    return sigmas, str(entries.get("solver", ""))


NODE_CLASS_MAPPINGS = {"FastschedScheduleLoader": FastschedScheduleLoader}
NODE_DISPLAY_NAME_MAPPINGS = {"FastschedScheduleLoader": "Load Schedule (fastsched)"}
