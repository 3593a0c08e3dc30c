"""The true limit: gradient descent through the network on the nodes and the weights of a linear multistep sampler.

    python -m benchmarks.quality.gradient_limit

In ``y = x / sigma`` over ``rho = alpha / sigma``, with the denoised samples ``D_m`` of all nodes so far,

    y_{n+1} = y_n + (rho_{n+1} - rho_n) [D_n + sum_{m<n} b_{n,m} (D_m - D_n)]
    x0 = D_{K-1} + sum_{m<K-1} b_{K-1,m} (D_m - D_{K-1}).

The weights ``b`` are those of dpmpp_2m on the nodes (0 in the last step) plus a correction. Adam moves nodes and
corrections together, from `fastsched.optimal_schedule` and corrections of 0, to minimise the mean logarithm of the
squared distance to the converged samples of 128 noises. Samplers that learn their weights by gradients do the same;
here the number of calls is not limited. Rows go to ``benchmarks/results/quality_gradient_limit.csv``; cells that the
file already has are not run again. Errors are on the noises of seed 0 of `benchmarks.quality.run`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from tqdm import tqdm

import fastsched as fs
from benchmarks.common import RESULTS, append, environment, read
from benchmarks.quality.choosing import Choosers
from benchmarks.quality.models import MODELS
from benchmarks.quality.run import REFERENCE, SAMPLES
from fastsched.denoisers.noise import VariancePreserving
from fastsched.measurement.converged_samples import Reference

NAME = "quality_gradient_limit"
KEY = ("denoiser", "calls")
CALLS = (4, 6, 8)
#: Number of noises of the descent, and their seed, which no other part of the benchmark uses.
NOISES = 128
SEED = 2000
#: Adam's iterations, and its first learning rate, which falls to 0 along a cosine.
ITERATIONS = {"digits": 600, "digits_vp": 600, "patches": 200}
LEARNING_RATE = 0.03


@dataclass(frozen=True, eq=False)
class DifferentiableTimesteps(VariancePreserving):
    """A process whose timesteps are differentiable in the level; measurements do not need this."""

    def timestep(self, s: Tensor) -> Tensor:
        """Fractional timesteps, interpolated linearly in ``log s`` between the entries of the table."""
        t = VariancePreserving.timestep(self, s)
        logs = self.trained_levels.log()
        below = t.floor().long().clamp(0, len(logs) - 2)
        return t + (s.log() - s.detach().log()) / (logs[below + 1] - logs[below])


def differentiable(denoiser: fs.Denoiser) -> fs.Denoiser:
    """The same denoiser, with a network condition that is differentiable in the level."""
    process = denoiser.process
    if not isinstance(process, VariancePreserving):
        return denoiser
    values = {field.name: getattr(process, field.name) for field in fields(process) if field.init}
    return replace(denoiser, process=DifferentiableTimesteps(**values))


@dataclass(frozen=True)
class Sampler:
    """A linear multistep sampler whose nodes and weights can be differentiated."""

    first: float  #: ``log s`` of the first node, which is fixed
    last: float  #: lower bound of ``log s`` of all nodes
    log_gaps: Tensor  #: logarithms of the distances in ``log s`` between nodes, [K - 1]
    corrections: Tensor  #: added to dpmpp_2m's weights, [K, K], used below the diagonal

    @classmethod
    def of_schedule(cls, s: Tensor, lowest: float) -> Sampler:
        """dpmpp_2m on the nodes ``s`` [K], all finite and above 0."""
        gaps = -s.log().diff()
        return cls(float(s[0].log()), math.log(lowest), gaps.log(), torch.zeros(len(s), len(s), dtype=torch.float64))

    def nodes(self) -> Tensor:
        """``s``, [K]."""
        steps = torch.cat([self.log_gaps.new_zeros(1), self.log_gaps.exp().cumsum(0)])
        return (self.first - steps).clamp_min(self.last).exp()

    def weights(self, s: Tensor) -> list[Tensor]:
        """``b_n`` of each step, [n] each."""
        lam = -s.log()
        found = []
        for n in range(len(s)):
            b = self.corrections[n, :n]
            if 0 < n < len(s) - 1:  # dpmpp_2m: D_n + (D_n - D_{n-1}) / (2 r), r the ratio of the last two steps
                theory = -0.5 * (lam[n + 1] - lam[n]) / (lam[n] - lam[n - 1])
                b = torch.cat([b[:-1], (b[-1] + theory)[None]])
            found.append(b)
        return found

    def sample(self, denoise: Callable[[Tensor, Tensor], Tensor], y: Tensor) -> Tensor:
        """The sampler's samples from the noises ``y`` [B, *shape]."""
        s = self.nodes()
        known: list[Tensor] = []
        for n, b in enumerate(self.weights(s)):
            denoised = denoise(y, s[n])
            slope = denoised
            for weight, earlier in zip(b, known, strict=True):
                slope = slope + weight.to(y.dtype) * (earlier - denoised)
            known.append(denoised)
            y = slope if n + 1 == len(s) else y + (1 / s[n + 1] - 1 / s[n]).to(y.dtype) * slope
        return y


