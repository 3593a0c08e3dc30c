"""All squared distances between levels: `level_increment_gram` against other implementations.

Run ``python -m benchmarks.speed.level_gram`` for the interleaved comparison (on the GPU if there is one), or
``python -m pytest -o addopts= benchmarks/speed/level_gram.py`` for pytest-benchmark's statistics on the CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.common import append, copy_bandwidth, environment, interleaved, table
from benchmarks.speed.options import KEY, parsed, parser, row_of
from fastsched.ops import level_increment_gram, pairwise_squared_distances, reference


@dataclass(frozen=True)
class Case:
    """``N`` levels of ``B`` samples of ``d`` elements; adjacent levels differ by ``apart`` times their size."""

    N: int = 64
    B: int = 4
    d: int = 65536
    states: str = "none"
    dtype: torch.dtype = torch.float32
    apart: float = 1e-4

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"N{self.N} B{self.B} d{self.d} X {self.states} {dtype} apart {self.apart:g}"

    def inputs(self, device: str) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Return ``R, X, a, c``: outputs that are a random walk, and states that change little."""
        generator = torch.Generator(device).manual_seed(0)
        shape = (self.B, self.d)
        R = torch.empty(self.N, *shape, dtype=self.dtype, device=device)
        walk = torch.randn(shape, generator=generator, device=device)
        for k in range(self.N):
            R[k] = walk
            walk = walk + self.apart * torch.randn(shape, generator=generator, device=device)
        X = None
        if self.states != "none":
            X = torch.randn(shape, generator=generator, device=device)
            if self.states == "levels":
                X = X * (1 + self.apart * torch.arange(self.N, device=device).view(-1, 1, 1))
        drift = self.apart * torch.arange(self.N, dtype=torch.float64)
        return R, X, 0.5 + drift, 1.0 + drift

    def nbytes(self, X: Tensor | None) -> int:
        """Bytes of R and X, each read once."""
        return self.N * self.B * self.d * self.dtype.itemsize + (0 if X is None else X.nbytes)


def levels(R: Tensor, X: Tensor | None, a: Tensor, c: Tensor) -> Tensor:
    """The levels ``u = a X + c R``, ``[N, B d]`` float32."""
    a, c = (t.to(R.device, torch.float32).view(-1, 1, 1) for t in (a, c))
    u = c * R.float()
    return (u if X is None else u + a * X).flatten(1)


def by_pairs(u: Tensor) -> Tensor:
    D = torch.zeros(len(u), len(u), device=u.device)
    for i, j in itertools.combinations(range(len(u)), 2):
        D[i, j] = (u[i] - u[j]).square().sum()
    return D + D.T


def by_matmul(u: Tensor) -> Tensor:
    gram = u @ u.T
    norms = gram.diagonal()
    return norms[:, None] + norms[None, :] - 2 * gram


def increments_by_matmul(R: Tensor, X: Tensor | None, a: Tensor, c: Tensor) -> Tensor:
    u = levels(R, X, a, c)
    e = torch.cat([u[:1], u[1:] - u[:-1]])
    return e @ e.T


def variants(case: Case, device: str, compiled: bool) -> tuple[dict[str, Callable[[], Tensor]], int, Tensor]:
    """Implementations of the same ``[N, N]`` matrix, the bytes to read, and the matrix in float64."""
    R, X, a, c = case.inputs(device)
    u = levels(R, X, a, c)
    found: dict[str, Callable[[], Tensor]] = {}
    for precision in ("bf16x3", "tf32x3") if device == "cuda" else ("bf16x3",):
        name = f"level_increment_gram, {precision}" if device == "cuda" else "level_increment_gram"
        found[name] = lambda precision=precision: pairwise_squared_distances(
            level_increment_gram(R, X, a, c, precision=precision)
        )
    if compiled:
        difference = torch.compile(increments_by_matmul)
        found["torch.compile of difference + matmul"] = lambda: pairwise_squared_distances(difference(R, X, a, c))
    found["eager difference + matmul"] = lambda: pairwise_squared_distances(increments_by_matmul(R, X, a, c))
    found["levels, then matmul Gram"] = lambda: by_matmul(levels(R, X, a, c))
    found["matmul Gram of levels at hand"] = lambda: by_matmul(u)
    found["levels, then cdist"] = lambda: torch.cdist(levels(R, X, a, c), u).square()
    found["levels, then a loop over pairs"] = lambda: by_pairs(levels(R, X, a, c))
    found["loop over pairs of levels at hand"] = lambda: by_pairs(u)
    return found, case.nbytes(X), exact(R, X, a, c)


