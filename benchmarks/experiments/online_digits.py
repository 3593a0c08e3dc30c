"""Algorithm 2 in a training loop: the noise levels are learned together with the denoiser of digits.

    python -m benchmarks.experiments.online_digits --start linear
    python -m benchmarks.experiments.online_digits --start log-uniform

Networks have the same initialisation and number of steps. One draws training levels from the starting schedule,
uniform in ``s`` or in ``log s`` (*fixed*), another from a `fastsched.AdaptiveSchedule` that starts there (*adaptive*).
Reported over training: the coefficient of variation of the incremental corrector costs of each schedule under its own
network, and the loss on held-out digits with EDM's weighting, averaged over ``log s``, with the same levels and noises
for all. With the log-uniform start the fixed schedule trains on exactly this loss. There a third network draws half of
its levels from each schedule and weights them so that its objective is the same loss (*weighted*): with ``p`` and ``q``
the two densities, ``p / (p/2 + q/2)``, at most 2 (the balance heuristic of Veach and Guibas 1995).
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastsched as fs
from benchmarks.experiments.common import SHAPE, SIGMA_MAX, SIGMA_MIN, arguments, axes, report
from benchmarks.train.digits import digits_data, preconditioned
from fastsched.denoisers.digits import DigitsNetwork
from fastsched.denoisers.level_grids import log_uniform
from fastsched.selection.fixed_point import variation

LEVELS = 25
#: Splits levels into low and high: below about this level the corrector cost, and so the learned schedule, vanishes.
LOW = 0.25


def weighted_loss(network: DigitsNetwork, clean: Tensor, s: Tensor, noise: Tensor) -> Tensor:
    """EDM's loss of each sample, [B]; its mean is 1 for a network that returns 0."""
    z = clean + s[:, None, None, None] * noise
    weight = (s**2 + network.sigma_data**2) / (s * network.sigma_data) ** 2
    return weight * (preconditioned(network, z, s) - clean).square().mean((1, 2, 3))


HELD_OUT_LEVELS = log_uniform(SIGMA_MAX, SIGMA_MIN, 24)


def held_out_losses(network: DigitsNetwork, clean: Tensor) -> np.ndarray:
    """The losses at 24 levels uniform in ``log s``, [24]. Levels and noises are the same at every call."""
    generator = torch.Generator().manual_seed(1234)
    losses = []
    with torch.no_grad():
        for s in HELD_OUT_LEVELS.tolist():
            noise = torch.randn(clean.shape, generator=generator)
            losses.append(float(weighted_loss(network, clean, torch.full((len(clean),), s), noise).mean()))
    return np.array(losses)


def cost_variation(network: DigitsNetwork, s: Tensor, clean: Tensor) -> float:
    """Coefficient of variation of the incremental corrector costs along ``s`` under this network."""
    denoiser = fs.Denoiser.from_edm(network)
    cost = fs.costs.stein_corrector(denoiser, shape=SHAPE, sigmas=s, samples=128, data=clean, progress=False)
    return variation(cost.adjacent)


