"""One denoiser of digits under four noise processes: the schedule in ``s`` must not depend on them.

    python -m benchmarks.experiments.dynamics

The network is wrapped as a variance-exploding model, as the noise prediction of a linear and of a cosine
variance-preserving process, and as a flow velocity. Each follows its own path from its own start. Reported: the nodes
of every schedule in ``s``, and their largest distance to the variance-exploding nodes, in cells of the grid of levels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastsched as fs
from benchmarks.experiments.common import SHAPE, arguments, axes, report
from benchmarks.quality.networks import ddpm_table
from fastsched.denoisers.digits import digits_denoiser
from fastsched.denoisers.level_grids import log_uniform

STEPS = 10


def _wide(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).reshape(-1, 1, 1, 1)


def as_epsilon(denoise: Callable[[Tensor, Tensor], Tensor], alphas_cumprod: Tensor) -> fs.Denoiser:
    """The noise prediction of a variance-preserving model with this table."""
    trained = ((1 - alphas_cumprod) / alphas_cumprod).sqrt().log().numpy()

    def epsilon(x: Tensor, t: Tensor) -> Tensor:
        s = torch.from_numpy(np.exp(np.interp(t.double().numpy(), np.arange(len(trained)), trained)))
        z = x * _wide((1 + s**2).sqrt(), x)
        return (z - denoise(z, s)) / _wide(s, x)

    return fs.Denoiser.from_epsilon(epsilon, alphas_cumprod)


def as_velocity(denoise: Callable[[Tensor, Tensor], Tensor]) -> fs.Denoiser:
    """The velocity of a flow-matching model; times above 0.999 use the denoiser at ``s = 999``."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        inner = t.double().clamp(max=1 - 1e-3)
        s = inner / (1 - inner)
        return (x - denoise(x / _wide(1 - inner, x), s)) / _wide(t, x)

    return fs.Denoiser.from_velocity(velocity)


def processes(denoiser: fs.Denoiser) -> dict[str, fs.Denoiser]:
    u = torch.arange(1001, dtype=torch.float64) / 1000
    curve = torch.cos((u + 0.008) / 1.008 * torch.pi / 2).square()
    cosine = torch.cumprod((curve[1:] / curve[:-1]).clamp(min=1e-3), 0)
    return {
        "VE": denoiser,
        "VP linear": as_epsilon(denoiser, ddpm_table()),
        "VP cosine": as_epsilon(denoiser, cosine),
        "flow": as_velocity(denoiser),
    }


def main() -> None:
    args = arguments(__doc__)
    levels, samples = 48, 16 if args.quick else 64
    s = log_uniform(80.0, 0.02, levels)  # within the range of all four
    cell = float((s[0] / s[1]).log())
    rows: list[dict[str, Any]] = []
    figure, panels = axes(2)
    for panel, method in zip(panels, ("corrector", "solver-aware ddim"), strict=True):
        first: Tensor | None = None
        for place, (name, model) in enumerate(processes(digits_denoiser()).items()):
            if method == "corrector":
                schedule = fs.score_optimal_schedule(
                    model, STEPS, shape=SHAPE, levels=s, samples=samples, progress=False
                )
            else:
                stats = fs.measure(model, SHAPE, levels=s, samples=samples, progress=False)
                schedule = fs.optimal_schedule(stats, STEPS, "ddim")
            nodes = model.process.level(schedule.sigmas)[1:STEPS]  # the first is the process's own start
            first = nodes if first is None else first
            row = {"schedule": method, "process": name, "model_calls": samples * 2 * levels}
            row |= {"cells_from_VE": float((nodes / first).log().abs().max()) / cell}
            row |= {f"s_{n + 1}": value for n, value in enumerate(nodes.tolist())}
            rows.append(row)
            panel.plot(nodes, [place] * len(nodes), "o", ms=5)
        panel.set_xscale("log")
        panel.invert_xaxis()
        panel.set_yticks(range(4), list(processes(digits_denoiser())))
        panel.set_xlabel("s")
        panel.set_title(f"{method}, {STEPS} steps")
    report("dynamics", rows, ("schedule", "process"), quick=args.quick, figure=figure)


if __name__ == "__main__":
    main()
