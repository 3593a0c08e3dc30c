"""Fit a schedule through ComfyUI's guider, or find one that was fitted before."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch

import fastsched
from fastsched import validate
from fastsched.fitting.loop import FitReport
from fastsched.measurement.statistics import PathStatistics

from . import cache
from .content import digest
from .files import Found
from .measuring import FittingSampler, Settings, measurement_calls, process_of
from .repeats import QUESTIONS

#: The folder of this package.
HERE = os.path.dirname(os.path.abspath(__file__))


def guider_of(model: Any, positive: Any, negative: Any, cfg: float) -> Any:
    """ComfyUI's guider of two conditions, as its node SamplerCustom makes it."""
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(float(cfg))
    return guider


def fit(guider: Any, latent: dict[str, Any], settings: Settings) -> tuple[Found, list[str]]:
    """The schedule for a guider, fitted now or before, and remarks for the user.

    Raises:
        ValueError: If the model cannot be measured, as when it depends on the step, or a mask overwrites its latents.
    """
    model = guider.model_patcher
    check(model, latent)
    image = sampled_latent(model, latent)
    process = process_of(model.get_model_object("model_sampling"))
    content = image if bool(image.any()) else image.shape[1:]
    asked = (settings.seed, settings.levels, settings.samples)
    measured = digest("measured", fastsched.__version__, guider, content, *asked)
    wanted = (settings.solver, settings.steps, settings.model_calls, settings.decoupled)
    chosen = None if measured is None else digest("chosen", measured, *wanted)
    schedule, stats = cache.schedule(chosen), cache.statistics(measured)
    warned: list[str] = []
    if schedule is None or stats is None:
        try:
            with warnings_also_in(warned):
                report = run(guider, image, settings, stats)
        except BaseException as error:  # also an interrupt, after which a whole measurement is kept
            finished = getattr(error, "partial", None)
            if isinstance(finished, PathStatistics) and finished.samples == settings.samples:
                cache.keep_statistics(measured, finished)
            raise
        saved = stats.model_calls if stats is not None and report.stats is stats else 0
        schedule, stats = report.schedule, report.stats
        failed = cache.keep_statistics(measured, stats) or cache.keep_schedule(chosen, schedule)
        spent = f"{report.model_calls - saved:,} model calls"
        if saved:
            spent += " (measured before)"
        if measured is None:
            spent += " (this workflow's content cannot be compared, so nothing is remembered)"
        if failed is not None:
            spent += f" (warning: not remembered: {failed})"
    else:
        spent = "remembered, no model calls"
    found = Found(schedule, stats)
    words = [found.summary(), spent]
    if getattr(process, "integer_timesteps", False):
        words.append("sigmas on trained levels")  # ComfyUI rounds timesteps, so no others were considered
    return found, [*words, *(f"warning: {message}" for message in warned)]


@contextlib.contextmanager
def warnings_also_in(messages: list[str]) -> Iterator[None]:
    """Append the warnings about this package's calls to ``messages``, even those shown before; then give them again."""
    name = str(__package__)
    ours: list[tuple[Any, ...]] = []
    try:
        with warnings.catch_warnings():
            show = warnings.showwarning

            def hear(message: Any, category: Any, filename: str, lineno: int, *more: Any) -> None:
                if filename.startswith(HERE):
                    ours.append((message, category, filename, lineno))
                else:
                    show(message, category, filename, lineno, *more)

            warnings.showwarning = hear
            warnings.filterwarnings("always", module=re.escape(name))
            yield
    finally:
        messages += [str(message) for message, *_ in ours]
        for each in ours:
            warnings.warn_explicit(*each, module=name)


def sampled_latent(model: Any, latent: dict[str, Any]) -> torch.Tensor:
    """The latent as ComfyUI's sampler nodes give it to the model: an empty one gets its channels, frames and size.

    In newer versions, ComfyUI's function for this also takes entries of the LATENT about its scale; they have the names
    of its arguments.
    """
    import comfy.sample

    sized = comfy.sample.fix_empty_latent_channels
    more = [name for name in inspect.signature(sized).parameters if name in latent and name != "samples"]
    return sized(model, latent["samples"], **{name: latent[name] for name in more})


def check(model: Any, latent: dict[str, Any]) -> None:
    """Refuse models that are known to depend on more than the image and the noise level.

    Raises:
        ValueError: If the model is one of these, or the latent cannot be used.
    """
    samples = latent.get("samples")
    if type(samples) is not torch.Tensor or samples.ndim < 3 or len(samples) == 0:
        raise ValueError(f"latent must hold one tensor of images, [B, C, H, W], got {validate.shown(samples)}")
    if latent.get("noise_mask") is not None:
        raise ValueError(
            "latent has a noise mask: inpainting overwrites a part of every step's latents, so it cannot be measured; "
            "fit with the latent without its mask"
        )
    transformer = model.model_options.get("transformer_options", {})
    wrappers = (*transformer.get("wrappers", {}).values(), *getattr(model, "wrappers", {}).values())
    for name in (*transformer, *(key for some in wrappers for key in some)):
        if "cache" in str(name).lower():
            raise ValueError(
                f"the model has a cache ({name}), so what it computes depends on the steps before and on their number; "
                "fit without it"
            )
    if model.model_options.get("context_handler") is not None:
        raise ValueError(
            "the model samples in context windows, which move with the steps, so it cannot be measured; fit without "
            "them, on a latent as long as one window"
        )


def run(guider: Any, image: torch.Tensor, settings: Settings, known: PathStatistics | None) -> FitReport:
    """Fit through ComfyUI's guider, with ComfyUI's progress bar; an interrupt in ComfyUI stops the fit."""
    import comfy.model_management
    import comfy.utils

    process = process_of(guider.model_patcher.get_model_object("model_sampling"))
    if known is not None and known.increments is None and settings.model_calls > 0:
        known = None  # a file holds no increments, without which there is no tuning
    calls = 0 if known is not None else measurement_calls(process, settings)
    images = min(len(image), settings.samples)
    asked = QUESTIONS * (2 + images * (images > 1))
    bar = comfy.utils.ProgressBar(asked + calls + settings.model_calls)

    def advance(count: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update(count)

    fitting = FittingSampler(settings, known, advance)
    levels = process.sampler_sigma(process.levels(16))
    sigmas = torch.cat([levels, levels.new_zeros(1)]).float()
    noise = torch.zeros_like(image, device="cpu")
    try:
        guider.sample(noise, image, fitting, sigmas, disable_pbar=True, seed=settings.seed)
    except MemoryError as error:  # ComfyUI recognises the original error, unloads models and reports it
        raise error.__cause__ or error from None
    if fitting.report is None:
        raise ValueError("the model's wrappers did not run the sampler that they were given, so it cannot be measured")
    bar.update_absolute(bar.total)
    return fitting.report
