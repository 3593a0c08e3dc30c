"""Decoupled levels: the network asked at a level that is not the state's. What that gains after `fastsched.fit`.

    python -m benchmarks.quality.decoupled --models digits --solvers ddim dpmpp_2m fitted
    python -m benchmarks.quality.decoupled --models cifar-grey --weights FOLDER --noises 8 --iterations 3

The state keeps its level ``s_n`` and what is made of the answer keeps it too; only the level or timestep that the
network is told moves, by an offset a step in ``log s``. From the schedule of `fastsched.fit`, Gauss-Newton steps on
the sampler's own ends, differences taken by running it, lower the mean logarithm of the squared error of ``--noises``
noises: by offsets alone, by the levels (or the fitted solver's weights) alone, and by both. Errors are of 64 other
noises. Rows go to ``results/decoupled.csv``. The seeds are not those of the benchmark.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import fastsched as fs
from benchmarks.common import append, environment
from benchmarks.quality.cost_curve import model_of
from benchmarks.quality.models import MODELS
from benchmarks.quality.run import SAMPLES
from fastsched.comparison import Reference
from fastsched.costs.norms import Array
from fastsched.sampling.solvers import FITTED

KEY = ("denoiser", "solver", "calls", "seed", "model_calls", "moved")
#: Damping factors of a Gauss-Newton step, all of which are run.
DAMPING = (0.01, 0.1, 1.0, 10.0)
#: The most that a step changes an unknown, and the least fall of the objective that is gone on after.
MOST, LEAST = 0.3, 2e-3
#: Differences that derivatives are taken from; of integer timesteps, the second.
DIFFERENCE = {"levels": (0.01, 0.05), "offsets": (0.02, 0.1), "weights": (0.01, 0.01)}


@dataclass(frozen=True)
class Decoupled(fs.Denoiser):
    """A denoiser for one run, whose network is told the level times ``exp(offset)``, an offset a call."""

    offsets: Iterator[float] = field(default_factory=lambda: iter(()))

    def raw_output(self, x: Tensor, s: Tensor | float, *, dtype: torch.dtype | None = None) -> Tensor:
        """The network's answer; the input is scaled as at level ``s``."""
        level = torch.as_tensor(s, dtype=torch.float64)
        asked = (level * math.exp(next(self.offsets))).clamp(self.process.s_min, self.process.s_max)
        if self.prediction == "edm":
            # what c_in makes of x at `asked` is to be what it makes of x at `level`
            squares = asked.square() + self.sigma_data**2, level.square() + self.sigma_data**2
            x = x * float((squares[0] / squares[1]).sqrt())
        return super().raw_output(x, asked, dtype=dtype)


@dataclass(frozen=True, eq=False)
class Unknowns:
    """A sampler that can be moved: ``log s`` [K], offsets [K], and the weights [K, K] of the fitted solver."""

    levels: Array
    offsets: Array
    weights: Array | None

    def moved(self, parts: Sequence[str], by: Array) -> Unknowns:
        """The same with these parts changed; the first level stays, and rows of weights sum to 1."""
        found, steps = self, len(self.levels)
        for part in parts:
            change, by = by[: sizes(part, steps)], by[sizes(part, steps) :]
            if part == "levels":
                found = replace(found, levels=found.levels + np.append(0.0, change))
            elif part == "offsets":
                found = replace(found, offsets=found.offsets + change)
            elif found.weights is not None:
                below = found.weights.copy()
                below[np.tril_indices(steps, -1)] += change
                found = replace(found, weights=below + np.diag(1 - below.sum(1)))
        return found

    def sample(self, denoiser: fs.Denoiser, solver: str, noise: Tensor) -> Tensor | None:
        """The ends; None where levels are out of order or out of range."""
        process = denoiser.process
        s = process.nearest(torch.from_numpy(np.append(np.exp(self.levels), 0.0)))
        if bool((s[1:] >= s[:-1]).any()) or float(s[-2]) < 0.999 * process.s_min:
            return None
        values = {name: getattr(denoiser, name) for name in ("network", "process", "prediction", "sigma_data")}
        asked = Decoupled(**values, offsets=iter(self.offsets.tolist()))
        if self.weights is None:
            return fs.sample(asked, process.sampler_sigma(s), solver, noise)
        return fs.sample(
            asked, fs.Schedule.from_levels(process, s, FITTED, None, torch.from_numpy(self.weights)), noise=noise
        )


