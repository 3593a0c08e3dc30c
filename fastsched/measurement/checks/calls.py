"""The calls by which a network is checked: they are counted, and repeated ones are compared."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastsched import validate
from fastsched.denoisers.denoiser import Denoiser
from fastsched.denoisers.network_errors import not_finite
from fastsched.sampling.random_streams import noise_of

#: The end of what the checks find wrong with a network. Errors that the network raises do not have it.
ANYWAY = " (in Python, checks=False measures it anyway)"

#: What to do about a network whose outputs depend on its earlier calls.
STATE = (
    "it keeps a state between its calls (a cache, a counter?), or is random at times; reset this in every call, or "
    f"disable it{ANYWAY}"
)

#: What is wrong with a network whose outputs depend on the other samples.
MIXES = (
    "the network gives different outputs for a sample alone and for the same sample in a batch: it mixes the samples "
    "of a batch (batch norm in training mode? statistics over the batch?); call network.eval(), or wrap it so that "
    "samples are independent"
)

#: Up to this relative change of a sample's output with the other samples of a batch there is only a warning: networks
#: whose activations are rounded to 8 bits, with one scale for the batch, change by 0.02 to 0.05.
LITTLE = 0.1

#: Added to a sample's seed, it gives a seed that no measurement uses: a measurement has fewer than 2^31 samples.
ELSEWHERE = 2**31

#: Largest relative difference of two outputs for the same input, alone or in a batch, by the network's dtype.
REPEATABLE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass
class CheckCalls:
    """Calls a denoiser to check it, and counts the calls."""

    denoiser: Denoiser
    shape: tuple[int, ...]  #: the shape of one sample
    device: torch.device  #: where to run
    dtype: torch.dtype  #: what the network computes in
    model_calls: int = field(default=0, init=False)  #: network evaluations so far, counted per sample
    fingerprint: Tensor | None = field(default=None, init=False)  #: the network's fingerprint, once it is known
    top: Top = field(init=False)  #: the outputs at the highest level
    middle: Tensor = field(init=False)  #: ``R`` of the call for the fingerprint
    constant: bool = field(default=False, init=False)  #: whether all outputs before the measurement were equal
    #: A message if ``D`` moves against a step of its input, else None.
    negative_slope: str | None = field(default=None, init=False)
    #: A message if ``D`` depends on its input at the highest level as only data as large as the noise allow, else None.
    top_fault: str | None = field(default=None, init=False)
    #: A message if ``D`` is far from its input at the lowest level, else None.
    low_fault: str | None = field(default=None, init=False)
    #: A message if denoising moves a rough sample of a flow too far and a finer one not, else None.
    middle_fault: str | None = field(default=None, init=False)

    @property
    def range(self) -> tuple[float, float, float]:
        """The lowest level, the highest finite one, and the highest, which may be pure noise."""
        top, second, low = self.denoiser.levels(3).tolist()
        return low, top if math.isfinite(top) else second, top

    @property
    def assumed_deviation(self) -> float | None:
        """The standard deviation of the data that ``F`` and ``v`` assume; None for other predictions."""
        return {"edm": self.denoiser.sigma_data, "v": 1.0}.get(self.denoiser.prediction)

    def between(self, part: float) -> float:
        """The known level nearest to the fraction ``part`` of the range in ``log s``, from the highest finite level."""
        low, high, _ = self.range
        return self.known(high ** (1 - part) * low**part)

    def known(self, s: float) -> float:
        """The nearest level that the network knows, within its range."""
        low, high, _ = self.range
        level = torch.tensor(min(max(s, low), high), dtype=torch.float64, device="cpu")
        return float(self.denoiser.process.nearest(level))

    def coefficients(self, s: float) -> tuple[float, float]:
        """``(a, c)`` of ``D = a x + c R``."""
        a, c = self.denoiser.coefficients(torch.tensor(s, dtype=torch.float64, device="cpu"))
        return float(a), float(c)

    def raw(self, y: Tensor, s: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """``R`` and ``D`` at normalised states ``y = z / s`` [B, *shape], in ``dtype`` on the CPU."""
        level, (a, c) = torch.tensor(s, dtype=torch.float64, device="cpu"), self.coefficients(s)
        x = float(self.denoiser.process.sigma(level)) * y.float().to(self.device)
        raw = self.denoiser.raw_output(x, level, dtype=self.dtype).cpu().to(dtype)
        self.model_calls += len(y)
        if not bool(torch.isfinite(raw).all()):
            raise ValueError(f"{not_finite(self.denoiser.process, level)} (a call of checks=True)")
        return raw, (c * raw).add_(x.cpu(), alpha=a)

    def noise(self, *seeds: int) -> Tensor:
        """Standard normal noise, one sample for each seed, [B, *shape] float32 on the CPU."""
        return noise_of(torch.tensor(seeds, device="cpu"), self.shape)

    def at_third(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        """``R`` and ``D`` for pure noise, a third of the range down; with seed 0, the fingerprint's call."""
        return self.raw(self.noise(seed), self.between(1 / 3))

    def denoised(self, z: Tensor, s: float) -> Tensor:
        """``D`` at ``z`` [B, *shape], float64."""
        return self.raw(z / s, s)[1]

    def differs(self, output: Tensor, other: Tensor, allowed: float | None = None) -> bool:
        """Whether two outputs for the same input differ by more than rounding, or than a relative norm ``allowed``."""
        most = (REPEATABLE[self.dtype] if allowed is None else allowed) * float(other.norm())
        return float((output.cpu().double() - other).norm()) > most

    @torch.no_grad()
    def check_first(self, output: Tensor) -> None:
        """ValueError, with the reason, if an ``output`` [*shape] differs from the earlier one for the same input.

        If it is only `LITTLE` other, in another batch, a warning.
        """
        if not self.differs(output, self.top.raw[0]):
            return
        self.check_repeats()
        if self.differs(output, self.top.raw[0], LITTLE):
            raise ValueError(MIXES)
        validate.warn(
            "the network's output for a sample changes a little with the other samples of its batch, so results depend "
            "on batch_size: activations in 8 bits with one scale for the batch may do so, statistics over the batch "
            "(batch norm in training mode) must not; with batch_size=1 each sample runs alone"
        )

    @torch.no_grad()
    def check_repeats(self) -> None:
        """Make the first calls again, in batches of the same size and of another; ValueError if an output differs."""
        first, middle = self.top.again(self), self.at_third()[0]
        if self.differs(self.at_third()[0], middle) or self.differs(self.top.again(self), first):
            raise ValueError(
                "the network gives different outputs for the same input: it is random, or keeps a state (dropout "
                "left on? noise or a counter inside?); call network.eval(), or fix its random numbers"
            )
        if self.differs(first, self.top.raw):
            raise ValueError(f"the network's output for the same input is not that of its first call: {STATE}")
        if self.differs(self.top.again(self, 3 - self.top.size), first, LITTLE):
            raise ValueError(MIXES)

    @torch.no_grad()
    def check_last(self) -> None:
        """Make the fingerprint's call again; ValueError if its output has changed during the measurement."""
        if self.differs(self.at_third()[0], self.middle):
            raise ValueError(
                "the network gives different outputs for the same input before and after the measurement, so the "
                f"measurement is useless: {STATE}"
            )


