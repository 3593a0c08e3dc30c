"""Second-order min-plus: NumPy on the host, and the kernel on the GPU if there is one.

``python -m benchmarks.speed.min_plus``. On a GPU the host's time includes the copy of the costs that it needs.
"""

from __future__ import annotations

import argparse

import pytest
import torch

from benchmarks.common import append, environment, interleaved, quantiles, table
from fastsched.ops import second_order_min_plus

KEY = ("device", "threads", "torch", "commit", "case", "variant")


def costs(M: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, cost = (torch.rand((M,) * k, generator=generator, dtype=torch.float64) for k in (1, 3))
    return first.to(device), cost.to(device)


def main() -> None:
    """Compare, print, append to the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--dry-run", action="store_true", help="print only")
    options = parser.parse_args()
    for M, steps in ((33, 16), (65, 32), (128, 32), (256, 64)):
        first, cost = costs(M, options.device)
        backends = ("torch", "triton") if options.device == "cuda" else ("torch",)
        functions = {
            {"torch": "NumPy", "triton": "Triton"}[b]: lambda b=b, f=first, c=cost, n=steps: second_order_min_plus(
                f, c, n, backend=b
            )
            for b in backends
        }
        taken = interleaved(functions, options.device, options.repeats)
        rows = [
            {"case": f"M{M} steps{steps}", "variant": name, "bytes": 8 * (steps - 1) * M * (M - 1) * (M - 2) // 6}
            | quantiles(seconds)
            | environment(options.device)
            for name, seconds in taken.items()
        ]
        print(table(rows, ("case", "variant", "p20_ms", "p50_ms", "p80_ms")), flush=True)
        if not options.dry_run:
            append("min_plus", rows, KEY)


@pytest.mark.parametrize(("M", "steps"), [(33, 16), (65, 32)])
def test_min_plus(benchmark, M, steps):
    first, cost = costs(M, "cpu")
    benchmark(second_order_min_plus, first, cost, steps)


if __name__ == "__main__":
    main()
