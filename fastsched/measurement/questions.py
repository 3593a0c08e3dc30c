"""Ask a network single questions, count them, and compare answers to the same one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastsched.denoisers.denoiser import Denoiser
from fastsched.denoisers.network_errors import not_finite
from fastsched.sampling.random_streams import noise_of

#: What to do about a network whose answers depend on its earlier calls.
STATE = (
    "it keeps a state between its calls (a cache, a counter?); reset that in every call, or disable it (checks=False "
    "measures it all the same)"
)

#: What is wrong with a network whose answers depend on the other samples.
MIXES = (
    "the network answers differently for a sample alone and for the same sample in a batch: it mixes the samples of a "
    "batch (batch norm in training mode? statistics over the batch?); call network.eval(), or wrap it so that samples "
    "are independent"
)

#: From a sample's seed to one that is in no measurement.
ELSEWHERE = 2**31

#: Largest relative difference of two answers to one question, alone or in a batch, by what the network computes in.
REPEATABLE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass
class Questions:
    """Asks single questions of a denoiser, and counts them.

    Attributes:
        denoiser: The denoiser.
        shape: The shape of one sample.
        device: Where to run.
        dtype: What the network computes in.
        model_calls: Network evaluations so far, counted per sample.
        fingerprint: The network's, once it is known.
        top: The answers at the highest level.
        middle: ``R`` for the question of the fingerprint.
        against: What is wrong if ``D`` moves against a step of its input, None if it does not.
        moved: What is wrong if ``D`` is far from its input at the lowest level, None if it is not.
    """

    denoiser: Denoiser
    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    model_calls: int = field(default=0, init=False)
    fingerprint: Tensor | None = field(default=None, init=False)
    top: Top = field(init=False)
    middle: Tensor = field(init=False)
    against: str | None = field(default=None, init=False)
    moved: str | None = field(default=None, init=False)

    @property
    def range(self) -> tuple[float, float, float]:
        """The lowest level, the highest finite one, and the highest, which may be pure noise."""
        top, second, low = self.denoiser.levels(3).tolist()
        return low, top if math.isfinite(top) else second, top

    def between(self, part: float) -> float:
        """A level at some part of the range in ``log s``, from the highest finite one; the nearest that is known."""
        low, high, _ = self.range
        return self.known(high ** (1 - part) * low**part)

    def known(self, s: float) -> float:
        """The nearest level that the network knows, within its range."""
        low, high, _ = self.range
        level = torch.tensor(min(max(s, low), high), dtype=torch.float64, device="cpu")
        return float(self.denoiser.process.nearest(level))

    def factor(self, s: float) -> float:
        """``c`` of ``D = a x + c R``."""
        return float(self.denoiser.coefficients(torch.tensor(s, dtype=torch.float64, device="cpu"))[1])

    def raw(self, y: Tensor, s: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """``R`` and ``D`` at normalised states ``y = z / s`` [B, *shape], of that dtype on the CPU."""
        level = torch.tensor(s, dtype=torch.float64, device="cpu")
        a, c = (float(value) for value in self.denoiser.coefficients(level))
        x = float(self.denoiser.process.sigma(level)) * y.float().to(self.device)
        raw = self.denoiser.raw_output(x, level, dtype=self.dtype).cpu().to(dtype)
        self.model_calls += len(y)
        if not bool(torch.isfinite(raw).all()):
            raise ValueError(f"{not_finite(self.denoiser.process, level)} (a question of checks=True)")
        return raw, (c * raw).add_(x.cpu(), alpha=a)

    def denoised(self, z: Tensor, s: float) -> Tensor:
        """``D`` at ``z`` [B, *shape], float64."""
        return self.raw(z / s, s)[1]

    def differs(self, answer: Tensor, other: Tensor) -> bool:
        """Whether two answers to one question differ by more than rounding."""
        allowed = REPEATABLE.get(self.dtype, 1e-3) * float(other.norm())
        return float((answer.cpu().double() - other).norm()) > allowed

    @torch.no_grad()
    def check_first(self, answer: Tensor) -> None:
        """Compare ``answer`` [*shape], of the measurement, with what the same question was answered before.

        Raises:
            ValueError: If they differ; a few more calls find out why.
        """
        if self.differs(answer, self.top.raw[0]):
            self.check_repeats()
            raise ValueError(MIXES)

    @torch.no_grad()
    def check_repeats(self) -> None:
        """Ask the first questions again, as they were asked and in another batch.

        Raises:
            ValueError: If an answer is another one.
        """
        noise = noise_of(torch.tensor([0], device="cpu"), self.shape)
        first, middle = self.top.asked(self), self.raw(noise, self.between(1 / 3))[0]
        if self.differs(self.raw(noise, self.between(1 / 3))[0], middle) or self.differs(self.top.asked(self), first):
            raise ValueError(
                "the network answers the same question differently every time: it is random, or keeps a state (dropout "
                "left on? noise or a counter inside?); call network.eval(), or fix its random numbers"
            )
        if self.differs(first, self.top.raw):
            raise ValueError(f"the network answers the same question differently than at its first call: {STATE}")
        if self.differs(self.top.asked(self, 3 - self.top.size), first):
            raise ValueError(MIXES)

    @torch.no_grad()
    def check_last(self) -> None:
        """Ask the question of the fingerprint again, after the measurement; one call.

        Raises:
            ValueError: If the answer has changed.
        """
        again = self.raw(noise_of(torch.tensor([0], device="cpu"), self.shape), self.between(1 / 3))[0]
        if self.differs(again, self.middle):
            raise ValueError(
                "the network answers the same question differently after the measurement than before it, so what was "
                f"measured is of no use: {STATE}"
            )


@dataclass
class Top:
    """Answers at the highest level, ``raw`` and ``denoised`` [2, *shape], and what they were asked at.

    ``size`` samples are asked about at once.
    """

    level: float
    noise: Tensor
    size: int
    raw: Tensor = field(init=False)
    denoised: Tensor = field(init=False)

    def ask(self, ask: Questions) -> None:
        """Ask for the first time."""
        raw, denoised = zip(*(ask.raw(part, self.level) for part in self.noise.split(self.size)), strict=True)
        self.raw, self.denoised = torch.cat(raw).float(), torch.cat(denoised).float()  # held while paths are followed

    def asked(self, ask: Questions, size: int | None = None) -> Tensor:
        """Ask once more, ``size`` at once; returns ``R``."""
        return torch.cat([ask.raw(part, self.level)[0] for part in self.noise.split(size or self.size)])

    @property
    def slope(self) -> float:
        """Change of ``D`` along the change of the noise."""
        difference = self.noise[0] - self.noise[1]
        change = self.denoised[0] - self.denoised[1]
        return float((change * difference).sum() / difference.square().sum())

    def reach(self, c: float) -> float:
        """How much the network's output moved ``D``, in the same units: what errors of it are to be compared with."""
        difference = self.noise[0] - self.noise[1]
        return abs(c) * float((self.raw[0] - self.raw[1]).norm() / difference.norm())
