import math

import numpy as np
import pytest
import torch
from kernel_worker import DEVICE, launch

from fastsched import ops
from fastsched.ops import eager, reference


def costs(M: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """First costs and edge costs: ``real``, ``ties`` (whole numbers 0 to 2), ``forbidden`` (a third infinite)."""
    generator = torch.Generator().manual_seed(M)
    first, cost = (torch.rand((M,) * k, generator=generator, dtype=torch.float64) for k in (1, 3))
    if kind == "ties":
        return (3 * first).floor(), (3 * cost).floor()
    if kind == "forbidden":
        cost[torch.rand(cost.shape, generator=generator) < 1 / 3] = math.inf
    return first, cost


def run(M: int, kind: str, steps: int, poison: bool = False) -> list[np.ndarray]:
    first, cost = costs(M, kind)
    if poison:  # everything but i < j < k
        i, j, k = torch.meshgrid(*(torch.arange(M),) * 3, indexing="ij")
        cost[(i >= j) | (j >= k)] = math.nan
        first[0] = math.nan
    found = ops.second_order_min_plus(first.to(DEVICE), cost.to(DEVICE), steps, backend="triton")
    return [t.cpu().numpy() for t in found]


@pytest.mark.parametrize("kind", ["real", "ties", "forbidden"])
@pytest.mark.parametrize(("M", "steps"), [(2, 3), (3, 4), (7, 8), (17, 4), (33, 2), (24, 64)])
def test_same_as_numpy(M, steps, kind):
    totals, paths = launch(run, M, kind, steps)
    expected_totals, expected_paths = eager.min_plus(*(t.numpy() for t in costs(M, kind)), steps)
    assert np.array_equal(totals, expected_totals)
    assert np.array_equal(paths, expected_paths)


@pytest.mark.parametrize("kind", ["real", "ties", "forbidden"])
def test_same_as_all_paths(kind):
    totals, paths = launch(run, 7, kind, 7)
    expected_totals, expected_paths = reference.second_order_min_plus(*costs(7, kind), 7)
    assert totals.tolist() == expected_totals
    assert paths.tolist() == expected_paths


def test_reads_nothing_outside_its_edges():
    for got, want in zip(launch(run, 9, "real", 5, True), launch(run, 9, "real", 5), strict=True):
        assert np.array_equal(got, want)


@pytest.mark.slow
def test_most_levels():
    steps = 2 if DEVICE == "cpu" else 64  # an edge takes the interpreter half a minute
    totals, paths = launch(run, 256, "ties", steps)
    expected_totals, expected_paths = eager.min_plus(*(t.numpy() for t in costs(256, "ties")), steps)
    assert np.array_equal(totals, expected_totals)
    assert np.array_equal(paths, expected_paths)


def run_opcheck() -> dict:
    first, cost = (t.to(DEVICE) for t in costs(4, "real"))
    return torch.library.opcheck(torch.ops.fastsched.min_plus, (first, cost, 3, True))


def test_opcheck():
    assert set(launch(run_opcheck).values()) == {"SUCCESS"}
