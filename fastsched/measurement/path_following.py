"""Follow the paths of a batch of samples: the reference path, then the deviated ones, level by level together.

For each path, the solver's own states are held, and the N - 1 increments and the responses, about ``2 N`` states per
sample, in memory that is allocated before the first call (`fastsched.measurement.kept_vectors`). A response is the
difference between the outputs of a deviated path and of the reference path at one level. Until the deviated paths reach
this level, the reference path's state and raw output are stored in the rows that the two responses take later.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from fastsched import validate
from fastsched.denoisers.deferred_checks import DeferredChecks
from fastsched.denoisers.denoiser import Denoiser
from fastsched.denoisers.network_errors import not_finite
from fastsched.measurement.deviated_paths import DeviatedPath, asked_levels, queries
from fastsched.measurement.kept_vectors import KeptVectors
from fastsched.measurement.rounding import STORAGE_ERROR, warn_of_storage
from fastsched.measurement.statistics import PathStatistics, data_deviation, with_vectors
from fastsched.sampling.random_streams import noise_of
from fastsched.sampling.sampler import answered, integration, nodes_of
from fastsched.sampling.solvers import get_solver

Answer = TypeVar("Answer")
#: A generator that needs the network: it yields a state and its level, is sent the raw output ``R``, returns a result.
Query: TypeAlias = Generator[tuple[Tensor, int], Tensor, Answer]

#: Solver of the reference path: of seven tried, its ends are nearest to the converged ones for the same calls. Over 48
#: levels their squared distance is 12 to 50 times smaller than with DPM-Solver++(3M).
PATH_SOLVER = "unipc_3"

#: Warn of levels that end above this fraction of the data's deviation and this multiple of the process's lowest level.
#: Predicted errors of 16 steps of DPM-Solver++(2M), over the real ones, were 0.9 (digits), 5.9 and 2.3 (mixture_64,
#: patches) with the usual levels; 0.3, 1.3 and 1.4 with levels that end at `HIGH_END`; 0.1, 0.2 and 0.7 at twice this.
HIGH_END, ABOVE_LOWEST = 0.05, 3.0


@dataclass(frozen=True, eq=False)
class Measurement:
    """What is measured, and how."""

    denoiser: Denoiser
    s: Tensor  #: the levels, [N] float64
    device: torch.device  #: where the states are
    dtype: torch.dtype  #: what the network computes in
    deviated: tuple[DeviatedPath, ...] = ()  #: the deviated paths to follow; none for the reference path alone
    keep_vectors: bool = False  #: whether the statistics are to hold increments and responses
    #: Where increments and responses are held while paths are followed: ``"device"`` or ``"cpu"``; None until it is
    #: chosen (`fastsched.measurement.memory.with_store`).
    store: str | None = None
    a: Tensor = field(init=False)
    c: Tensor = field(init=False)
    sigma: Tensor = field(init=False)

    def __post_init__(self) -> None:
        a, c = self.denoiser.coefficients(self.s)
        for name, value in (("a", a), ("c", c), ("sigma", self.denoiser.process.sigma(self.s))):
            object.__setattr__(self, name, value)

    @property
    def calls(self) -> int:
        """Network evaluations per sample."""
        return len(self.queries)

    @property
    def queries(self) -> list[int]:
        """The levels at which the network is called, in order."""
        return queries(len(self.s), self.deviated)

    @property
    def vectors(self) -> int:
        """The number of increments and responses of a sample: one for each call but the first."""
        return self.calls - 1

    @property
    def rows(self) -> int:
        """Memory rows for increments and responses; two or more per asked level, first for a state and raw output."""
        return len(self.s) - 1 + (max(2, len(self.deviated)) if self.deviated else 0) * len(asked_levels(len(self.s)))

    def row(self, path: int, k: int) -> int:
        """The row of a deviated path's response at the asked level k; each path's rows precede those of the next."""
        asked = asked_levels(len(self.s))
        return len(self.s) - 1 + path * len(asked) + asked.index(k)

    def drive(self, steps: Query[Answer]) -> Answer:
        """Run ``steps`` with the denoiser's own network, which may reuse the memory of its outputs."""
        return answered(steps, lambda x, k: self.denoiser.borrowed_output(x, float(self.s[k]), dtype=self.dtype))


