"""Algorithm 2 in a training loop: the schedule of noise levels is learned with the denoiser of digits.

    python -m benchmarks.experiments.online_digits --start linear
    python -m benchmarks.experiments.online_digits --start log-uniform

Two networks a seed, equal in initialisation and number of steps: one draws training levels from the starting schedule,
uniform in ``s`` or in ``log s``, the other from `fastsched.AdaptiveSchedule` that starts there. Reported over
training: the coefficient of variation of the incremental corrector costs of each schedule under its own network, and
the loss on held-out digits, of EDM's weighting and averaged over ``log s``, the same levels and noises for both. With
the log-uniform start that average is the very loss that the fixed schedule trains on.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastsched as fs
from benchmarks.experiments.common import SHAPE, SIGMA_MAX, SIGMA_MIN, arguments, axes, digits_data, report
from fastsched.digits import DigitsNetwork
from fastsched.fixed_point import variation
from fastsched.noise import log_uniform

LEVELS = 25


def preconditioned(network: DigitsNetwork, z: Tensor, s: Tensor) -> Tensor:
    """The denoiser ``D(z; s)``, EDM's preconditioning around the raw network."""
    level, deviation = s.to(z.dtype)[:, None, None, None], network.sigma_data
    width = (level**2 + deviation**2).sqrt()
    return (deviation / width) ** 2 * z + level * deviation / width * network(z / width, s.to(z.dtype).log() / 4)


def weighted_loss(network: DigitsNetwork, clean: Tensor, s: Tensor, noise: Tensor) -> Tensor:
    """EDM's loss of each sample, [B]: 1 for a network that returns 0."""
    z = clean + s[:, None, None, None] * noise
    weight = (s**2 + network.sigma_data**2) / (s * network.sigma_data) ** 2
    return weight * (preconditioned(network, z, s) - clean).square().mean((1, 2, 3))


def held_out_loss(network: DigitsNetwork, clean: Tensor) -> float:
    """Averaged over levels uniform in ``log s``; the same levels and noises at every call."""
    generator = torch.Generator().manual_seed(1234)
    losses = []
    with torch.no_grad():
        for s in log_uniform(SIGMA_MAX, SIGMA_MIN, 24).tolist():
            noise = torch.randn(clean.shape, generator=generator)
            losses.append(float(weighted_loss(network, clean, torch.full((len(clean),), s), noise).mean()))
    return float(np.mean(losses))


def cost_variation(network: DigitsNetwork, s: Tensor, clean: Tensor) -> float:
    """Of the incremental corrector costs along the schedule ``s``, under this network."""
    denoiser = fs.Denoiser.from_edm(network)
    cost = fs.costs.stein_corrector(denoiser, shape=SHAPE, sigmas=s, samples=128, data=clean, progress=False)
    return variation(cost.adjacent)


def train(
    data: Tensor, held_out: Tensor, start: Tensor, adaptive: bool, seed: int, steps: int, batch: int = 128
) -> list[dict[str, Any]]:
    """One run; a row for each of five moments of it."""
    torch.manual_seed(seed)
    network = DigitsNetwork(sigma_data=float(data.std()), width=128, blocks=3)
    average = copy.deepcopy(network).requires_grad_(False)
    optimiser = torch.optim.Adam(network.parameters(), 1e-3)
    decay = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda n: 0.5 * (1 + math.cos(math.pi * n / steps)))
    schedule = fs.AdaptiveSchedule(start, rate=0.02)
    draws = torch.Generator().manual_seed(seed)
    probes = torch.Generator().manual_seed(seed + 1)
    rows = []
    for n in range(1, steps + 1):
        clean = data[torch.randint(len(data), (batch,), generator=draws)]
        s = schedule.draw(batch, generator=draws)
        loss = weighted_loss(network, clean, s, torch.randn(clean.shape, generator=draws)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        decay.step()
        with torch.no_grad():
            for mean, value in zip(average.parameters(), network.parameters(), strict=True):
                mean.lerp_(value, max(0.005, 1 / n))
        if adaptive and n > steps // 20:  # costs of a network that has learned nothing yet say nothing
            schedule.observe_denoiser(lambda z, s: preconditioned(average, z, s), clean, generator=probes)
            schedule.update()
        if n % (steps // 5) == 0:
            rows.append(
                {
                    "seed": seed,
                    "schedule": "adaptive" if adaptive else "fixed",
                    "step": n,
                    "cost_variation": cost_variation(average, schedule.s, held_out),
                    "held_out_loss": held_out_loss(average, held_out),
                }
            )
    return rows


def main() -> None:
    args = arguments(__doc__, start=("log-uniform", "linear"))
    seeds, steps = (1, 200) if args.quick else (5, 1500)
    linear = torch.linspace(SIGMA_MAX, SIGMA_MIN, LEVELS, dtype=torch.float64)
    start = linear if args.start == "linear" else log_uniform(SIGMA_MAX, SIGMA_MIN, LEVELS)
    data = digits_data()
    data = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(0))]
    data, held_out = data[360:], data[:360]
    rows = [
        row
        for seed in range(seeds)
        for adaptive in (False, True)
        for row in train(data, held_out, start, adaptive, seed, steps)
    ]
    figure, panels = axes(2)
    for panel, quantity in zip(panels, ("cost_variation", "held_out_loss"), strict=True):
        for colour, name in (("C1", "fixed"), ("C0", "adaptive")):
            for seed in range(seeds):
                line = [row for row in rows if row["seed"] == seed and row["schedule"] == name]
                steps_of = [row["step"] for row in line]
                panel.plot(steps_of, [row[quantity] for row in line], colour, label=name if seed == 0 else None)
        panel.set_xlabel("training step")
        panel.set_ylabel(quantity.replace("_", " "))
    panels[0].legend()
    columns = ("seed", "schedule", "step", "cost_variation", "held_out_loss")
    report(f"online_digits_{args.start}", rows, columns, ("seed", "schedule", "step"), quick=args.quick, figure=figure)
    final = [row for row in rows if row["step"] == max(row["step"] for row in rows)]
    for name in ("fixed", "adaptive"):
        for quantity in ("cost_variation", "held_out_loss"):
            values = [row[quantity] for row in final if row["schedule"] == name]
            print(f"{name}: {quantity} at the end {np.mean(values):.4f}, over seeds ± {np.std(values):.4f}")


if __name__ == "__main__":
    main()
