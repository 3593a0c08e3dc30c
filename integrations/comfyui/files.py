"""Schedules as the nodes pass them on, and their files."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsched.measurement.statistics import PathStatistics
from fastsched.sampling.schedule import Schedule

from . import fastsched_fitted, fastsched_schedule
from .measuring import largest_change, on_trained_levels, process_of

#: What a saved file may be called: no folders, no hidden files.
NAME = re.compile(r"\w[\w .+-]{0,99}")
#: Names that Windows gives to devices, with any ending: what is written to them is lost.
DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d) *(\..*)?", re.IGNORECASE)
#: The most bytes that a name may have, so that a number and ``.json`` fit within the 255 of most file systems.
MOST_BYTES = 240
#: The dropdown shows at most this many files, from folders nested at most this deep.
MOST_FILES, DEEPEST = 500, 3
#: Largest relative difference between the first sigmas of a schedule and of the model.
SAME_START = 0.02


@dataclass(frozen=True, eq=False)
class Found:
    """A schedule as the nodes pass it on.

    Attributes:
        schedule: The schedule; its first sigma is finite, as in ComfyUI.
        stats: The measurement that it was chosen from; None if it comes from a file.
    """

    schedule: Schedule
    stats: PathStatistics | None = None

    def sigmas(self) -> Tensor:
        """SIGMAS: [steps + 1] float32 on the CPU, descending, the last 0."""
        return replace(self.schedule, network_sigmas=None).to_comfyui().sigmas

    def weights(self) -> list[list[float]] | None:
        """The weights of the fitted solver; None for other solvers."""
        return None if self.schedule.weights is None else self.schedule.weights.tolist()

    def summary(self) -> str:
        """One line about the schedule."""
        kind = {"flow": "flow times", "vp": "sigmas", "ve": "sigmas"}[self.schedule.noise]
        parts = [
            f"{self.schedule.solver}, {self.schedule.steps} steps, {self.schedule.model_calls} model calls, {kind}"
        ]
        parts += ["decoupled levels"] if self.schedule.decoupled else []
        errors = {"on the noises of its fit": self.schedule.measured_error, "predicted": self.schedule.predicted_error}
        parts += [f"squared error {error:.4g} {what}" for what, error in errors.items() if error is not None]
        return ", ".join(parts)

    def rounding(self) -> list[str]:
        """A warning if ComfyUI will round the timesteps, else []."""
        timesteps = self.schedule.timesteps
        if self.schedule.noise != "vp" or timesteps is None:
            return []
        moved = float((timesteps - timesteps.round()).abs().max())
        if moved < 1e-6:
            return []
        return [
            f"warning: ComfyUI rounds this model's timesteps, by up to {moved:.2g} here; connect the model, and the "
            "sigmas are moved to its trained levels"
        ]

    def on_model(self, model_sampling: Any) -> tuple[Found, list[str]]:
        """The schedule as this model can use it, and remarks for the user.

        Raises:
            ValueError: If it is for another kind of model.
        """
        process, schedule, words = process_of(model_sampling), self.schedule, []
        if (process.kind == "flow") != (schedule.noise == "flow"):
            kinds = {True: "a flow model", False: "a model of sigmas"}
            raise ValueError(
                f"the schedule is for {kinds[schedule.noise == 'flow']}, and this is {kinds[process.kind == 'flow']}"
            )
        top = float(process.sampler_sigma(torch.tensor(process.s_max, dtype=torch.float64)))
        first = float(schedule.sigmas[0])
        if abs(first / top - 1) > SAME_START:
            words.append(f"warning: the schedule starts at sigma {first:.5g}, and this model at {top:.5g}")
        moved = on_trained_levels(schedule, process, model_sampling)
        if moved is not schedule:
            change = largest_change(schedule.sigmas, moved.sigmas)
            if change > 1e-6:
                words.append(f"sigmas moved to the model's trained levels, by up to {change:.2%}")
            else:
                words.append("sigmas on trained levels")
        elif getattr(process, "integer_timesteps", False):
            steps = process.timestep(schedule.sigmas[:-1])
            table = process.trained_levels[steps.long()]  # type: ignore[attr-defined]  # of VariancePreserving
            change = largest_change(schedule.sigmas[:-1], table)
            if change > 1e-4:
                words.append(
                    "warning: ComfyUI rounds this model's timesteps, as if its sigmas changed by up to "
                    f"{change:.2%}; the fitted solver's weights belong to the sigmas, which stay"
                )
        return replace(self, schedule=moved), words


def load(file: Any) -> Found:
    """Load a schedule from ComfyUI's input folder, or from the folder to which the nodes save.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is elsewhere, not a regular file, or not a valid schedule.
    """
    entries = fastsched_schedule.read_entries(file)
    shown = fastsched_schedule.read_sigmas(file, entries).tolist()
    weights = entries.get("weights")
    if weights is not None:
        fastsched_fitted.read_fitted(file)
    network_sigmas = entries.get("network_sigmas")
    if network_sigmas is None and "decoupled" in entries:
        raise ValueError(f"{file} lacks network_sigmas, which its entry decoupled needs; save the schedule again")
    if network_sigmas is not None and entries.get("decoupled") != "denoiser":
        raise ValueError(
            f"{file} has decoupled timesteps, which ComfyUI's models cannot be given; fit one with Fit Schedule, or "
            "with fastsched.fit(..., decoupled=True)"
        )
    # These have every digit of the file; a first sigma of pure noise becomes ComfyUI's own.
    values = [
        single if value == "inf" else float(value) for single, value in zip(shown, entries["sigmas"], strict=True)
    ]
    try:
        return Found(
            Schedule(
                torch.tensor(values, dtype=torch.float64),
                entries.get("solver", ""),
                entries.get("noise", "ve"),
                timesteps=entries.get("timesteps"),
                predicted_error=entries.get("predicted_error"),
                measured_error=entries.get("measured_error"),
                weights=weights,
                network_sigmas=network_sigmas,
                decoupled=entries.get("decoupled"),
            )
        )
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{file} does not hold a valid schedule: {error}") from None


def checked_name(name: Any) -> str:
    """The name of a file to save, without its ending.

    Raises:
        ValueError: If it is not a plain name.
    """
    plain = name.strip() if isinstance(name, str) else ""
    plain = plain[: -len(".json")] if plain.endswith(".json") else plain
    if not NAME.fullmatch(plain):
        raise ValueError(
            f"name must be of letters, digits, spaces and '_.+-', at most 100, without folders, got {name!r:.120}"
        )
    if len(plain.encode()) > MOST_BYTES:
        raise ValueError(f"name must have at most {MOST_BYTES} bytes in UTF-8, got {len(plain.encode())}; shorten it")
    if DEVICES.fullmatch(plain):
        raise ValueError(f"name must not be one that Windows gives to a device, got {name!r:.120}")
    return plain


def save(schedule: Schedule, name: str) -> str:
    """Save in output/fastsched under ``name``, with a number added if that file exists; returns the file's name.

    If the first sigma is ComfyUI's finite one for pure noise, infinity is saved, which other programs expect.

    Raises:
        OSError: If it cannot be written.
        ValueError: If the name is not valid.
    """
    plain, home = checked_name(name), fastsched_schedule.saved_folder()
    folder = Path(home if home is not None else ".")
    folder.mkdir(parents=True, exist_ok=True)
    number, path = 1, folder / f"{plain}.json"
    while os.path.lexists(path):
        number += 1
        path = folder / f"{plain}_{number:05d}.json"
    first = float(schedule.sigmas[0])
    if (
        schedule.noise == "vp"
        and schedule.decoupled is None
        and math.isclose(first, fastsched_schedule.LARGEST_SIGMA, rel_tol=1e-4)
    ):
        sigmas = schedule.sigmas.clone()
        sigmas[0] = math.inf
        schedule = replace(schedule, sigmas=sigmas)
    schedule.save(path)
    return path.name + (fastsched_schedule.OUTPUT if home is not None else "")


def listed() -> list[str]:
    """The schedule files to choose from, the newest first; without opening any."""
    found: list[tuple[float, str]] = []
    roots = [(fastsched_schedule.input_folder(), ""), (fastsched_schedule.saved_folder(), fastsched_schedule.OUTPUT)]
    for root, ending in roots:
        if root is not None:
            for path, time in _json_files(root, DEEPEST):
                found.append((time, os.path.relpath(path, root).replace(os.sep, "/") + ending))
    return [name for _, name in sorted(found, reverse=True)[:MOST_FILES]]


def _json_files(folder: str, depth: int) -> Iterator[tuple[str, float]]:
    """Paths and times of the regular files that end in .json; links are not followed."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        try:
            if entry.name.endswith(".json") and entry.is_file(follow_symlinks=False):
                yield entry.path, entry.stat(follow_symlinks=False).st_mtime
            elif depth > 1 and entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                yield from _json_files(entry.path, depth - 1)
        except OSError:  # it has been removed meanwhile
            continue
