"""Checks of the latents that a pipeline starts from: they must be independent normal noise."""

from __future__ import annotations

import math

import torch
from scipy.special import gammainccinv, gammaincinv
from torch import Tensor

from fastsched import validate
from fastsched.denoisers.deferred_checks import DeferredChecks
from fastsched.diffusers.watching.step_checks import INSTEAD

#: Parts of the latents with fewer elements may be equal by chance.
FEWEST_ELEMENTS = 8

#: Neighbours are refused if they are correlated by more than the first number and this many standard errors.
CORRELATED, STANDARD_ERRORS = 0.1, 6


def check_first_latents(sample: Tensor, deferred: DeferredChecks, needed: float = 1.0, name: str = "") -> None:
    """Check that a pipeline starts from standard normal noise of the size that its scheduler needs.

    Warns if parts of it are copies of others.

    Args:
        sample: The first latents.
        deferred: Collects the values to compare.
        needed: 1 if the pipeline has asked for ``init_noise_sigma``, which is 1 here. If not (Bria, DiT), that of its
            own scheduler, which it may know as its first sigma.
        name: The scheduler's class.

    Raises:
        ValueError: If the root mean square of the elements is more than a factor of 1.33 outside the range that it
            leaves once in 10^9 draws on either side, by the chi-square distribution of ``sum x^2``.
    """
    half = sample.numel() / 2
    low, high = (needed * math.sqrt(float(edge(half, 1e-9)) / half) for edge in (gammaincinv, gammainccinv))

    def check(found: Tensor) -> None:
        size = float(found)
        if low / 1.33 < size < high * 1.33:
            return
        if not 0.9 < needed < 1.1:
            raise ValueError(
                f"the pipeline does not multiply its first latents by scheduler.init_noise_sigma, which {name} needs "
                f"({needed:.3g}), so it samples from latents of the wrong size; give it a scheduler with "
                "init_noise_sigma 1, as DDIMScheduler, DPMSolverMultistepScheduler or, for flow models, "
                "FlowMatchEulerDiscreteScheduler"
            )
        raise ValueError(
            f"the pipeline's first latents have size {size:.3g} (root mean square) where those of this "
            "scheduler's noise process have 1: the pipeline uses another noise process than its scheduler, "
            f"scales them by a formula of its own, or puts a given image beside the noise (JoyImage), {INSTEAD}"
        )

    deferred.add(sample.float().square().mean().sqrt(), check)
    _warn_of_copies(sample, deferred)


def _warn_of_copies(sample: Tensor, deferred: DeferredChecks) -> None:
    counts = []
    for n in range(1, sample.ndim):
        parts = sample.movedim(n, 0).flatten(1)
        if parts.shape[1] >= FEWEST_ELEMENTS:
            parts = parts[parts.sum(1, dtype=torch.float32).argsort()]  # copies are neighbours
            random = (parts[1:] != parts[1:, :1]).any(1)  # not those that a mask or a condition fills with one number
            counts.append((random & (parts[1:] == parts[:-1]).all(1)).sum())

    def check(found: Tensor) -> None:
        if int(found.max()) > 0:
            validate.warn(
                "some parts of the pipeline's first latents are copies of others (FreeNoise's frames), but a "
                "measurement and the runs of a fit start from independent noise; where the pipeline can do so as well, "
                "let it (noise_type='random')"
            )

    if counts:
        deferred.add(torch.stack(counts), check)


def check_neighbours(sample: Tensor, owned: Tensor | None, deferred: DeferredChecks) -> None:
    """ValueError if neighbours in a pipeline's first latents are correlated, as in an image with noise.

    Elements that the pipeline replaces at every step (``owned``) may hold anything.
    """
    x = sample.float() if owned is None else sample.float() * ~owned
    pairs = [(x.narrow(n, 1, x.shape[n] - 1), x.narrow(n, 0, x.shape[n] - 1)) for n in range(1, x.ndim)]
    products = torch.stack([x.square().mean(), *((one * other).mean() for one, other in pairs if one.numel())])
    most = [CORRELATED + STANDARD_ERRORS / math.sqrt(one.numel()) for one, _ in pairs if one.numel()]

    def check(found: Tensor) -> None:
        square, *others = found.tolist()
        for product, bound in zip(others, most, strict=True):
            if abs(product) > bound * square:
                raise ValueError(
                    f"neighbours in the pipeline's first latents are correlated, by {product / square:.2g}: they hold "
                    "more than independent noise (an image or a video that is to be sharpened or changed?). A "
                    "measurement starts from noise alone; measure the pipeline of the same model that does (text to "
                    "image or video), if there is one"
                )

    deferred.add(products, check)
