"""Measure a denoiser: the reference path, then the sensitivity sweep."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from fastsched import ops, validate
from fastsched.denoisers.denoiser import Denoiser, not_finite
from fastsched.measurement.rounding import warn_of_storage
from fastsched.measurement.statistics import PathStatistics, data_deviation
from fastsched.progress import progress_bar
from fastsched.sampling.multistep import Node
from fastsched.sampling.random_streams import noise_of, probe_of, sample_seeds
from fastsched.sampling.sampler import nodes_of
from fastsched.sampling.solvers import get_solver

Answer = TypeVar("Answer")
#: A generator that asks for raw outputs: yields a state and its level, is sent ``R``, and returns an answer.
Ask: TypeAlias = Generator[tuple[Tensor, int], Tensor, Answer]

SENSITIVITIES = ("finite-difference", "jvp")

#: Size of a finite difference against the state's own, by what the network computes in: large enough to stand
#: above its rounding, small enough to stay on the linear part.
RELATIVE_STEP = {torch.float64: 0.01, torch.float32: 0.01, torch.float16: 0.02, torch.bfloat16: 0.05}


#: Follows the path: of seven solvers tried the one whose ends are nearest the converged ones for the same calls; over
#: 48 levels 12 to 50 times nearer (squared) than DPM-Solver++(3M)'s on the benchmark's denoisers.
PATH_SOLVER = "unipc_3"


@torch.no_grad()
def measure(
    denoiser: Denoiser,
    shape: Sequence[int],
    *,
    levels: int | Tensor = 48,
    samples: int = 8,
    sensitivity: str | None = "finite-difference",
    keep_increments: bool = False,
    seed: int = 0,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> PathStatistics:
    """Follow ``samples`` probability-flow paths over ``levels`` levels and keep what schedules are chosen from.

    **Path.** From ``y_0 = noise``, one call a level, by UniPC of third order, whose corrector costs none.
    **Sensitivity.** Back from the end with a Rademacher probe ``w_N = w``,

        ``w_k = (s_{k+1}/s_k) w_{k+1} + (1 - s_{k+1}/s_k) J_k w_{k+1}``,   ``J = dD/dz``,

    where ``J w`` is a forward difference of raw outputs, ``[D(z + h w) - D(z)] / h``, one more call a level, with
    ``h ||w|| / sqrt(d)`` about 1% of ``sqrt(s^2 + c^2)``; or a forward-mode derivative (``"jvp"``). No gradients
    are taken, so compiled, quantised and guided models work. Cost: ``2 N - 1`` calls a sample, ``N`` with
    ``sensitivity=None``.

    Warns if the network's outputs come in 16 bits and rounding adds more than 1% to the squared increments
    (`fastsched.measurement.rounding`).

    Args:
        denoiser: What to measure.
        shape: The shape of one sample, without the batch.
        levels: How many levels (32 to 64 serve), or the levels ``s`` themselves, descending.
        samples: How many paths.
        sensitivity: ``"finite-difference"``, ``"jvp"`` or None.
        keep_increments: Whether the statistics hold the increments themselves, ``N - 1`` images a sample, too: what
            `fastsched.tune` needs. They are not saved.
        seed: Of the noises and probes. Sample ``n`` is the same whatever ``samples`` and ``batch_size``.
        batch_size: Paths followed at once; all of them when None. About ``3 N`` states a path are held.
        device: Where to run; where the network's parameters are when None.
        dtype: What the network computes in; that of its parameters when None. States stay float32.
        progress: Show a progress bar.

    Returns:
        The statistics, on the CPU.

    Raises:
        ValueError: If an argument is out of range, the network's output has the wrong shape, or holds NaN or inf
            (the message names the level).
    """
    sizes = validate.sample_shape(shape)
    count = validate.positive_int("samples", samples)
    batch = count if batch_size is None else validate.positive_int("batch_size", batch_size)
    if sensitivity is not None:
        validate.choice("sensitivity", sensitivity, SENSITIVITIES)
    s = measured_levels(denoiser, levels)
    run = Run(
        denoiser,
        s,
        torch.device(device) if device is not None else denoiser.device,
        dtype if dtype is not None else denoiser.dtype,
        sensitivity,
        keep_increments,
    )
    seeds = sample_seeds(seed, count)
    calls = len(s) * (1 if sensitivity is None else 2) - (sensitivity is not None)
    whole: PathStatistics | None = None
    with progress_bar(calls * count, progress, "measuring") as advance:
        for part_seeds in seeds.split(batch):
            part = _drive(run, measurement_steps(run, part_seeds, sizes, advance))
            whole = part if whole is None else whole.merge(part)
    assert whole is not None
    return whole


class Run:
    """One measurement's settings, and the network as it needs it."""

    def __init__(
        self,
        denoiser: Denoiser,
        s: Tensor,
        device: torch.device,
        dtype: torch.dtype,
        sensitivity: str | None,
        keep_increments: bool = False,
    ) -> None:
        self.denoiser, self.s, self.device, self.dtype = denoiser, s, device, dtype
        self.sensitivity, self.keep_increments = sensitivity, keep_increments
        self.rho = 1 / s
        self.alpha, self.sigma = denoiser.process.alpha(s), denoiser.process.sigma(s)
        self.a, self.c = denoiser.coefficients(s)

    def raw_output(self, x: Tensor, k: int) -> Tensor:
        """``R`` at ``x`` [B, *shape] and level k; ValueError if it is not finite."""
        raw = self.denoiser.raw_output(x, self.s[k], dtype=self.dtype)
        if not bool(torch.isfinite(raw).all()):
            raise ValueError(f"{not_finite(self.denoiser.process, self.s[k])} (level {k} of {len(self.s)})")
        return raw

    def exact_product(self, x: Tensor, w: Tensor, k: int) -> Tensor:
        """``J_k w`` for ``w`` [B, *shape], by a forward-mode derivative at ``x``."""
        a, c, alpha = float(self.a[k]), float(self.c[k]), float(self.alpha[k])
        function = lambda state: self.denoiser.raw_output(state, self.s[k], dtype=self.dtype)
        change = torch.func.jvp(function, (x,), (alpha * w,))[1]
        if not bool(torch.isfinite(change).all()):
            raise ValueError(f"{not_finite(self.denoiser.process, self.s[k])} (derivative, level {k})")
        return a * alpha * w + c * change.float()

    def difference_product(self, x: Tensor, raw: Tensor, w: Tensor, k: int, spread: Tensor) -> Ask[Tensor]:
        """``J_k w`` for ``w`` [B, *shape], by a forward difference from the output ``raw`` at ``x``; one call.

        ``spread`` [B] is the deviation of each path's end, which says how far the denoiser is linear at low noise.
        """
        a, c, alpha = float(self.a[k]), float(self.c[k]), float(self.alpha[k])
        size = RELATIVE_STEP.get(self.dtype, 0.01) * (float(self.s[k]) ** 2 + spread**2).sqrt()
        norm = w.flatten(1).norm(dim=1) / math.sqrt(w[0].numel())
        h = (size / norm.clamp_min(torch.finfo(w.dtype).tiny)).reshape(-1, *[1] * (w.ndim - 1))
        moved = yield x + alpha * h * w, k
        return a * alpha * w + c * (moved.float() - raw.float()) / h


