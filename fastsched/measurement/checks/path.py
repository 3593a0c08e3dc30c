"""Checks of the network's outputs along the reference path, with one or more additional calls at its end.

``D(z; s) = E[x0 | z]`` has four properties. With a wrong table of levels, time, sign or scale none holds by chance:

* ``E <z - m, D - m> = E |x0 - m|^2`` for any fixed ``m``. So it is the same at every level. The reason is that
  ``x0 - D`` is orthogonal to all functions of ``z``. The outputs along the path are enough to check it, for the mean of
  the data, and for 0 if the path ends nearer to it.
* For ``z = x0 + s n``, ``E |D - x0|^2 = s E <n, D - x0>`` (Stein's identity), which is at most ``E |s n|^2``: the error
  after denoising is no larger than the noise, and lies along it. One call checks this, with a path's end as ``x0``.
* ``E |z - D|^2 = s^2 (d - E tr J)`` along the path, with the Jacobian ``J`` of ``D`` in ``d`` dimensions (Stein's
  identity again): what is removed is as much as the posterior variance ``s^2 tr J`` leaves. The left side is known for
  all paths; one call, with noise added to a state of the first, estimates the right side.
* ``<n, D(z + s n) - D(z)> >= 0`` for all ``z``, ``n`` and data: the Jacobian ``J = Cov[x0 | z] / s^2`` has no negative
  eigenvalue. Here ``z`` is a state of the path. ``n`` is noise, and then ``(2 - J) n``, which amplifies directions of
  small eigenvalues. A wrong scale of ``v`` or ``F`` violates this in most directions, guidance in a few.

For ``v`` and ``F`` the last property is checked in one direction. If the result or the path is unusual, it is checked
in two more. The second property is checked if something is unusual, or if samples have few elements. At the highest
level ``D`` is the mean of the data, whatever the noise (`_Path._noise_held`). Flow models have two more properties
(`measurement.checks.flow`). The bounds were chosen on 60 networks, trained or in closed form, and on 800 wrong
interpretations of them; those of the last property on 1,300 measurements of correct networks, 800 of guided ones, and
3,900 of ``-F``, ``2 F`` and ``3 F``.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

from fastsched import validate
from fastsched.measurement.checks.calls import ELSEWHERE, CheckCalls
from fastsched.measurement.checks.flow import flow_faults
from fastsched.measurement.checks.network import (
    FEWEST_ELEMENTS,
    FLOW_LIKE,
    SIGN_AMBIGUOUS,
    check_cache,
    moved_at_lowest,
    suspects,
)
from fastsched.measurement.path_following import Query

Result = TypeVar("Result")

#: A path of fewer levels may not end near a sample. The first property is then ignored, and bounds on the noise left
#: are multiplied by the second number.
FEWEST_LEVELS, FEW_LEVELS_FACTOR = 12, 2.0
#: Largest number of paths that are checked, the first of the batch.
MOST_PATHS = 8
#: Noises that are added to the end of a path if samples have few elements.
NOISES = 8
#: Levels at which the first property is checked, in units of the data's deviation; above, it scatters on few paths.
NEAR_DATA = (0.1, 2.5)
#: The first property is checked for 0 if the highest level is above this times the data's deviation, and not for few
#: elements, which may end near 0 by chance. At a lower level, noise alone, from which paths start, is smaller than z.
NOISE_ALONE = 4.0
#: Tolerance of the first property, as a relative difference, at a ``level`` in units of the data's deviation:
#: ``(SLACK + SLACK_OF_ELEMENTS / sqrt(elements)) / sqrt(paths) * (1 + GROWTH * level)``.
SLACK, SLACK_OF_ELEMENTS, GROWTH = 0.4, 0.65, 0.7
#: Times the fourth power of the widest step in ``log s``, this is added for the path's own error. On any number of
#: paths, a ring of modes in the plane seems to have 1.4 times its variance over 12 levels, 1.01 times over 24. Of 1,800
#: measurements of correct networks none has a false alarm; without this term 64 had.
SLACK_OF_WIDE_STEPS = 0.3
#: The tolerance is raised to the first number of standard errors, as the paths scatter, but at most to the second
#: number of times. Of data with rare values, such as a feature that is 0 in nine samples of ten, few paths end in one:
#: of 720 measurements of such data of 1 to 4 elements 82 had a false alarm without this, and 18 with it. Of 480 wrong
#: networks of 1 to 16 elements 315 were refused or warned of without this, and 307 with it.
STANDARD_ERRORS, MOST_SLACK = 3.0, 2.0
#: At a level of this many times ``sqrt(elements)``, in units of the data's deviation, ``D`` is the mean of the data. It
#: may hold this part of the noise, in units of that deviation: correct networks, trained weakly too, hold 0.05 above
#: chance; functions that lead noise to samples, as distilled networks do, 0.2 to 0.7. Predictions of noise and scores
#: are not checked, as their errors are as large there, nor are fewer elements in all paths than the third number.
PURE, HELD, FEWEST_IN_ALL = 4.5, 0.1, 32
#: The slope of ``D`` along noise at the highest level, over that for Gaussian data of the deviation that paths show, is
#: at most the first number, and the second over the root of their elements more. In 530 measurements of exact networks
#: it reached 1.4 for 64 elements a path, and 2.1 for 16.
TOP_SHARE = (1.5, 8.0)
#: Level of the second property, in units of the data's deviation; higher for predictions whose sign may be wrong.
#: A wrong sign shows further from the data.
LOW_PART, LOW_PART_OF_SIGN = 0.1, 0.15
#: A network is unusual if the deviation of its data is above the first number times that which ``v`` or ``F`` assumes,
#: or if ``D`` moves along noise by more than the second number times what it does for Gaussian data as assumed.
WIDE, MOVING = 1.5, 0.75
#: Level of the third property, for data of the usual deviations of 0.2 to 1. ``v`` and ``F`` are checked where other
#: calls are made too.
REMOVED_AT = 0.35
#: Tolerance of the third property, over the noise's square: ``a`` times the mean of its two sides, and
#: ``(b + c / sqrt(paths)) / sqrt(elements)``. Above a third of it, the network is unusual. Of 724 measurements of exact
#: networks in 48 to 1,024 dimensions and of 12 trained ones none has a false alarm, of 336 guided ones one, at guidance
#: 7.5. Of 330 with a wrong time, table or prediction, 66 of them in 32 dimensions, it finds 126; 29 of these look right
#: otherwise, and 35 more are not found at all.
REMOVED_TOLERANCE, UNUSUAL = (0.3, 0.25, 2.25), 1 / 3
#: With fewer elements, the third property says too little: in 32 dimensions a path between modes had a false alarm.
FEWEST_REMOVED = 48
#: Smallest slope of ``D`` along a step of ``z`` (correct networks reach -0.009); and the number of directions checked.
BACKWARDS, DIRECTIONS = -0.05, 3
#: At this fraction of the level of that check, ``D`` moves by more than the noise if the sign is wrong.
BELOW = 0.15
#: No network that is guided within its data leaves more noise than this many times `WRONG`.
FAR = 5.0
#: Bounds ``(b, e)`` mean ``b + e / sqrt(elements)``. `WRONG` and `DOUBTFUL` bound ``|D - x0|^2 / |s n|^2``. `ACROSS`
#: bounds its excess over the component of ``D - x0`` along ``n``, and `AGAINST` how far this component is below 0.
WRONG, DOUBTFUL, ACROSS, AGAINST = (1.7, 2.2), (1.05, 1.35), (0.2, 0.7), (0.0, 0.6)
#: Start of the messages about noise that was added to a state of the path.
MOVES = "the denoised sample moves by {:.3g} of a step of the input, but a denoiser's"


def path_checked(steps: Query[Result], calls: CheckCalls, s: Tensor) -> Query[Result]:
    """Run ``steps``, a measurement at levels ``s``, and check the outputs: `CheckCalls.check_first`, then the path.

    Usually one additional call; up to five if something is unusual, and up to nine if samples have few elements. Two
    more if the outputs on the deviated paths are those on the path, as if the network kept its output at each level.

    Raises:
        ValueError: If ``v`` or EDM's ``F`` has the wrong sign: in a random direction ``D`` moves by more than the
            noise, and in another against its input (`CheckCalls.negative_slope`), or too much noise is left at the end;
            or if far too much is left. Also if `CheckCalls.check_first` fails, or `CheckCalls.low_fault` is set and the
            path does not end in a sample. Other findings are warnings, as strong guidance causes them too.
    """
    path = _Path(calls, s)
    question = next(steps)
    raw = yield question
    calls.check_first(raw[-1])
    while (end := path.see(*question, raw)) is None:
        question = steps.send(raw)
        raw = yield question
    raw = raw.clone()  # `check_end` calls the network, which may overwrite its last output
    path.check_end(end)
    squares, equal = [each[2] for each in path.products], []  # |R|^2 on the path, and whether it is that on others
    del path, end  # the deviated paths need the memory
    while True:
        try:
            question = steps.send(raw)
        except StopIteration as finished:
            if equal and not calls.constant and bool(torch.stack(equal).all()):  # read now: one wait for the device
                check_cache(calls)
            return finished.value
        raw = yield question
        first = raw[:MOST_PATHS].flatten(1).to(question[0])
        equal.append(torch.einsum("bd,bd->b", first, first) == squares[question[1]])
        del first


class _Path:
    """Inner products along the reference paths of a batch, and states of the first path that later checks need."""

    def __init__(self, calls: CheckCalls, s: Tensor) -> None:
        self.calls, self.s = calls, s
        self.a, self.c = (each.tolist() for each in calls.denoiser.coefficients(s))
        self.alpha = calls.denoiser.process.alpha(s)
        self.centre = calls.top.denoised[1].float()  # of a noise that no path starts from
        self.sign_ambiguous = calls.denoiser.prediction in SIGN_AMBIGUOUS
        self.prior = calls.assumed_deviation or 1.0
        near = lambda level: int((s / level).log().abs().argmin())
        self.level, self.below = near(self.prior), near(BELOW * self.prior)
        self.removed_at = {"edm": self.level, "v": self.below}.get(calls.denoiser.prediction, near(REMOVED_AT))
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}  # x and D of the first path
        self.products: list[Tensor] = []  # <x, x>, <x, R>, <R, R>, <m, x>, <m, R>, [5, B] per level

    @property
    def noise(self) -> Tensor:
        """The noise that is added to states, [*shape]; drawn again at each use, so that it takes no memory."""
        return self.calls.noise(ELSEWHERE + 2)[0]

    def see(self, x: Tensor, k: int, raw: Tensor) -> Tensor | None:
        """Record the output at state ``x`` and level k; after the last level, return the first path's end [*shape]."""
        m = self.centre.flatten().to(x)
        x, raw = (each[:MOST_PATHS].flatten(1) for each in (x, raw.to(x)))
        squares = [torch.einsum("bd,bd->b", *pair) for pair in ((x, x), (x, raw), (raw, raw))]
        self.products.append(torch.stack([*squares, x @ m, raw @ m]))
        last = len(self.products) == len(self.s)
        kept = k in ((self.level, self.below) if self.sign_ambiguous else (self.removed_at,))
        if not last and not kept:
            return None
        denoised = (self.a[k] * x[0] + self.c[k] * raw[0]).cpu().float().view(self.calls.shape)
        if kept:  # a copy, because the measurement overwrites x
            self._kept[k] = x[0].to("cpu", torch.float32, copy=True).view(self.calls.shape), denoised
        return denoised if last else None

    def moved(self, k: int, step: Tensor) -> tuple[Tensor, float]:
        """``J n`` for a step n [*shape] from the state at level k, by a difference, and the slope along n; one call."""
        s = float(self.s[k])
        x, before = self._kept[k]
        y = x / float(self.calls.denoiser.process.sigma(self.s[k])) + step
        change = self.calls.raw(y[None], s, torch.float32)[1][0].sub_(before).div_(s)
        return change, float((change * step).sum() / step.square().sum())

    def check_end(self, end: Tensor) -> None:
        """Raise an error if the prediction has the wrong sign; warn of other violations."""
        products = torch.stack(self.products, 1).cpu().double()  # [5, N, B]
        each_size, spread, of_zero = self._sizes(products)
        sizes = each_size.mean(1)
        deviation = math.sqrt(max(float(sizes[-1]), 0.0) / end.numel())
        self._check_top(deviation, end.numel() * products.shape[2])
        far = self._far_from_data(end, deviation)
        if not deviation > 0:
            return
        (left, *others), wrong = self._with_noise(end, deviation, products[:3])
        along_path: list[str | None] = []
        if len(self.s) >= FEWEST_LEVELS:
            paths, unequal = products.shape[2], _unequal_sizes(each_size, self.s, end.numel())
            about_zero = float(self.s[0]) > NOISE_ALONE * deviation and end.numel() * paths >= FEWEST_IN_ALL
            if unequal is None and about_zero and 0 < of_zero[-1].mean() < sizes[-1]:  # D may lack its mean
                unequal = _unequal_sizes(of_zero, self.s, end.numel())
            along_path = [unequal, self._noise_held(sizes / sizes[-1], spread / sizes[-1], deviation, paths)]
            if self.calls.denoiser.prediction in FLOW_LIKE:
                of_flow, wrong = flow_faults(self.calls, float(self.s[-1]), deviation, products[:3, -1])
                others += of_flow
        found = [each for each in (far, left, *along_path, *others) if each]
        if not found:
            return
        found = [self.calls.middle_fault, *found] if self.calls.middle_fault is not None else found
        finding = (
            f"{'; and '.join(found)}. Does the network get time or noise level in its own units, and is its table of "
            f"levels the right one? Is it guided by more than its data allow? Or {suspects(self.calls.denoiser)}"
        )
        if wrong or self.calls.middle_fault is not None:  # that alone may be of a rough sample between modes
            raise ValueError(finding)
        validate.warn(finding)

    def _with_noise(self, end: Tensor, deviation: float, squares: Tensor) -> tuple[list[str | None], bool]:
        """Messages about noise added to the path's end and to its states, and whether the sign is surely wrong.

        ``squares`` are ``<x, x>``, ``<x, R>`` and ``<R, R>``, [3, N, B]. Calls that are not always made are for
        networks that are unusual so far.
        """
        few, small, ambiguous = len(self.s) < FEWEST_LEVELS, end.numel() < FEWEST_ELEMENTS, self.sign_ambiguous
        against, unusual, slope, excess = self.calls.negative_slope, not few, None, 0.0
        left = backwards = removed = outwards = None
        if ambiguous:  # other signs were checked before the path
            backwards, unusual, slope = self._backwards(against is not None or deviation > WIDE * self.prior)
        if not few and end.numel() >= FEWEST_REMOVED:
            removed, odd = self._removed(squares, slope)
            unusual = odd or (unusual and ambiguous)
        if unusual and ambiguous:
            outwards = self._outwards()
        if unusual and not small:
            level = (LOW_PART_OF_SIGN if ambiguous else LOW_PART) * deviation
            left, excess = _noise_left(self.calls, end, self.noise, level, few)
        wrong = bool(outwards and (against or excess > 1)) or (excess > FAR and not few)
        return [left, against, backwards, None if small else outwards, removed], ambiguous and wrong

    def _sizes(self, products: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``<z - m, D - m>`` [N, B], ``|D - m|^2`` [N], a mean over the paths, and ``<z, D>`` [N, B]; of [5, N, B]."""
        xx, xr, rr, mx, mr = products
        alpha, a, c = (
            torch.as_tensor(each, dtype=torch.float64, device="cpu")[:, None] for each in (self.alpha, self.a, self.c)
        )
        of_centre = torch.linalg.vector_norm(self.centre, dtype=torch.float64).square()  # no copy in float64
        of_zero, of_denoised = (a * xx + c * xr) / alpha, a * mx + c * mr  # <z, D>, <m, D>
        sizes = of_zero - mx / alpha - of_denoised + of_centre
        spread = (a.square() * xx + 2 * a * c * xr + c.square() * rr - 2 * of_denoised).mean(1) + of_centre
        return sizes, spread, of_zero

    def _check_top(self, deviation: float, elements: int) -> None:
        """Raise `CheckCalls.top_fault`, or warn if data of this ``deviation``, of so many ``elements``, explain it.

        The mean slope of ``D`` along noise is the mean of ``v / (v + s^2)`` for Gaussian data of variances ``v``.
        """
        top, fault = self.calls.top, self.calls.top_fault
        if fault is None:
            return
        most = TOP_SHARE[0] + TOP_SHARE[1] / math.sqrt(elements)
        if top.slope / top.level > most / (1 + (top.level / max(deviation, 1e-30)) ** 2):
            raise ValueError(fault)
        validate.warn(
            f"at the highest level ({top.level:.3g}) the noise does not far exceed the data, whose deviation is "
            f"{deviation:.3g}, so samples that start from noise alone differ from the data. Is the range of levels, or "
            f"the table, that of the training? Or {suspects(self.calls.denoiser)}"
        )

    def _far_from_data(self, end: Tensor, deviation: float) -> str | None:
        """`CheckCalls.low_fault` of a sample of few elements, if the path does not end in a sample either; else None.

        Any path leads to where ``D`` returns its input, also if ``D`` is not a denoiser. So noise is added to the end
        and subtracted from it, and a denoiser's ``D`` must not move against it. Up to nine calls.

        Raises:
            ValueError: If there is such a fault, and the path had enough levels to end in a sample.
        """
        if self.calls.low_fault is None or (deviation > 0 and self._is_sample(end, deviation)):
            return None
        if len(self.s) >= FEWEST_LEVELS:
            raise ValueError(f"{self.calls.low_fault}: {suspects(self.calls.denoiser)}")
        return self.calls.low_fault

    def _is_sample(self, end: Tensor, deviation: float) -> bool:
        noise = self.calls.noise(*range(ELSEWHERE + 3, ELSEWHERE + 3 + NOISES // 2))
        if moved_at_lowest(self.calls, end.double()[None], noise[:1].double(), float(self.s[-1])) is not None:
            return False
        _, left, along = _left(self.calls, end, torch.cat([noise, -noise]), LOW_PART * deviation)
        return left <= WRONG[0] and along >= BACKWARDS

    def _backwards(self, unusual: bool) -> tuple[str | None, bool, float]:
        """A message if ``D`` moves against a step, whether the network is unusual, and the slope along the first step.

        One call, or `DIRECTIONS`.
        """
        step, s, slopes = self.noise, float(self.s[self.level]), []
        for _ in range(DIRECTIONS):
            change, along = self.moved(self.level, step)
            slopes.append(along)
            if along < BACKWARDS:
                return f"at level {s:.3g} {MOVES.format(along)} does not move against it", True, slopes[0]
            unusual = unusual or along > MOVING / (1 + (s / self.prior) ** 2)
            if not unusual and len(self.s) >= FEWEST_LEVELS:
                break
            change.sub_(step, alpha=2)
            step = change * (step.norm() / change.norm().clamp_min(1e-30))
        return None, unusual, slopes[0]

    def _removed(self, squares: Tensor, slope: float | None) -> tuple[str | None, bool]:
        """A message if ``|z - D|^2`` does not agree with the slope of ``D`` along noise, and whether it is unusual.

        Args:
            squares: ``<x, x>``, ``<x, R>`` and ``<R, R>``, [3, N, B].
            slope: The slope at the level `removed_at`, if it is known; else one call.
        """
        k, elements, paths = self.removed_at, self.centre.numel(), squares.shape[2]
        if slope is None or k != self.level:
            slope = self._slope(k)
        xx, xr, rr = squares[:, k].mean(1).tolist()
        s, c, weight = float(self.s[k]), self.c[k], 1 / float(self.alpha[k]) - self.a[k]  # z - D = weight x - c R
        noise = float(squares[0, 0].mean()) / float(self.calls.denoiser.process.sigma(self.s[0])) ** 2
        removed = (weight**2 * xx - 2 * weight * c * xr + c**2 * rr) / (s**2 * noise)
        tolerance = REMOVED_TOLERANCE[0] * (removed + abs(1 - slope)) / 2
        tolerance += (REMOVED_TOLERANCE[1] + REMOVED_TOLERANCE[2] / math.sqrt(paths)) / math.sqrt(elements)
        excess = abs(removed - (1 - slope)) / tolerance
        if excess <= 1:
            return None, excess > UNUSUAL
        return (
            f"at level {s:.3g} denoising takes {removed:.3g} of the noise's square away, but that of a denoiser whose "
            f"output moves by {slope:.3g} of a step of its input takes {1 - slope:.3g}"
        ), True

    def _slope(self, k: int) -> float:
        """Slope of ``D`` along half the noise of level k; one call, with fewer vectors in memory than `moved`."""
        s = float(self.s[k])
        x, before = self._kept[k] if self.sign_ambiguous else self._kept.pop(k)
        y = self.noise.div_(2).add_(x, alpha=1 / float(self.calls.denoiser.process.sigma(self.s[k])))
        del x
        change = self.calls.raw(y[None], s, torch.float32)[1][0].sub_(before)
        noise = self.noise
        return 2 * float((change * noise).sum() / noise.square().sum()) / s

    def _noise_held(self, sizes: Tensor, spread: Tensor, deviation: float, paths: int) -> str | None:
        """A message if ``D`` follows the noise at the highest finite level, instead of being the mean of the data.

        Args:
            sizes: The first property's values, over that of the lowest level, [N].
            spread: ``|D - m|^2`` for a fixed m, over the same, [N].
            deviation: Of the data.
            paths: The number of paths.
        """
        k, elements = int(self.s.isinf().sum()), self.centre.numel()
        if self.calls.denoiser.prediction in ("epsilon", "score") or elements * paths < FEWEST_IN_ALL:
            return None
        level = float(self.s[k]) / deviation
        held = (float(sizes[k]) - 1) / level
        chance = math.sqrt(float(spread[k].clamp_min(0)) / (elements * paths))
        if level < PURE * math.sqrt(elements) or held <= HELD + chance:
            return None
        return (
            f"at level {float(self.s[k]):.4g} a denoised sample is the mean of all data, but this one follows the noise"
            f" ({held:.2g} of the data's deviation), as that of a distilled network or consistency model does, which "
            "leads noise straight to samples, or of a network that is given too low a level"
        )

    def _outwards(self) -> str | None:
        """A message if ``D`` moves by more than the noise that is added; one call."""
        along = self.moved(self.below, self.noise)[1]
        return f"at level {float(self.s[self.below]):.3g} {MOVES.format(along)} moves by less" if along > 1 else None


def _unequal_sizes(each: Tensor, s: Tensor, elements: int) -> str | None:
    """A message if the first property's values [N, B] at levels ``s`` are too far from those of the lowest level."""
    paths, of_data = each.shape[1], float(each[-1].mean())
    sizes, level = each.mean(1) / of_data, s / math.sqrt(of_data / elements)
    slack = (SLACK + SLACK_OF_ELEMENTS / math.sqrt(elements)) / math.sqrt(paths) * (1 + GROWTH * level)
    slack += SLACK_OF_WIDE_STEPS * float(s[s.isfinite()].log().diff().abs().max()) ** 4
    scatter = ((each - each[-1]) / of_data).var(1, correction=0).div(max(paths - 1, 1)).sqrt()
    slack = (STANDARD_ERRORS * scatter).clamp(slack, MOST_SLACK * slack)
    near = (level >= NEAR_DATA[0]) & (level <= NEAR_DATA[1])
    excess = torch.where(near, (sizes - 1).abs() / slack, 0.0)
    worst = int(excess.argmax())
    if float(excess[worst]) <= 1:
        return None
    return (
        f"at level {float(s[worst]):.3g} the network's outputs imply {float(sizes[worst]):.3g} times the data variance "
        "that they imply at the lowest level, but a denoiser's imply the same at all levels"
    )


def _noise_left(calls: CheckCalls, end: Tensor, noise: Tensor, level: float, few: bool) -> tuple[str | None, float]:
    """A message if denoising a path's end with noise leaves too large an error, else None; and the error over `WRONG`.

    For a path of ``few`` levels it may be `FEW_LEVELS_FACTOR` times larger, in any direction. One call.
    """
    s, left, along = _left(calls, end, noise[None], level)
    wrong, doubtful, across, against = (
        base + each / math.sqrt(end.numel()) for base, each in (WRONG, DOUBTFUL, ACROSS, AGAINST)
    )
    size = left / FEW_LEVELS_FACTOR if few else left
    if size <= doubtful and (few or (left - along <= across and -along <= against)):
        return None, 0.0
    return (
        f"when noise of level {s:.3g} is added to the end of a path and denoised, the squared error is {left:.3g}, and "
        f"the inner product of error and noise {along:.3g}, both over the noise's square; for a denoiser these two "
        "numbers are equal, and at most 1"
    ), size / wrong


def _left(calls: CheckCalls, end: Tensor, noise: Tensor, level: float) -> tuple[float, float, float]:
    """A known level, and there, over ``|s n|^2`` for ``noise`` n [B, *shape], ``|D - x0|^2`` and ``<s n, D - x0>``."""
    s = calls.known(level)
    error = calls.raw((end / s).add(noise), s, torch.float32)[1].sub_(end).div_(s).flatten()
    noise = noise.flatten()
    whole = float(noise @ noise)
    return s, float(error @ error) / whole, float(noise @ error) / whole
