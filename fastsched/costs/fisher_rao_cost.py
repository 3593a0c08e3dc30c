"""The Fisher-Rao cost: how fast the marginals ``p_s`` change, in Kullback-Leibler divergence.

By the heat equation ``d/ds log p_s(z) = s (tr H + ||score||^2)``, with ``H`` the Hessian of ``log p_s``. The Fisher
information of a level is therefore

    ``I(s) = s^2 E_{z ~ p_s} (tr H + ||score||^2)^2``,   ``KL(p_s || p_{s + ds}) = I(s) ds^2 / 2``,

and steps of equal length in ``sqrt(I) ds`` have equal divergence. ``H = (J - 1) / s^2`` with ``J = dD/dz``. Its trace
is estimated by Hutchinson's ``w' J w``. The square of the trace is estimated without bias by the product of two
independent probes.

Source: Williams et al. 2024 (arXiv 2412.07877) compare their Stein metric with this one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastsched import ops, validate
from fastsched.costs.cost_matrix import CostMatrix
from fastsched.costs.level_pairs import pair_indices
from fastsched.costs.states import Batch, StateSource, is_probes
from fastsched.denoisers.denoiser import Denoiser
from fastsched.measurement.rounding import stored_squares, warn_of_rounded_costs
from fastsched.ops.backends import in_float64


@torch.no_grad()
def fisher_rao(
    denoiser: Denoiser,
    *,
    shape: Sequence[int],
    sigmas: Tensor | Sequence[float],
    samples: int | range,
    data: Tensor | None = None,
    probes: int = 2,
    seed: int = 0,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> CostMatrix:
    """The squared Fisher-Rao length between neighbouring levels, ``(integral of sqrt(I) ds)^2`` for short steps.

    With ``m = s^2 I``, the metric in ``log s``, ``cost = (log s_i - log s_{i+1})^2 (m_i + m_{i+1}) / 2``. It is linear
    in the estimates of ``m``, so unbiased, and accurate to second order in the step. Select levels with
    ``method="arc_length"``. Each level and sample takes one evaluation and ``probes`` forward-mode derivatives
    (`torch.func.jvp`), which the network must support. Without data a path may take more evaluations, as in
    `fastsched.costs.stein_corrector`.

    The arguments are those of `fastsched.costs.states.StateSource`, ``progress``, which shows a progress bar, and

    * ``probes``: Rademacher probes per state, at least 2. A batch takes ``batch_size * probes`` rows.

    Returns:
        The cost of neighbouring levels, of order 2, with standard errors. With few samples an estimate may be below 0.

    Raises:
        ValueError: If an argument is out of range, or a level (named) has an output of wrong shape, NaN or inf.
    """
    validate.arguments(locals(), probes=is_probes)
    source = StateSource(denoiser, sigmas, shape, samples, data, seed, batch_size, device, dtype)

    rounding = torch.zeros(source.levels, dtype=torch.float64, device="cpu")  # of the metric

    def of_batch(batch: Batch, advance: Callable[[int], None]) -> Tensor:
        metrics = []
        for k, z, raw in source.states(batch, source.levels):
            norms = in_float64(source.score_of(z, raw, k).flatten(1)).square().sum(1)  # ||score||^2, [B]
            metrics.append(_metric(source, z, k, norms, batch.signs(probes)))
            rounding[k] += _rounding(source, raw, k, norms.cpu()).sum() / source.samples
            advance(len(z))
        return torch.stack(metrics, 1)

    metric = source.over_batches(of_batch, source.levels, progress, "Fisher-Rao cost")  # of log s, [samples, N]
    of_steps = lambda values: source.s.log().diff().square() * (values[..., :-1] + values[..., 1:]) / 2
    costs = of_steps(metric)
    warn_of_rounded_costs(costs.mean(0), of_steps(rounding), order=2)
    derivatives = source.samples * source.levels * probes
    return source.cost_matrix("fisher_rao", pair_indices(source.levels, "adjacent"), costs, order=2, jvp=derivatives)


def _metric(source: StateSource, z: Tensor, k: int, norms: Tensor, probes: Tensor) -> Tensor:
    """``s^4 (tr H + ||score||^2)^2`` for each sample, from the products of different probes, [B] float64."""
    count = probes.shape[1]
    repeated, directions = z.repeat_interleave(count, 0), probes.flatten(0, 1)
    products = source.derivative(repeated, directions, k)
    traces, _ = ops.hutchinson_reduce(probes.flatten(2), products.reshape(*probes.shape[:2], -1))
    s2 = float(source.s[k]) ** 2
    change = traces - z[0].numel() + s2 * norms[:, None]  # s^2 (tr H + ||score||^2), [B, probes]
    # (sum of all)^2 - sum of squares = the products of different probes: the square of a single probe's estimate
    # would be biased by its variance.
    return (change.sum(1).square() - change.square().sum(1)) / (count * (count - 1))


def _rounding(source: StateSource, raw: Tensor, k: int, norms: Tensor) -> Tensor:
    """What storage of ``raw`` in 16 bits adds to `_metric`, ``4 s^4 E (score' error)^2``, [B] float64."""
    error = source.score_c[k].square() * stored_squares(raw) / 2 / raw[0].numel()  # mean square of an element's error
    return 4 * float(source.s[k]) ** 4 * norms * error
