"""Run a scheduler as a pipeline does, and find from its states which noise levels it steps through.

**The probe.** Let half of the elements of a sample be exactly 1 in the data and without noise, and the other half 0
with noise ``e``. Then ``D`` is known (1 and 0), every consistent solver is exact, and a state ``alpha x0 + sigma e``
shows ``alpha`` in the first half and ``sigma`` in the second: the level of the scheduler's state. The network answers
for the level of its *timestep*, as a real one does, so a scheduler whose timesteps and sigmas disagree is detected too.
Rounding to integer timesteps is ignored here; `fastsched.diffusers.schedulers.exporter.prove` reports it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsched.denoisers.noise import VarianceExploding
from fastsched.diffusers.conventions import Convention, class_names, describe
from fastsched.diffusers.random_numbers import ONE_CALL

#: Elements of the probe's state. A stochastic scheduler's sigma is found to about ``1 / sqrt(PROBE_SIZE)``.
PROBE_SIZE = 1 << 14

#: Classes that add noise with the variance that the network predicts, if it predicts one; other classes ignore it.
ADDS_LEARNED_VARIANCE = ("DDPMScheduler", "DDPMParallelScheduler")

#: Relative change of the answers that shows how a scheduler amplifies rounding: that of one float32.
NUDGE = 2.0**-23
#: How many times the change by `NUDGE` rounding may make: its errors were up to 6 times as large, in 10 schedules of
#: three steps and five multistep classes; and the largest relative error of a level that counts as rounding.
ROUNDINGS, MOST_ROUNDING = 8, 0.1

#: ``D(y, s)``.
Oracle = Callable[[Tensor, Tensor], Tensor]


def states_of(scheduler: Any, network: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Iterator[Tensor]:
    """The states after each step of a pipeline's loop from ``x``, after ``set_timesteps`` has been called."""
    generator = torch.Generator().manual_seed(1)  # another stream than the probe's noise
    extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(scaled, t), t, x, **extra, return_dict=False)[0]
        yield x


def oracle_network(convention: Convention, denoise: Oracle) -> Callable[[Tensor, Tensor], Tensor]:
    """The network ``R(input, s)`` of an exact denoiser ``D(y, s)``, ``y = x / sigma`` [B, *shape], at one level ``s``.

    From ``D = a x + c R``, in float64; the result has the dtype of the input.
    """

    def network(scaled: Tensor, s: Tensor) -> Tensor:
        a, c = convention.denoiser.coefficients(s)
        x = scaled.double() / convention.input_scale(s)
        denoised = denoise(x / convention.process.sigma(s), s)
        return convention.sign * ((denoised - a * x) / c).to(scaled.dtype)

    return network


