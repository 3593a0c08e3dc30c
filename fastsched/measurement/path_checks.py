"""What a denoiser's own path must show: looked at while it is followed, with one question or more at its end.

``D(z; s) = E[x0 | z]`` has properties that no wrong table of levels, time, sign or scale shares by chance:

* ``E <z - m, D - m> = E |x0 - m|^2`` for any fixed ``m``: the same at every level, because ``x0 - D`` is orthogonal to
  all functions of ``z``. What the path's calls answered is enough to see it.
* For ``z = x0 + s n``, ``E |D - x0|^2 = s E <n, D - x0>`` (Stein's identity), which is at most ``E |s n|^2``: no more
  than the noise is left, and what is left lies along it. The end of a path is the ``x0`` of one call.
* ``<n, D(z + s n) - D(z)> >= 0`` for all ``z`` and ``n``, whatever the data: the Jacobian ``J = Cov[x0 | z] / s^2`` has
  no negative eigenvalue. Here ``z`` is a state of the path, and ``n`` noise, then ``(2 - J) n``, where the smallest
  eigenvalues have more weight. A wrong scale of ``v`` or ``F`` violates this in most directions, guidance in a few.

Of ``v`` and ``F`` the third property is asked about once, and if that or the path is unusual for such a network, twice
more, and so is the second. The bounds were set on 60 networks, trained or in closed form, and on 800 wrong readings of
them; those of the third on 1,300 measurements of right networks, 800 of guided ones, and 3,900 of ``-F``, ``2 F`` and
``3 F``.
"""

from __future__ import annotations

import math
import warnings
from typing import TypeVar

import torch
from torch import Tensor

from fastsched.measurement.network_checks import FEWEST_ELEMENTS, OF_A_SIGN, moved_at_lowest, suspects
from fastsched.measurement.path_following import Query
from fastsched.measurement.questions import ELSEWHERE, Questions
from fastsched.sampling.random_streams import noise_of

Result = TypeVar("Result")

#: Over fewer levels a path's end is hardly a sample: no reason for a warning, or not before this many times more noise
#: is left than elsewhere.
FEWEST_LEVELS, FEW = 12, 2.0
#: Paths that are looked at, the first of the batch.
MOST_PATHS = 8
#: Noises that are added to the end of a path of few elements.
NOISES = 8
#: The range of levels of the first property, in units of the data's deviation: above, few paths say little.
NEAR_DATA = (0.1, 2.5)
#: How far the first property may be violated, over the root of the paths; of one element, over its root, more; and how
#: that grows with the level in units of the data's deviation.
SLACK, SLACK_OF_ELEMENTS, GROWTH = 0.4, 0.65, 0.7
#: And how much further, for the path's own error, times the fourth power of the widest step in ``log s``: over 12
#: levels a ring of modes in the plane seems to have 1.4 times its variance, over 24 levels 1.01 times, on any number of
#: paths. Of 1,800 measurements of right networks none is doubted so, and 64 were without it.
OF_WIDE_STEPS = 0.3
#: The level of the second property, in units of the data's deviation; a wrong sign shows further from the data.
LOW_PART, LOW_PART_OF_A_SIGN = 0.1, 0.15
#: In these units of the data that ``v`` and ``F`` are trained for, an end is unusual; and so is a ``D`` that moves with
#: noise by more than that part of what it does for Gaussian data of their deviation.
WIDE, MOVING = 1.5, 0.75
#: How ``D`` may move over a step of ``z``; right networks reach -0.009. In how many directions that is asked.
BACKWARDS, DIRECTIONS = -0.05, 3
#: At this part of the level at which that is asked, ``D`` moves by more than the noise where the sign is wrong.
BELOW = 0.15
#: How many times more noise than is wrong is left by no network that is guided within its data.
FAR = 5.0
#: ``|D - x0|^2 / |s n|^2`` above which a network is wrong, or doubtful; how far it may exceed the part along ``n``; and
#: how far that part may be below 0. Each with what more is allowed of one element, over the root of their number.
WRONG, DOUBTFUL, ACROSS, AGAINST = (1.7, 2.2), (1.05, 1.35), (0.2, 0.7), (0.0, 0.6)
#: What was found when noise was added to a path's state.
MOVES = "the denoised sample moves by {:.3g} of a step of the input, where a denoiser's"