def sizes(part: str, steps: int) -> int:
    """How many unknowns a part has."""
    return {"levels": steps - 1, "offsets": steps, "weights": steps * (steps - 1) // 2}[part]


def optimised(
    start: Unknowns, parts: Sequence[str], denoiser: fs.Denoiser, solver: str, reference: Reference, iterations: int
) -> tuple[Unknowns, int]:
    """Gauss-Newton on the ends of the reference's noises, each divided by its own error; with the runs that it made."""
    steps, runs = len(start.levels), 0
    integers = getattr(denoiser.process, "integer_timesteps", False)
    h = np.concatenate([np.full(sizes(part, steps), DIFFERENCE[part][integers]) for part in parts])

    def residual(at: Array) -> Array | None:
        nonlocal runs
        runs += 1
        ends = start.moved(parts, at).sample(denoiser, solver, reference.noise)
        return None if ends is None else (ends - reference.ends).flatten(1).double().numpy()

    at, here = np.zeros_like(h), residual(np.zeros_like(h))
    assert here is not None
    value = log_error(here)
    for _ in range(iterations):
        jacobian = np.zeros((*here.shape, len(h)))
        for i, step in enumerate(np.diag(h)):
            sign = 1 if (there := residual(at + step)) is not None else -1
            there = residual(at - step) if there is None else there
            jacobian[..., i] = 0 if there is None else sign * (there - here) / h[i]
        weight = 1 / (here**2).sum(1)
        normal = np.einsum("b,bdi,bdj->ij", weight, jacobian, jacobian)
        slope = np.einsum("b,bdi,bd->i", weight, jacobian, here)
        diagonal = np.diag(np.diag(normal) + 1e-9 * np.trace(normal) / len(h))
        tried = [at - np.clip(np.linalg.solve(normal + each * diagonal, slope), -MOST, MOST) for each in DAMPING]
        known = [(log_error(found), to, found) for to in tried if (found := residual(to)) is not None]
        best = min(known, key=lambda each: each[0], default=(math.inf, at, here))
        fall, (value, at, here) = value - best[0], best if best[0] < value else (value, at, here)
        if fall < LEAST:
            break
    return start.moved(parts, at), runs


def log_error(residual: Array) -> float:
    """The mean logarithm of the squared errors of residuals [B, d]."""
    return float(np.log((residual**2).sum(1)).mean())


def rows_of(args: argparse.Namespace, name: str, seed: int, solver: str, steps: int) -> Iterator[dict[str, object]]:
    """The fit's own error, and what moving each part makes of it."""
    model = model_of(name, None if name in MODELS else args.weights)
    both = fs.converged_reference(
        model.denoiser,
        model.shape,
        samples=SAMPLES + args.noises,
        seed=seed,
        steps=200,
        solver="dpmpp_3m",
        progress=False,
    )
    judge, tune = (
        replace(both, noise=both.noise[part], ends=both.ends[part]) for part in (slice(SAMPLES), slice(SAMPLES, None))
    )
    options = {"model_calls": args.model_calls, "seed": seed, "progress": False}
    schedule = fs.fit(model.denoiser, model.shape, steps, solver, **options)
    levels = model.denoiser.process.level(schedule.sigmas)[:-1].log().numpy()
    start = Unknowns(levels, np.zeros(steps), None if schedule.weights is None else schedule.weights.numpy())
    known = "weights" if solver == FITTED else "levels"
    for parts in ((), ("offsets",), (known,), (known, "offsets")):
        found, runs = start, 0
        if parts:
            found, runs = optimised(start, parts, model.denoiser, solver, tune, args.iterations)
        ends = found.sample(model.denoiser, solver, judge.noise)
        assert ends is not None
        squared = fs.metrics.squared_distances(ends, judge.ends)
        yield {
            "denoiser": name, "solver": solver, "calls": steps, "seed": seed, "model_calls": args.model_calls,
            "moved": " and ".join(parts) or "nothing", "noises": args.noises, "iterations": args.iterations,
            "further_calls": runs * steps * args.noises,
            "typical_error": f"{fs.metrics.geometric_mean(squared):.4g}", "mean_error": f"{float(squared.mean()):.4g}",
        }  # fmt: skip


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["digits", "digits_vp", "patches"])
    parser.add_argument(
        "--weights", type=Path, default=None, help="others' networks: a folder with zoo.py in or beside it"
    )
    parser.add_argument("--solvers", nargs="+", default=["ddim", "dpmpp_2m"])
    parser.add_argument("--calls", nargs="+", type=int, default=[5, 8])
    parser.add_argument("--seeds", nargs="+", type=int, default=[900, 901])
    parser.add_argument("--noises", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--model-calls", type=int, default=800, help="of the fit that is the start")
    args = parser.parse_args()
    torch.set_num_threads(1)
    commit = environment()["commit"]
    for place in itertools.product(args.models, args.seeds, args.solvers, args.calls):
        for row in rows_of(args, *place):
            append("decoupled", [row | {"commit": commit}], KEY)
            print(*row.values(), flush=True)


if __name__ == "__main__":
    main()