def _drive(run: Run, steps: Ask[PathStatistics]) -> PathStatistics:
    """Answer what ``steps`` ask with the run's own network."""
    try:
        x, k = next(steps)
        while True:
            x, k = steps.send(run.raw_output(x, k))
    except StopIteration as finished:
        return finished.value


def measurement_steps(
    run: Run, seeds: Tensor, shape: tuple[int, ...], advance: Callable[[int], None] = lambda calls: None
) -> Ask[PathStatistics]:
    """One batch's measurement, as a generator that asks for the network's raw outputs.

    It yields ``(x, k)``, a state [B, *shape] and its level, and is sent ``R`` there; it returns the statistics. So a
    measurement can be driven by whoever can call the network: `measure`, or a pipeline's own loop
    (`fastsched.diffusers.CalibrationScheduler`). ``advance`` is told of calls made.
    """
    noise = noise_of(seeds, shape).to(run.device)
    raws, states, end = yield from _follow_path(run, noise, advance)
    vectors = None
    calls = len(run.s)
    if run.sensitivity is not None:
        probe = probe_of(seeds, shape).to(run.device)
        spread = end.flatten(1).std(dim=1, correction=0)  # each sample's own, so that batches do not change samples
        vectors = yield from _sweep_back(run, raws, states, probe, spread, advance)
        calls += len(run.s) - 1
    flat = lambda tensors: torch.stack(tensors).flatten(2)  # [N, B, d]
    R = flat(raws)
    result = ops.level_increment_gram(
        R, flat(states), run.a, run.c, W=None if vectors is None else flat(vectors), per_sample=True
    )
    warn_of_storage(R, run.c, result.gram)
    return PathStatistics(
        process=run.denoiser.process,
        s=run.s,
        shape=shape,
        seeds=seeds,
        gram=result.gram[:, 1:, 1:].cpu(),
        ends=end.cpu(),
        data_std=data_deviation(end),
        model_calls=calls * len(seeds),
        cross=None if result.cross is None else result.cross[:, :, 1:].cpu(),
        w_squared=None if result.w_squared is None else result.w_squared.cpu(),
        increments=_increments(run, raws, states) if run.keep_increments else None,
    )


