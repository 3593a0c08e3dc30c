"""The sampler of fastsched's fitted solver for ComfyUI, and the older node that loads such a schedule.

The older node is deprecated: the package's node Load Schedule loads every schedule. Put alone into ComfyUI's
``custom_nodes`` folder, together with ``fastsched_schedule.py``, this file still works; it needs only what ComfyUI
itself needs. Connect both outputs, SAMPLER and SIGMAS, to a SamplerCustom or SamplerCustomAdvanced.

With the denoised images ``D_m`` of all steps so far and ``r = sigma_{n+1} / sigma_n``, step n is

    ``x_{n+1} = r x_n + (1 - r) sum_m W[n, m] D_m``,

for variance-exploding states, of Stable Diffusion too, and for flow times, where ``x = (1 - t) x0 + t eps`` and
``sigma = t``: only the differences of ``1 / sigma`` count, and they are the same for ``(1 - t) / t``.
"""

import importlib.util
import math
import os

import torch

#: Largest relative difference between the sigmas at sampling and those that the weights are for.
SAME = 1e-4
#: Largest difference of a row's sum from 1.
SUM = 1e-6


def _loader():
    """The module of ``fastsched_schedule.py``, loaded by its path, because the files may be in no package."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fastsched_schedule.py")
    if not os.path.isfile(path):
        raise ImportError("fastsched_fitted.py needs fastsched_schedule.py in the same folder; copy both")
    spec = importlib.util.spec_from_file_location("fastsched_schedule_of_fitted", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


schedules = _loader()


class FastschedFittedLoader(schedules.FastschedScheduleLoader):
    """Load SAMPLER and SIGMAS, which belong together, from ``Schedule.save``'s JSON of a fitted schedule."""

    DESCRIPTION = "Load a schedule of fastsched's fitted solver, and the sampler that uses its weights."
    RETURN_TYPES = ("SAMPLER", "SIGMAS")
    RETURN_NAMES = ("sampler", "sigmas")

    @classmethod
    def VALIDATE_INPUTS(cls, file):
        """True, or a message that ComfyUI shows before it runs anything."""
        return schedules.readable(read_fitted, file)

    def load(self, file):
        """The sampler and its sigmas."""
        import comfy.samplers

        schedules.check_coupled(file, schedules.read_entries(file))
        sigmas, weights = read_fitted(file)
        options = {"weights": weights, "fitted_sigmas": sigmas.tolist()}
        return (comfy.samplers.KSAMPLER(sample_fitted, extra_options=options), sigmas)


def read_fitted(file):
    """The sigmas, float32 [steps + 1], and the weights, a list of ``steps`` rows, of a saved fitted schedule.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not a schedule of the fitted solver, or its weights are damaged.
    """
    entries = schedules.read_entries(file)
    weights = entries.get("weights")
    if weights is None:
        raise ValueError(f"{file} has no weights; load it with the node Load Schedule (fastsched_schedule.py)")
    sigmas = schedules.read_sigmas(file, entries)
    steps = len(sigmas) - 1
    if not isinstance(weights, list) or len(weights) != steps or not all(_is_row(row, steps) for row in weights):
        raise ValueError(f"{file}: weights must be {steps} lists of {steps} finite numbers")
    if any(value != 0 for n, row in enumerate(weights) for value in row[n + 1 :]):
        raise ValueError(f"{file}: weights must be 0 above the diagonal: a step knows only the steps before it")
    if any(abs(math.fsum(row) - 1) > SUM for row in weights):
        raise ValueError(f"{file}: weights must sum to 1 in every row")
    return sigmas, [[float(value) for value in row] for row in weights]


def _is_row(row, steps):
    return isinstance(row, list) and len(row) == steps and all(map(_is_finite, row))


def _is_finite(value):
    try:
        return not isinstance(value, (bool, str)) and isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:  # an integer beyond float64
        return False


@torch.no_grad()
def sample_fitted(model, x, sigmas, extra_args=None, callback=None, disable=None, weights=(), fitted_sigmas=()):
    """Sample as k-diffusion's functions do; ``model(x, sigma)`` is the denoised image.

    Raises:
        ValueError: If the sigmas are not those that the weights are for.
    """
    levels = [float(value) for value in sigmas.tolist()]
    same = len(levels) == len(fitted_sigmas) and all(
        abs(used - fitted) <= SAME * fitted for used, fitted in zip(levels, fitted_sigmas, strict=True)
    )
    if not same:
        raise ValueError(
            f"the sigmas must be those that the sampler's weights are for, {list(fitted_sigmas)}, got {levels}; "
            "connect the SIGMAS of the node that gave the SAMPLER, whole and unchanged"
        )
    steps = range(len(weights))
    if not disable:
        from tqdm.auto import trange

        steps = trange(len(weights))
    ones, history = x.new_ones([x.shape[0]]), []
    for i in steps:
        denoised = model(x, sigmas[i] * ones, **(extra_args or {}))
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        history.append(denoised)
        ratio = levels[i + 1] / levels[i]
        mean = sum(weight * known for weight, known in zip(weights[i], history, strict=False))
        x = ratio * x + (1 - ratio) * mean
    return x


NODE_CLASS_MAPPINGS = {"FastschedFittedLoader": FastschedFittedLoader}
NODE_DISPLAY_NAME_MAPPINGS = {"FastschedFittedLoader": "Load Fitted Schedule (fastsched)"}
