"""Hutchinson sums: `hutchinson_reduce` with shared probes and with a probe for each level, eager and compiled PyTorch.

``python -m benchmarks.speed.hutchinson``, on the GPU if there is one.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.common import append, copy_bandwidth, environment, interleaved, table
from benchmarks.speed.options import KEY, parsed, parser, row_of
from fastsched.ops import hutchinson_reduce, reference


def plain(V: Tensor, JV: Tensor) -> tuple[Tensor, Tensor]:
    JV = JV.float()
    return (V * JV).sum(-1), JV.square().sum(-1)


def variants(JV: Tensor, compiled: bool) -> dict[str, tuple[Callable[[], tuple[Tensor, Tensor]], Tensor, int]]:
    """By name: a call, the probes it uses, and the bytes it must read."""
    generator = torch.Generator(JV.device).manual_seed(1)
    shared = torch.randint(0, 2, JV.shape[1:], generator=generator, device=JV.device).float() * 2 - 1
    each = shared.expand_as(JV).contiguous()
    found = {
        "hutchinson_reduce, shared probe": (lambda: hutchinson_reduce(shared, JV), shared, JV.nbytes + shared.nbytes),
        "hutchinson_reduce, probe per level": (lambda: hutchinson_reduce(each, JV), each, JV.nbytes + each.nbytes),
        "eager, shared probe": (lambda: plain(shared, JV), shared, JV.nbytes + shared.nbytes),
    }
    if compiled:
        fused = torch.compile(plain)
        found["torch.compile, shared probe"] = (lambda: fused(shared, JV), shared, JV.nbytes + shared.nbytes)
        found["torch.compile, probe per level"] = (lambda: fused(each, JV), each, JV.nbytes + each.nbytes)
    return found


def compare(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str, compiled: bool, repeats: int, clock: str
) -> list[dict]:
    """Time all variants interleaved; one row per variant."""
    JV = torch.randn(shape, device=device).to(dtype)
    bandwidth = copy_bandwidth() if device == "cuda" else None
    found = variants(JV, compiled)
    seconds = interleaved({name: call for name, (call, _, _) in found.items()}, device, repeats, clock=clock)
    rows = []
    for name, (call, V, nbytes) in found.items():
        row = row_of(f"{shape} {dtype}", name, seconds[name], nbytes, bandwidth, clock)
        size = JV[0].double().abs().sum(-1)  # what a sum's error is measured against
        error = (call()[0][0].double() - reference.hutchinson(V if V.ndim == 2 else V[:1], JV[:1])[0][0]).abs() / size
        rows.append(row | {"error": f"{error.max():.1e}"} | environment(device))
    return rows


def main() -> None:
    """Compare, print, append to the results."""
    options = parsed(parser(__doc__))
    shape = (48, 4, 1 << 22) if options.device == "cuda" else (48, 4, 1 << 16)
    for dtype in (torch.float32, torch.bfloat16):
        rows = compare(shape, dtype, options.device, options.compiled, options.repeats, options.clock)
        print(shape, dtype, "\n" + table(rows, ("variant", "p50_ms", "share_of_copy_bandwidth", "error")), flush=True)
        if not options.dry_run:
            append("hutchinson", rows, KEY)


@pytest.mark.parametrize("variant", list(variants(torch.ones(1, 1, 1), compiled=False)))
def test_hutchinson(benchmark, variant):
    benchmark(variants(torch.randn(48, 4, 1 << 14), compiled=False)[variant][0])


if __name__ == "__main__":
    main()
