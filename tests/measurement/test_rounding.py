import warnings

import pytest
import torch

import fastsched as fs
from fastsched.measurement.rounding import STORAGE_ERROR, storage_floor, stored_dtype, warn_of_storage
from fastsched.ops import vector_gram


def walk(levels, apart, samples=2, d=20_000):
    """Outputs of Gaussian numbers, each level ``apart`` of its size from the one before."""
    generator = torch.Generator().manual_seed(0)
    strides = torch.randn(levels, samples, d, generator=generator, dtype=torch.float64)
    return strides[0] + apart * torch.cat([torch.zeros(1, samples, d), strides[1:].cumsum(0)])


def gram_of(R, c):
    """Gram matrices of the increments of ``c_k R_k``, [B, N-1, N-1]."""
    levels = c[:, None, None] * R.double()
    return vector_gram(levels.diff(dim=0).transpose(0, 1))


def norms_of(R):
    return R.double().norm(dim=-1)


@pytest.mark.parametrize("dtype", STORAGE_ERROR, ids=str)
@pytest.mark.parametrize("size", [1.0, 1.4, 100.0])
def test_floor_is_what_storage_adds(dtype, size):
    """Against the squared distances of the same outputs in float32, where they differ by several spacings."""
    apart = 100 * STORAGE_ERROR[dtype] ** 0.5
    R, c = size * walk(8, apart), torch.linspace(1.0, 2.0, 8, dtype=torch.float64)
    stored = R.to(dtype)
    c[1:] = c[0]  # so that a distance is c^2 times that of the outputs
    gram, exact = (gram_of(t, c).diagonal(dim1=1, dim2=2) for t in (stored, R.float()))
    added = (gram - exact).mean()
    # 5.3e-6 is rounded, and up to a quarter less where numbers are spread otherwise than Gaussian ones (by size, 4%);
    # the cross term with the increments has standard error 2 sqrt(apart^2 floor / n) = 200 floor / sqrt(n).
    floor = storage_floor(norms_of(stored), dtype, c)[:, 1:].mean()
    assert abs(added / floor - 1) < 0.06 + 4 * 200 / (gram.numel() * 20_000) ** 0.5


def test_no_floor_under_float32():
    assert (storage_floor(norms_of(walk(3, 0.1)), torch.float32, torch.ones(3)) == 0).all()


@pytest.mark.parametrize("dtype", STORAGE_ERROR, ids=str)
@pytest.mark.parametrize(("times", "warns"), [(0.8, True), (1.25, False)])
def test_warns_within_a_hundred_times_the_floor(dtype, times, warns):
    """``||u_k - u_{k-1}||^2`` is ``apart^2 ||u||^2``, plus the floor itself, which the measured distance holds."""
    apart = (times * 100 * STORAGE_ERROR[dtype]) ** 0.5
    R, c = walk(3, apart).to(dtype), torch.full((3,), 0.3, dtype=torch.float64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_storage(norms_of(R), dtype, c, gram_of(R, c))
        warn_of_storage(norms_of(R), torch.float32, c, gram_of(R, c))  # 32 bits: never
    assert len(caught) == warns
    if warns:
        assert str(dtype).removeprefix("torch.") in str(caught[0].message)
        assert "dtype=torch.float32" in str(caught[0].message)


def measured(dtype, levels):
    """`measure` on a Gaussian's denoiser that answers in ``dtype``, as a network in ``dtype`` would."""
    network = lambda z, s: (z / (1 + torch.as_tensor(s).view(-1, 1) ** 2)).to(dtype)
    denoiser = fs.Denoiser.from_denoiser(network, sigma_min=0.1, sigma_max=10.0)
    return fs.measure(denoiser, (500,), levels=levels, samples=2, batch_size=1, device="cpu", progress=False)


def test_measure_warns_once_that_levels_are_too_close_for_bfloat16():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        measured(torch.bfloat16, levels=256)
    assert len([w for w in caught if "bfloat16" in str(w.message)]) == 1  # of two batches


def test_a_single_pair_of_nearly_equal_outputs_does_not_warn():
    R = walk(8, 0.2)
    R[4:] += R[3] - R[4] + 0.001 * (R[4] - R[3])  # level 4 is all but level 3
    R, c = R.bfloat16(), torch.ones(8)
    gram = gram_of(R, c)
    assert gram[:, 3, 3].mean() < 100 * storage_floor(norms_of(R), R.dtype, c)[:, 4].mean()
    warn_of_storage(norms_of(R), R.dtype, c, gram)


@pytest.mark.parametrize(
    ("dtype", "levels"), [(torch.bfloat16, 24), (torch.float16, 64), (torch.float32, 256)], ids=str
)
def test_measure_does_not_warn_without_need(dtype, levels):
    measured(dtype, levels)


def test_the_dtype_of_rounded_numbers_is_found():
    values = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert stored_dtype(values) == torch.float32
    for dtype in STORAGE_ERROR:
        assert stored_dtype(values.to(dtype)) == dtype
        assert stored_dtype(values.to(dtype).double()) == dtype
