"""States ``z ~ p_k`` at every noise level, either data plus noise or points of the probability-flow path."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fastsched import validate
from fastsched.costs.cost_matrix import CostMatrix, ModelCalls
from fastsched.denoisers.denoiser import Denoiser, placement
from fastsched.denoisers.level_grids import log_uniform
from fastsched.denoisers.network_errors import not_finite
from fastsched.denoisers.network_state import (
    check_evaluation_mode,
    checked_training,
    unchanged_buffers,
)
from fastsched.denoisers.noise import check_near
from fastsched.measurement.batches import is_out_of_memory
from fastsched.measurement.checks.network_warnings import warned_of_faults
from fastsched.sampling.progress import progress_bar
from fastsched.sampling.random_streams import noise_of, normal, sample_seeds, stream
from fastsched.sampling.sampler import integration, nodes_of
from fastsched.sampling.solvers import get_solver

#: The longest step of the path in ``log s``. Between two levels that are further apart, the path has more levels.
PATH_STEP = 0.35

#: Data are checked at levels from the first number times their deviation to the third, or from the second if the
#: network predicts x0. Its errors soon exceed lower noise, as ``D`` has no part of the input itself; at higher levels
#: guided networks are as far off.
LEAST_LEVEL, LEAST_LEVEL_OF_X0, MOST_LEVEL = 0.05, 0.3, 0.8
#: Errors over the noise's square of more than the first number, and the second over the root of the elements, are those
#: of other data.
OTHER_DATA = 2.0, 8.0


class Batch:
    """A batch of an estimate's samples. Each sample has its own random stream, independent of the batch.

    Attributes:
        noise: The noise that the states start from, standard normal, [B, *shape].
        clean: Clean samples of the data, [B, *shape]; None without data.
        unchecked: The deviation of data that need a check; None without, and in all batches after the first.
    """

    def __init__(self, seeds: Tensor, noise: Tensor, clean: Tensor | None, check: bool) -> None:
        self.noise, self.clean = noise, clean
        self.unchecked = float(clean.std(correction=0)) if clean is not None and check else None
        self._streams = [stream(seed, 1) for seed in seeds.tolist()]

    def __len__(self) -> int:
        return len(self.noise)

    def normal(self) -> Tensor:
        """New standard normal noise, with the shape, dtype and device of `noise`."""
        return normal(self._streams, self.noise.shape[1:]).to(self.noise)

    def signs(self, probes: int) -> Tensor:
        """New Rademacher probes, [B, probes, *shape], with the dtype and device of `noise`."""
        shape = (probes, *self.noise.shape[1:])
        draws = [generator.integers(0, 2, shape) for generator in self._streams]
        return torch.from_numpy(2 * np.stack(draws) - 1).to(self.noise)


#: Error message for a network without forward-mode derivatives.
_NO_DERIVATIVE = (
    "the network has no forward-mode derivative (torch.func.jvp), which this cost needs (does it use detach, NumPy, "
    "torch.inference_mode or operations of its own?)"
)


class StateSource:
    """The states of one cost estimate, and the network's outputs there. These are the arguments of every cost.

    Args:
        denoiser: The denoiser to measure.
        sigmas: Sampler sigmas, descending, [N]; positive and of finite level (pure noise has no finite score). With
            integer timesteps the nearest levels that the network knows are taken.
        shape: The shape of one sample, without the batch.
        samples: The number of states per level; or ``range(a, b)``, their indices, to merge with other estimates.
        data: Clean samples [n, *shape] to which noise is added; None follows the probability-flow path instead.
        seed: The seed of the noises, the probes and the choice of data. Sample ``b`` does not depend on ``samples``
            or ``batch_size``.
        batch_size: Samples per batch; all of them when None.
        device: Where to run; where the network's parameters are when None.
        dtype: What the network computes in; that of its parameters when None. States are float64 if this is, else
            float32.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        sigmas: Tensor | Sequence[float],
        shape: Sequence[int],
        samples: int | range,
        data: Tensor | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.denoiser, self.process = denoiser, denoiser.process
        check_evaluation_mode(denoiser.network)
        self.s = finite_levels(denoiser, sigmas)
        self.shape = validate.sample_shape("shape", shape)
        which = validate.sample_range("samples", samples)
        self.samples = len(which)
        self.batch = self.samples if batch_size is None else validate.positive_int("batch_size", batch_size)
        self.device, self.dtype = placement(denoiser, device, dtype)
        self.state_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.seeds = sample_seeds(seed, which)
        self.alpha = self.process.alpha(self.s)
        a, c = denoiser.coefficients(self.s)
        #: ``score(z; s_k) = score_a[k] z + score_c[k] R``, [N] float64 each.
        self.score_a, self.score_c = (a * self.alpha - 1) / self.s.square(), c / self.s.square()
        #: ``D(z; s_k) = denoised_a[k] z + denoised_c[k] R``.
        self.denoised_a, self.denoised_c = a * self.alpha, c
        self.forward_calls = 0
        self._fingerprint: Tensor | None = None
        self._chosen = None if data is None else _choose(data, self.shape, which, seed)

    @property
    def levels(self) -> int:
        """N, the number of levels."""
        return len(self.s)

    def raw_output(self, z: Tensor, k: int) -> Tensor:
        """The network's output at the states ``z`` [B, *shape] and level ``k``; counted in `forward_calls`.

        Raises:
            ValueError: If it holds NaN or inf (the message names the level).
        """
        return self._finite_raw(float(self.alpha[k]) * z, self.s[k])

    def score_of(self, z: Tensor, raw: Tensor, k: int) -> Tensor:
        """The score of the variance-exploding marginal at level ``k``, [B, *shape], in the dtype of ``z``."""
        return float(self.score_a[k]) * z + float(self.score_c[k]) * raw.to(z.dtype)

    def denoised_of(self, z: Tensor, raw: Tensor, k: int) -> Tensor:
        """``D`` at level ``k``, [B, *shape], in the dtype of ``z``."""
        return float(self.denoised_a[k]) * z + float(self.denoised_c[k]) * raw.to(z.dtype)

    def denoise(self, z: Tensor, k: int) -> Tensor:
        """``D(z; s_k)``, [B, *shape], as a function to differentiate: neither counted nor checked for NaN."""
        return self.denoised_of(z, self.denoiser.raw_output(float(self.alpha[k]) * z, self.s[k], dtype=self.dtype), k)

    def derivative(self, z: Tensor, w: Tensor, k: int) -> Tensor:
        """``J w`` row by row, ``J`` the Jacobian of ``D`` at states ``z`` of level ``k``; by forward-mode derivatives.

        Raises:
            ValueError: If the network has none, for example because it detaches its input or uses NumPy.
        """
        with explained_derivatives(_NO_DERIVATIVE):
            found = torch.func.jvp(partial(self.denoise, k=k), (z,), (w,))[1]
        if torch.equal(found, float(self.denoised_a[k]) * w):  # the derivative of the network's output is 0
            moved, still = (self.raw_output(each[:1], k) for each in (z + float(self.s[k]) * w, z))
            if not torch.equal(moved, still):
                raise ValueError(f"{_NO_DERIVATIVE}: it is 0, although the output depends on the input")
        return found

    def batches(self) -> Iterator[Batch]:
        """The samples, ``batch_size`` at a time."""
        for start in range(0, self.samples, self.batch):
            rows = slice(start, min(start + self.batch, self.samples))
            # Drawn on the CPU, sample by sample, for the same numbers on every device and in every batch.
            noise = noise_of(self.seeds[rows], self.shape).to(self.device, self.state_dtype)
            clean = None if self._chosen is None else self._chosen[rows].to(self.device, self.state_dtype)
            yield Batch(self.seeds[rows], noise, clean, check=start == 0)

    def over_batches(
        self, estimate: Callable[[Batch, Callable[[int], None]], Tensor], levels: int, progress: bool, what: str
    ) -> Tensor:
        """``estimate(batch, advance)`` [B, P] of every batch, [samples, P] float64 on the CPU.

        ``advance(n)`` moves the progress bar by n states; there are ``levels`` states per sample. A few more tell
        if the network is a denoiser, changes or mixes samples.
        """
        bar = progress_bar(self.samples * levels, progress, what, unit="state")
        network = self.denoiser.network
        words = {"what": "the estimate", "harm": "the cost is mostly that of their changes", "result": "the cost is"}
        watched = warned_of_faults(self.denoiser, self.shape, self.batch, self.device, self.dtype, **words)
        with unchanged_buffers(network), watched as known, checked_training(network, self.device), bar as advance:
            self._fingerprint = known
            return torch.cat([estimate(batch, advance).cpu().double() for batch in self.batches()])

    def states(self, batch: Batch, count: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """``(k, z, R)`` for the levels ``k < count``: states ``z ~ p_k`` and the network's output there.

        With data, ``z = x0 + s_k eps`` with one ``eps`` per sample for all levels; without data, states of one path.
        """
        if batch.clean is None:
            yield from self._follow_path(batch.noise, count)
            return
        for k in range(count):
            z = batch.clean + float(self.s[k]) * batch.noise
            raw = self.raw_output(z, k)
            self.warn_of_other_data(batch, z, raw, k)
            yield k, z, raw

    def warn_of_other_data(self, batch: Batch, z: Tensor, raw: Tensor, k: int) -> None:
        """Warn, once, if data are further off once denoised than with noise: ``E |D - x0|^2 <= s^2 d``."""
        clean, deviation, s = batch.clean, batch.unchecked, float(self.s[k])
        least = LEAST_LEVEL_OF_X0 if self.denoiser.prediction == "x0" else LEAST_LEVEL
        if clean is None or deviation is None or not least * deviation <= s <= MOST_LEVEL * deviation:
            return
        off = float((self.denoised_of(z, raw, k) - clean).square().mean()) / s**2
        if off > OTHER_DATA[0] + OTHER_DATA[1] / math.sqrt(clean.numel()):
            batch.unchecked = None
            validate.warn(
                f"data do not seem to be what the network was trained on: from level {s:.3g} they are denoised to "
                f"samples {math.sqrt(off):.3g} times as far off as the noise. Are they in its range, such as [-1, 1], "
                "or latents with their scaling factor?"
            )

    def clean(self, batch: Batch) -> Tensor:
        """Clean samples, [B, *shape]: from the data, or the ends of probability-flow paths."""
        if batch.clean is not None:
            return batch.clean
        *_, (k, z, raw) = self.states(batch, self.levels)
        return self.denoised_of(z, raw, k)

    def cost_matrix(self, name: str, pairs: Tensor, per_sample: Tensor, order: int, *, jvp: int = 0) -> CostMatrix:
        """The estimate as a `CostMatrix`, with the calls it took."""
        calls = ModelCalls(self.forward_calls, jvp)
        return CostMatrix(name, self.process, self.s, pairs, per_sample, order, calls, self.seeds, self._fingerprint)

    def _follow_path(self, noise: Tensor, count: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """DPM-Solver++(2M) from the process's highest level, no step longer than `PATH_STEP` in ``log s``."""
        grid, positions = _path_levels(self.denoiser, self.s[:count])
        nodes, sigma = nodes_of(self.process, torch.cat([grid, grid.new_zeros(1)])), self.process.sigma(grid)
        a, c = self.denoiser.coefficients(grid)
        path, denoised = integration(nodes, get_solver("dpmpp_2m"), noise, s=grid), None
        for n in range(len(grid)):
            y, _ = path.send(denoised)
            x = float(sigma[n]) * y
            raw = self._finite_raw(x, grid[n])
            if n in positions:
                yield positions[n], float(grid[n]) * y, raw
            denoised = float(a[n]) * x + float(c[n]) * raw.to(y.dtype)

    def _finite_raw(self, x: Tensor, s: Tensor) -> Tensor:
        raw = self.denoiser.raw_output(x, s, dtype=self.dtype)
        self.forward_calls += len(x)
        if not bool(torch.isfinite(raw).all()):
            raise ValueError(not_finite(self.process, s))
        return raw


@contextmanager
def explained_derivatives(message: str) -> Iterator[None]:
    """Turn a RuntimeError in the block, which computes derivatives, into a ValueError that starts with ``message``."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{message}: {str(error).splitlines()[0]}") from error


def is_probes(name: str, value: object) -> int:
    """TypeError or ValueError unless the argument is a number of probes: at least 2, because pairs are multiplied."""
    return validate.positive_int(name, value, minimum=2)


def finite_levels(denoiser: Denoiser, sigmas: Tensor | Sequence[float]) -> Tensor:
    """The levels ``s`` of sampler ``sigmas``, [N] float64, that the network knows.

    Raises:
        ValueError: If they do not descend, one is 0 or pure noise, where the score of data is not finite, they lie a
            thousandfold beyond those of the noise process, or two are nearest to one integer timestep.
    """
    values = validate.descending_sigmas("sigmas", sigmas)
    s = denoiser.process.nearest(denoiser.process.level(values))
    if float(s[-1]) <= 0 or not bool(torch.isfinite(s).all()):
        raise ValueError(
            "sigmas must be noise levels above 0 and short of pure noise (for flow models: times within (0, 1)), "
            f"got {values.tolist()}; remove both ends, select adds them"
        )
    check_near("sigmas", denoiser.process, s)
    if not bool((s[1:] < s[:-1]).all()):
        raise ValueError("sigmas must be at different integer timesteps, as this network knows no others")
    return s


def finite_grid(denoiser: Denoiser, n: int) -> Tensor:
    """``n`` levels ``s`` of the denoiser's own grid without pure noise, [n] float64."""
    levels = denoiser.levels(n)
    return levels if bool(torch.isfinite(levels[0])) else denoiser.levels(n + 1)[1:]


def _path_levels(denoiser: Denoiser, s: Tensor) -> tuple[Tensor, dict[int, int]]:
    """The levels of a path through all of ``s``, and a map from path index to index in ``s``."""
    top = denoiser.levels(3)
    start = [value for value in top[:2].tolist() if value > float(s[0]) * (1 + 1e-9)]
    anchors = [*(start if math.isinf(denoiser.process.s_max) else start[:1]), *s.tolist()]
    grid = anchors[:1]
    for high, low in itertools.pairwise(anchors):
        pieces = 1 if math.isinf(high) else max(1, math.ceil((math.log(high) - math.log(low)) / PATH_STEP - 1e-9))
        between = denoiser.process.nearest(log_uniform(high, low, pieces + 1)[1:-1]) if pieces > 1 else s[:0]
        grid += [value for value in between.unique().flip(0).tolist() if low < value < high] + [low]
    position = {value: k for k, value in enumerate(s.tolist())}
    places = {n: position[v] for n, v in enumerate(grid) if v in position}
    return torch.tensor(grid, dtype=torch.float64, device="cpu"), places


def _choose(data: Tensor, shape: tuple[int, ...], samples: range, seed: int) -> Tensor:
    """Rows ``samples`` of ``data`` in random order; no row is repeated before all have been used."""
    if tuple(data.shape[1:]) != shape or len(data) == 0:
        raise ValueError(f"data must have shape [n, {', '.join(map(str, shape))}], got {tuple(data.shape)}")
    # A separate generator does not change the state of torch's global one.
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed), device="cpu")
    return data[order[torch.arange(samples.start, samples.stop, device="cpu") % len(data)].to(data.device)]
