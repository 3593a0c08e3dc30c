"""Denoisers in closed form, against which the estimates of this package are tested.

Each oracle is a data distribution whose variance-exploding marginals are known: a state is
``z = x0 + s * eps`` with ``x0`` from the data and ``eps`` standard normal. All have the same interface:

* ``shape``: the shape of one sample, without the batch dimension;
* ``denoise(z, s)``: ``D(z; s) = E[x0 | z]``, shaped as ``z`` [B, *shape];
* ``score(z, s)``: the gradient of the marginal's log density, ``(D - z) / s^2``, shaped as ``z``;
* ``log_density(z, s)``: the log density of the marginal at level ``s``, in nats, [B];
* ``sample(n, seed=...)``: clean samples [n, *shape].

``s`` is positive and finite: a float, a scalar tensor, or a tensor [B] with one level per sample. Results have
the dtype and device of ``z``; half precision is computed in float32 and rounded at the end. All methods
are differentiable in ``z``, in forward and reverse mode.

Invalid input raises ``ValueError`` or ``TypeError`` naming the argument. The values of a *tensor* of levels
are not checked, because reading them would stall a GPU.
"""

from __future__ import annotations

from fastsched.denoisers.oracles.empirical import Empirical
from fastsched.denoisers.oracles.gaussian import Gaussian
from fastsched.denoisers.oracles.mixture import GaussianMixture

__all__ = ["Empirical", "Gaussian", "GaussianMixture"]
