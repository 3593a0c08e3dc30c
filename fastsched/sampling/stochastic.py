"""Stochastic samplers: solvers of the reverse SDE.

In ``y = x / sigma`` a step from level j to k is ``y_k = keep * y_j + pull * D_j + fresh * noise``, the same for every
noise process, with ``h = log(s_j / s_k)``, ``rho = 1 / s`` and ``eta`` how much noise is renewed (0: none):

* ``sde_dpmpp_2m``: ``keep = exp(-eta h)``, ``pull = rho_k (1 - exp(-(1 + eta) h))``,
  ``fresh = sqrt(1 - exp(-2 eta h))``, and ``D_j + (h / 2 h_last) (D_j - D_i)`` in place of ``D_j``;
* ``ancestral``: ``fresh = eta sqrt(1 - (s_k / s_j)^2)``, ``keep = sqrt(1 - fresh^2)``,
  ``pull = rho_k (1 - keep s_k / s_j)``.

With ``eta = 0`` they are ``dpmpp_2m`` and ``ddim``. The step to sigma 0 is ``z = D_j``. In k-diffusion they are
``sample_dpmpp_2m_sde`` (midpoint) and ``sample_euler_ancestral``.

Source: Lu et al. 2022 (arXiv 2211.01095), appendix on SDE-DPM-Solver++; Ho et al. 2020, Song et al. 2021.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fastsched import validate
from fastsched.denoisers.deferred_checks import sent
from fastsched.denoisers.denoiser import Denoiser
from fastsched.denoisers.finite_answers import finite_denoised, noise_check
from fastsched.denoisers.network_state import unchanged_buffers
from fastsched.sampling.progress import Progress, progress_bar
from fastsched.sampling.random_streams import normal, sample_seeds, stream
from fastsched.sampling.schedule import Schedule, check_decoupled, check_run, check_sigmas
from fastsched.sampling.solvers import STOCHASTIC_SOLVERS

_IS_STOCHASTIC = partial(validate.choice, known=STOCHASTIC_SOLVERS)


@torch.no_grad()
def sample_stochastic(
    denoiser: Denoiser,
    sigmas: Tensor | Sequence[float] | Schedule,
    solver: str,
    noise: Tensor,
    *,
    eta: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    progress: Progress = False,
) -> Tensor:
    """Solve the reverse SDE along ``sigmas`` from ``x = sigma_0 * noise``; one model call per step.

    Result, errors and arguments are those of `fastsched.sample`, which calls this function for ``"sde_dpmpp_2m"`` and
    ``"ancestral"``, and

    * ``eta``: how much of the noise each step renews, within [0, 1].
    """
    validate.arguments(locals(), sigmas=validate.anything, solver=_IS_STOCHASTIC)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be within [0, 1], got {eta!r}")
    check_run("sigmas", sigmas, denoiser)
    if isinstance(sigmas, Schedule) and sigmas.network_sigmas is not None:
        check_decoupled(solver)
    s = denoiser.process.level(check_sigmas("sigmas", sigmas))
    levels, dtype = s.tolist(), dtype or denoiser.dtype_beside(noise.dtype)
    streams = [stream(value, 1) for value in sample_seeds(seed, len(noise)).tolist()]
    y, before, width_before, deferred = noise, None, math.inf, noise_check(noise, levels[0], denoiser)
    bar = progress_bar(len(levels) - 1, progress, f"{solver} sampling")
    with unchanged_buffers(denoiser.network), bar as advance:
        for n in range(len(levels) - 1):
            start, end = levels[n], levels[n + 1]
            denoised = finite_denoised(denoiser, y, s[n], dtype, deferred)
            advance(1)
            if end == 0:
                deferred.run()
                return denoised
            width = math.log(start / end)
            slope = denoised
            if solver == "sde_dpmpp_2m" and before is not None and math.isfinite(width_before):
                slope = torch.add(denoised, denoised - before, alpha=width / (2 * width_before))
            keep, pull, fresh = (_sde_dpmpp if solver == "sde_dpmpp_2m" else _ancestral)(width, end, eta)
            y = (keep * y).add_(slope, alpha=pull)
            y.add_(sent(normal(streams, y.shape[1:]), y.device), alpha=fresh)
            before, width_before = denoised, width
    deferred.run()
    return levels[-1] * y


def _sde_dpmpp(width: float, end: float, eta: float) -> tuple[float, float, float]:
    """``(keep, pull, fresh)``; ``width`` is infinite from pure noise."""
    renewed = eta * width if eta else 0.0
    return math.exp(-renewed), -math.expm1(-width - renewed) / end, math.sqrt(-math.expm1(-2 * renewed))


def _ancestral(width: float, end: float, eta: float) -> tuple[float, float, float]:
    """``(keep, pull, fresh)``; ``width`` is infinite from pure noise."""
    fresh = eta * math.sqrt(-math.expm1(-2 * width))
    keep = math.sqrt(1 - fresh**2)
    return keep, (1 - keep * math.exp(-width)) / end, fresh