def exact(R: Tensor, X: Tensor | None, a: Tensor, c: Tensor) -> Tensor:
    """The distances in float64, summed over samples; one sample is held at a time."""
    total = torch.zeros(len(R), len(R), dtype=torch.float64)
    for b in range(R.shape[1]):
        x = None if X is None else X[..., b : b + 1, :]
        e = reference.increments(R[:, b : b + 1], x, a.to(R.device), c.to(R.device))[:, 0]
        total += pairwise_squared_distances(e @ e.T).cpu()
    return total


def errors(found: Tensor, want: Tensor) -> dict[str, str]:
    """The largest relative errors over adjacent levels and over all pairs."""
    off = ~torch.eye(len(want), dtype=torch.bool)
    relative = ((found.double().cpu() - want).abs() / want)[off].view(len(want), -1)
    adjacent = relative[range(len(want) - 1), range(len(want) - 1)]
    return {"error_adjacent": f"{adjacent.max():.1e}", "error_all": f"{relative.max():.1e}"}


def compare(case: Case, device: str, compiled: bool, bandwidth: float | None, repeats: int, clock: str) -> list[dict]:
    """Time all variants of a case interleaved; one row per variant."""
    functions, nbytes, want = variants(case, device, compiled)
    seconds = interleaved(functions, device, repeats, clock=clock)
    ours = float(np.median(next(iter(seconds.values()))))
    rows = []
    for name, taken in seconds.items():
        scale = case.B if name.startswith("level_increment_gram") else 1  # ours is a mean over samples
        row = row_of(case, name, taken, nbytes, bandwidth, clock)
        row["times_ours"] = round(float(np.median(taken)) / ours, 3)
        rows.append(row | errors(scale * functions[name](), want) | environment(device))
    return rows


def cases(device: str) -> list[Case]:
    """On a GPU, large inputs and one that measures only launch cost; on the CPU, the default sizes."""
    if device == "cpu":
        return [Case(states=states) for states in ("none", "levels")]
    sizes = {16: 16, 32: 8, 48: 6, 64: 4, 100: 3, 128: 2, 256: 1}
    dtypes = (torch.float32, torch.bfloat16)
    grid = itertools.product(sizes, ("none", "shared", "levels"), dtypes)
    big = [Case(N, B=4, d=sizes[N] << 19, states=states, dtype=dtype, apart=1e-2) for N, states, dtype in grid]
    return [*big, Case(B=8, d=64)]


def main() -> None:
    """Compare, print, append to the results."""
    own = parser(__doc__)
    own.add_argument("--levels", type=int, help="only the cases of this many levels")
    options = parsed(own)
    bandwidth = copy_bandwidth() if options.device == "cuda" else None
    for case in cases(options.device):
        if options.levels not in (None, case.N):
            continue
        rows = compare(case, options.device, options.compiled, bandwidth, options.repeats, options.clock)
        columns = ("variant", "p50_ms", "times_ours", "error_adjacent", "error_all")
        print(case, table(rows, columns), sep="\n", flush=True)
        if not options.dry_run:
            append("level_gram", rows, KEY)


@pytest.mark.parametrize("variant", list(variants(Case(N=2, B=1, d=2), "cpu", compiled=False)[0]))
def test_level_gram(benchmark, variant):
    benchmark.pedantic(variants(Case(), "cpu", compiled=False)[0][variant], rounds=3, warmup_rounds=1)


if __name__ == "__main__":
    main()
