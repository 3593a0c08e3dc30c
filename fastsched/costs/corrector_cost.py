"""The corrector-optimised cost of Score-Optimal Diffusion Schedules.

Moving samples from ``p_i`` to ``p_j`` costs the work of a Langevin corrector, the Stein (Fisher) divergence. With no
predictor it is

    ``L_c(i, j) = v^2 E_{z ~ p_i} || score_j(z) - score_i(z) ||^2``,   ``v`` the noise level,

both scores at one state. In the coordinates shared by all noise processes ``score_k(z) = (D(z; s_k) - z) / s_k^2``,
so a schedule in ``s`` does not depend on the process. For short steps ``L_c ~ delta * step^2``.

Source: Williams, Campbell, Doucet and Syed, NeurIPS 2024 (arXiv 2412.07877), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsched import ops
from fastsched.costs.cost_matrix import CostMatrix
from fastsched.costs.level_pairs import pair_indices, step_costs, step_speed
from fastsched.costs.states import Batch, StateSource
from fastsched.denoisers.denoiser import Denoiser


@torch.no_grad()
def stein_corrector(
    denoiser: Denoiser,
    *,
    shape: Sequence[int],
    sigmas: Tensor | Sequence[float],
    samples: int,
    pairs: str = "adjacent",
    velocity: str | None = "noisier",
    data: Tensor | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> CostMatrix:
    """``L_c(i, j) = v^2 E_{z ~ p_i} ||score_j(z) - score_i(z)||^2`` between noise levels; scores only.

    ``2 (N - 1)`` calls a sample for neighbouring levels and ``N (N + 1) / 2`` for all pairs, one fewer with
    ``"all"`` (the last level is never a start). Without data the states are those of a probability-flow path from
    the highest level; where ``sigmas`` are further apart than `fastsched.costs.states.PATH_STEP` in ``log s``, or
    start lower, the levels it passes between them cost a call each.

    Args:
        denoiser: What to measure.
        shape: The shape of one sample, without the batch.
        sigmas: Sampler sigmas [N], descending, above 0 and short of pure noise.
        samples: How many states a level.
        pairs: ``"adjacent"``: each level with the next; ``"all"``: with every cleaner one.
        velocity: ``v``: the ``s`` of the ``"noisier"`` level of the pair, of the ``"cleaner"``, or None for 1.
        data: Clean samples [n, *shape]: states are data plus noise. None: states of the path.
        seed: Of the noises and the choice of data.
        batch_size: Samples handled at once; all of them when None. ``"all"`` holds N outputs a sample.
        device: Where to run; where the network's parameters are when None.
        dtype: What the network computes in; that of its parameters when None.
        progress: Show a progress bar.

    Returns:
        The cost, of order 2, with its standard errors.

    Raises:
        ValueError: If an argument is out of range, or the network's output has the wrong shape or holds NaN or inf
            (the message names the level).
    """
    source = StateSource(denoiser, sigmas, shape, samples, data, seed, batch_size, device, dtype)
    steps = pair_indices(source.levels, pairs)
    speed = step_speed(source.s, steps, velocity)

    def squares(_: Batch, z: Tensor, raw: Tensor, k: int, others: range) -> Tensor:
        # A GPU reads every output once for the fused op's whole Gram; a CPU is faster without its n^2 products.
        return (fused_score_distances if z.is_cuda else score_distances)(source, z, raw, k, others)

    costs = step_costs(source, steps, speed, squares, progress=progress, what="Stein corrector cost")
    return source.cost_matrix("stein_corrector", steps, costs, order=2)


def score_distances(source: StateSource, z: Tensor, raw: Tensor, k: int, others: range) -> Tensor:
    """``||score_j(z) - score_k(z)||^2`` of level k against each level j of ``others``, [B, n] float64.

    From factored terms, ``c_j (R_j - R_k) + (c_j - c_k) R_k + (a_j - a_k) z``, one level at a time.
    """
    wide = torch.promote_types(raw.dtype, z.dtype)
    start, columns = raw.to(wide), []
    for j in others:
        a = float(source.score_a[j] - source.score_a[k])
        c, change = float(source.score_c[j]), float(source.score_c[j] - source.score_c[k])
        difference = c * (source.raw_output(z, j).to(wide) - start) + change * start + a * z
        columns.append(difference.flatten(1).double().square().sum(1))
    return torch.stack(columns, 1).cpu()


def fused_score_distances(source: StateSource, z: Tensor, raw: Tensor, k: int, others: range) -> Tensor:
    """As `score_distances`, in one pass over all levels' outputs: level k is the first row of their Gram."""
    raws = torch.stack([raw, *[source.raw_output(z, j) for j in others]]).flatten(2)
    rows = [k, *others]
    backend = "torch" if torch.float64 in (raws.dtype, z.dtype) else "auto"
    gram = ops.level_increment_gram(
        raws, z.flatten(1), source.score_a[rows], source.score_c[rows], per_sample=True, backend=backend
    ).gram
    return ops.pairwise_squared_distances(gram)[:, 0, 1:].cpu()
