import math

import numpy as np
import pytest
import torch
from kernel_cases import EPS
from kernel_worker import DEVICE, launch

from fastsched import ops
from fastsched.ops import reference

SEED = 2**40 + 7
PROBES = ("levels", "shared", "seed")
TILE = 8192


def data(N: int, B: int, d: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(N, B, d, generator=torch.Generator().manual_seed(d)).to(dtype)


def probes(probe: str, N: int, B: int, d: int) -> torch.Tensor:
    if probe == "levels":
        return torch.randn(N, B, d, generator=torch.Generator().manual_seed(1))
    return ops.rademacher(SEED, (B, d))


def run(probe: str, N: int, B: int, d: int, dtype: torch.dtype) -> list[np.ndarray]:
    V = SEED if probe == "seed" else probes(probe, N, B, d).to(DEVICE)
    sums = ops.hutchinson_reduce(V, data(N, B, d, dtype).to(DEVICE), backend="triton")
    return [t.cpu().numpy() for t in sums]


def assert_sums(found, V, JV):
    V = V.double().expand_as(JV)
    # A rounding a product, and a float32 sum of a tile in a tree: a thread's addends deep at most, and a few more.
    bound = (TILE // 128 + 10) * EPS[torch.float32]
    for got, want, size in zip(found, reference.hutchinson(V, JV), ((V * JV).abs(), JV.double().square()), strict=True):
        got = torch.from_numpy(got)
        assert got.dtype == torch.float64
        assert got.shape == want.shape
        assert ((got - want).abs() <= bound * size.sum(-1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize(("N", "B", "d"), [(1, 1, 1), (5, 3, 63), (2, 2, TILE), (3, 1, 20_001)])
def test_against_reference(N, B, d, probe, dtype):
    assert_sums(launch(run, probe, N, B, d, dtype), probes(probe, N, B, d), data(N, B, d, dtype))


def run_signs(seed: int, B: int, d: int) -> np.ndarray:
    """Draw the kernel's signs one by one: the products with the unit vectors are the signs."""
    sums, _ = ops.hutchinson_reduce(seed, torch.eye(d, device=DEVICE).unsqueeze(1).repeat(1, B, 1), backend="triton")
    return sums.cpu().numpy()


@pytest.mark.parametrize("seed", [0, 12345, 2**32, 2**63 - 1])
def test_draws_the_stated_signs(seed):
    found = torch.from_numpy(launch(run_signs, seed, 3, 40)).T
    assert torch.equal(found, ops.rademacher(seed, (3, 40)).double())


def run_far_signs(d: int, columns: list[int]) -> np.ndarray:
    JV = torch.zeros(len(columns), 2, d, device=DEVICE)
    JV[range(len(columns)), :, columns] = 1.0
    return ops.hutchinson_reduce(SEED, JV, backend="triton")[0].cpu().numpy()


def test_draws_the_stated_signs_in_later_tiles():
    columns = [0, 63, 64, 2047, 2048, TILE - 1, TILE, TILE + 2049, 2 * TILE + 4097]
    found = torch.from_numpy(launch(run_far_signs, 2 * TILE + 5000, columns))
    expected = [[reference.rademacher_sign(SEED, row, column) for row in range(2)] for column in columns]
    assert found.tolist() == expected


def run_strided(d: int) -> list[list[np.ndarray]]:
    JV = data(4, 3, d, torch.float32).to(DEVICE)
    wide = torch.empty(4, 6, d, device=DEVICE)[:, ::2].copy_(JV)
    turned = torch.empty(d, 3, 4, device=DEVICE).permute(2, 1, 0).copy_(JV)
    V = probes("levels", 4, 3, d).to(DEVICE)
    turned_V = torch.empty(d, 3, 4, device=DEVICE).permute(2, 1, 0).copy_(V)
    found = [ops.hutchinson_reduce(v, jv, backend="triton") for v, jv in ((V, JV), (V, wide), (turned_V, turned))]
    return [[t.cpu().numpy() for t in sums] for sums in found]


def test_strides():
    plain, *strided = launch(run_strided, 100)
    for sums in strided:
        for got, want in zip(sums, plain, strict=True):
            assert np.array_equal(got, want)


def run_raw(probe: str, fill: float) -> np.ndarray:
    from fastsched.kernels import hutchinson

    N, B, d = 3, 2, TILE + 5
    V = None if probe == "seed" else probes(probe, N, B, d).to(DEVICE)
    return hutchinson.launch(V, SEED, data(N, B, d, torch.float32).to(DEVICE), fill).cpu().numpy()


@pytest.mark.parametrize("probe", PROBES)
def test_outputs_are_written_whole_and_repeat_bitwise(probe):
    once, again = launch(run_raw, probe, math.nan), launch(run_raw, probe, 0.0)
    assert np.isfinite(once).all()
    assert np.array_equal(once, again)


def run_bad(bad: float) -> list[np.ndarray]:
    JV = data(3, 2, 50, torch.float32)
    JV[1, 0, 7] = bad
    return [t.cpu().numpy() for t in ops.hutchinson_reduce(SEED, JV.to(DEVICE), backend="triton")]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_numbers_come_through(bad):
    touched = np.zeros((3, 2), dtype=bool)
    touched[1, 0] = True
    for sums in launch(run_bad, bad):
        assert np.array_equal(~np.isfinite(sums), touched)


def run_opcheck(probe: str) -> dict:
    V = None if probe == "seed" else probes(probe, 2, 2, 40).to(DEVICE)
    arguments = (V, 3, data(2, 2, 40, torch.float32).to(DEVICE), True)
    return torch.library.opcheck(torch.ops.fastsched.hutchinson, arguments)


@pytest.mark.parametrize("probe", PROBES)
def test_opcheck(probe):
    assert set(launch(run_opcheck, probe).values()) == {"SUCCESS"}