def _increments(run: Run, raws: list[Tensor], states: list[Tensor]) -> Tensor:
    """``e_q`` [B, N-1, d] float32 on the CPU, from differences of raw outputs and of states, as `ops` forms them."""
    a, c = run.a.tolist(), run.c.tolist()
    found = []
    for k in range(1, len(raws)):
        raw, raw_before = raws[k].float(), raws[k - 1].float()
        moved = c[k] * (raw - raw_before) + (c[k] - c[k - 1]) * raw_before
        moved += a[k] * (states[k] - states[k - 1]) + (a[k] - a[k - 1]) * states[k - 1]
        found.append(moved.flatten(1).float().cpu())
    return torch.stack(found, dim=1)


@torch.no_grad()
def with_increments(
    denoiser: Denoiser,
    stats: PathStatistics,
    *,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> PathStatistics:
    """These statistics with their increments, the paths followed once more if need be: N calls a sample.

    Args:
        denoiser: The denoiser that ``stats`` was measured on.
        stats: What `measure` returned.
        batch_size: As in `measure`.
        device: As in `measure`.
        dtype: As in `measure`.

    Raises:
        ValueError: If the network returns NaN or inf.
    """
    if stats.increments is not None:
        return stats
    batch = stats.samples if batch_size is None else validate.positive_int("batch_size", batch_size)
    run = Run(
        denoiser,
        stats.s,
        torch.device(device) if device is not None else denoiser.device,
        dtype if dtype is not None else denoiser.dtype,
        None,
        keep_increments=True,
    )
    parts = [_drive(run, measurement_steps(run, seeds, stats.shape)) for seeds in stats.seeds.split(batch)]
    increments = torch.cat([part.increments for part in parts if part.increments is not None])
    calls = stats.model_calls + sum(part.model_calls for part in parts)
    return replace(stats, increments=increments, model_calls=calls)


def _follow_path(
    run: Run, noise: Tensor, advance: Callable[[int], None]
) -> Ask[tuple[list[Tensor], list[Tensor], Tensor]]:
    """Raw outputs and states at every level, and the end ``D_{N-1}``; by `PATH_SOLVER`.

    The network is called at predicted states, which the corrector then mends with the output found there.
    """
    solver, nodes = get_solver(PATH_SOLVER), nodes_of(run.denoiser.process, run.s)
    assert solver.corrector is not None
    raws, states = [], []
    y, before, denoised = noise, noise, noise
    history: list[tuple[Node, Tensor]] = []
    for k, node in enumerate(nodes):
        x = float(run.sigma[k]) * y
        raw = yield x, k
        advance(len(noise))
        raws.append(raw)
        states.append(x)
        denoised = float(run.a[k]) * x + float(run.c[k]) * raw.float()
        known = [(node, denoised), *history]
        if history:
            weights = solver.corrector([earlier for earlier, _ in history], node)
            y = before + float(node.rho - history[0][0].rho) * _mean_slope(weights, known)
        history = known[: solver.order]
        if k + 1 < len(nodes):
            weights = solver.weights([earlier for earlier, _ in history], nodes[k + 1])
            before, y = y, y + float(nodes[k + 1].rho - node.rho) * _mean_slope(weights, history)
    return raws, states, denoised


def _mean_slope(weights: Sequence[Any], known: Sequence[tuple[Node, Tensor]]) -> Tensor:
    terms = (float(b) * output for b, (_, output) in zip(weights, known, strict=True))
    return functools.reduce(torch.add, terms)


def _sweep_back(
    run: Run,
    raws: list[Tensor],
    states: list[Tensor],
    probe: Tensor,
    spread: Tensor,
    advance: Callable[[int], None],
) -> Ask[list[Tensor]]:
    """The adjoint vectors ``w_1 .. w_N`` (no step ends at level 0, so ``w_0`` is not needed)."""
    vectors = [probe]
    following = 0.0
    for k in range(len(run.s) - 1, 0, -1):
        keep = following / float(run.s[k])
        w = vectors[-1]
        if run.sensitivity == "jvp":
            product = run.exact_product(states[k], w, k)
        else:
            product = yield from run.difference_product(states[k], raws[k], w, k, spread)
        advance(len(probe))
        vectors.append(keep * w + (1 - keep) * product)
        following = float(run.s[k])
    return vectors[::-1]


def measured_levels(denoiser: Denoiser, levels: int | Tensor) -> Tensor:
    """The levels to measure at, float64 [N], from their number or a list of them; errors as in `measure`."""
    if not isinstance(levels, Tensor):
        return denoiser.levels(validate.positive_int("levels", levels, minimum=3))
    s = validate.descending_sigmas(levels, name="levels")
    if len(s) < 3 or float(s[-1]) <= 0:
        raise ValueError("levels must be at least three positive noise levels; sigma 0 is added as the end")
    return s