@dataclass
class Top:
    """Two noises at the highest level, and their outputs, ``raw`` and ``denoised`` [2, *shape].

    Each call has ``size`` samples.
    """

    level: float
    noise: Tensor
    size: int
    raw: Tensor = field(init=False)
    denoised: Tensor = field(init=False)

    def call(self, calls: CheckCalls) -> None:
        """Make the calls for the first time."""
        raw, denoised = zip(*(calls.raw(part, self.level) for part in self.noise.split(self.size)), strict=True)
        self.raw, self.denoised = torch.cat(raw).float(), torch.cat(denoised).float()  # held while paths are followed

    def again(self, calls: CheckCalls, size: int | None = None) -> Tensor:
        """Make the calls again, with ``size`` samples each; returns ``R``."""
        return torch.cat([calls.raw(part, self.level)[0] for part in self.noise.split(size or self.size)])

    @property
    def slope(self) -> float:
        """Slope of ``D`` along the difference of the two noises."""
        difference = self.noise[0] - self.noise[1]
        change = self.denoised[0] - self.denoised[1]
        return float((change * difference).sum() / difference.square().sum())

    def reach(self, c: float) -> float:
        """A bound on the part of `slope` that is due to the network's output, whose factor in ``D`` is ``c``."""
        difference = self.noise[0] - self.noise[1]
        return abs(c) * float((self.raw[0] - self.raw[1]).norm() / difference.norm())
