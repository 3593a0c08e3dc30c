import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from fastsched import metrics


def exact_sample(n: int, mean: torch.Tensor, root: torch.Tensor, seed: int) -> torch.Tensor:
    """``n`` samples whose mean and unbiased covariance are exactly ``mean`` and ``root' root``."""
    x = torch.randn(n, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = x - x.mean(0)
    whitener = torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (n - 1)))
    return x @ whitener.T @ root + mean


def random_root(d: int, seed: int) -> torch.Tensor:
    return torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_frechet_of_isotropic_gaussians_is_the_closed_form():
    d = 5
    a = exact_sample(40, torch.zeros(d, dtype=torch.float64), 2.0 * torch.eye(d, dtype=torch.float64), 0)
    b = exact_sample(31, torch.full((d,), 3.0, dtype=torch.float64), 0.5 * torch.eye(d, dtype=torch.float64), 1)
    assert metrics.frechet_distance(a, b) == pytest.approx(d * 3.0**2 + d * (2.0 - 0.5) ** 2, rel=1e-12)


def test_frechet_of_full_covariances_equals_scipy_sqrtm():
    d = 7
    mean_a, mean_b = random_root(d, 2)[0], random_root(d, 3)[0]
    root_a, root_b = random_root(d, 4), random_root(d, 5)
    a, b = exact_sample(50, mean_a, root_a, 6), exact_sample(60, mean_b, root_b, 7)
    cov_a, cov_b = (root_a.T @ root_a).numpy(), (root_b.T @ root_b).numpy()
    product = np.real(scipy.linalg.sqrtm(cov_a @ cov_b))
    expected = float((mean_a - mean_b).square().sum()) + np.trace(cov_a + cov_b - 2 * product)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_fewer_samples_than_dimensions_is_that_of_the_covariances():
    d, n = 12, 5
    a, b = random_root(d, 8)[:n], 2 * random_root(d, 9)[:n] + 1
    values, vectors = np.linalg.eigh(np.cov(a.T.numpy()))
    root = vectors @ np.diag(np.sqrt(np.clip(values, 0, None))) @ vectors.T
    inner = np.linalg.eigvalsh(root @ np.cov(b.T.numpy()) @ root)
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(np.cov(a.T.numpy()) + np.cov(b.T.numpy()))
    expected -= 2 * np.sqrt(np.clip(inner, 0, None)).sum()
    # The reference takes roots of eigenvalues that should be 0 and are 1e-16: an error of about d * 1e-8.
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, abs=1e-6)


def test_frechet_ignores_order_and_is_zero_on_itself():
    a = random_root(9, 10).reshape(9, 3, 3)
    assert metrics.frechet_distance(a, a.flip(0)) == pytest.approx(0.0, abs=1e-12)


def test_squared_distances_and_their_means():
    a = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]], [[5.0, 5.0]]])
    b = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[5.0, 1.0]]])
    distances = metrics.squared_distances(a, b)
    assert distances.tolist() == [4.0, 1.0, 16.0]
    assert metrics.geometric_mean(distances) == pytest.approx(4.0)
    mean, error = metrics.mean_and_standard_error(distances)
    assert mean == pytest.approx(7.0)
    assert error == pytest.approx(scipy.stats.sem([4.0, 1.0, 16.0]))


def test_edges_of_the_means():
    assert metrics.geometric_mean(torch.tensor([0.0, 3.0])) == 0.0
    mean, error = metrics.mean_and_standard_error(torch.tensor([2.0]))
    assert mean == 2.0
    assert math.isnan(error)


def test_sliced_wasserstein_in_one_dimension_is_the_sorted_distance():
    a, b = torch.tensor([[3.0], [1.0], [2.0]]), torch.tensor([[10.0], [30.0], [20.0]])
    assert metrics.sliced_wasserstein(a, b) == pytest.approx(math.sqrt((9**2 + 18**2 + 27**2) / 3))


def test_sliced_wasserstein_of_a_shift_averages_its_projections():
    # E (u . v)^2 = |v|^2 / d over the sphere; its relative standard error with P directions is below sqrt(2 / P).
    d, count = 6, 4096
    a = random_root(d, 11)
    shift = torch.arange(1.0, d + 1, dtype=torch.float64)
    expected = math.sqrt(float(shift.square().sum()) / d)
    assert metrics.sliced_wasserstein(a, a + shift, projections=count) == pytest.approx(
        expected, rel=3 * 0.5 * math.sqrt(2 / count)
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.squared_distances(torch.zeros(2, 3), torch.zeros(3, 3)), "same shape"),
        (lambda: metrics.squared_distances(torch.zeros(0, 3), torch.zeros(0, 3)), "at least one sample"),
        (lambda: metrics.frechet_distance(torch.zeros(1, 3), torch.zeros(4, 3)), "samples must hold at least two"),
        (lambda: metrics.frechet_distance(torch.zeros(4, 3), torch.zeros(4, 2)), "same shape but for their number"),
        (lambda: metrics.frechet_distance(torch.zeros(4, 3), torch.full((4, 3), torch.nan)), "reference must be fin"),
        (lambda: metrics.sliced_wasserstein(torch.zeros(4, 3), torch.zeros(5, 3)), "same shape"),
        (lambda: metrics.sliced_wasserstein(torch.zeros(4, 3), torch.zeros(4, 3), projections=0), "projections"),
        (lambda: metrics.geometric_mean(torch.tensor([])), "at least one"),
        (lambda: metrics.geometric_mean(torch.tensor([1.0, -1.0])), "non-negative"),
        (lambda: metrics.mean_and_standard_error(torch.tensor([])), "at least one"),
        (lambda: metrics.mean_and_standard_error(torch.tensor([1.0, torch.nan])), "values must be numbers"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("exponent", [0.25, 0.5, 1.0])
def test_power_mean_by_its_definition(exponent):
    values = torch.tensor([[0.5, 3.0, 8.0], [2.0, 2.0, 2.0]], dtype=torch.float64)
    expected = values.pow(exponent).mean(1).pow(1 / exponent)
    assert metrics.power_mean(values, exponent) == pytest.approx(expected.numpy(), rel=1e-12)


def test_power_mean_lies_between_the_means_and_does_not_overflow():
    values = np.array([1e-300, 1.0, 1e300])
    assert metrics.power_mean(values, 0) == pytest.approx(1.0)
    assert metrics.power_mean(values, 1.0) == pytest.approx(1e300 / 3, rel=1e-9)
    assert metrics.power_mean(values, 0.25) == pytest.approx(1e300 / 3**4, rel=1e-6)
    assert metrics.power_mean(np.array([1.0, np.inf])) == np.inf
    assert metrics.power_mean(torch.tensor([1.0, 4.0], dtype=torch.bfloat16, requires_grad=True), 1.0) == 2.5
    assert metrics.power_mean(np.array([1.0, 4.0]), 0) < metrics.power_mean(np.array([1.0, 4.0])) < 2.5


def test_power_mean_refuses_what_is_no_squared_error():
    for values in (torch.tensor([-1.0, 2.0]), torch.empty(0), [-1.0]):
        with pytest.raises(ValueError, match="values must be non-negative numbers"):
            metrics.power_mean(values)
    with pytest.raises(TypeError, match="values must be a tensor of real numbers"):
        metrics.power_mean(torch.ones(2, dtype=torch.complex64))
    assert metrics.power_mean(torch.tensor(2.0)) == pytest.approx(2.0)
