"""Distances between two sets of samples: sample by sample, and as distributions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastsched import validate


def squared_distances(samples: Tensor, reference: Tensor) -> Tensor:
    """``||x_b - r_b||^2``, summed over the elements of a sample, [B] float64.

    Args:
        samples: [B, *shape].
        reference: [B, *shape], in the same order.

    Raises:
        ValueError: If the shapes differ, there is no sample, or an entry is NaN or inf.
    """
    validate.arguments(locals(), samples=validate.tensor, reference=validate.tensor)
    x, y = _same_shape(samples, reference)
    return (x - y).square().sum(1)


def rounding_floor(ends: Tensor) -> Tensor:
    """The squared distance that is due to float32 rounding of samples [B, *shape]: ``(2^-23 ||x_b||)^2``, [B] float64.

    Smaller distances cannot be distinguished from 0, and would make a geometric mean 0.
    """
    return torch.finfo(torch.float32).eps ** 2 * _rows("ends", ends).square().sum(1)


def geometric_mean(values: Tensor) -> float:
    """``exp(mean(log v))`` of non-negative ``values``: the typical size where a few are far larger than the rest.

    It is 0 if one value is 0.

    Raises:
        ValueError: If there is no value, or one is negative or NaN.
    """
    values = validate.tensor("values", values)
    wide = values.cpu().double()
    if wide.numel() == 0 or not bool((wide >= 0).all()):
        raise ValueError("values must be non-negative numbers, at least one of them")
    return float(wide.log().mean().exp())


#: Exponent of the power mean by which schedules are chosen and ranked.
EXPONENT = 0.25
#: The logarithm of the largest float64.
MOST = math.log(np.finfo(np.float64).max)


def power_mean(values: Tensor | np.ndarray | Sequence[float], exponent: float = EXPONENT) -> np.ndarray:
    """``(mean_b v_b^p)^(1/p)`` of non-negative values over the last axis; the geometric mean for ``p = 0``.

    For ``0 < p < 1`` it lies between the geometric mean, which a few samples with large errors barely change, and the
    arithmetic mean (p = 1), which they dominate.

    Raises:
        TypeError: If a tensor or list does not hold real numbers.
        ValueError: If a tensor or list has no value, or a negative one. Arrays are not checked; rounding may have made
            their values negative.
    """
    if not isinstance(values, np.ndarray):
        wide = torch.atleast_1d(validate.float64("values", values))
        if wide.numel() == 0 or bool((wide < 0).any()):
            raise ValueError("values must be non-negative numbers, at least one of them")
        values = wide.numpy()
    logs = np.log(np.maximum(np.asarray(values, dtype=np.float64), np.finfo(np.float64).tiny))
    if exponent == 0:
        return np.exp(logs.mean(axis=-1))
    top = np.minimum(logs.max(axis=-1, keepdims=True), MOST)  # so that no power overflows
    return np.exp(top[..., 0] + np.log(np.exp(exponent * (logs - top)).mean(axis=-1)) / exponent)


def mean_and_standard_error(values: Tensor) -> tuple[float, float]:
    """The arithmetic mean, and its standard error ``std / sqrt(B)`` (NaN for a single value).

    Raises:
        ValueError: If there is no value, or one is NaN.
    """
    wide = validate.tensor("values", values).cpu().double().flatten()
    if wide.numel() == 0 or bool(wide.isnan().any()):
        raise ValueError("values must be numbers, at least one of them")
    error = wide.std() / wide.numel() ** 0.5 if wide.numel() > 1 else torch.tensor(torch.nan, device="cpu")
    return float(wide.mean()), float(error)


def frechet_distance(samples: Tensor, reference: Tensor) -> float:
    """Squared Frechet (2-Wasserstein) distance between the Gaussians fitted to two sets of samples.

        ``||m_1 - m_2||^2 + tr(S_1 + S_2 - 2 (S_1^(1/2) S_2 S_1^(1/2))^(1/2))``

    ``m`` and ``S`` are the mean and the (unbiased) covariance of a set. No matrix square root is taken: with
    centred rows ``X_i / sqrt(n_i - 1) = Q_i R_i``, ``S_i = R_i' R_i``, the last trace is the sum of the singular
    values of ``R_1 R_2'``, for covariances of any rank. It is computed on the samples themselves, not on features
    of a classifier, and is biased upwards with few samples: compare only values from equally many samples.

    Args:
        samples: [n_1, *shape].
        reference: [n_2, *shape], where the shape is the same.

    Raises:
        ValueError: If the shapes disagree, a set has fewer than two samples, or an entry is NaN or inf.

    Source: Dowson & Landau 1982; Heusel et al. 2017 (arXiv 1706.08500), equation 6.
    """
    validate.arguments(locals(), samples=validate.tensor, reference=validate.tensor)
    mean_1, root_1 = _moments("samples", samples)
    mean_2, root_2 = _moments("reference", reference)
    if samples.shape[1:] != reference.shape[1:]:
        raise ValueError(
            f"samples and reference must have the same shape but for their number, got {tuple(samples.shape)} and "
            f"{tuple(reference.shape)}"
        )
    shared = torch.linalg.svdvals(root_1 @ root_2.T).sum()
    spread = root_1.square().sum() + root_2.square().sum() - 2 * shared
    return float((mean_1 - mean_2).square().sum() + spread.clamp_min(0.0))


def sliced_wasserstein(samples: Tensor, reference: Tensor, *, projections: int = 256, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance: root mean square over random directions of the distance in one dimension.

        ``SW^2 = E_u mean_b (sort(X u)_b - sort(Y u)_b)^2``,   ``u`` uniform on the unit sphere

    Args:
        samples: [B, *shape].
        reference: [B, *shape], in any order.
        projections: How many directions.
        seed: The seed of the directions.

    Raises:
        ValueError: If the shapes differ, there is no sample, or an entry is NaN or inf.

    Source: Bonneel et al. 2015, "Sliced and Radon Wasserstein barycenters of measures".
    """
    validate.arguments(locals(), samples=validate.tensor, reference=validate.tensor, projections=validate.positive_int)
    x, y = _same_shape(samples, reference)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(x.shape[1], projections, generator=generator, dtype=torch.float64, device="cpu")
    directions = directions / directions.norm(dim=0)
    gaps = (x @ directions).sort(dim=0).values - (y @ directions).sort(dim=0).values
    return float(gaps.square().mean().sqrt())


def _same_shape(samples: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Both as rows; ValueError if their shapes differ."""
    if samples.shape != reference.shape:
        raise ValueError(
            f"samples and reference must have the same shape, got {tuple(samples.shape)} and {tuple(reference.shape)}"
        )
    return _rows("samples", samples), _rows("reference", reference)


def _rows(name: str, samples: Tensor) -> Tensor:
    """``samples`` as float64 rows on the CPU, [B, d]; ValueError if they are no batch of finite numbers."""
    return validate.finite(name, samples).cpu().double().flatten(1)


def _moments(name: str, samples: Tensor) -> tuple[Tensor, Tensor]:
    """The mean [d], and ``R`` [min(n, d), d] with ``R' R`` the covariance."""
    rows = _rows(name, samples)
    if len(rows) < 2:
        raise ValueError(f"{name} must hold at least two samples for a covariance, got {len(rows)}")
    mean = rows.mean(0)
    return mean, torch.linalg.qr((rows - mean) / (len(rows) - 1) ** 0.5, mode="r").R
