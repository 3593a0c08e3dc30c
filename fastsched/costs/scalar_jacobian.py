"""The scalar Jacobian of the denoiser around a path: its response to a deviation as a multiple of the deviation."""

from __future__ import annotations

import numpy as np

from fastsched.costs.norms import Array


def scalar_jacobian(deviations: Array, responses: Array, grams: Array) -> Array:
    """The least-squares ``j`` of ``D(z') - D(z) ~ j a`` over the deviated paths, at the levels of secants.

    It is clipped to [0, 1], so that errors do not change sign or grow along the path. Between modes they can grow; only
    secants model this.

    Args:
        deviations: The paths' deviations ``a``, [G, M, V].
        responses: Their responses, [G, M, V].
        grams: Gram matrices of samples, [B, V, V]; or their mean, [1, V, V].

    Returns:
        ``j``, [G, B].
    """
    square, answered = (
        np.einsum("gmv,bvw,gmw->gb", deviations, grams, vectors, optimize=True) for vectors in (deviations, responses)
    )
    found = np.divide(answered, square, out=np.zeros_like(square), where=square > 0)
    found[0] = found[1]  # at the first level nothing has deviated yet
    return np.clip(found, 0.0, 1.0)
