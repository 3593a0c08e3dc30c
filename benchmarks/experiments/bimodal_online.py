"""The bimodal Gaussian with online learning: likelihood and score error over training.

    python -m benchmarks.experiments.bimodal_online

The data are ``(N(-2, 0.1^2) + N(2, 0.1^2)) / 2`` in one dimension. A small network is trained with levels drawn from a
linear schedule, from a log-uniform one, or from one learned online from the linear start (Algorithm 2). Reported over
training: the score error ``E s^2 (score - exact)^2`` averaged over ``log s``, and the log-likelihood of held-out data
under the probability-flow ODE, in nats. The log-likelihood under the exact denoiser is the bound.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastsched as fs
from benchmarks.experiments.common import arguments, axes, report
from fastsched.denoisers.level_grids import log_uniform

SIGMA_MIN, SIGMA_MAX, LEVELS = 0.01, 20.0, 25
ORACLE = fs.oracles.GaussianMixture(
    torch.ones(2), torch.tensor([[-2.0], [2.0]]), torch.full((2, 1, 1), 0.01, dtype=torch.float64)
)
DEVIATION = 2.0


class Network(nn.Module):
    """An EDM-preconditioned perceptron for states [B, 1]; its features are sines and cosines of state and level."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(17, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        )

    def forward(self, z: Tensor, s: Tensor) -> Tensor:
        """``D(z; s)``, shaped as ``z``."""
        level = s.to(z.dtype).reshape(-1, 1)
        width = (level**2 + DEVIATION**2).sqrt()
        waves = torch.arange(1.0, 5.0)
        angles = torch.cat([level.log() / 4 * waves, z / width * waves], 1)
        raw = self.layers(torch.cat([z / width, angles.sin(), angles.cos()], 1))
        return (DEVIATION / width) ** 2 * z + level * DEVIATION / width * raw


def score_error(denoise: Callable[[Tensor, Tensor], Tensor], clean: Tensor) -> float:
    generator, errors = torch.Generator().manual_seed(99), []
    for s in log_uniform(SIGMA_MAX, SIGMA_MIN, 32).tolist():
        z = clean + s * torch.randn(clean.shape, generator=generator)
        levels = torch.full((len(z),), s)
        errors.append(float(((denoise(z, levels) - ORACLE.denoise(z, s)) / s).square().mean()))
    return float(np.mean(errors))


def log_likelihood(denoise: Callable[[Tensor, Tensor], Tensor], clean: Tensor, steps: int = 60) -> float:
    """The mean log-likelihood of ``clean`` [B, 1] with noise of level ``SIGMA_MIN`` added, in nats.

    Heun's method integrates the ODE up to the highest level, together with the logarithm of the map's derivative.
    """
    levels = log_uniform(SIGMA_MAX, SIGMA_MIN, steps + 1).flip(0).tolist()
    z = clean + SIGMA_MIN * torch.randn(clean.shape, generator=torch.Generator().manual_seed(98))
    volume = torch.zeros(len(z))

    def slope(state: Tensor, s: float) -> tuple[Tensor, Tensor]:
        at = torch.full((len(state),), s)
        value, change = torch.func.jvp(lambda x: (x - denoise(x, at)) / s, (state,), (torch.ones_like(state),))[:2]
        return value, change[:, 0]

    for s, s_next in itertools.pairwise(levels):
        first, first_change = slope(z, s)
        second, second_change = slope(z + (s_next - s) * first, s_next)
        z = z + (s_next - s) * (first + second) / 2
        volume = volume + (s_next - s) * (first_change + second_change) / 2
    variance = SIGMA_MAX**2 + DEVIATION**2
    prior = -z[:, 0].square() / (2 * variance) - 0.5 * np.log(2 * np.pi * variance)
    return float((prior + volume).mean())


def train(kind: str, seed: int, steps: int, batch: int, held_out: Tensor) -> list[dict[str, Any]]:
    torch.manual_seed(seed)
    network = Network()
    optimiser = torch.optim.Adam(network.parameters(), 5e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    uniform = torch.linspace(SIGMA_MAX, SIGMA_MIN, LEVELS, dtype=torch.float64)
    start = log_uniform(SIGMA_MAX, SIGMA_MIN, LEVELS) if kind == "log-uniform" else uniform
    schedule = fs.AdaptiveSchedule(start, rate=0.02)
    draws = torch.Generator().manual_seed(seed)
    rows = []
    for n in range(1, steps + 1):
        clean = ORACLE.sample(batch, seed=seed * steps + n)
        s = schedule.draw(batch, generator=draws)
        level = s[:, None]
        z = clean + level * torch.randn(clean.shape, generator=draws)
        weight = (level**2 + DEVIATION**2) / (level * DEVIATION) ** 2
        loss = (weight * (network(z, s) - clean).square()).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        decay.step()
        if kind == "learned" and n > steps // 20:
            schedule.observe_denoiser(network, clean)
            schedule.update()
        if n % (steps // 5) == 0:
            with torch.no_grad():
                error, likelihood = score_error(network, held_out), log_likelihood(network, held_out)
            rows.append({"seed": seed, "schedule": kind, "step": n, "score_error": error, "log_likelihood": likelihood})
    return rows


def main() -> None:
    args = arguments(__doc__)
    seeds, steps, count = (1, 250, 64) if args.quick else (5, 2000, 512)
    held_out = ORACLE.sample(count, seed=10**6)
    bound = log_likelihood(ORACLE.denoise, held_out)
    kinds = ("linear", "log-uniform", "learned")
    rows = [row for seed in range(seeds) for kind in kinds for row in train(kind, seed, steps, 128, held_out)]
    figure, (left, right) = axes(2)
    for colour, kind in zip(("C1", "C2", "C0"), kinds, strict=True):
        for seed in range(seeds):
            line = [row for row in rows if row["seed"] == seed and row["schedule"] == kind]
            at, label = [row["step"] for row in line], kind if seed == 0 else None
            left.semilogy(at, [row["score_error"] for row in line], colour, label=label)
            right.plot(at, [row["log_likelihood"] for row in line], colour)
    right.axhline(bound, color="0.6", lw=1, label="exact denoiser")
    right.legend()
    for panel in (left, right):
        panel.set_xlabel("training step")
    left.set_ylabel("score error")
    right.set_ylabel("log-likelihood, nats")
    left.legend()
    report("bimodal_online", rows, ("seed", "schedule", "step"), quick=args.quick, figure=figure)
    print(f"log-likelihood under the exact denoiser: {bound:.4f}")
    for kind in kinds:
        final = [row for row in rows if row["schedule"] == kind and row["step"] == steps]
        error, likelihood = (np.array([row[q] for row in final]) for q in ("score_error", "log_likelihood"))
        print(
            f"{kind}: score error {error.mean():.4g} ± {error.std():.2g}, "
            f"log-likelihood {likelihood.mean():.4f} ± {likelihood.std():.2g}"
        )


if __name__ == "__main__":
    main()
