"""KLUB (Kullback-Leibler upper bound), the cost of Align Your Steps, for stochastic samplers.

Suppose that a sampler of the reverse SDE holds ``D`` fixed over a step from level i to j. By Girsanov's theorem the
divergence of its law from the exact one grows by at most

    ``cost(i, j) = integral from s_j to s_i of E ||D(z_s; s) - D(z_i; s_i)||^2 / s^3 ds``,

with ``z_s`` and ``z_i`` two points of one forward noising path: ``z_i = z_s + sqrt(s_i^2 - s^2) eps``.

Source: Sabour, Fidler and Kreis 2024, "Align Your Steps" (arXiv 2404.14507), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastsched import ops, validate
from fastsched.costs.cost_matrix import CostMatrix
from fastsched.costs.level_pairs import pair_indices
from fastsched.costs.states import Batch, StateSource
from fastsched.denoisers.denoiser import Denoiser
from fastsched.measurement.rounding import stored_squares, warn_of_rounded_costs


@torch.no_grad()
def klub(
    denoiser: Denoiser,
    *,
    shape: Sequence[int],
    sigmas: Tensor | Sequence[float],
    samples: int | range,
    data: Tensor | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> CostMatrix:
    """``cost(i, j)`` of all pairs of levels, from one network call per level and sample.

    ``M[k, i] = E ||D_k - D_i||^2`` along forward noising paths is taken as piecewise linear in ``log s`` and integrated
    against ``ds / s^3`` exactly. Without data the paths start from samples of the denoiser itself, the ends of
    probability-flow paths, which take as many calls again, and more where `fastsched.costs.stein_corrector` says that a
    path has extra levels. A batch keeps ``2 N`` states per sample in memory.

    The arguments are those of `fastsched.costs.states.StateSource`, and ``progress``, which shows a progress bar.

    Returns:
        The cost, of order 2, with its standard errors.

    Raises:
        ValueError: If an argument is out of range, or a level (named) has an output of wrong shape, NaN or inf.
    """
    validate.arguments(locals())
    source = StateSource(denoiser, sigmas, shape, samples, data, seed, batch_size, device, dtype)
    pairs = pair_indices(source.levels, "all")
    rounding = torch.zeros(source.levels, dtype=torch.float64, device="cpu")  # of squared differences of D

    def of_batch(batch: Batch, advance: Callable[[int], None]) -> Tensor:
        raws, states = [], _noising_paths(source, batch)
        for k, z in enumerate(states):
            raws.append(source.raw_output(z, k))
            source.warn_of_other_data(batch, z, raws[-1], k)
            rounding[k] += source.denoised_c[k].square() * stored_squares(raws[-1]).sum() / source.samples
            advance(len(z))
        return _integrals(source, torch.stack(raws), torch.stack(states))[:, pairs[:, 0], pairs[:, 1]]

    costs = source.over_batches(of_batch, source.levels, progress, "KLUB cost")
    cost = source.cost_matrix("klub", pairs, costs, order=2)
    warn_of_rounded_costs(cost.adjacent, _end_weights(source.s)[1] * rounding[1:], cost.order)
    return cost


def _noising_paths(source: StateSource, batch: Batch) -> list[Tensor]:
    """The states of forward noising paths at every level, noisiest first: Brownian motion in ``s^2``."""
    z, before, states = source.clean(batch), 0.0, []
    for s in source.s.flip(0).tolist():
        z = z + (s**2 - before**2) ** 0.5 * batch.normal()
        states.append(z)
        before = s
    return states[::-1]


def _integrals(source: StateSource, raws: Tensor, states: Tensor) -> Tensor:
    """``cost[i, j]`` for i < j, [B, N, N] float64 on the CPU."""
    gram = ops.level_increment_gram(
        raws.flatten(2), states.flatten(2), source.denoised_a, source.denoised_c, per_sample=True
    )
    distances = ops.pairwise_squared_distances(gram).cpu()  # [B, i, k]
    earlier, later = _end_weights(source.s)
    segments = earlier * distances[:, :, :-1] + later * distances[:, :, 1:]
    inside = torch.ones(source.levels, source.levels - 1, dtype=torch.bool, device="cpu").triu()  # segments k >= i
    costs = torch.zeros_like(distances)
    costs[:, :, 1:] = torch.where(inside, segments, 0.0).cumsum(-1)
    return costs


def _end_weights(s: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of a linear function's values at the noisier and the cleaner end of each segment, in its integral."""
    # With lam = -log s, ds / s^3 is exp(2 lam) dlam up to its sign.
    snr, widths = s.pow(-2), -s.log().diff()
    whole = snr.diff() / 2
    later = snr[1:] / 2 - whole / (2 * widths)
    return whole - later, later
