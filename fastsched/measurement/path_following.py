"""Follow the paths of a batch of samples: the reference path, then the deviated ones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from fastsched import ops
from fastsched.denoisers.denoiser import Denoiser, not_finite
from fastsched.measurement.deviated_paths import DeviatedPath, asked_levels, positions, queries
from fastsched.measurement.rounding import warn_of_storage
from fastsched.measurement.statistics import PathStatistics, data_deviation
from fastsched.sampling.random_streams import noise_of
from fastsched.sampling.sampler import answered, integration, nodes_of
from fastsched.sampling.solvers import get_solver

Answer = TypeVar("Answer")
#: A generator that needs the network: it yields a state and its level, is sent the raw output ``R``, returns a result.
Query: TypeAlias = Generator[tuple[Tensor, int], Tensor, Answer]

#: Follows the reference path: of seven solvers tried the one whose ends are nearest the converged ones for the same
#: calls; over 48 levels 12 to 50 times nearer (squared) than those of DPM-Solver++(3M).
PATH_SOLVER = "unipc_3"

#: Columns that are converted to float64 at a time.
CHUNK = 1 << 16


@dataclass(frozen=True, eq=False)
class Measurement:
    """What a measurement is of.

    Attributes:
        denoiser: The denoiser.
        s: The levels, [N] float64.
        device: Where the states are.
        dtype: What the network computes in.
        deviated: The deviated paths to follow; none for the reference path alone.
        keep_vectors: Whether the statistics are to hold increments and responses.
    """

    denoiser: Denoiser
    s: Tensor
    device: torch.device
    dtype: torch.dtype
    deviated: tuple[DeviatedPath, ...] = ()
    keep_vectors: bool = False
    a: Tensor = field(init=False)
    c: Tensor = field(init=False)
    sigma: Tensor = field(init=False)

    def __post_init__(self) -> None:
        a, c = self.denoiser.coefficients(self.s)
        for name, value in (("a", a), ("c", c), ("sigma", self.denoiser.process.sigma(self.s))):
            object.__setattr__(self, name, value)

    @property
    def calls(self) -> int:
        """Network evaluations a sample."""
        return len(self.queries)

    @property
    def queries(self) -> list[int]:
        """The levels at which the network is called, in order."""
        return queries(len(self.s), self.deviated)

    def raw_output(self, x: Tensor, k: int) -> Tensor:
        """``R`` at ``x`` [B, *shape] and level k.

        Raises:
            ValueError: If it is not finite.
        """
        raw = self.denoiser.raw_output(x, self.s[k], dtype=self.dtype)
        if not bool(torch.isfinite(raw).all()):
            raise ValueError(f"{not_finite(self.denoiser.process, self.s[k])} (level {k} of {len(self.s)})")
        return raw

    def drive(self, steps: Query[Answer]) -> Answer:
        """Run ``steps`` with the denoiser's own network."""
        return answered(steps, self.raw_output)


def measurement_steps(
    run: Measurement, seeds: Tensor, shape: tuple[int, ...], advance: Callable[[int], object] = lambda calls: None
) -> Query[PathStatistics]:
    """One batch's measurement, as a generator that is sent the network's raw outputs.

    It yields ``(x, k)``, a state [B, *shape] and its level, and is sent ``R`` there; it returns the statistics. So
    anything that can call the network can drive a measurement: `fastsched.measure`, or a pipeline's own loop
    (`fastsched.diffusers.CalibrationScheduler`). ``advance`` is given the number of calls made.
    """
    noise = noise_of(seeds, shape).to(run.device)
    asked = len(run.deviated) * len(asked_levels(len(run.s)))
    # Memory is allocated before the first call, not after the last. The op needs as many responses as levels.
    rows = lambda dtype: torch.zeros(len(run.s), *noise.shape, dtype=dtype, device=noise.device)
    raws, states, responses = rows(run.dtype), rows(noise.dtype), rows(noise.dtype) if asked else None
    raws, end = yield from _follow_reference(run, noise, raws, states, advance)
    for n, path in enumerate(run.deviated):
        assert responses is not None
        first = n * len(asked_levels(len(run.s)))
        yield from _follow_deviated(run, path, noise, raws, states, responses[first:], advance)
    R, W = raws.flatten(2), None if responses is None else responses.flatten(2)  # [N, B, d]
    result = ops.level_increment_gram(R, states.flatten(2), run.a, run.c, W=W, per_sample=True)
    warn_of_storage(R, run.c, result.gram)
    kept = run.keep_vectors
    return PathStatistics(
        process=run.denoiser.process,
        s=run.s,
        shape=shape,
        seeds=seeds,
        gram=result.gram[:, 1:, 1:].cpu(),
        ends=end.cpu(),
        data_std=data_deviation(end.cpu()),
        model_calls=run.calls * len(seeds),
        deviated=run.deviated,
        response_cross=None if result.cross is None else result.cross[:, :asked, 1:].cpu(),
        response_gram=None if W is None else _gram(W[:asked]).cpu(),
        increments=_increments(run, raws, states) if kept else None,
        responses=W[:asked].transpose(0, 1).cpu().contiguous() if kept and W is not None else None,
    )


