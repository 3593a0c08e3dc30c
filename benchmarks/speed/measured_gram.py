"""What `fastsched.measure` asks of `level_increment_gram`: matrices per sample, with sensitivity vectors.

For each sample the Gram matrix of increments, its products with the vectors ``W`` and their norms.
``python -m benchmarks.speed.measured_gram``, on the GPU if there is one; rows go to ``results/level_gram.csv``.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.common import append, copy_bandwidth, environment, interleaved, quantiles, table
from benchmarks.speed.level_gram import KEY, Case, errors, levels
from fastsched.ops import level_increment_gram, pairwise_squared_distances, reference


def by_matmul(R: Tensor, X: Tensor | None, a: Tensor, c: Tensor, W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gram matrices and cross blocks ``[B, N, N]`` and norms ``[B, N]`` from levels in float32."""
    u = levels(R, X, a, c).unflatten(1, R.shape[1:])
    e = torch.cat([u[:1], u[1:] - u[:-1]]).transpose(0, 1)
    w = W.transpose(0, 1)
    return e @ e.mT, w @ e.mT, w.square().sum(-1)


def variants(
    R: Tensor, X: Tensor | None, a: Tensor, c: Tensor, W: Tensor, compiled: bool
) -> dict[str, Callable[[], tuple]]:
    """Calls that return Gram matrices, cross blocks and norms of every sample, by name."""
    found: dict[str, Callable[[], tuple]] = {
        "level_increment_gram": lambda: level_increment_gram(R, X, a, c, W=W, per_sample=True)
    }
    if compiled:
        fused = torch.compile(by_matmul)
        found["torch.compile of difference + matmul"] = lambda: fused(R, X, a, c, W)
    found["eager difference + matmul"] = lambda: by_matmul(R, X, a, c, W)
    return found


def largest_errors(
    gram: Tensor, cross: Tensor, R: Tensor, X: Tensor | None, a: Tensor, c: Tensor, W: Tensor
) -> dict[str, str]:
    """The largest errors of the first sample: of squared distances, relative; of the cross block, against norms."""
    R, W, X = R[:, :1], W[:, :1], None if X is None else X[..., :1, :]
    a, c = a.to(R.device), c.to(R.device)
    distances = pairwise_squared_distances(reference.increment_gram(R, X, a, c)).cpu()
    found = errors(pairwise_squared_distances(gram[0]), distances)
    want = reference.cross_gram(W, R, X, a, c)
    rows, columns = W.double().norm(dim=-1), reference.increments(R, X, a, c).norm(dim=-1).T
    error = ((cross[0].double() - want).abs() / (rows * columns)).max()
    return found | {"error_cross": f"{error:.1e}"}


def compare(case: Case, device: str, compiled: bool, bandwidth: float | None, repeats: int, clock: str) -> list[dict]:
    """Time all variants of a case interleaved; one row per variant."""
    R, X, a, c = case.inputs(device)
    W = case.vectors(device)
    functions = variants(R, X, a, c, W, compiled)
    nbytes = case.nbytes(X) + W.nbytes
    seconds = interleaved(functions, device, repeats, clock=clock)
    ours = float(np.median(next(iter(seconds.values()))))
    rows = []
    for name, taken in seconds.items():
        row = {"case": f"{case}, W per sample", "variant": name} | quantiles(taken)
        row |= {"clock": clock, "times_ours": round(float(np.median(taken)) / ours, 3), "bytes": nbytes}
        if bandwidth is not None:
            row["share_of_copy_bandwidth"] = round(nbytes / float(np.median(taken)) / bandwidth, 3)
        gram, cross, _ = functions[name]()
        rows.append(row | largest_errors(gram, cross, R, X, a, c, W) | environment(device))
    return rows


def cases(device: str) -> list[Case]:
    """On a GPU one gigabyte and more, and numbers of samples that do not divide its multiprocessors."""
    if device == "cpu":
        return [Case(states="levels")]
    sizes = {16: 8, 32: 4, 48: 3, 64: 2, 128: 1}
    grid = itertools.product(sizes, (torch.float32, torch.bfloat16))
    big = [Case(N, B=4, d=sizes[N] << 19, states="levels", dtype=dtype, apart=1e-2) for N, dtype in grid]
    return [*big, *(Case(48, B=B, d=1 << 16, states="levels", apart=1e-2) for B in (100, 133))]


def main() -> None:
    """Compare, print, append to the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--dry-run", action="store_true", help="print only")
    parser.add_argument("--threads", type=int, help="of PyTorch; one is steadier on a busy machine")
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"), help="cpu: seconds computed, not passed")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    bandwidth = copy_bandwidth() if options.device == "cuda" else None
    for case in cases(options.device):
        rows = compare(case, options.device, options.compiled, bandwidth, options.repeats, options.clock)
        columns = ("variant", "p50_ms", "times_ours", "error_adjacent", "error_all", "error_cross")
        print(case, table(rows, columns), sep="\n", flush=True)
        if not options.dry_run:
            append("level_gram", rows, KEY)


@pytest.mark.parametrize("variant", ["level_increment_gram", "eager difference + matmul"])
def test_measured_gram(benchmark, variant):
    case = Case(states="levels")
    call = variants(*case.inputs("cpu"), case.vectors("cpu"), compiled=False)[variant]
    benchmark.pedantic(call, rounds=3, warmup_rounds=1)


if __name__ == "__main__":
    main()
