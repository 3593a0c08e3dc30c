"""The op that `fastsched.measure` uses: the Gram matrix of all vectors of a path, for each sample.

A path of 48 levels has 47 increments and 46 responses, 93 vectors. ``python -m benchmarks.speed.measured_gram`` uses
the GPU if there is one; rows go to ``results/measured_gram.csv``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.common import append, copy_bandwidth, environment, interleaved, table
from benchmarks.speed.options import KEY, parsed, parser, row_of
from fastsched.ops import vector_gram


@dataclass(frozen=True)
class Case:
    """``V`` vectors of ``d`` elements for each of ``B`` samples."""

    V: int = 93
    B: int = 4
    d: int = 65536

    def __str__(self) -> str:
        return f"V{self.V} B{self.B} d{self.d} float32"

    def vectors(self, device: str) -> Tensor:
        """Standard normal vectors, plus 0.1 times a vector that is common to all."""
        generator = torch.Generator(device).manual_seed(0)
        common = torch.randn(self.B, 1, self.d, generator=generator, device=device)
        own = torch.randn(self.B, self.V, self.d, generator=generator, device=device)
        return own.add_(common, alpha=0.1)


def in_float64(vectors: Tensor) -> Tensor:
    """The Gram matrices in float64, one sample at a time; the reference for errors."""
    return torch.stack([each.double() @ each.double().T for each in vectors])


def by_matmul(vectors: Tensor) -> Tensor:
    """The Gram matrices by a batched product in float32."""
    return vectors @ vectors.mT


def variants(vectors: Tensor, compiled: bool) -> dict[str, Callable[[], Tensor]]:
    """Calls that return the Gram matrix of every sample, by name; the first is ours."""
    found: dict[str, Callable[[], Tensor]] = {"vector_gram": lambda: vector_gram(vectors)}
    if compiled:
        fused = torch.compile(by_matmul)
        found["torch.compile of matmul"] = lambda: fused(vectors)
    found["eager matmul"] = lambda: by_matmul(vectors)
    if vectors.is_cuda:
        found["eager blocks, summed in float64"] = lambda: vector_gram(vectors, backend="torch")
    return found


def compare(case: Case, device: str, compiled: bool, bandwidth: float | None, repeats: int, clock: str) -> list[dict]:
    """Time all variants of a case interleaved; one row per variant."""
    vectors = case.vectors(device)
    functions = variants(vectors, compiled)
    seconds = interleaved(functions, device, repeats, clock=clock)
    ours = float(np.median(next(iter(seconds.values()))))
    want = in_float64(vectors[:1])
    norms = want.diagonal(dim1=1, dim2=2).sqrt()
    rows = []
    for name, taken in seconds.items():
        row = row_of(case, name, taken, vectors.nbytes, bandwidth, clock)
        row["times_ours"] = round(float(np.median(taken)) / ours, 3)
        error = (functions[name]()[:1].double() - want).abs() / (norms[:, :, None] * norms[:, None, :])
        rows.append(row | {"error": f"{float(error.max()):.1e}"} | environment(device))
    return rows


def cases(device: str) -> list[Case]:
    """On a GPU, mostly large inputs, some with numbers of samples that do not divide the multiprocessors evenly."""
    if device == "cpu":
        return [Case()]
    large = [Case(V, B=4, d=(3 << 21) // V // 16 * 64) for V in (31, 61, 93, 125)]
    return [*large, Case(93, B=1, d=1 << 22), Case(93, B=100, d=1 << 16), Case(93, B=133, d=1 << 16), Case(93, B=8)]


def main() -> None:
    """Compare, print, append to the results."""
    options = parsed(parser(__doc__))
    bandwidth = copy_bandwidth() if options.device == "cuda" else None
    for case in cases(options.device):
        rows = compare(case, options.device, options.compiled, bandwidth, options.repeats, options.clock)
        columns = ("variant", "p50_ms", "times_ours", "share_of_copy_bandwidth", "error")
        print(case, table(rows, columns), sep="\n", flush=True)
        if not options.dry_run:
            append("measured_gram", rows, KEY)


@pytest.mark.parametrize("variant", ["vector_gram", "eager matmul"])
def test_measured_gram(benchmark, variant):
    benchmark.pedantic(variants(Case().vectors("cpu"), compiled=False)[variant], rounds=3, warmup_rounds=1)


if __name__ == "__main__":
    main()