def _follow_reference(
    run: Measurement, noise: Tensor, raws: Tensor, states: Tensor, advance: Callable[[int], object]
) -> Query[tuple[Tensor, Tensor]]:
    """Writes raw outputs and states at every level; returns the former and the end ``D_{N-1}``; by `PATH_SOLVER`.

    The network is called at predicted states, which the corrector then moves with the output found there.
    """
    nodes = nodes_of(run.denoiser.process, torch.cat([run.s, run.s.new_zeros(1)]))
    path = integration(nodes, get_solver(PATH_SOLVER), noise, s=run.s)
    denoised = None
    for k in range(len(run.s)):
        y, _ = path.send(denoised)
        x = float(run.sigma[k]) * y
        states[k] = x
        raw = yield x, k
        advance(len(noise))
        # In the dtype that the network returns, the widest if it returns several.
        raws = raws.to(raw.dtype if k == 0 else torch.promote_types(raws.dtype, raw.dtype))
        raws[k] = raw
        denoised = float(run.a[k]) * states[k] + float(run.c[k]) * raw.float()
    assert denoised is not None  # there are levels
    return raws, denoised


def _follow_deviated(
    run: Measurement,
    path: DeviatedPath,
    noise: Tensor,
    raws: Tensor,
    states: Tensor,
    responses: Tensor,
    advance: Callable[[int], object],
) -> Query[None]:
    """Writes the responses ``D(z') - D(z)`` at the asked levels, one after the other."""
    asked = asked_levels(len(run.s))
    rho, y = (1 / run.s).tolist(), noise
    a, c, sigma = run.a.tolist(), run.c.tolist(), run.sigma.tolist()
    answers = {0: a[0] * states[0] + c[0] * raws[0].float()}
    for k, used in enumerate([*path.slopes(positions(run.s)), []]):
        if k in asked:
            x = sigma[k] * y
            raw = yield x, k
            advance(len(noise))
            # both at level k: differences first, so that close answers keep theirs
            row = asked.index(k)
            responses[row] = a[k] * (x - states[k]) + c[k] * (raw.float() - raws[k].float())
            answers[k] = a[k] * x + c[k] * raw.float()
        if used:
            slope = functools.reduce(torch.add, (weight * answers[level] for level, weight in used))
            y = y + (rho[k + 1] - rho[k]) * slope


def _increments(run: Measurement, raws: Tensor, states: Tensor) -> Tensor:
    """``e_q`` [B, N-1, d] float32 on the CPU, from differences of raw outputs and of states, as `ops` forms them."""
    a, c = run.a.tolist(), run.c.tolist()
    found = []
    for k in range(1, len(raws)):
        raw, raw_before = raws[k].float(), raws[k - 1].float()
        moved = c[k] * (raw - raw_before) + (c[k] - c[k - 1]) * raw_before
        moved += a[k] * (states[k] - states[k - 1]) + (a[k] - a[k - 1]) * states[k - 1]
        found.append(moved.flatten(1).float().cpu())
    return torch.stack(found, dim=1)


def _gram(rows: Tensor) -> Tensor:
    """Gram matrix of the rows of each sample, [B, R, R] float64, from [R, B, d]."""
    wide = torch.float32 if rows.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    parts = ((part := block.to(wide).transpose(0, 1)) @ part.mT for block in rows.split(CHUNK, dim=2))
    return functools.reduce(torch.add, parts).double()
