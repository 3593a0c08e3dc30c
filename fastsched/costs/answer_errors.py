"""The error of the surrogate's answers, and the variance that it adds to the error at the end.

An answer is the surrogate's estimate of the network's response to a deviation from the path. The secants explain part
of a deviation. For the rest, ``u``, the surrogate has only the scalar Jacobian, so its answer has an unknown error
``E``. To estimate its size, each deviated path ``m`` is left out in turn. The other paths then leave ``u_m`` of its
deviation unexplained, and predict its answer with an error ``E_m``:

    ``kappa(s)^2 = LEAVE_ONE_OUT_FACTOR median_b ( sum_m ||E_{m,b}||^2 / sum_m ||u_{m,b}||^2 )^(1/2)``.

``kappa`` is near 0 at very high and very low noise, and near 1 where modes separate. The square root corrects for an
optimistic ratio: a deviated path has passed through the denoiser many times, which leaves deviations in directions that
it treats similarly, while the error of a single step has other directions. Over nine denoisers and five solvers, the
squared errors of answers at the end were 0.3 to 3 times this estimate, and 1.6 to 15 times the one without the root.

The error of the n-th answer reaches the end multiplied by ``c_n``, which follows from the weights of all later steps.
Errors of answers to similar deviations at neighbouring levels are correlated, so the variance at the end is taken as

    ``sum_{n,m} c_n c_m kappa_n kappa_m <u_n, u_m> exp(-|lambda_n - lambda_m| / CORRELATION_LENGTH)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from fastsched.costs.norms import Array

#: Factor of the leave-one-out estimate: predictions use all paths, so their answers are better than with one left out.
LEAVE_ONE_OUT_FACTOR = 0.8

#: Correlation length of the errors of answers, in ``lambda``. Over twelve denoisers and three solvers the errors
#: of answers to nearly the same deviation had cosines of 0.95 at a distance of 0.1, 0.65 at 0.4, 0.5 at 1, 0.2 at 1.6.
CORRELATION_LENGTH = 1.3


def relative_errors(left_out: Iterable[tuple[Array, Array]], difference: Array) -> Array:
    """``kappa`` at the levels of the secants, [G].

    Args:
        left_out: For each deviated path, the error and the unexplained deviation from `Secants.left_out`, in the
            samples' coordinates, [G, B, r] each.
        difference: The scalar Jacobian of each sample minus the common one, [G, B].
    """
    missed, left = np.zeros_like(difference), np.zeros_like(difference)
    for error, unexplained in left_out:
        missed += ((error - difference[:, :, None] * unexplained) ** 2).sum(2)
        left += (unexplained**2).sum(2)
    ratio = np.divide(missed, left, out=np.zeros_like(left), where=left > 0)
    ratio[0] = ratio[1]  # at the first level nothing has deviated yet
    return np.sqrt(LEAVE_ONE_OUT_FACTOR * np.sqrt(np.median(ratio, axis=1)))


def variance_at_end(errors: Sequence[Array], lam: Array, length: float, squared: Callable[[Array], Array]) -> Array:
    """The variance of a sum of correlated errors.

    The sum ``sum_{n,m} q[n, m] <e_n, e_m>`` with ``q[n, m] = exp(-|lam_n - lam_m| / length)``, the correlations of a
    Markov process, is ``sum_k (1 - q[k, k-1]^2) ||f_k||^2``, where ``f_k = e_k + q[k, k+1] f_{k+1}``.

    Args:
        errors: The errors ``e_n`` of C schedules as they reach the end, E arrays [C, ...].
        lam: ``lambda`` of the evaluations with these errors, ascending, [C, E].
        length: Correlation length of the errors in ``lambda``.
        squared: Gives the squared norms of errors.
    """
    near = np.exp(-np.abs(np.diff(lam, axis=1)) / length)
    each = lambda k, values: near[:, k].reshape(-1, *[1] * (values.ndim - 1))
    carried = errors[-1]
    total = np.zeros_like(squared(carried))
    for k in range(len(errors) - 1, 0, -1):
        own = squared(carried)
        total += (1 - each(k - 1, own) ** 2) * own
        carried = errors[k - 1] + each(k - 1, carried) * carried
    return total + squared(carried)
