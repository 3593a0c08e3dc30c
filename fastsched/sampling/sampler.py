"""Run a solver along a schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastsched import validate
from fastsched.denoisers.denoiser import Denoiser
from fastsched.denoisers.finite_answers import finite_denoised, noise_check
from fastsched.denoisers.network_state import unchanged_buffers
from fastsched.denoisers.noise import SMALLEST_LEVEL, NoiseProcess
from fastsched.sampling.fitted import fitted_solver
from fastsched.sampling.multistep import Node, log_rho
from fastsched.sampling.progress import Progress, progress_bar
from fastsched.sampling.schedule import Schedule, check_decoupled, check_run, check_sigmas
from fastsched.sampling.solvers import (
    FITTED,
    STOCHASTIC_SOLVERS,
    Solver,
    from_pure_noise,
    get_solver,
    solver_name,
    step_scale,
)
from fastsched.sampling.stochastic import sample_stochastic

Result = TypeVar("Result")

#: If the first level is above this multiple of the process's highest, it is likely to be a timestep. Networks that are
#: given sigma may know levels above that.
BEYOND = {"vp": 1.5, "ve": 10.0, "flow": math.inf}

#: Shortest step in ``log s``, over the next one. At this ratio UniPC leaves 20 times the sample's size in error.
SHORTEST = 1e-3

_IS_SEED = validate.optional(validate.CHECKS["seed"])


def nodes_of(process: NoiseProcess, s: Tensor) -> list[Node]:
    """The levels ``s`` [n] as solver nodes; a level of 0 has ``rho = lam = inf`` and ``tau = 0``.

    The nodes of C schedules, from ``s`` [C, n], are arrays [C].
    """
    values = s.to(torch.float64)
    rho = (1 / values).numpy()
    tau = process.sampler_sigma(values).numpy()
    return [Node(*each) for each in zip(rho.T, log_rho(rho).T, tau.T, strict=True)]


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    sigmas: Tensor | Sequence[float] | Schedule,
    solver: str | Solver | None = None,
    noise: Tensor | None = None,
    *,
    seed: int | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress = False,
) -> Tensor:
    """Integrate the probability-flow ODE along ``sigmas`` from ``x = sigma_0 * noise``.

    Args:
        denoiser: The denoiser to sample from.
        sigmas: Sampler sigmas [steps + 1], strictly descending, usually ending in 0; or a `Schedule`.
        solver: A solver's name; that of the schedule when None. ``"sde_dpmpp_2m"`` and ``"ancestral"`` solve the
            reverse SDE instead, by `fastsched.sampling.stochastic.sample_stochastic` with ``eta = 1``.
        noise: Standard normal noise [B, *shape], float32 or float64; the state is kept in its dtype.
        seed: The seed of the noise that a stochastic solver adds, 0 when None. Every sample has a stream of its own,
            drawn on the CPU: sample ``b`` is the same whatever ``B`` and the device. Only for stochastic solvers.
        dtype: What the network computes in; that of its parameters when None, or of ``noise`` if it has none.
        progress: Show a progress bar, or a function called with the model calls done and their total.

    Returns:
        The samples ``x0`` [B, *shape]; if the last sigma is not 0, the state ``z = x / alpha`` there.

    Warns if sigmas of a variance-preserving process are like timesteps, and if noise is too large or too small.

    Raises:
        ValueError: If ``sigmas`` do not descend or start where ``D`` is not finite, the solver is unknown or not for
            the schedule, a deterministic one is given a seed, or the network returns NaN or inf (the message names
            the level; on a GPU it may come late).
    """
    validate.arguments(locals(), sigmas=check_sigmas, seed=_IS_SEED)
    name = solver if solver is not None else getattr(sigmas, "solver", None)
    if name is None:
        raise ValueError("solver must be given, because the sigmas do not name one")
    if noise is None:
        raise ValueError("noise must be given: standard normal, [B, *shape]")
    check_run("sigmas", sigmas, denoiser)
    s = denoiser.process.level(check_sigmas("sigmas", sigmas))
    _warn_of_unknown_levels(denoiser.process, float(s[0]))
    if solver_name(name) in STOCHASTIC_SOLVERS:
        return sample_stochastic(denoiser, sigmas, str(name), noise, seed=seed or 0, dtype=dtype, progress=progress)
    method = schedule_solver(sigmas, name)
    if seed is not None:
        raise ValueError(f"seed must be None for {method.name}, got {seed!r}: this solver adds no noise")
    nodes, deferred = _checked_nodes(denoiser.process, s, method), noise_check(noise, float(s[0]), denoiser)
    dtype = dtype or denoiser.dtype_beside(noise.dtype)
    calls, others = calls_of(method, nodes), _other_levels(sigmas, method.name, denoiser.process)
    with unchanged_buffers(denoiser.network), progress_bar(calls, progress, f"{method.name} sampling") as advance:

        def denoise(y: Tensor, level: Tensor | float) -> Tensor:
            denoised = finite_denoised(denoiser, y, level, dtype, deferred, **next(others, {}))
            advance(1)
            return denoised

        y = answered(integration(nodes, method, noise, s=s), denoise)
    deferred.run()
    return y if float(s[-1]) == 0.0 else y * float(s[-1])


def calls_of(method: Solver, nodes: Sequence[Node]) -> int:
    """The model calls of a run. A step with a stage takes two, except the step to sigma 0 and one from pure noise."""
    steps = len(nodes) - 1
    without = int(nodes[-1].tau == 0.0) + int(from_pure_noise(method, nodes[0]))
    return steps if method.stage is None else steps + max(0, steps - without)


def _warn_of_unknown_levels(process: NoiseProcess, s: float, name: str = "sigmas") -> None:
    """Warn if a run starts far above all levels of the noise process."""
    if BEYOND[process.kind] * process.s_max < s < math.inf:
        validate.warn(
            f"{name} start at {s:g}, far above {process.s_max:g}, the highest of the noise process: are they "
            "timesteps? fastsched takes noise levels, sigma / alpha"
        )


def _checked_nodes(process: NoiseProcess, s: Tensor, method: Solver) -> list[Node]:
    """`nodes_of`; ValueError for levels too low for float32, a warning if a solver extrapolates a step too far."""
    known = s[(s > 0) & s.isfinite()]
    if bool((known < SMALLEST_LEVEL).any()):
        lowest = float(known[-1])
        raise ValueError(f"sigmas must be 0 or at least {SMALLEST_LEVEL:g}, as states are float32, got {lowest}")
    steps = -known.log().diff()
    short = (steps[:-1] < SHORTEST * steps[1:]).nonzero()
    if len(short) and method.order > 1 and method.stage is None and method.name != FITTED:
        k = int(short[0])
        first, second = process.sampler_sigma(known[k : k + 2]).tolist()
        validate.warn(
            f"sigmas {first:.12g} and {second:.12g} are nearly equal, and {method.name} extrapolates their step to one "
            f"{float(steps[k + 1] / steps[k]):.2g} times as long: leave one of them out"
        )
    return nodes_of(process, s)


def _other_levels(run: object, solver: str, process: NoiseProcess) -> Iterator[dict[str, Tensor]]:
    """Decoupled levels as arguments of `Denoiser.denoise`, for each call; empty if levels are those of the states."""
    own = getattr(run, "network_sigmas", None)
    if own is None:
        return iter(())
    check_decoupled(solver)
    name = "denoiser_level" if getattr(run, "decoupled", None) == "denoiser" else "timestep_level"
    levels = process.level(own)
    _warn_of_unknown_levels(process, float(levels[0]), "network_sigmas")
    return ({name: level} for level in levels)


def schedule_solver(sigmas: object, solver: str | Solver | None = None) -> Solver:
    """The solver of that name, or the schedule's own when None; the fitted solver gets the schedule's weights.

    ValueError if there is no such solver, or it is the fitted one and ``sigmas`` is no schedule with weights.
    """
    weights = getattr(sigmas, "weights", None)
    if weights is not None and (solver is None or solver_name(solver) == FITTED):
        return fitted_solver(weights)
    return get_solver(solver if solver is not None else getattr(sigmas, "solver", ""))


def answered(queries: Generator[tuple[Any, Any], Any, Result], answer: Callable[[Any, Any], Any]) -> Result:
    """Run a generator: send ``answer(*query)`` for every query that it yields, and return its result."""
    found = None
    while True:
        try:
            query = queries.send(found)
        except StopIteration as finished:
            return finished.value
        del found  # states are large, and the network needs memory too
        found = answer(*query)  # not inside the try: a StopIteration raised here is not the generator's end
        del query


def integration(
    nodes: Sequence[Node], method: Solver, y: Any, *, s: Sequence[Any] | Tensor, number: Callable[[Any], Any] = float
) -> Generator[tuple[Any, Any], Any, Any]:
    """The loop of every deterministic solver, as a generator.

    It yields a normalised state and its level, ``(y, s)``, and the caller sends ``D`` at this state. A state can be
    anything that can be added and scaled: images, or coefficients of images.

    Args:
        nodes: The levels as nodes; if ``rho = inf`` at the last one, the loop ends in a denoised sample.
        method: The solver.
        y: The state at the first node.
        s: The levels to yield at the nodes; at a solver's stage ``1 / rho`` is yielded.
        number: Converts a weight computed from nodes to a factor of a state. With nodes of arrays, one entry per
            schedule, it shapes weights to broadcast against ``y``, so that many schedules run at once.

    Returns:
        The denoised sample if the last node is at sigma 0, else ``y`` there.
    """
    y_before, known, slopes = y, [], []  # earlier nodes, newest first, and their slopes
    for n in range(len(nodes) - 1):
        start, end = nodes[n], nodes[n + 1]
        denoised = yield y, s[n]
        if np.all(end.tau == 0):
            if method.end_weights is None:
                return denoised
            first, *others = [number(b) for b in method.end_weights([start, *known], end)]
            return _plus(first * denoised, others, slopes)
        if from_pure_noise(method, start):
            y_before, y = y, _plus(y, [number(end.rho - start.rho)], [denoised])
            continue
        newest = _slope(method, start, y, denoised, number)
        if method.corrector is not None and known:
            weights = method.corrector(known, start)
            y = _step(method, weights, y_before, known[0], start, [newest, *slopes], number)
        kept = method.history_at(n, len(nodes) - 1) + 1
        known, slopes = [start, *known][:kept], [newest, *slopes][:kept]
        used = slopes
        if method.stage is not None:
            stage = method.stage(start, end)
            predicted = _plus(y, [number(stage.rho - start.rho)], [denoised])
            ahead = yield predicted, 1 / stage.rho
            used = [_slope(method, stage, predicted, ahead, number), *slopes]
        y_before, y = y, _step(method, method.weights(known, end), y, start, end, used, number)
    return y


def _step(
    method: Solver,
    weights: Sequence[Any],
    y: Any,
    start: Node,
    end: Node,
    slopes: Sequence[Any],
    number: Callable[[Any], Any],
) -> Any:
    scale = number(step_scale(method, start, end))
    kept = y if method.variable == "rho" else (1 - scale) * y
    return _plus(kept, [scale * number(b) for b in weights], slopes)


def _plus(y: Any, factors: Sequence[Any], states: Sequence[Any]) -> Any:
    """``y + sum_n factors[n] states[n]``; tensors take one pass over memory per term."""
    add = torch.add if isinstance(y, Tensor) else lambda y, state, alpha, out: y + alpha * state
    for n, (factor, state) in enumerate(zip(factors, states, strict=True)):
        y = add(y, state, alpha=factor, out=y if n else None)
    return y


def _slope(method: Solver, node: Node, y: Any, denoised: Any, number: Callable[[Any], Any]) -> Any:
    return denoised if method.variable == "rho" else _plus(y, [-1 / number(node.tau)], [denoised])
