import math

import numpy as np
import pytest
import torch
from kernel_cases import EPS
from kernel_worker import DEVICE, launch, nan_in_new_tensors

from fastsched import ops
from fastsched.kernels import config
from fastsched.ops import reference

PROBES = ("levels", "shared")
TILE = config.HUTCHINSON_COLUMNS


def data(N: int, B: int, d: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(N, B, d, generator=torch.Generator().manual_seed(d)).to(dtype)


def probes(probe: str, N: int, B: int, d: int) -> torch.Tensor:
    V = torch.randn(N, B, d, generator=torch.Generator().manual_seed(1))
    return V if probe == "levels" else V[0].clone()


def run(probe: str, N: int, B: int, d: int, dtype: torch.dtype) -> list[np.ndarray]:
    V, JV = probes(probe, N, B, d).to(DEVICE), data(N, B, d, dtype).to(DEVICE)
    return [t.cpu().numpy() for t in ops.hutchinson_reduce(V, JV, backend="triton")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize(("N", "B", "d"), [(1, 1, 1), (5, 3, 63), (2, 2, TILE), (3, 1, 20_001)])
def test_against_reference(N, B, d, probe, dtype):
    V, JV = probes(probe, N, B, d), data(N, B, d, dtype)
    # A rounding a product, then a float32 sum: the addends of a thread one by one, and a tree over 128 threads.
    bound = (TILE // 128 + 10) * EPS[torch.float32]
    sizes = (V.double() * JV.double()).abs(), JV.double().square()
    for got, want, size in zip(launch(run, probe, N, B, d, dtype), reference.hutchinson(V, JV), sizes, strict=True):
        got = torch.from_numpy(got)
        assert got.dtype == torch.float64
        assert got.shape == want.shape
        assert ((got - want).abs() <= bound * size.sum(-1)).all()


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


def run_over_nan(probe: str, N: int, B: int, d: int) -> list[np.ndarray]:
    with nan_in_new_tensors():
        return run(probe, N, B, d, torch.float32)


@pytest.mark.parametrize("probe", PROBES)
def test_outputs_are_written_whole_and_repeat_bitwise(probe):
    once, again = launch(run_over_nan, probe, 3, 2, TILE + 5), launch(run, probe, 3, 2, TILE + 5, torch.float32)
    assert np.isfinite(once).all()
    assert np.array_equal(once, again)


def run_bad(bad: float) -> list[np.ndarray]:
    JV = data(3, 2, 50, torch.float32)
    JV[1, 0, 7] = bad
    V = probes("shared", 3, 2, 50).to(DEVICE)
    return [t.cpu().numpy() for t in ops.hutchinson_reduce(V, JV.to(DEVICE), backend="triton")]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_numbers_come_through(bad):
    touched = np.zeros((3, 2), dtype=bool)
    touched[1, 0] = True
    for sums in launch(run_bad, bad):
        assert np.array_equal(~np.isfinite(sums), touched)


def run_opcheck(probe: str) -> dict:
    V, JV = probes(probe, 2, 2, 40).to(DEVICE), data(2, 2, 40, torch.float32).to(DEVICE)
    return torch.library.opcheck(torch.ops.fastsched.hutchinson, (V, JV, True))


@pytest.mark.parametrize("probe", PROBES)
def test_opcheck(probe):
    assert set(launch(run_opcheck, probe).values()) == {"SUCCESS"}


def run_too_large() -> str:
    JV = torch.zeros(1, device=DEVICE).expand(2, 2**30, 1)
    try:
        ops.hutchinson_reduce(JV, JV, backend="triton")
    except ValueError as error:
        return str(error)
    return "no error"


def test_too_many_samples():
    assert launch(run_too_large).startswith("JV must have at most 536870911 samples of this size; got shape")