class OutputChecks:
    """Checks the network's outputs for a batch, one after the other, without waiting for the device."""

    def __init__(self, run: Measurement, advance: Callable[[int], object], deferred: DeferredChecks | None) -> None:
        self.run, self.advance, self.deferred = run, advance, DeferredChecks() if deferred is None else deferred
        self._checks = deferred is None
        self._asked, self._queries = 0, run.queries
        self._norms: list[Tensor] = []  # [B], one a level of the reference path, if outputs have 16 bits
        self._dtype: torch.dtype | None = None

    def look(self, raw: Tensor) -> None:
        """Note whether an output [B, *shape] is finite and, on the reference path, its norms."""
        if self._checks:
            run, k = self.run, self._queries[self._asked]
            where = f"(level {k} of {len(run.s)})"
            self.deferred.add_finite(raw, lambda: f"{not_finite(run.denoiser.process, run.s[k])} {where}")
            self.deferred.run(wait=False)
        if self._asked < len(self.run.s):
            self._dtype = raw.dtype if self._dtype is None else torch.promote_types(self._dtype, raw.dtype)
            if self._dtype in STORAGE_ERROR:
                self._norms.append(torch.linalg.vector_norm(raw.flatten(1), dim=1, dtype=torch.float32))
        self._asked += 1
        self.advance(len(raw))

    def warn_of_storage(self, gram: Tensor) -> None:
        """Warn if the reference path's outputs were too coarse for its increments; ``gram`` [B, N-1, N-1]."""
        if self._dtype in STORAGE_ERROR:
            warn_of_storage(torch.stack(self._norms), self._dtype, self.run.c, gram)


def measurement_steps(
    run: Measurement,
    seeds: Tensor,
    shape: tuple[int, ...],
    advance: Callable[[int], object] = lambda calls: None,
    out: Tensor | None = None,
    deferred: DeferredChecks | None = None,
) -> Query[PathStatistics]:
    """One batch's measurement, as a generator that is sent the network's raw outputs.

    It yields ``(x, k)``, a state [B, *shape] and its level. It is sent ``R`` for them, and keeps no reference to it. It
    returns the statistics. So anything that can call the network can drive a measurement: `fastsched.measure`, or a
    pipeline's own loop (`fastsched.diffusers.CalibrationScheduler`).

    ``advance`` is called with the number of calls made. Kept vectors are written to ``out`` [B, V, d] float32 on the
    CPU, or to new memory. A caller that checks by itself whether outputs are finite passes its ``deferred``
    checks, which are run at the end.

    Raises:
        ValueError: If an output holds NaN or inf (the message names the first such level), or if squared increments
            exceed float32. For outputs on a GPU it is raised once the result is known without waiting, or at the end.
    """
    noise, elements = noise_of(seeds, shape).to(run.device), math.prod(shape)
    checks = OutputChecks(run, advance, deferred)
    with KeptVectors.allocated((len(seeds), run.rows, elements), run.device, run.store or "device", out) as kept:
        first, end = yield from _follow_reference(run, noise, kept, checks)
        followers = [_Follower(run.s, path, noise, first) for path in run.deviated]
        del noise, first  # no longer than the followers need them
        if run.deviated:
            yield from _follow_deviated(run, followers, kept, checks)
        checks.deferred.run()
        gram, n = kept.gram(run.vectors), len(run.s) - 1
        _check_squares(gram)
        vectors = kept.on_cpu(run.vectors, out) if run.keep_vectors else None
        ends = end.cpu()
    checks.warn_of_storage(gram[:, :n, :n])
    data_std = data_deviation(ends)
    _warn_of_high_end(run, data_std)
    found = PathStatistics(
        process=run.denoiser.process,
        s=run.s,
        shape=shape,
        seeds=seeds,
        gram=gram[:, :n, :n].contiguous(),
        ends=ends,
        data_std=data_std,
        model_calls=run.calls * len(seeds),
        deviated=run.deviated,
        response_cross=gram[:, n:, :n].contiguous() if run.deviated else None,
        response_gram=gram[:, n:, n:].contiguous() if run.deviated else None,
    )
    return with_vectors(found, vectors)


def _warn_of_high_end(run: Measurement, data_std: float) -> None:
    """Warn if the levels end so high that the error of the step from there to 0 matters."""
    lowest, process = float(run.s[-1]), run.denoiser.process
    if lowest > HIGH_END * data_std and lowest > ABOVE_LOWEST * process.s_min:
        validate.warn(
            f"the levels end at {lowest:.3g}, and the data's deviation is {data_std:.3g}: the error of the step from "
            f"there to 0 is not measured, and errors are predicted too low. Add levels nearer to {process.s_min:.3g}",
        )


def _check_squares(gram: Tensor) -> None:
    if not bool(gram.isfinite().all()):
        raise ValueError(
            "the denoised samples change by so much from level to level that their squares exceed float32; does the "
            "network return what it is said to predict? Otherwise scale the data and the levels"
        )


