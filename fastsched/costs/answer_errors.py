"""The error of the surrogate's answers, and the variance that it adds to the error at the end.

The secants explain part of a deviation. For the rest, ``u``, the surrogate has only the scalar Jacobian, and its answer
has an unknown error ``E``. To estimate its size, each deviated path ``m`` is left out in turn: the others explain its
deviation up to ``u_m``, and predict its answer up to ``E_m``,

    ``kappa(s)^2 = FOUND median_b ( sum_m ||E_{m,b}||^2 / sum_m ||u_{m,b}||^2 )^(1/2)``.

``kappa`` is near 0 where the denoiser is known (noise alone; no noise) and near 1 where modes part. The root is there
because a deviated path is one the denoiser has answered many times, which leaves the directions that it answers alike;
a step's own error lies in others. Over nine denoisers and five solvers, squared errors of answers as they reach the end
were 0.3 to 3 times what this says, and without the root 1.6 to 15 times.

An error of the n-th answer reaches the end multiplied by ``c_n``, which follows from the weights of all later steps.
Errors of answers to similar deviations at neighbouring levels are correlated, so the variance at the end is taken as

    ``sum_{n,m} c_n c_m kappa_n kappa_m <u_n, u_m> exp(-|lambda_n - lambda_m| / LENGTH)``.
"""

from __future__ import annotations

import numpy as np

from fastsched.costs.norms import Array, Norms
from fastsched.costs.secants import Secants

#: Fraction of ``kappa^2`` found by leaving a path out: where all paths are known, answers are better.
FOUND = 0.8

#: Correlation length of the errors of answers, in ``lambda``. Over twelve denoisers and three solvers the errors
#: of answers to nearly the same deviation had cosines of 0.95 at a distance of 0.1, 0.65 at 0.4, 0.5 at 1, 0.2 at 1.6.
LENGTH = 1.3


def relative_errors(secants: Secants, norms: Norms) -> Array:
    """``kappa`` at the levels of the secants, [G], by leaving out each deviated path in turn."""
    missed = np.zeros((len(secants.lam), len(norms.gram)))
    left = np.zeros_like(missed)
    for path in range(secants.deviations.shape[1]):
        error, unexplained = secants.left_out(path)
        missed += norms.squared(error)
        left += norms.squared(unexplained)
    ratio = np.divide(missed, left, out=np.zeros_like(left), where=left > 0)
    ratio[0] = ratio[1]  # at the first level nothing has deviated yet
    return np.sqrt(FOUND * np.sqrt(np.median(ratio, axis=1)))


def uncorrelated(vectors: Array, lam: Array, length: float) -> Array:
    """Uncorrelated vectors of the same total variance as correlated errors, [C, E, V].

    With ``L`` the Cholesky factor of ``exp(-|lam_n - lam_m| / length)``, ``sum_n L[n, k] v_n`` for each k. The
    correlation is that of a Markov process, so ``L[n, k]`` is the correlation of n and k times ``sqrt(1 - that of k and
    k - 1, squared)``.

    Args:
        vectors: Errors as they reach the end, [C, E, V].
        lam: Where they were made, [C, E].
        length: Their correlation length in ``lambda``.
    """
    near = np.exp(-np.abs(np.diff(lam, axis=1)) / length)[:, :, None]
    found = vectors.copy()
    for k in range(vectors.shape[1] - 2, -1, -1):
        found[:, k] += near[:, k] * found[:, k + 1]
    found[:, 1:] *= np.sqrt(1 - near**2)
    return found
