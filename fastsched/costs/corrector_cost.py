"""The corrector-optimised cost of Score-Optimal Diffusion Schedules.

The cost of moving samples from ``p_i`` to ``p_j`` is the work that a Langevin corrector does, which the Stein
(Fisher) divergence measures. Without a predictor it is

    ``L_c(i, j) = v^2 E_{z ~ p_i} || score_j(z) - score_i(z) ||^2``,   ``v`` the noise level,

with both scores at the same state. In the coordinates that all noise processes share, ``score_k(z) = (D(z; s_k) - z)
/ s_k^2``, so a schedule in ``s`` does not depend on the process. For short steps ``L_c ~ delta * step^2``.

Source: Williams, Campbell, Doucet and Syed, NeurIPS 2024 (arXiv 2412.07877), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsched import ops, validate
from fastsched.costs.cost_matrix import CostMatrix
from fastsched.costs.level_pairs import pair_costs
from fastsched.costs.states import Batch, StateSource
from fastsched.denoisers.denoiser import Denoiser
from fastsched.ops.backends import in_float64


@torch.no_grad()
def stein_corrector(
    denoiser: Denoiser,
    *,
    shape: Sequence[int],
    sigmas: Tensor | Sequence[float],
    samples: int | range,
    pairs: str = "adjacent",
    velocity: str | None = "noisier",
    data: Tensor | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> CostMatrix:
    """``L_c(i, j) = v^2 E_{z ~ p_i} ||score_j(z) - score_i(z)||^2`` between noise levels, without derivatives.

    Model calls per sample: ``2 (N - 1)`` for neighbouring levels, ``N (N + 1) / 2 - 1`` for all pairs (no step starts
    at the last level). Without data the states are those of a probability-flow path from the highest level. Where
    ``sigmas`` start below it, or are further apart than `fastsched.costs.states.PATH_STEP` in ``log s``, each extra
    level of the path takes one more call.

    The arguments are those of `fastsched.costs.states.StateSource`, ``progress``, which shows a progress bar, and

    * ``pairs``: ``"adjacent"``, each level with the next, or ``"all"``, each with every cleaner one. ``"all"`` keeps
      N outputs per sample in memory.
    * ``velocity``: ``v`` is the ``s`` of the pair's ``"noisier"`` level, of its ``"cleaner"`` level, or 1 for None.

    Returns:
        The cost, of order 2, with its standard errors.

    Raises:
        ValueError: If an argument is out of range, or a level (named) has an output of wrong shape, NaN or inf.
    """
    validate.arguments(locals())
    source = StateSource(denoiser, sigmas, shape, samples, data, seed, batch_size, device, dtype)

    def squares(_: Batch, z: Tensor, raw: Tensor, k: int, others: range) -> Tensor:
        # The fused op reads every output once but computes the whole n x n Gram, of which one row is needed. A GPU is
        # limited by the reads, a CPU by the products.
        return (fused_score_distances if z.is_cuda else score_distances)(source, z, raw, k, others)

    return pair_costs(source, "stein_corrector", pairs, velocity, squares, order=2, progress=progress)


def score_distances(source: StateSource, z: Tensor, raw: Tensor, k: int, others: range) -> Tensor:
    """``||score_j(z) - score_k(z)||^2`` of level k against each level j of ``others``, [B, n] float64.

    Computed as ``c_j (R_j - R_k) + (c_j - c_k) R_k + (a_j - a_k) z``, one level at a time.
    """
    # The scores of neighbours are nearly equal: subtracting them directly would cancel most of their digits. The
    # differences of coefficients are taken in float64 instead.
    wide = torch.promote_types(raw.dtype, z.dtype)
    start, columns = raw.to(wide), []
    for j in others:
        a = float(source.score_a[j] - source.score_a[k])
        c, change = float(source.score_c[j]), float(source.score_c[j] - source.score_c[k])
        difference = c * (source.raw_output(z, j).to(wide) - start) + change * start + a * z
        columns.append(in_float64(difference.flatten(1)).square().sum(1))
    return torch.stack(columns, 1).cpu()


def fused_score_distances(source: StateSource, z: Tensor, raw: Tensor, k: int, others: range) -> Tensor:
    """The same as `score_distances`, from one Gram of the outputs of all levels, of which level k is the first row."""
    raws = torch.stack([raw, *[source.raw_output(z, j) for j in others]]).flatten(2)
    rows = [k, *others]
    gram = ops.level_increment_gram(raws, z.flatten(1), source.score_a[rows], source.score_c[rows], per_sample=True)
    return ops.pairwise_squared_distances(gram)[:, 0, 1:].cpu()