def draw(
    kind: str, fixed: fs.AdaptiveSchedule, schedule: fs.AdaptiveSchedule, batch: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Training levels and the weights of their losses, [batch] each."""
    if kind != "weighted":
        return schedule.draw(batch, generator=generator), torch.ones(batch)
    half = batch // 2
    s = torch.cat([fixed.draw(half, generator=generator), schedule.draw(batch - half, generator=generator)])
    p, q = fixed.density(s), schedule.density(s)
    return s, (p / (p / 2 + q / 2)).float()


def train(
    data: Tensor, held_out: Tensor, start: Tensor, kind: str, seed: int, steps: int, batch: int = 128
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """One training run: rows at five moments, and the held-out losses at the end."""
    torch.manual_seed(seed)
    network = DigitsNetwork(sigma_data=float(data.std()), width=128, blocks=3)
    average = copy.deepcopy(network).requires_grad_(False)
    optimiser = torch.optim.Adam(network.parameters(), 1e-3)
    decay = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda n: 0.5 * (1 + math.cos(math.pi * n / steps)))
    fixed, schedule = fs.AdaptiveSchedule(start), fs.AdaptiveSchedule(start, rate=0.02)
    draws = torch.Generator().manual_seed(seed)
    probes = torch.Generator().manual_seed(seed + 1)
    rows, losses = [], np.empty(0)
    low = HELD_OUT_LEVELS.numpy() < LOW
    for n in range(1, steps + 1):
        clean = data[torch.randint(len(data), (batch,), generator=draws)]
        s, weight = draw(kind, fixed, schedule, batch, draws)
        loss = (weight * weighted_loss(network, clean, s, torch.randn(clean.shape, generator=draws))).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        decay.step()
        with torch.no_grad():
            for mean, value in zip(average.parameters(), network.parameters(), strict=True):
                mean.lerp_(value, max(0.005, 1 / n))
        if kind != "fixed" and n > steps // 20:  # costs of an untrained network are meaningless
            schedule.observe_denoiser(lambda z, s: preconditioned(average, z, s), clean, generator=probes)
            schedule.update()
        if n % (steps // 5) == 0:
            losses = held_out_losses(average, held_out)
            rows.append(
                {
                    "seed": seed,
                    "schedule": kind,
                    "step": n,
                    "cost_variation": cost_variation(average, schedule.s, held_out),
                    "held_out_loss": float(losses.mean()),
                    "loss_high": float(losses[~low].mean()),
                    "loss_low": float(losses[low].mean()),
                    "drawn_low": float((s < LOW).float().mean()),
                }
            )
    return rows, losses


def main() -> None:
    args = arguments(__doc__, start=("log-uniform", "linear"))
    seeds, steps = (1, 200) if args.quick else (5, 1500)
    linear = torch.linspace(SIGMA_MAX, SIGMA_MIN, LEVELS, dtype=torch.float64)
    start = linear if args.start == "linear" else log_uniform(SIGMA_MAX, SIGMA_MIN, LEVELS)
    data = digits_data()
    data = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(0))]
    data, held_out = data[360:], data[:360]
    kinds = ("fixed", "adaptive", "weighted")[: 2 if args.start == "linear" else 3]
    rows, profiles = [], {kind: [] for kind in kinds}
    for seed in range(seeds):
        for kind in kinds:
            run, losses = train(data, held_out, start, kind, seed, steps)
            rows += run
            profiles[kind].append(losses)
    figure, panels = axes(3)
    for kind, colour in zip(kinds, ("C1", "C0", "C2"), strict=False):
        for seed in range(seeds):
            line = [row for row in rows if row["seed"] == seed and row["schedule"] == kind]
            steps_of, label = [row["step"] for row in line], kind if seed == 0 else None
            panels[0].semilogy(steps_of, [row["cost_variation"] for row in line], colour, label=label)
            panels[1].plot(steps_of, [row["held_out_loss"] for row in line], colour)
        panels[2].semilogx(HELD_OUT_LEVELS, np.mean(profiles[kind], 0) - np.mean(profiles["fixed"], 0), colour)
    for panel, name in zip(
        panels, ("cost variation", "held-out loss", "held-out loss at the end, less fixed"), strict=True
    ):
        panel.set_ylabel(name)
        panel.set_xlabel("training step")
    panels[2].set_xlabel("s")
    panels[2].invert_xaxis()
    panels[0].legend()
    quantities = ("cost_variation", "held_out_loss", "loss_high", "loss_low", "drawn_low")
    report(f"online_digits_{args.start}", rows, ("seed", "schedule", "step"), quick=args.quick, figure=figure)
    final = [row for row in rows if row["step"] == steps]
    for kind in kinds:
        values = {q: np.array([row[q] for row in final if row["schedule"] == kind]) for q in quantities}
        print(f"{kind}: " + ", ".join(f"{q} {value.mean():.4f} ± {value.std():.4f}" for q, value in values.items()))


if __name__ == "__main__":
    main()
