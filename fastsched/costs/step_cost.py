"""The solver-aware path cost: the error of every step of a solver, from one Gram matrix of increments.

Between levels, ``D`` on the path is taken as piecewise linear in ``lambda``. A segment from ``rho_q`` to ``rho_{q+1}``
has the length ``h`` in ``lambda`` and ``I`` in ``rho``, and the integral of ``D`` over it is
``(I - w) D_q + w D_{q+1}``, ``w = rho_{q+1} - I/h``. With ``r_q = rho_q + (I - w)`` the path is

    ``y_k - y_j = (rho_k - rho_j) D_j + sum_{j <= q < k} (rho_k - r_q) e_q``,   ``e_q = D_{q+1} - D_q``.

A step of a linear solver (`fastsched.sampling.solvers`) with weights ``b`` then has the error ``sum_q C_q e_q``:

* ``j <= q < k``: ``C_q = r_q - rho_k``. A slope of weight ``b`` at a node ahead adds ``scale * b * f * p_q``, where
  ``p_q`` is the fraction of segment ``q`` before this node (1 for all segments if the node is the end of the step).
* ``i <= q < j``: ``C_q = -scale * B_i * u_q``, ``B_i`` the weight on ``i`` and earlier; and so on for earlier levels.

Here ``u_q e_q`` is the change of the slope over a segment. For the slope ``D``, ``u = f = 1``. For the slope ``g``,
``u_q = -(r_q + 1/tau - rho)``, in which ``1/tau - rho`` is 0 (VE, VP) or 1 (flow), and ``f = -1/tau`` at the node
ahead. The state there is a prediction with an error ``sum_q P_q e_q``. The denoiser multiplies this error by ``J``, the
scalar Jacobian of `fastsched.costs.surrogate`, which adds ``scale * b * f * J s P_q``. The local error is
``E ||.||^2 = s_k^2 C' G C``.

Source: multistep error analysis in the form of Lu et al. 2022 (DPM-Solver++) and Zhang & Chen 2023 (DEIS).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastsched import validate
from fastsched.costs.norms import Array
from fastsched.costs.surrogate import Surrogate
from fastsched.measurement import memory
from fastsched.measurement.statistics import PathStatistics
from fastsched.sampling.multistep import Node, log_rho
from fastsched.sampling.solvers import Solver, from_pure_noise, get_solver, step_scale

#: Bytes that a search takes for each triple of levels: 8 for its cost, and copies of a sixth of all costs.
BYTES_A_TRIPLE = 10


def error_weight(stats: PathStatistics) -> Array:
    """The factor from a squared error made at each level to the one at the end of the path, [N + 1]; 1 at the end."""
    return _weight(Surrogate.of(stats))


def _weight(surrogate: Surrogate) -> Array:
    return np.append(surrogate.amplitude(surrogate.s) ** 2, 1.0)


def check_memory(levels: int) -> None:
    """MemoryError if `PathCost.triples` of so many levels do not fit into memory; the message says what to lower."""
    free, wanted = memory.free_bytes(torch.device("cpu")), BYTES_A_TRIPLE * (levels + 1) ** 3
    if free is not None and wanted > free:
        raise MemoryError(
            f"not enough memory: a search over {levels} levels takes {wanted / 2**30:.3g} GiB, but "
            f"{free / 2**30:.3g} are free; lower levels (32 to 64 are enough)"
        )


def path_cost(stats: PathStatistics, solver: str | Solver = "dpmpp_2m", *, weighted: bool = True) -> PathCost:
    """The cost of every step of ``solver`` between the levels of ``stats``.

    Args:
        stats: The result of `fastsched.measure`.
        solver: A solver's name.
        weighted: Whether errors are weighted by their effect at the end of the path (`error_weight`).

    Raises:
        ValueError: If the solver is unknown.
    """
    validate.arguments(locals())
    surrogate, gram = Surrogate.of(stats), stats.gram.mean(0).numpy()
    return PathCost(
        solver=get_solver(solver),
        s=stats.s.numpy(),
        tau=stats.process.sampler_sigma(stats.s).numpy(),
        gram=(gram + gram.T) / 2,  # the triangles differ by rounding; equal ones give exactly equal costs
        weight=_weight(surrogate) if weighted else np.ones(stats.levels + 1),
        jacobian=surrogate.jacobian,
    )


@dataclass(frozen=True, eq=False)
class PathCost:
    """Costs over levels ``0..N``, where level N is sigma 0.

    Attributes:
        solver: The solver.
        s: Levels 0..N-1, [N].
        tau: The same levels as sampler sigmas, [N].
        gram: Mean Gram matrix of the increments, ``E <e_p, e_q>``, [N-1, N-1].
        weight: Weight of a squared error made at each level, [N + 1]; entry 0 is not used.
        jacobian: The scalar Jacobian, by which the denoiser multiplies a state's error, [N].
    """

    solver: Solver
    s: Array
    tau: Array
    gram: Array
    weight: Array
    jacobian: Array

    @property
    def levels(self) -> int:
        """N, the number of levels."""
        return len(self.s)

    @cached_property
    def rho(self) -> Array:
        """``1 / s``, [N]."""
        return 1 / self.s

    @cached_property
    def _node_rho(self) -> Array:
        """``r_q``, [N-1]: a jump of ``D`` at this ``rho`` has the same integral as the increment."""
        a, b = self.rho[:-1], self.rho[1:]
        length = b - a
        with np.errstate(divide="ignore"):
            h = np.log(b / a)
        on_end = np.where(np.isinf(h), length / 2, b - length / h)
        return b - on_end

    @cached_property
    def _slope_change(self) -> Array:
        """``u_q``, [N-1]."""
        if self.solver.variable == "rho":
            return np.ones(self.levels - 1)
        return -(self._node_rho + (1 / self.tau - self.rho)[-1])

    @cached_property
    def _lam(self) -> Array:
        return log_rho(self.rho)

    def _node(self, k: int | NDArray[np.intp]) -> Node:
        return Node(self.rho[k], self._lam[k], self.tau[k])

    @cached_property
    def pairs(self) -> Array:
        """Cost of a step from level j to k with no earlier slope, [N + 1, N + 1]; ``inf`` where ``k <= j``."""
        n = self.levels
        costs = np.full((n + 1, n + 1), np.inf)
        for k in range(1, n):
            if self.solver.stage is None and self.solver.corrector is None:
                costs[:k, k] = self.weight[k] * self.s[k] ** 2 * self._suffix_squares(self._step_vector(k), k)
            else:
                costs[:k, k] = [self.step([j, k]) for j in range(k)]
        costs[:n, n] = self._end_cost
        return costs

    @cached_property
    def first(self) -> Array:
        """Cost of the first step, from level 0 to each level, [N + 1]; ``inf`` at level 0."""
        n = self.levels
        return np.array([np.inf, *(self.step([0, k]) for k in range(1, n)), self._end_cost[0]])

    @cached_property
    def triples(self) -> Array:
        """Cost of a step from j to k after one from i to j, ``[i, j, k]``, [N + 1]^3; ``inf`` unless ``i < j < k``."""
        n = self.levels
        check_memory(n)
        costs = np.full((n + 1, n + 1, n + 1), np.inf)
        for k in range(2, n):
            i, j = np.arange(k)[:, None], np.arange(k)[None, :]
            alpha, beta, gain = self._two_slope_factors(i, j, k)
            vector, ones = self._step_vector(k), np.ones(k)
            total = gain**2 * self._suffix_squares(vector, k) + alpha**2 * self._history_squares[:k, :k]
            total += 2 * alpha * gain * self._cross_products(vector, k)
            if self.solver.corrector is not None:
                total += 2 * beta * gain * self._suffix_products(vector, ones, k)
                total += beta**2 * self._suffix_squares(ones, k) + 2 * alpha * beta * self._cross_products(ones, k)
            scaled = self.weight[k] * self.s[k] ** 2 * np.maximum(total, 0.0)
            costs[:k, :k, k] = np.where(i < j, scaled, np.inf)
        before_end = np.arange(n)[:, None] < np.arange(n)[None, :]
        costs[:n, :n, n] = np.where(before_end, self._end_cost[None, :], np.inf)
        return costs

    def of(self, nodes: Sequence[int]) -> Array:
        """The cost of each step of a schedule, [steps], with the solver's full history; ``nodes`` end at level N."""
        steps, costs = len(nodes) - 1, list[float]()
        for n in range(steps):
            oldest = max(0, n - self.solver.history_at(n, steps))
            costs.append(self.step(nodes[oldest : n + 2], corrected=n + 2 < steps))
        return np.array(costs)

    def step(self, nodes: Sequence[int], *, corrected: bool = True) -> float:
        """The cost of the step between the last two of ``nodes``; the nodes before are its history, newest last.

        Args:
            nodes: Ascending level indices.
            corrected: Whether the solver's corrector, if any, is applied. The step before the one to sigma 0 has none.
        """
        j, k = nodes[-2], nodes[-1]
        if k == self.levels:
            return float(self._end_cost[j])
        inside = self.error_vector(nodes, corrected=corrected)[nodes[0] : k]
        gram = self.gram[nodes[0] : k, nodes[0] : k]
        return float(self.weight[k] * self.s[k] ** 2 * (inside @ gram @ inside))

    def error_vector(self, nodes: Sequence[int], *, corrected: bool = True) -> Array:
        """``C`` [N-1]: the error in ``y_k`` of the step between the last two ``nodes``, over the increments.

        For the step to sigma 0, where ``y`` is infinite, it is the error in ``z``.
        """
        *earlier, j, k = nodes
        if k == self.levels:
            return np.where(np.arange(k - 1) < j, 0.0, -1.0)  # z = D_j, against D_{N-1}
        if from_pure_noise(self.solver, self._node(j)):
            return np.append(self._step_vector(k), np.zeros(self.levels - 1 - k))
        earlier = [n for n in earlier if not from_pure_noise(self.solver, self._node(n))]
        history, end = [self._node(n) for n in (j, *earlier[::-1])], self._node(k)
        scale = step_scale(self.solver, history[0], end)
        vector = self._history_error(list(self.solver.weights(history, end)), earlier, j, k, scale)
        if self.solver.corrector is not None and corrected:
            first, *weights = self.solver.corrector(history, end)
            predicted = vector
            vector = self._history_error(weights, earlier, j, k, scale)
            vector[j:k] += scale * first
            vector += scale * first * self.jacobian[k] * self.s[k] * predicted
        return vector

    def _history_error(self, weights: list[Any], earlier: Sequence[int], j: int, k: int, scale: Any) -> Array:
        """The error of a step with ``weights`` on its stage, if the solver has one, and on its history."""
        vector = np.zeros(self.levels - 1)
        vector[j:k] = self._step_vector(k)[j:k]
        if self.solver.stage is not None:
            vector[j:k] += scale * weights.pop(0) * self._stage_change(j, k)
        tails = np.cumsum(weights[::-1])[::-1]  # total weight on each level and all earlier ones
        newer = j
        for tail, older in zip(tails[1:], earlier[::-1], strict=True):
            vector[older:newer] = -scale * tail * self._slope_change[older:newer]
            newer = older
        return vector

    def _stage_change(self, j: int, k: int) -> Array:
        """Change of the slope from level ``j`` to the stage of a step to ``k``, over the increments, [k - j]."""
        assert self.solver.stage is not None
        node = self.solver.stage(self._node(j), self._node(k))
        factor = 1.0 if self.solver.variable == "rho" else -1.0 / node.tau
        covered = np.clip((node.lam - self._lam[:-1]) / np.diff(self._lam), 0.0, 1.0)[j:k]
        j_ahead = np.interp(node.lam, self._lam, self.jacobian)
        return factor * covered * (1 + j_ahead / node.rho * (self._node_rho[j:k] - node.rho))

    def _step_vector(self, k: int) -> Array:
        """``r_q - rho_k`` for ``q < k``, [k]."""
        return self._node_rho[:k] - self.rho[k]

    def _two_slope_factors(self, i: NDArray[np.intp], j: NDArray[np.intp], k: int) -> tuple[Array, Array, Array]:
        """Factors of ``u`` over ``[i, j)``, and of 1 and the step vector over ``[j, k)``; each [i, j]."""
        history, end = [self._node(j), self._node(i)], self._node(k)
        scale = step_scale(self.solver, history[0], end)
        with np.errstate(invalid="ignore", divide="ignore"):
            alpha = -scale * self.solver.weights(history, end)[-1]
            beta = gain = np.zeros_like(alpha)
            if self.solver.corrector is not None:
                first, *_, last = self.solver.corrector(history, end)
                beta = scale * first
                gain = beta * self.jacobian[k] * self.s[k]
                alpha = -scale * last + gain * alpha
            ordered, far = i < j, np.isinf(history[1].tau) & (self.solver.variable == "tau")
        return np.where(ordered & ~far, alpha, 0.0), np.where(ordered, beta, 0.0), np.where(ordered, 1 + gain, 0.0)

    @cached_property
    def _history_squares(self) -> Array:
        """``sum_{i <= p, q < j} u_p G_pq u_q``, [i, j]."""
        n, u = self.levels, self._slope_change
        squares = np.zeros((n, n))
        for j in range(1, n):
            squares[:j, j] = self._suffix_squares(u[:j], j)
        return squares

    def _cross_products(self, vector: Array, k: int) -> Array:
        """``sum_{i <= p < j, j <= q < k} u_p G_pq v_q``, [i, j] for levels below ``k``."""
        spread = self.gram[:k, :k] * vector  # [p, q]
        reach = np.cumsum(spread[:, ::-1], axis=1)[:, ::-1]  # [p, j]: sum over j <= q < k
        before = np.tri(k, k, -1, dtype=bool).T  # [p, j]: p < j
        crossed = np.where(before, self._slope_change[:k, None] * reach, 0.0)
        return np.cumsum(crossed[::-1], axis=0)[::-1]

    def _suffix_squares(self, vector: Array, k: int) -> Array:
        """``sum_{j <= p, q < k} v_p G_pq v_q`` for every ``j < k``, [k]."""
        return self._suffix_products(vector, vector, k)

    def _suffix_products(self, left: Array, right: Array, k: int) -> Array:
        """``sum_{j <= p, q < k} left_p G_pq right_q`` for every ``j < k``, [k]; summed from the end."""
        products = left[:, None] * self.gram[:k, :k] * right[None, :]
        rows = np.triu(products).sum(1) + np.triu(products.T, 1).sum(1)
        return np.cumsum(rows[::-1])[::-1]

    @cached_property
    def _end_cost(self) -> Array:
        """``E ||D_{N-1} - D_j||^2`` for the step from each level to sigma 0, [N]."""
        n = self.levels
        return self.weight[n] * np.append(self._suffix_squares(np.ones(n - 1), n - 1), 0.0)
