"""Time of measuring and selecting without the model's own calls.

``python -m benchmarks.speed.pipeline`` times `measure` on a very cheap network, whose time is subtracted, and then
`optimal_schedule` on the result. It also times the selection of every number of steps up to 16 from 64 levels, for
four solvers.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from torch import Tensor

import fastsched as fs
from benchmarks.common import append, environment, quantiles, table

KEY = ("device", "threads", "torch", "commit", "case", "variant")


class Timed:
    """A Gaussian's denoiser, ``D = z c^2 / (c^2 + s^2)`` with ``c = 1``, that counts its calls and their seconds."""

    def __init__(self) -> None:
        self.calls, self.seconds = 0, 0.0

    def __call__(self, z: Tensor, s: Tensor) -> Tensor:
        """One call."""
        if z.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        s = torch.as_tensor(s, dtype=z.dtype, device=z.device)
        s = s.view(-1, *(1,) * (z.ndim - 1)) if s.ndim else s
        out = z / (1 + s * s)
        if z.is_cuda:
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - start
        self.calls += 1
        return out


def once(shape: tuple[int, ...], levels: int, samples: int, steps: int, device: str) -> tuple[dict[str, float], int]:
    """Seconds of each part, and the number of model calls."""
    network = Timed()
    denoiser = fs.Denoiser.from_denoiser(network, sigma_min=0.02, sigma_max=80.0)
    start = time.perf_counter()
    stats = fs.measure(denoiser, shape, levels=levels, samples=samples, device=device, progress=False)
    measured = time.perf_counter() - start
    seconds = {"measure, model calls taken off": measured - network.seconds, "model calls": network.seconds}
    for solver in ("ddim", "dpmpp_2m"):
        start = time.perf_counter()
        fs.optimal_schedule(stats, steps=steps, solver=solver)
        seconds[f"optimal_schedule, {solver}"] = time.perf_counter() - start
    return seconds, network.calls


def selecting(levels: int = 64, samples: int = 8, steps: int = 16) -> dict[str, float]:
    """Seconds of `error_curve` for four solvers, on a mixture of two modes."""
    means = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    mixture = fs.oracles.GaussianMixture(torch.tensor([0.3, 0.7]), means, 0.01 * torch.eye(64).expand(2, -1, -1))
    denoiser = fs.Denoiser.from_denoiser(mixture.denoise, 0.002, 80.0)
    stats = fs.measure(denoiser, (64,), levels=levels, samples=samples, progress=False)
    seconds: dict[str, float] = {}
    for solver in ("ddim", "dpmpp_2m", "unipc", "fitted"):
        start = time.perf_counter()
        fs.error_curve(stats, solver, steps, progress=False)
        seconds[solver] = time.perf_counter() - start
    return seconds


def main() -> None:
    """Measure, print, append to the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dry-run", action="store_true", help="print only")
    options = parser.parse_args()
    for shape, levels, samples, steps in (((4, 64, 64), 48, 8, 8), ((4, 128, 128), 64, 8, 32)):
        once(shape, levels, samples, steps, options.device)
        runs = [once(shape, levels, samples, steps, options.device) for _ in range(options.repeats)]
        case = f"shape {shape} levels {levels} samples {samples} steps {steps}"
        report(case, [seconds for seconds, _ in runs], options.device, options.dry_run, model_calls=runs[0][1])
    runs = [selecting() for _ in range(options.repeats)]
    report("levels 64 samples 8, every number of steps up to 16", runs, "cpu", options.dry_run)


def report(case: str, runs: list[dict[str, float]], device: str, dry_run: bool, **others: int) -> None:
    """Print the times of each part, and append them to the results."""
    rows = [
        {"case": case, "variant": name} | quantiles(np.array([run[name] for run in runs])) | others for name in runs[0]
    ]
    print(case, table(rows, ("variant", "p20_ms", "p50_ms", "p80_ms", *others)), sep="\n", flush=True)
    if not dry_run:
        append("pipeline", [row | environment(device) for row in rows], KEY)


if __name__ == "__main__":
    main()
