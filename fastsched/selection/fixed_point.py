"""Algorithm 1 of Score-Optimal Diffusion Schedules, iterated until all steps of a schedule cost the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsched import validate
from fastsched.costs.cost_matrix import CostMatrix, check_costs, is_cost
from fastsched.selection.arc_length import moved_to_equal_arc_length
from fastsched.selection.constraints import distinct_known_levels


@dataclass(frozen=True, eq=False)
class Refinement:
    """Result of `refine_schedule`.

    Attributes:
        sigmas: The refined levels, as sampler sigmas, [n] float64.
        cost: The cost of their steps.
        variations: The coefficient of variation of ``cost^(1/p)`` over the steps, of the start and of each trial.
        converged: Whether the least of them is within the tolerance.
        model_calls: Network evaluations of all estimates.
    """

    sigmas: Tensor
    cost: CostMatrix
    variations: tuple[float, ...]
    converged: bool
    model_calls: int


def refine_schedule(
    estimate: Callable[..., CostMatrix],
    sigmas: Tensor | Sequence[float],
    *,
    iterations: int = 10,
    tolerance: float = 0.01,
) -> Refinement:
    """Estimate the cost of each step of a schedule, move its levels to equal arc length, and repeat.

    ``t <- gamma * UpdateSchedule(t, L(t_i, t_{i+1})) + (1 - gamma) t`` in ``log s``. ``gamma`` starts at 1. It is
    halved after a trial that made the steps' costs less equal, which happens where steps are long. At the fixed point
    all steps cost the same, which is the paper's optimality condition, without a fine grid of levels.

        >>> estimate = partial(fs.costs.stein_corrector, denoiser, shape=(1, 8, 8), samples=64)
        >>> refined = fs.refine_schedule(estimate, fs.baselines.karras(10, 0.002, 80.0)[:-1])

    Args:
        estimate: ``estimate(sigmas=...)`` returns the cost of neighbouring levels. With a fixed seed the iteration
            is deterministic.
        sigmas: Levels to start from, as sampler sigmas, descending, the last above 0. Both ends are kept.
        iterations: The most trials.
        tolerance: Stop at this coefficient of variation of ``cost^(1/p)`` over the steps.

    Returns:
        The refined levels; those of the best trial if it did not converge.

    Raises:
        TypeError: If ``estimate`` returns something else.
        ValueError: If an argument is out of range, or the costs of ``sigmas`` are not finite or none is above 0.

    Source: Williams, Campbell, Doucet and Syed, NeurIPS 2024 (arXiv 2412.07877), algorithm 1.
    """
    validate.arguments(locals())
    cost = _estimated(estimate, validate.descending_sigmas("sigmas", sigmas))
    check_costs(cost)
    best, variations, calls, blend = cost, [variation(cost.lengths)], cost.model_calls, 1.0
    while len(variations) <= iterations and min(variations) > tolerance:
        s = moved_to_equal_arc_length(best.s, best.lengths, blend)
        known = distinct_known_levels(cost.process, torch.cat([s, s.new_zeros(1)]).numpy(), float(s[-1]))[:-1]
        cost = _estimated(estimate, cost.process.sampler_sigma(torch.from_numpy(known)))
        calls += cost.model_calls
        variations.append(variation(cost.lengths))
        # The next trial starts from the best schedule so far: a trial that made the costs less equal is dropped.
        better = variations[-1] == min(variations)
        best, blend = (cost, min(1.0, 2 * blend)) if better else (best, blend / 2)
    return Refinement(best.sigmas, best, tuple(variations), min(variations) <= tolerance, calls)


def _estimated(estimate: Callable[..., CostMatrix], sigmas: Tensor) -> CostMatrix:
    cost = is_cost("what estimate(sigmas=...) returns", estimate(sigmas=sigmas))
    asked = cost.process.nearest(cost.process.level(sigmas))
    if asked.shape != cost.s.shape or not torch.allclose(asked, cost.s, rtol=1e-6, atol=0.0):
        raise ValueError(
            "what estimate(sigmas=...) returns must be the cost of these sigmas, and for all calls of one denoiser, "
            f"but it is of levels {validate.shown(cost.sigmas.tolist())}"
        )
    return cost


def variation(values: Tensor) -> float:
    """The coefficient of variation: standard deviation divided by mean."""
    return float(values.std(correction=0) / values.mean())