def descend(
    denoise: Callable[[Tensor, Tensor], Tensor], start: Sampler, reference: Reference, iterations: int
) -> Sampler:
    """Adam on nodes and corrections, on the mean logarithm of the squared distance to the converged samples."""
    gaps, corrections = (x.clone().requires_grad_() for x in (start.log_gaps, start.corrections))
    sampler = replace(start, log_gaps=gaps, corrections=corrections)
    adam = torch.optim.Adam([gaps, corrections], LEARNING_RATE)
    slower = torch.optim.lr_scheduler.CosineAnnealingLR(adam, iterations)
    for _ in range(iterations):
        adam.zero_grad()
        ends = sampler.sample(denoise, reference.noise)
        log_distances(ends, reference.ends).mean().backward()
        torch.nn.utils.clip_grad_norm_([gaps, corrections], 1.0)
        adam.step()
        slower.step()
    return replace(start, log_gaps=gaps.detach(), corrections=corrections.detach())


def log_distances(ends: Tensor, converged: Tensor) -> Tensor:
    """Logarithms of the squared distances, [B]."""
    return (ends - converged).double().square().flatten(1).sum(1).log()


def find(name: str, calls: int) -> dict[str, object]:
    """The limit of one cell, as a row of the results."""
    model = MODELS[name]()
    denoiser = differentiable(model.denoiser)
    trained, unseen = (model.converged(n, seed, **REFERENCE) for n, seed in ((NOISES, SEED), (SAMPLES, 0)))
    schedule = fs.optimal_schedule(Choosers(model, SEED).statistics, calls, "dpmpp_2m")
    start = Sampler.of_schedule(denoiser.process.level(schedule.sigmas[:-1]), denoiser.process.s_min)
    found = descend(denoiser.denoise, start, trained, ITERATIONS[name])

    def errors(sampler: Sampler, reference: Reference) -> tuple[str, str]:
        with torch.no_grad():
            distances = log_distances(sampler.sample(denoiser.denoise, reference.noise), reference.ends)
        return f"{float(distances.mean().exp()):.4g}", f"{float(distances.exp().mean()):.4g}"

    typical, mean = errors(found, unseen)
    weights = " ".join(f"{b:.5g}" for step in found.weights(found.nodes()) for b in step.tolist())
    return {
        "denoiser": name,
        "calls": calls,
        "typical_error": typical,
        "mean_error": mean,
        "typical_error_where_trained": errors(found, trained)[0],
        "start_error": errors(start, unseen)[0],
        "model_calls": ITERATIONS[name] * NOISES * calls + trained.model_calls,
        "sigmas": " ".join(f"{value:.6g}" for value in denoiser.process.sampler_sigma(found.nodes()).tolist()),
        "weights": weights,
        "commit": environment()["commit"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(ITERATIONS), choices=list(ITERATIONS))
    parser.add_argument("--calls", nargs="*", type=int, default=list(CALLS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    known = {(row["denoiser"], int(row["calls"])) for row in read(RESULTS / f"{NAME}.csv")}
    cells = [(name, calls) for name in args.models for calls in args.calls if (name, calls) not in known]
    for name, calls in tqdm(cells, desc="gradient limit", unit="cell"):
        append(NAME, [find(name, calls)], KEY)


if __name__ == "__main__":
    main()
