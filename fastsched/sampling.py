"""Run a solver along a schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastsched import validate
from fastsched.denoiser import Denoiser
from fastsched.noise import NoiseProcess
from fastsched.solvers import Node, Solver, get_solver, step_scale

if TYPE_CHECKING:
    from fastsched.schedule import Schedule


def nodes_of(process: NoiseProcess, s: Tensor) -> list[Node]:
    """The levels ``s`` [n] as solver nodes; a last level of 0 has ``rho = lam = inf`` and ``tau = 0``."""
    values = s.to(torch.float64)
    rho = (1 / values).numpy()
    tau = process.sampler_sigma(values).numpy()
    with np.errstate(divide="ignore"):
        return [Node(r, np.log(r), t) for r, t in zip(rho, tau, strict=True)]


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    sigmas: Tensor | Sequence[float] | Schedule,
    solver: str | Solver | None = None,
    noise: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Tensor:
    """Integrate the probability-flow ODE along ``sigmas`` from ``x = sigma_0 * noise``.

    Args:
        denoiser: What to sample from.
        sigmas: Sampler sigmas [steps + 1], strictly descending, usually ending in 0; or a `Schedule`.
        solver: A solver's name; that of the schedule when None. ``"sde_dpmpp_2m"`` and ``"ancestral"`` are
            `fastsched.stochastic.sample_stochastic` with its defaults.
        noise: Standard normal noise [B, *shape], float32 or float64; the state is kept in its dtype.
        dtype: What the network computes in; the dtype of ``noise`` when None.
        progress: Show a progress bar.

    Returns:
        The samples ``x0`` [B, *shape]; if the last sigma is not 0, the state ``z = x / alpha`` there.

    Raises:
        ValueError: If ``sigmas`` do not descend, the solver is unknown, or the network returns NaN or inf
            (the message names the level).
    """
    name = solver if solver is not None else getattr(sigmas, "solver", None)
    if name is None:
        raise ValueError("solver must be given, for the sigmas do not say what they are for")
    if noise is None:
        raise ValueError("noise must be given: standard normal, [B, *shape]")
    if name in ("sde_dpmpp_2m", "ancestral"):
        from fastsched.stochastic import sample_stochastic

        return sample_stochastic(denoiser, sigmas, str(name), noise, dtype=dtype, progress=progress)
    method = get_solver(name)
    values = validate.descending_sigmas(getattr(sigmas, "sigmas", sigmas))  # type: ignore[arg-type]
    s = denoiser.process.level(values)
    nodes = nodes_of(denoiser.process, s)
    y, history = noise, []
    steps: Sequence[int] = range(len(nodes) - 1)
    if progress:
        from tqdm import tqdm

        steps = tqdm(steps, desc=f"{method.name} sampling", unit="step")  # type: ignore[assignment]
    for n in steps:
        start, end = nodes[n], nodes[n + 1]
        denoised = _finite_denoised(denoiser, y, s[n], dtype)
        if end.tau == 0:
            return denoised
        history = [(start, _slope(method, start, y, denoised)), *history][: method.history + 1]
        if method.lookahead:
            predicted = y + float(end.rho - start.rho) * denoised
            ahead = _finite_denoised(denoiser, predicted, s[n + 1], dtype)
            slopes = [_slope(method, end, predicted, ahead), *[slope for _, slope in history]]
        else:
            slopes = [slope for _, slope in history]
        weights = method.weights([node for node, _ in history], end)
        mean = sum(float(b) * slope for b, slope in zip(weights, slopes, strict=True))
        scale = float(step_scale(method, start, end))
        y = y + scale * mean if method.variable == "rho" else (1 - scale) * y + scale * mean
    return y * float(s[-1])


def _slope(method: Solver, node: Node, y: Tensor, denoised: Tensor) -> Tensor:
    return denoised if method.variable == "rho" else y - denoised / float(node.tau)


def _finite_denoised(denoiser: Denoiser, y: Tensor, s: Tensor, dtype: torch.dtype | None) -> Tensor:
    denoised = denoiser.denoise(y, s, dtype=dtype)
    if not bool(torch.isfinite(denoised).all()):
        raise ValueError(not_finite(denoiser.process, s))
    return denoised


def not_finite(process: NoiseProcess, s: Tensor) -> str:
    """What to say when a network returns NaN or inf at level ``s``."""
    sigma = float(process.sampler_sigma(s))
    timestep = process.timestep(s)
    where = f"sigma = {sigma:g}" + ("" if timestep is None else f" (timestep {float(timestep):g})")
    return (
        f"the network returned NaN or inf at {where}; check its input scaling and the sigma range, or run it "
        "in a wider dtype (dtype=torch.float32)"
    )
