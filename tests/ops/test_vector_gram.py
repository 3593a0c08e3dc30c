"""The Gram matrix of kept vectors against float64."""

import pytest
import torch
from kernel_cases import summation_error

from fastsched.ops import vector_gram


@pytest.mark.parametrize("precision", ["highest", "high"])  # "high" lets products be in TF32: then float64 it is
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 1001), (1, 64, 40_000), (2, 7, 300_001)], ids=str)
def test_products_of_all_pairs(shape, dtype, precision):
    vectors = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = vector_gram(vectors)
    finally:
        torch.set_float32_matmul_precision(before)
    expected = vectors.double() @ vectors.double().mT
    norms = vectors.double().norm(dim=2)
    bound = summation_error(shape[2]) * norms[:, :, None] * norms[:, None, :]
    assert found.dtype == torch.float64
    assert ((found - expected).abs() <= bound).all()


def test_some_of_the_rows_and_bad_ones():
    vectors = torch.randn(2, 5, 700)
    torch.testing.assert_close(vector_gram(vectors[:, 1:4]), vector_gram(vectors)[:, 1:4, 1:4], rtol=1e-6, atol=1e-4)
    with pytest.raises(ValueError, match=r"vectors must be \[B, V, d\]"):
        vector_gram(vectors[0])
    with pytest.raises(ValueError, match="vectors must be one of float32"):
        vector_gram(torch.zeros(1, 2, 3, dtype=torch.int64))


def test_a_program_s_autocast_does_not_reach_the_products():
    vectors = torch.randn(1, 4, 5000)
    expected = vector_gram(vectors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(vector_gram(vectors), expected)
