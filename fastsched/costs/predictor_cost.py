"""The predictor-optimised cost of Score-Optimal Diffusion Schedules.

The predictor of a step from level i to j is the Euler step of the probability-flow ODE,
``F(z) = z + a score_i(z)``, ``a = s_i (s_i - s_j)``. It carries ``p_i`` to a distribution whose score at ``F(z)`` is
``M^{-T} [score_i(z) - g(z)]``, with ``M = dF/dz = r I + (1 - r) J``, ``r = s_j / s_i``, ``J = dD/dz``, and
``g = grad log det M``. The error that is left is the Stein divergence

    ``L_p(i, j) = v^2 E_{z ~ p_i} || score_j(F(z)) - M^{-T} [score_i(z) - g(z)] ||^2``.

* ``g`` is estimated with Hutchinson's identity: ``d log det M = tr(M^{-1} dM)``, so for a Rademacher probe ``w`` and
  ``u = M^{-1} w`` held fixed, ``E (1 - r) grad_z (u' J(z) w) = g``: a gradient of a forward-mode derivative.
* The square is unbiased: the estimates ``b_m`` from independent probes enter as ``mean_{m != n} <b_m, b_n>``.
* Linear systems are solved by conjugate gradients on forward-mode derivatives: ``M`` is symmetric and positive
  definite for an exact denoiser. The system is solved for ``b = M^{-1} [M score_j(F) - score_i + g]`` as a whole, so
  that the solver's relative accuracy is that of the small difference and not of the two large scores.

For short steps ``L_p ~ delta * step^4``, because the predictor is accurate to second order.

Source: Williams, Campbell, Doucet and Syed, NeurIPS 2024 (arXiv 2412.07877), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fastsched import validate
from fastsched.costs.cost_matrix import CostMatrix
from fastsched.costs.level_pairs import pair_costs
from fastsched.costs.states import Batch, StateSource, explained_derivatives, is_probes
from fastsched.denoisers.denoiser import Denoiser
from fastsched.ops.backends import in_float64

#: Relative residual at which conjugate gradients stop. The cost is a square, so its relative error is twice as large.
TOLERANCE = 1e-4

_NO_GRADIENT = (
    "the network's forward-mode derivative has no gradient (torch.func.grad), which this cost needs (does it use "
    "gradient checkpointing, or write into tensors that it keeps?)"
)


@torch.no_grad()
def stein_predictor(
    denoiser: Denoiser,
    *,
    shape: Sequence[int],
    sigmas: Tensor | Sequence[float],
    samples: int | range,
    pairs: str = "adjacent",
    velocity: str | None = "noisier",
    data: Tensor | None = None,
    probes: int | None = 2,
    max_iterations: int = 100,
    seed: int = 0,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> CostMatrix:
    """``L_p(i, j)``, the Stein divergence after one Euler step between noise levels (equation in the module docstring).

    The network must support forward-mode derivatives (`torch.func.jvp`). A step takes one evaluation, one derivative,
    one gradient per probe, and one derivative per probe for each iteration of its two linear systems: about 5 between
    neighbours, more between distant levels. States take evaluations as in `fastsched.costs.stein_corrector`. Where the
    true cost is close to 0 an unbiased estimate may be negative: its noise falls as ``step^2`` but the cost as
    ``step^4``. On a fine grid use many samples or ``probes=None``. With probes ``J`` is assumed symmetric, as it is for
    an exact denoiser. If a trained network's ``J`` is far from symmetric, long steps do not converge; a warning says
    so, and ``probes=None`` is needed. Use float64 for a network that predicts x0 at levels far below the data's
    standard deviation, where its score is a small difference.

    The arguments are those of `fastsched.costs.states.StateSource`, ``progress``, which shows a progress bar, and

    * ``pairs``, ``velocity``: as in `fastsched.costs.stein_corrector`.
    * ``probes``: Rademacher probes per state, at least 2; a batch takes ``batch_size * probes`` rows. None computes the
      whole Jacobian and the exact gradient of its determinant, with as many derivatives per state and gradients per
      step as a sample has elements.
    * ``max_iterations``: the most iterations of conjugate gradients.

    Returns:
        The cost, of order 4, with its standard errors.

    Raises:
        ValueError: If an argument is out of range, or a level (named) has an output of wrong shape, NaN or inf.
    """
    validate.arguments(locals(), probes=validate.optional(is_probes))
    source = StateSource(denoiser, sigmas, shape, samples, data, seed, batch_size, device, dtype)
    estimator = _Exact(source) if probes is None else _Hutchinson(source, probes, max_iterations)
    cost = pair_costs(source, "stein_predictor", pairs, velocity, estimator.squares, order=4, progress=progress)
    if estimator.unconverged:
        validate.warn(
            f"{estimator.unconverged} of {estimator.solves} linear systems did not reach a residual of {TOLERANCE:g}; "
            "raise max_iterations, or use probes=None if the network's Jacobian is far from symmetric and positive",
        )
    return replace(cost, calls=cost.calls._replace(jvp=estimator.jvp_calls, gradient=estimator.gradient_calls))


class _Estimator:
    """The base of both estimators: derivatives of the denoiser at a level, with counts."""

    def __init__(self, source: StateSource) -> None:
        self.source = source
        self.jvp_calls = self.gradient_calls = self.solves = self.unconverged = 0

    def jacobian_product(self, z: Tensor, w: Tensor, k: int) -> Tensor:
        """``J w`` row by row."""
        self.jvp_calls += len(z)
        return self.source.derivative(z, w, k)

    def product_gradient(self, z: Tensor, u: Tensor, w: Tensor, k: int) -> Tensor:
        """``grad_z (u' J(z) w)`` row by row, for fixed ``u`` and ``w``."""
        self.gradient_calls += len(z)
        denoise = partial(self.source.denoise, k=k)
        # The rows are independent, so the gradient of their sum holds each row's gradient.
        inner = lambda state: (u * torch.func.jvp(denoise, (state,), (w,))[1]).sum()
        with explained_derivatives(_NO_GRADIENT):
            return torch.func.grad(inner)(z)

    def predicted_score(self, z: Tensor, score: Tensor, k: int, j: int) -> Tensor:
        """``score_j`` at the Euler step ``F(z)``."""
        s_i, s_j = float(self.source.s[k]), float(self.source.s[j])
        reached = z + s_i * (s_i - s_j) * score
        return self.source.score_of(reached, self.source.raw_output(reached, j), j)


class _Exact(_Estimator):
    """The estimate from the whole Jacobian: ``g`` is a sum over unit vectors instead of a mean over probes."""

    def squares(self, batch: Batch, z: Tensor, raw: Tensor, k: int, others: range) -> Tensor:
        """The squared difference of scores for steps from level k, [B, n]."""
        source, d = self.source, z[0].numel()
        eye = torch.eye(d, dtype=z.dtype, device=z.device)
        units = eye.repeat(len(z), 1).reshape(-1, *z.shape[1:])  # [B d, *shape]
        repeated = z.repeat_interleave(d, 0)
        columns = self.jacobian_product(repeated, units, k).reshape(len(z), d, d)
        jacobian = columns.mT
        score = source.score_of(z, raw, k)
        results = []
        for j in others:
            r = float(source.s[j] / source.s[k])
            transposed = (r * eye + (1 - r) * jacobian).mT
            u = torch.linalg.solve(transposed, eye.expand_as(transposed)).mT  # row n is M^{-T} e_n
            gradients = self.product_gradient(repeated, u.reshape(repeated.shape), units, k)
            log_det_gradient = (1 - r) * gradients.reshape(len(z), d, d).sum(1)
            predicted = self.predicted_score(z, score, k, j).flatten(1)
            right = (transposed @ predicted[..., None])[..., 0] - score.flatten(1) + log_det_gradient
            results.append(in_float64(torch.linalg.solve(transposed, right)).square().sum(1))
        return torch.stack(results, 1)


class _Hutchinson(_Estimator):
    """The estimate from ``probes`` Rademacher probes per state, which all steps from a level share."""

    def __init__(self, source: StateSource, probes: int, max_iterations: int) -> None:
        super().__init__(source)
        self.probes, self.max_iterations = probes, max_iterations

    def squares(self, batch: Batch, z: Tensor, raw: Tensor, k: int, others: range) -> Tensor:
        """An unbiased estimate of the squared difference of scores for steps from level k, [B, n]."""
        source, probes = self.source, self.probes
        w = batch.signs(probes).flatten(0, 1)
        repeated = z.repeat_interleave(probes, 0)
        score = source.score_of(z, raw, k)
        results = []
        for j in others:
            r = float(source.s[j] / source.s[k])
            u = self._solve(repeated, w, k, r)
            log_det_gradient = (1 - r) * self.product_gradient(repeated, u, w, k)
            predicted = self.predicted_score(z, score, k, j)
            fixed = r * predicted + (1 - r) * self.jacobian_product(z, predicted, k) - score
            b = self._solve(repeated, fixed.repeat_interleave(probes, 0) + log_det_gradient, k, r)
            # Products of different probes only: the square of a single probe's b is biased by its variance.
            b = in_float64(b.reshape(len(z), probes, -1))
            crossed = b.sum(1).square().sum(1) - b.square().sum((1, 2))  # sum over m != n of <b_m, b_n>
            results.append(crossed / (probes * (probes - 1)))
        return torch.stack(results, 1)

    def _solve(self, z: Tensor, right: Tensor, k: int, r: float) -> Tensor:
        """``M^{-1} right`` row by row."""
        product = lambda v: r * v + (1 - r) * self.jacobian_product(z, v, k)
        solution, converged = conjugate_gradients(product, right, TOLERANCE, self.max_iterations)
        self.solves += len(z)
        self.unconverged += int((~converged).sum())
        return solution


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], right: Tensor, tolerance: float, max_iterations: int
) -> tuple[Tensor, Tensor]:
    """Solve ``M x = right`` for each row of a batch, ``M`` symmetric and positive definite (Hestenes & Stiefel 1952).

    Args:
        product: ``M v`` row by row.
        right: Right-hand sides, [R, *shape].
        tolerance: A row has converged when its residual is below this fraction of its right-hand side.
        max_iterations: The most products per row.

    Returns:
        Solutions [R, *shape], and which rows converged [R]. A row stops early, unconverged, where a search direction
        shows that ``M`` is not positive definite.
    """
    dot = lambda x, y: (x * y).flatten(1).sum(1).reshape(-1, *[1] * (x.ndim - 1))
    solution, residual, direction = torch.zeros_like(right), right, right
    size = dot(right, right)
    goal = tolerance**2 * size
    active = size > goal
    for _ in range(max_iterations):
        if not bool(active.any()):
            break
        image = product(direction)
        curvature = dot(direction, image)
        active = active & (curvature > 0)
        step = torch.where(active, size / curvature, 0.0)
        solution = solution + step * direction
        residual = residual - step * image
        smaller = dot(residual, residual)
        direction = torch.where(active, residual + smaller / size * direction, direction)
        size = torch.where(active, smaller, size)
        active = active & (size > goal)
    return solution, (size <= goal).flatten()