@dataclass(frozen=True)
class Trace:
    """The result of running the probe."""

    signal: Tensor  #: factor of the data in the state after each step, float64 [n]
    noise: Tensor  #: factor of the noise, root mean square, float64 [n]
    timesteps: Tensor  #: timesteps given to the network, float64, consecutive duplicates removed
    deterministic: bool  #: whether the scheduler added no noise
    #: Float32's error in a clean sample that is computed from the first state, ``(x - sigma e) / alpha``: about
    #: ``2^-23 sigma / alpha``.
    cancellation: float = 0.0

    def follows(self, signal: Tensor, noise: Tensor, rounding: float = 0.0) -> bool:
        """Whether the states have these factors in this order, each once or twice in a row.

        The tolerance is 1e-3, or four standard errors of the noise's sample if the scheduler added noise, and
        ``rounding``, the relative error that the scheduler's own arithmetic is allowed. Both factors may also be
        off by `cancellation` (0.74 of it at most, over five classes with cosine betas and 1 to 12 steps).
        """
        sampling = 0.0 if self.deterministic else 4 / math.sqrt(PROBE_SIZE // 2)
        allowed = (sampling or 1e-3) + rounding
        absolute = torch.full_like(noise, self.cancellation)
        absolute[-1] += allowed * max(1.0, float(noise[-2:][0]))  # of the last level, 0
        near = (self.noise[:, None] - noise).abs() <= allowed * noise + absolute
        near &= (self.signal[:, None] - signal).abs() <= allowed * signal.abs() + sampling * noise + absolute
        position = -1
        for reached in near.tolist():
            if position + 1 < len(noise) and reached[position + 1]:
                position += 1
            elif position < 0 or not reached[position]:
                return False
        return position == len(noise) - 1


def amplified_rounding(run: Trace, nudged: Trace) -> float:
    """The relative error that float32 rounding may make in the levels of ``run``, at most `MOST_ROUNDING`.

    A long step of a multistep solver after a short one multiplies small errors of the network's answers. The levels of
    ``nudged``, whose answers differ by `NUDGE`, show by how much.
    """
    if len(run.noise) != len(nudged.noise):
        return 0.0
    inner = run.noise[:-1] > NUDGE * run.noise.max()  # 0, as the last level is, is known up to rounding alone
    change = (nudged.noise / run.noise - 1)[:-1][inner].abs()
    return min(MOST_ROUNDING, ROUNDINGS * float(change.max())) if len(change) else 0.0


def trace(scheduler: Any, start: Tensor, levels: Tensor, expected: Tensor, nudge: float = 0.0) -> Trace:
    """Run the probe. The global random state is not changed.

    Args:
        scheduler: The scheduler, on which ``set_timesteps`` has been called.
        start: The level ``s`` of the first state.
        levels: The levels of its network calls as it lists them.
        expected: The timestep given to the network at each level.
        nudge: Relative change of the network's answers.
    """
    convention = describe(scheduler)
    ones = torch.zeros(1, 2, PROBE_SIZE // 2, 1, dtype=torch.float32, device="cpu")
    ones[:, 0] = 1.0
    with ONE_CALL, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # the CPU's alone, because no other is restored
        noise = torch.randn(ones.shape, dtype=torch.float32, device="cpu") * (1 - ones)
        alpha, sigma = (float(scale[0]) for scale in scales(convention, start.reshape(1)))
        oracle = oracle_network(convention, lambda y, s: ones.double())

        def network(x: Tensor, t: Any) -> Tensor:
            given = torch.as_tensor(t, dtype=torch.float64)
            nearest = (expected - given).abs().argmin()
            rounded = (expected[nearest] - given).abs() <= timestep_slack(convention)
            output = oracle(x, levels[nearest] if rounded else convention.levels(given)) * (1 + nudge)
            return _with_variance(output, scheduler, t)

        states = [x[0].double() for x in states_of(scheduler, network, alpha * ones + sigma * noise)]
    direction = noise[0, 1].double()
    power = direction.square().mean()
    levels = torch.stack([(x[1].square().mean() / power).sqrt() for x in states])
    fresh = torch.stack([(x[1] - (x[1] * direction).mean() / power * direction).abs().mean() for x in states])
    cancellation = NUDGE * sigma / alpha if alpha > 0 else 0.0
    slack = max(1e-5 * max(1.0, sigma), ROUNDINGS * cancellation)  # float32 rounding of the largest state, and this
    times = torch.as_tensor(scheduler.timesteps).detach().to("cpu", torch.float64)
    return Trace(
        torch.stack([x[0].mean() for x in states]),
        levels,
        torch.unique_consecutive(times),
        deterministic=bool((fresh <= 0.01 * levels + slack).all()),
        cancellation=cancellation,
    )


def _with_variance(output: Tensor, scheduler: Any, t: Any) -> Tensor:
    """``output``, with the variance of exactly known data appended for classes that add a predicted variance."""
    kind = scheduler.config.get("variance_type")
    if kind not in ("learned", "learned_range") or not class_names(scheduler).intersection(ADDS_LEARNED_VARIANCE):
        return output
    # "learned" is the variance itself, and -1 the lower end of the range.
    value = float(scheduler._get_variance(t, variance_type="fixed_small")) if kind == "learned" else -1.0
    return torch.cat([output, torch.full_like(output, value)], 1)


def timestep_slack(convention: Convention) -> float:
    """How far equal timesteps may differ: 1, or 0.001 for ``log(sigma) / 4``, flow times in [0, 1] and angles."""
    times = isinstance(convention.process, VarianceExploding) or convention.train_steps == 1
    return 1e-3 if times else 1.0


def scales(convention: Convention, s: Tensor) -> tuple[Tensor, Tensor]:
    """``alpha`` and ``sigma`` of the pipeline's state between steps, at levels ``s``."""
    if convention.scaled:
        return torch.ones_like(s), s
    return convention.process.alpha(s), convention.process.sigma(s)
