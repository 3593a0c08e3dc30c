"""DMN's schedules (Xue et al. 2024, arXiv 2402.17376): its bound, minimised by its authors' procedure.

There are no model calls, and one schedule serves all solvers. The bound is not smooth. From 7 steps on the minimiser
stops on one of its creases, and rounding of the start decides on which: from sigma 80 to 0.002 at 8 steps, the authors'
own code gives second nodes from 18.8 to 35.4 if its start is moved by 1e-12. So each seed of the benchmark moves the
start by its own random differences. Up to 6 steps all of them agree.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.quality.baselines import from_start, highest_finite
from fastsched.denoisers.noise import NoiseProcess

Array = NDArray[np.float64]

#: Up to this many steps the authors do not let weights of the first three steps cancel those of later steps.
FEW_STEPS = 7

#: Assumed error of a denoiser at level ``s = sigma / alpha``, with ``alpha^2 + sigma^2 = 1``: ``sigma / alpha``, which
#: the authors recommend for pixels, and ``sigma^2 / alpha``, which their program uses.
ERRORS: dict[str, Callable[[Array], Array]] = {
    "sigma": lambda s: s,
    "sigma_squared": lambda s: s**2 / np.sqrt(1 + s**2),
}

#: Size of the random differences in ``log s`` that imitate another rounding.
ROUNDING = 1e-12


@functools.cache
def schedule(process: NoiseProcess, steps: int, error: str = "sigma", seed: int = 0) -> Tensor:
    """Sampler sigmas [steps + 1] that minimise `bound` between the ends of the process; 0 replaces the last.

    As the authors do, this uses SciPy's trust-constr with its defaults over ``lambda = -log s`` of the inner nodes. It
    starts from nodes uniform in ``lambda``, and linear constraints keep the nodes in order. ``error`` is a name of
    `ERRORS`. A ``seed`` other than 0 adds random differences of size `ROUNDING` to the start.
    """
    from scipy.optimize import LinearConstraint, minimize

    first, last = -np.log(highest_finite(process)), -np.log(process.s_min)

    def nodes(inner: Array) -> Array:
        ends = np.ones_like(inner[..., :1])
        return np.exp(-np.concatenate([first * ends, inner, last * ends], -1))

    def value(inner: Array) -> float:
        return float(bound(nodes(inner), error))

    def gradient(inner: Array) -> Array:  # SciPy's forward differences, in one batch
        moved = inner + np.diag(np.sqrt(np.finfo(float).eps) * np.copysign(np.maximum(1, np.abs(inner)), inner))
        return (bound(nodes(moved), error) - value(inner)) / (np.diagonal(moved) - inner)

    inner = np.linspace(first, last, steps + 1)[1:-1]
    if seed:
        inner = inner + ROUNDING * np.random.default_rng(seed).standard_normal(len(inner))
    if steps > 1:
        gaps = np.eye(steps, steps - 1) - np.eye(steps, steps - 1, -1)
        least = np.concatenate([[first], np.zeros(steps - 2), [-last]])
        ordered = LinearConstraint(gaps, least)  # type: ignore[arg-type]  # SciPy's annotations leave arrays out
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "delta_grad == 0.0": between creases the bound can be linear
            inner = minimize(value, inner, jac=gradient, method="trust-constr", constraints=[ordered]).x
    return from_start(process, torch.from_numpy(np.append(nodes(inner)[:-1], 0.0)))


def bound(s: Array, error: str = "sigma") -> Array:
    """How far a denoiser with error ``e_i`` at level i can move the end of the path, [...].

    The bound is ``sum_i e_i |W_i|``, with ``W_i`` the weight of the i-th denoised sample in ``y`` at the end. The
    multistep solver is of third order: it interpolates ``D`` in ``lambda = -log s`` by the last three samples and
    integrates exactly over ``rho = e^lambda``. The first and the last step use one sample, the second and the last but
    one use two. Steps with one sample add ``e_i |W_i|`` of their own; up to `FEW_STEPS` steps, the second and the third
    step add ``(sum_i (e_i W_i)^2)^(1/2)`` of their own. Levels ``s`` [..., steps + 1] descend to
    above 0, and ``error`` is a name of `ERRORS`.
    """
    steps = s.shape[-1] - 1
    lam, size = -np.log(s), ERRORS[error](s)
    sums, apart = np.zeros((*s.shape[:-1], steps)), np.zeros(s.shape[:-1])
    for n in range(steps):
        order = max(1, min(3, n + 1, steps - n))
        used = slice(n + 1 - order, n + 1)
        h = lam[..., n + 1] - lam[..., n]
        moments = [np.expm1(h)]  # integrals of (lambda - lambda_n)^p over e^lambda, divided by e^lambda_n
        for power in range(1, order):
            moments.append(h**power * np.exp(h) - power * moments[-1])
        positions = lam[..., used] - lam[..., n : n + 1]
        powers = positions[..., None, :] ** np.arange(order)[:, None]
        weights = np.linalg.solve(powers, np.stack(moments, -1)[..., None])[..., 0] / s[..., n : n + 1]
        terms = weights * size[..., used]
        if steps <= FEW_STEPS and n < 3 and order > 1:
            apart += np.sqrt((terms**2).sum(-1))
        elif order == 1:
            apart += np.abs(terms[..., 0])
        else:
            sums[..., used] += terms
    return apart + np.abs(sums).sum(-1)
