"""Lower the predicted error of a schedule over its levels and weights together.

The error of sample ``b`` is a vector ``E_b(x)`` that depends smoothly on the parameters. The objective is the power
mean of ``q_b``, which is ``||E_b||^2`` plus the penalty on unexplained deviations (`fastsched.costs.prediction`). Its
gradient is proportional to that of the sum of the ``q_b`` with fixed weights ``w_b = q_b^(p - 1)``. So a step solves

    ``(H + mu diag H) dx = -g``,   ``H = sum_b w_b J_b' J_b``,   ``g = sum_b w_b J_b' E_b``,

with ``J_b`` by finite differences, for all `DAMPINGS` ``mu`` (Levenberg 1944; Marquardt 1963). The best step is taken.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastsched.costs.blas_threads import one_blas_thread
from fastsched.costs.norms import Array
from fastsched.costs.surrogate import Outcome
from fastsched.fitting.neighbourhood import Neighbourhood
from fastsched.metrics import EXPONENT

#: The dampings ``mu`` that every step tries.
DAMPINGS = 10.0 ** np.arange(-4.0, 3.5, 0.5)

#: The most steps, and the relative decrease of the error below which the iteration stops.
STEPS, LEAST_GAIN = 12, 1e-3

#: Length of finite differences, in ``log s`` and in weights.
DIFFERENCE = 1e-4


@one_blas_thread()
def lowered(near: Neighbourhood, x: Array, low: Array, high: Array) -> Array:
    """Parameters [P] between ``low`` and ``high`` whose predicted error is at most that of the start ``x``."""
    free = np.flatnonzero(high > low)
    error = float(near.predicted(x[None])[0])
    for _ in range(STEPS if len(free) else 0):
        gradient, hessian = quadratic(near, x, free)
        damped = hessian + DAMPINGS[:, None, None] * np.diag(np.diag(hessian) + np.finfo(np.float64).tiny)
        if not np.isfinite(damped).all():
            break
        tried = np.repeat(x[None], len(DAMPINGS), axis=0)
        tried[:, free] -= np.linalg.solve(damped, gradient[None, :, None])[..., 0]
        tried = np.clip(tried, low, high)
        errors = near.predicted(tried)
        best = int(errors.argmin())
        if not errors[best] < (1 - LEAST_GAIN) * error:
            break
        x, error = tried[best], float(errors[best])
    return x


def quadratic(near: Neighbourhood, x: Array, free: NDArray[np.intp]) -> tuple[Array, Array]:
    """``g`` and ``H`` at ``x`` over the parameters ``free``, with ``w_b`` scaled such that ``sum_b w_b q_b = 1``."""
    moved = x + DIFFERENCE * np.eye(len(x))[free]
    found = near.outcome(np.concatenate([x[None], moved]))
    error, deviations = found.error[0], found.deviations[0]
    q = near.squared_errors(Outcome(error[None], deviations[None]))[0]
    weights = q ** (EXPONENT - 1) / (q**EXPONENT).sum()
    jacobian = (found.error[1:] - error) / DIFFERENCE
    products = jacobian @ np.einsum("b,bvu->vu", weights, near.norms.gram)
    change = (found.deviations[1:] - deviations) / DIFFERENCE  # [P, evaluations, V]
    flat = lambda vectors: vectors.reshape(*vectors.shape[:-2], -1)
    scaled = near.penalty**2 * float(weights @ near.norms.size) * flat(change @ near.norms.metric)
    gradient = products @ error + scaled @ flat(deviations)
    return gradient, products @ jacobian.T + scaled @ flat(change).T