def path_checked(steps: Query[Result], ask: Questions, s: Tensor) -> Query[Result]:
    """``steps`` of a measurement at levels ``s``, checked; one call, or up to five where something is unusual.

    The first answer is compared by `Questions.check_first`; when the reference path ends, it is judged.

    Raises:
        ValueError: If ``v`` or EDM's ``F`` has the wrong sign: in a random direction ``D`` moves by more than the
            noise, and in another against its input (`Questions.against`), or too much noise is left at the end; or if
            far too much is left. What else is found is a warning, for guidance beyond its data does that too.
    """
    path = _Path(ask, s)
    question = next(steps)
    raw = yield question
    ask.check_first(raw[-1])
    while (end := path.see(*question, raw)) is None:
        question = steps.send(raw)
        raw = yield question
    raw = raw.clone()  # the network is asked before this answer is used, and may overwrite it
    path.judge(end)
    del path, end  # the deviated paths need the memory
    while True:
        try:
            question = steps.send(raw)
        except StopIteration as finished:
            return finished.value
        raw = yield question


class _Path:
    """Inner products along the reference paths of a batch, and what is kept of the first."""

    def __init__(self, ask: Questions, s: Tensor) -> None:
        self.ask, self.s = ask, s
        self.a, self.c = (each.tolist() for each in ask.denoiser.coefficients(s))
        self.alpha = ask.denoiser.process.alpha(s)
        self.centre = ask.top.denoised[0].float()
        self.signed = ask.denoiser.prediction in OF_A_SIGN
        self.prior = ask.denoiser.sigma_data if ask.denoiser.prediction == "edm" else 1.0
        self.level, self.below = (int((s / (part * self.prior)).log().abs().argmin()) for part in (1.0, BELOW))
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}  # x and D of the first path
        self._products: list[Tensor] = []  # <x, x>, <x, R>, <m, x>, <m, R>, [4, B] a level

    @property
    def noise(self) -> Tensor:
        """What is added to states, [*shape]; not kept while the path is followed."""
        return noise_of(torch.tensor([ELSEWHERE + 2], device="cpu"), self.ask.shape)[0]

    def see(self, x: Tensor, k: int, raw: Tensor) -> Tensor | None:
        """Note the answer at state ``x`` and level k; after the last of the reference path, a path's end [*shape]."""
        m = self.centre.flatten().to(x)
        x, raw = (each[:MOST_PATHS].flatten(1) for each in (x, raw.to(x)))
        squares = [torch.einsum("bd,bd->b", x, each) for each in (x, raw)]
        self._products.append(torch.stack([*squares, x @ m, raw @ m]))
        last = len(self._products) == len(self.s)
        if not last and not (self.signed and k in (self.level, self.below)):
            return None
        denoised = (self.a[k] * x[0] + self.c[k] * raw[0]).cpu().float().view(self.ask.shape)
        if self.signed:  # x is written over
            self._kept[k] = x[0].to("cpu", torch.float32, copy=True).view(self.ask.shape), denoised
        return denoised if last else None

    def moved(self, k: int, step: Tensor) -> tuple[Tensor, float]:
        """``J n``, as a difference, for a step n [*shape] off the state at level k, and that along n; one call."""
        s = float(self.s[k])
        x, before = self._kept[k]
        y = x / float(self.ask.denoiser.process.sigma(self.s[k])) + step
        change = self.ask.raw(y[None], s, torch.float32)[1][0].sub_(before).div_(s)
        return change, float((change * step).sum() / step.square().sum())

    def judge(self, end: Tensor) -> None:
        """Raise an error if the prediction has the wrong sign; warn of what else is violated."""
        xx, xr, mx, mr = torch.stack(self._products, 1).cpu().double()
        alpha, a, c = (
            torch.as_tensor(each, dtype=torch.float64, device="cpu")[:, None] for each in (self.alpha, self.a, self.c)
        )
        sizes = ((a * xx + c * xr - mx) / alpha - a * mx - c * mr).mean(1) + self.centre.double().square().sum()
        deviation = math.sqrt(max(float(sizes[-1]), 0.0) / end.numel())
        far = self._far_from_data(end, deviation)
        if not deviation > 0:
            return
        few, small = len(self.s) < FEWEST_LEVELS, end.numel() < FEWEST_ELEMENTS
        unequal = _unequal_sizes(sizes / sizes[-1], self.s, deviation, end.numel(), xx.shape[1])
        against, backwards, outwards, left, excess = self.ask.against, None, None, None, 0.0
        unusual = not few
        if self.signed:
            backwards, unusual = self._backwards(against is not None or deviation > WIDE * self.prior)
            outwards = self._outwards() if unusual else None
        if unusual and not small:
            level = (LOW_PART_OF_A_SIGN if self.signed else LOW_PART) * deviation
            left, excess = _noise_left(self.ask, end, self.noise, level, few)
        doubtful = far, left, None if few else unequal, against, backwards, None if small else outwards
        if not any(doubtful):
            return
        finding = (
            f"{'; and '.join(filter(None, doubtful))}. Is its condition in the network's own units, and its table of "
            "levels the right one? Is it guided by more than its data allow? Or "
            f"{suspects(self.ask.denoiser)}"
        )
        if self.signed and ((outwards and (against or excess > 1)) or (excess > FAR and not few)):
            raise ValueError(finding)  # other predictions were asked before the path
        warnings.warn(finding, stacklevel=8)

    def _far_from_data(self, end: Tensor, deviation: float) -> str | None:
        """What is wrong if few elements were moved at the lowest level, and a path's end is no sample either.

        A path goes to where ``D`` returns its input, be it a denoiser's or not. So it is also asked about with noise
        added and taken away, with which a denoiser's ``D`` moves. Up to nine calls.

        Raises:
            ValueError: If something is, and the path had levels enough to end in a sample.
        """
        if self.ask.moved is None or (deviation > 0 and self._a_sample(end, deviation)):
            return None
        if len(self.s) >= FEWEST_LEVELS:
            raise ValueError(f"{self.ask.moved}: {suspects(self.ask.denoiser)}")
        return self.ask.moved

    def _a_sample(self, end: Tensor, deviation: float) -> bool:
        noise = noise_of(torch.arange(NOISES // 2, device="cpu") + (ELSEWHERE + 3), self.ask.shape)
        if moved_at_lowest(self.ask, end.double()[None], noise[:1].double(), float(self.s[-1])) is not None:
            return False
        _, left, along = _left(self.ask, end, torch.cat([noise, -noise]), LOW_PART * deviation)
        return left <= WRONG[0] and along >= BACKWARDS

    def _backwards(self, unusual: bool) -> tuple[str | None, bool]:
        """What is wrong if ``D`` moves against a step; and whether that, too, is unusual. One call, or `DIRECTIONS`."""
        step, s = self.noise, float(self.s[self.level])
        for _ in range(DIRECTIONS):
            change, along = self.moved(self.level, step)
            if along < BACKWARDS:
                return f"at level {s:.3g} {MOVES.format(along)} does not move against it", True
            unusual = unusual or along > MOVING / (1 + (s / self.prior) ** 2)
            if not unusual and len(self.s) >= FEWEST_LEVELS:
                break
            change.sub_(step, alpha=2)
            step = change * (step.norm() / change.norm().clamp_min(1e-30))
        return None, unusual

    def _outwards(self) -> str | None:
        """What is wrong if ``D`` moves by more than noise that is added; one call."""
        along = self.moved(self.below, self.noise)[1]
        return f"at level {float(self.s[self.below]):.3g} {MOVES.format(along)} moves by less" if along > 1 else None


def _unequal_sizes(sizes: Tensor, s: Tensor, deviation: float, elements: int, paths: int) -> str | None:
    """What is wrong with the first property's values at levels ``s``, in units of the lowest's; None if nothing."""
    level = s / deviation
    slack = (SLACK + SLACK_OF_ELEMENTS / math.sqrt(elements)) / math.sqrt(paths) * (1 + GROWTH * level)
    slack += OF_WIDE_STEPS * float(s[s.isfinite()].log().diff().abs().max()) ** 4
    near = (level >= NEAR_DATA[0]) & (level <= NEAR_DATA[1])
    excess = torch.where(near, (sizes - 1).abs() / slack, 0.0)
    worst = int(excess.argmax())
    if float(excess[worst]) <= 1:
        return None
    return (
        f"at level {float(s[worst]):.3g} the network answers as if the data had {float(sizes[worst]):.3g} times the "
        "variance that they have at the lowest level, where a denoiser's answers agree"
    )


def _noise_left(ask: Questions, end: Tensor, noise: Tensor, level: float, few: bool) -> tuple[str | None, float]:
    """What is wrong with how a path's end with noise is denoised, None if nothing; and the noise left, over `WRONG`.

    Of a path of few levels that is `FEW` times more, and in which direction says nothing. One call.
    """
    s, left, along = _left(ask, end, noise[None], level)
    wrong, doubtful, across, against = (
        base + each / math.sqrt(end.numel()) for base, each in (WRONG, DOUBTFUL, ACROSS, AGAINST)
    )
    size = left / FEW if few else left
    if size <= doubtful and (few or (left - along <= across and -along <= against)):
        return None, 0.0
    return (
        f"of noise of level {s:.3g}, added to the end of a path, denoising leaves an error of {left:.3g} times its "
        f"square, {along:.3g} of that along the noise, where a denoiser leaves at most 1, and the two alike"
    ), size / wrong


def _left(ask: Questions, end: Tensor, noise: Tensor, level: float) -> tuple[float, float, float]:
    """The level, ``|D - x0|^2 / |s n|^2`` there, of a path's end with ``noise`` [B, *shape], and the part along it."""
    s = ask.known(level)
    error = ask.raw((end / s).add(noise), s, torch.float32)[1].sub_(end).div_(s).flatten()
    noise = noise.flatten()
    whole = float(noise @ noise)
    return s, float(error @ error) / whole, float(noise @ error) / whole
