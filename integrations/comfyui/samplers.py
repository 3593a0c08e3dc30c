"""SAMPLER for a schedule: ComfyUI's own sampler if one equals our solver, otherwise our own solver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsched.sampling.decoupled import decoupled_model
from fastsched.sampling.schedule import Schedule

from .fastsched_fitted import sample_fitted
from .files import Found
from .measuring import guided_denoiser

#: ComfyUI's sampler and its options, by our solver, where both take the same steps (`check.py` compares them).
#: For flow times ComfyUI's dpmpp_2m takes log sigma for the half log-SNR and so is another solver.
EVERYWHERE: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("euler", {}),
    "heun": ("heun", {}),
    "dpm_2": ("dpm_2", {}),
    "ipndm": ("ipndm", {}),
    "ipndm_3": ("ipndm", {"max_order": 3}),
    "ipndm_2": ("ipndm", {"max_order": 2}),
    "lms": ("lms", {}),
}
NOT_FLOW: dict[str, tuple[str, dict[str, Any]]] = {
    "dpmpp_2m": ("dpmpp_2m", {}),
    "dpmpp_2s": ("dpmpp_2s_ancestral", {"eta": 0.0}),
}
#: Stochastic samplers draw their own noise; with the same noise they equal ours. For flow times ComfyUI's differ.
STOCHASTIC: dict[str, tuple[str, dict[str, Any]]] = {
    "ancestral": ("euler_ancestral", {}),
    "sde_dpmpp_2m": ("dpmpp_2m_sde", {}),
}

#: Solvers to choose from, by the names that users of ComfyUI know.
CHOICES = (
    *("dpmpp_2m", "euler", "fitted", "heun", "dpm_2", "dpmpp_2s", "dpmpp_3m", "ipndm", "ipndm_3", "ipndm_2", "lms"),
    *("deis_2", "deis_3", "unipc", "unipc_3", "unipc_bh1", "unipc_bh1_3"),
)


def same_sampler(solver: str, noise: str) -> tuple[str, dict[str, Any]] | None:
    """ComfyUI's sampler and its options that equal our ``solver`` for a kind of noise process; None if none does."""
    return (EVERYWHERE if noise == "flow" else {**EVERYWHERE, **NOT_FLOW, **STOCHASTIC}).get(solver)


def sampler_for(found: Found) -> tuple[Any, str]:
    """SAMPLER for a schedule, and its name for people."""
    import comfy.samplers

    sampler, name = _coupled(found)
    if found.schedule.decoupled is None:
        return sampler, name
    options = {**sampler.extra_options, "sampler": sampler.sampler_function, "schedule": found.schedule}
    return comfy.samplers.KSAMPLER(sample_decoupled, extra_options=options), f"{name}, with decoupled levels"


def sample_decoupled(
    model: Any, x: Tensor, *args: Any, sampler: Callable[..., Tensor], schedule: Schedule, **options: Any
) -> Tensor:
    """Sample by ``sampler``, while the model is asked at the sigmas that ``schedule`` has for it."""
    return sampler(decoupled_model(model, schedule), x, *args, **options)


def _coupled(found: Found) -> tuple[Any, str]:
    """`sampler_for` a schedule as if its levels were not decoupled."""
    import comfy.samplers

    solver, noise, weights = found.schedule.solver, found.schedule.noise, found.weights()
    if weights is not None:
        options = {"weights": weights, "fitted_sigmas": found.sigmas().tolist()}
        return comfy.samplers.KSAMPLER(sample_fitted, extra_options=options), "fastsched's fitted solver"
    same = same_sampler(solver, noise)
    if same is not None:
        name, options = same
        shown = ", ".join(f"{key}={value}" for key, value in options.items())
        return comfy.samplers.ksampler(name, options), f"ComfyUI's {name}" + (f" ({shown})" if shown else "")
    options = {"solver": solver, "flow": noise == "flow"}
    return comfy.samplers.KSAMPLER(sample_by_solver, extra_options=options), f"fastsched's own {solver}"


@torch.no_grad()
def sample_by_solver(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], Any] | None = None,
    disable: bool | None = None,
    solver: str = "ddim",
    flow: bool = False,
) -> Tensor:
    """Sample by one of fastsched's solvers, called as the samplers of k-diffusion are.

    Args:
        model: ``model(x, sigma, **extra_args)`` is the denoised image; ``sigma`` has shape [B].
        x: The first state [B, *shape].
        sigmas: Descending [steps + 1]; may end above 0.
        extra_args: Further arguments of ``model``; their ``seed`` is that of the noise that stochastic solvers add.
        callback: Called at each step with a dict of ``x``, ``i``, ``sigma``, ``sigma_hat`` and ``denoised``.
        disable: Whether to hide the progress bar.
        solver: The solver's name.
        flow: Whether sigmas are flow times.
    """
    from fastsched.denoisers.noise import FlowMatching, VarianceExploding
    from fastsched.sampling.progress import progress_bar
    from fastsched.sampling.sampler import sample
    from fastsched.sampling.solvers import STOCHASTIC_SOLVERS, get_solver

    if len(sigmas) < 2:
        return x
    values, given = sigmas.detach().cpu().double(), extra_args or {}
    # The range does not affect sampling; only a start far above it is warned of.
    process = FlowMatching() if flow else VarianceExploding(float(values[0]) / 2, float(values[0]))
    stochastic = solver in STOCHASTIC_SOLVERS
    calls_a_step = 1 if stochastic or get_solver(solver).stage is None else 2
    calls = 0
    with progress_bar(len(values) - 1, not disable, f"{solver} sampling", unit="step") as advance:

        def ask(state: Tensor, sigma: Tensor) -> Tensor:
            nonlocal calls
            found = model(state, sigma, **given)
            if calls % calls_a_step == 0:
                step = calls // calls_a_step
                if callback is not None:
                    told = {"sigma": sigmas[step], "sigma_hat": sigmas[step], "denoised": found}
                    callback({"x": state, "i": step, **told})
                advance(1)
            calls += 1
            return found

        seed = int(given.get("seed") or 0) % 2**31 if stochastic else None
        end = sample(guided_denoiser(ask, process), values, solver, x / float(values[0]), seed=seed)
    # If the last sigma is above 0, the result is the state z = x / alpha.
    return end * float(process.alpha(process.level(values[-1:]))[0])