def _follow_reference(
    run: Measurement, noise: Tensor, kept: KeptVectors, checks: OutputChecks
) -> Query[tuple[Tensor, Tensor]]:
    """Keep the increments, and states and raw outputs at asked levels; return ``D_0`` and the end ``D_{N-1}``.

    Follows `PATH_SOLVER`: the network is called at predicted states, which the corrector then moves with the output
    found there.
    """
    nodes = nodes_of(run.denoiser.process, torch.cat([run.s, run.s.new_zeros(1)]))
    path = integration(nodes, get_solver(PATH_SOLVER), noise, s=run.s)
    a, c, sigma = run.a.tolist(), run.c.tolist(), run.sigma.tolist()
    asked = asked_levels(len(run.s)) if run.deviated else range(0)
    first = denoised = before = None
    for k in range(len(run.s)):
        y, _ = path.send(denoised)
        x = sigma[k] * y
        del y  # the solver holds what it needs
        raw = yield x, k
        checks.look(raw)
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32), copy=True)  # the network may overwrite it
        if before is not None:
            row = kept.row(k - 1, x.shape)
            found = _increment((x, raw), before, a[k - 1 : k + 1], c[k - 1 : k + 1], before[1] if row is None else row)
            if row is None:
                kept.write(k - 1, found)
            del row, found
        if k in asked:
            kept.write(run.row(0, k), x)
            kept.write(run.row(1, k), raw)
        before = x, raw
        denoised = (a[k] * x).add_(raw, alpha=c[k])
        first = denoised if first is None else first
    assert first is not None  # there are levels
    assert denoised is not None
    return first, denoised


def _increment(
    now: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor], a: Sequence[float], c: Sequence[float], out: Tensor
) -> Tensor:
    """``D_k - D_{k-1}`` from pairs ``(x, R)``, by differences of these, so that close outputs lose no digits.

    ``c_k (R_k - R_{k-1}) + (c_k - c_{k-1}) R_{k-1} + (the same in a, x)``, into ``out``, which may be ``R_{k-1}``.
    ``x_{k-1}`` is overwritten.
    """
    found, factor = _difference(now[1], before[1], c, out)
    found.mul_(factor)
    if any(a):
        of_x, factor = _difference(now[0], before[0], a, before[0])
        found.add_(of_x, alpha=factor)
    return found


def _difference(now: Tensor, before: Tensor, factors: Sequence[float], out: Tensor) -> tuple[Tensor, float]:
    """A tensor and a factor whose product is ``f_1 (now - before) + (f_1 - f_0) before``.

    Interpolation, ``lerp(start, end, w) = start + w (end - start)``, takes one pass over memory.
    """
    step = factors[1] - factors[0]
    if abs(step) < 1e-9 * abs(factors[1]):  # rounding of the difference is larger than the second term
        return torch.sub(now, before, out=out), factors[1]
    return torch.lerp(before, now, factors[1] / step, out=out), step


def _follow_deviated(
    run: Measurement, followers: Sequence[_Follower], kept: KeptVectors, checks: OutputChecks
) -> Query[None]:
    """Keep the responses ``D(z') - D(z)`` of all deviated paths, one asked level after the other."""
    a, c, sigma = run.a.tolist(), run.c.tolist(), run.sigma.tolist()
    shape = followers[0].y.shape
    for k in asked_levels(len(run.s)):
        state, raw_there = (kept.read(run.row(m, k), shape) for m in (0, 1))
        responses = []
        for follower in followers:
            follower.move(k)
            x = sigma[k] * follower.y
            raw = yield x, k
            checks.look(raw)
            follower.answer(k, x, raw, a[k], c[k])
            # differences of R and x first, as in `_increment`
            responses.append(torch.sub(raw.float(), raw_there).mul_(c[k]))
            if a[k] != 0.0:
                responses[-1].add_(x.sub_(state), alpha=a[k])
            del x, raw  # frees memory before the next call of the network
        del state, raw_there
        while responses:  # into the rows of state and raw output
            kept.write(run.row(len(responses) - 1, k), responses.pop())


class _Follower:
    """A deviated path on its way: its state ``y``, and the earlier outputs that later steps use."""

    def __init__(self, s: Tensor, path: DeviatedPath, noise: Tensor, first: Tensor) -> None:
        self.y, self._jumps = noise, path.jumps(s)
        self._last_use = {level: k for k, factors in self._jumps.items() for level in factors}
        self._answers = {0: first}

    def move(self, k: int) -> None:
        """Move to the asked level k from the one before."""
        for level, factor in self._jumps[k].items():
            self.y = torch.add(self.y, self._answers[level], alpha=factor)
        self._answers = {level: held for level, held in self._answers.items() if self._last_use[level] > k}

    def answer(self, k: int, x: Tensor, raw: Tensor, a: float, c: float) -> None:
        """Keep ``D = a x + c R`` of level k if later steps use it."""
        if k in self._last_use:
            self._answers[k] = (a * x).add_(raw, alpha=c)
