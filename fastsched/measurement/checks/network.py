"""Checks with a few calls that the network is a denoiser, and of the kind that was declared.

At most seven calls of one sample with fixed noises ``n``, five of them before the measurement. Up to six more if ``v``
or ``F`` is unusual, eight if samples have few elements, two if the rough sample seems no sample (nine for velocities),
two if the network is constant at the highest level, and thirteen if the first path is rough
(`measurement.checks.increments`):

==============================  ================================================================================
call                            output of a denoiser ``D = E[x0 | z]``
==============================  ================================================================================
the highest level, two samples  Nearly the same for both, the mean of the data: its slope along the noise is at
                                most ``var / s`` and not negative, and its size not far above the data's.
the measurement's first call    Equal for the sample that is in both. Otherwise the network is random, keeps a state
                                or mixes the samples of a batch. This check needs no additional call.
pure noise at a third of the    (The first output also gives the network's fingerprint. Two Euler steps lead to a
range, then at two thirds       rough sample ``x0``. ``v`` and ``F`` assume a size of the data, and need only one.)
the same third, plus a step     For ``v`` and ``F``, whose sign may be wrong: ``D`` does not move against the step. If
                                ``D`` moves only a little against it, another noise is tried.
``x0 + s n``, lowest level      Nearly its input. ``x0`` may be far from all data: then ``D`` is tried in its place, or
                                with few elements the end of the first path. With a velocity any ``D`` has this
                                property, so a middle level is used, where ``||D - x0|| < s ||n||``; else a finer
                                ``x0`` is tried. For EDM the check is instead whether the network returns ``D`` where
                                it should return ``F``. Not for ``v``.
the first path, and its end     See `measurement.checks.path` and `measurement.checks.increments`.
at the end, the third again     The same as before. Otherwise the network has changed during the measurement.
==============================  ================================================================================

The bounds were chosen on 40 networks, trained or in closed form, and on 100 wrong interpretations of them, with a wrong
prediction, sign, time or table.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from fastsched import validate
from fastsched.denoisers.denoiser import Denoiser
from fastsched.denoisers.edm import IDENTITY_RTOL, LOW_LEVEL
from fastsched.denoisers.network_errors import checked_call
from fastsched.denoisers.network_state import check_evaluation_mode, checked_training
from fastsched.denoisers.noise import NoiseProcess, VariancePreserving
from fastsched.measurement.checks.calls import ANYWAY, ELSEWHERE, STATE, CheckCalls, Top
from fastsched.measurement.checks.tables import check_table
from fastsched.measurement.fingerprints import fingerprint_of

#: Network evaluations that the checks spend, before a measurement and after it, unless the network is unusual.
CHECK_CALLS = 7

#: Largest ``||D - z||`` at the lowest level, over the norm of its noise; correct networks stay below 0.6.
LOW_ERROR = 3.0
#: The same over the norm of ``x0``; one of the two is enough. A network that predicts x0 may have this error there.
LOW_FRACTION = 0.1
#: Largest slope of ``D`` at the highest level; a network that returns its input has 1, correct networks less than 0.1.
#: They may have more where the noise does not far exceed the data, as over DDPM's first 100 betas. So up to the second
#: number the path decides, which shows the data's size.
TOP_JACOBIAN, CERTAIN_JACOBIAN = 0.3, 0.95
#: Only for VP tables that end between these levels, as data have a size of about 1 there: alphas that are not
#: cumulative end at 0.14, whole tables above 7.
SHORT_TABLE = (0.5, 4.0)
#: Size of ``D`` at the highest level, over that of the data: doubtful above the first number, wrong above the second.
#: Correct networks reach 11.
DOUBTFUL_SIZE, WRONG_SIZE = 20.0, 40.0
#: Size that is assumed at least if the noise has 1, because one rough sample may be much smaller than the data: for two
#: trained networks it had 0.06 and 0.11, and the data deviations of 0.35 and 0.47.
LEAST_SIZE = 0.25
#: Above the second size the network is refused only if the error of its noise prediction is more than this fraction of
#: the noise, or above this level. Weak training leaves 0.3 at level 157, which is 50 times the data's size.
WRONG_FRACTION, WRONG_LEVEL = 0.5, 1e3
#: A network whose predictions of the noise are smaller than this fraction of it at the highest level is not trained.
SILENT = 0.1
#: The highest sigmas that are usual, above any of which a table may be cut.
USUAL_TOP = (160.0, 20.0)
#: If denoising moves a rough sample of a flow too far, the component along the noise, over the noise, tells a wrong
#: sign or time from guidance: of three trained networks of images at guidance up to 12 it was at most 0.3, and at least
#: 0.6 with a wrong sign.
ALONG_NOISE = 0.5
#: Predictions that contain the noise with a weight of at most 1, so that any ``D`` is near its input at low levels.
VELOCITY_LIKE = ("v", "velocity", "reverse_velocity")
#: Predictions of flow models.
FLOW_LIKE = ("velocity", "reverse_velocity")
#: Predictions whose ``D`` is near its input at low levels, and correct at the highest, even if their sign is wrong.
SIGN_AMBIGUOUS = ("v", "edm")
#: ``D`` moves against a step if two numbers are below these: the cosine of its movement and the step, and its slope
#: along the step in units of ``a``. Exact denoisers reach 0.06 in both; a trained one has slope -0.2 where only its
#: error moves.
NEGATIVE_COSINE, NEGATIVE_SLOPE = -0.05, -0.3
#: Below this slope, in the same units, one step is enough. Above it another noise is tried, because trained networks
#: reach -0.7 where only their error moves, but not at two places.
CERTAIN_SLOPE = -1.0
#: With fewer elements, the error of one sample says nothing, and its size little: at least 1 is assumed, as VP does.
FEWEST_ELEMENTS = 8
#: Euler steps to a sample that is not between modes.
FINER = 8
#: `TOP_JACOBIAN` is checked at the highest level of the process, or above this many times the data's size: levels that
#: the caller chose may start lower.
TOP_LEVEL = 4.0
#: Predictions of x0 that differ by less than this multiple of the lowest level count as equal.
ALIKE = 1e-4


@torch.no_grad()
def check_network(
    denoiser: Denoiser,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    s: Tensor,
    seed: int = 0,
    batch: int = 2,
) -> CheckCalls:
    """Raise an error, before the measurement, if a network is not a denoiser of its process; at most five calls.

    Two more if it returns the same for two states of the highest level, and two if ``D`` of ``v`` or ``F`` moves a
    little against a step. Warns if all outputs are equal.

    ``s`` are the levels of the measurement, ``seed`` is that of the last sample of its first batch, which is checked at
    the first level, and ``batch`` the size of this batch. If it is 1, the check has both samples in one call, unless
    the network takes no two; else one in each.

    Returns:
        The calls and outputs so far; `CheckCalls.check_first` and `CheckCalls.check_last` remain to be called.

    Raises:
        ValueError: If the network is in training mode or not a denoiser, or its table is the square root of one. The
            message says what may be wrong.
    """
    check_table(denoiser.process)
    check_evaluation_mode(denoiser.network)
    calls = CheckCalls(denoiser, shape, device, dtype)
    calls.top = Top(float(s[0]), calls.noise(seed, seed + ELSEWHERE), 2 if batch == 1 else 1)
    with checked_training(denoiser.network, device):
        try:
            calls.top.call(calls)
        except Exception:
            if calls.top.size == 1:
                raise
            calls.top.size = 1  # a network that is asked for one sample at a time need not take two
            calls.top.call(calls)
    try:
        _check_denoiser(calls, float(s[-1]))
    except ValueError:
        calls.check_repeats()  # raises instead if the network is random or keeps a state
        raise
    if torch.equal(calls.top.raw[0], calls.top.raw[1]) and not calls.constant:
        check_cache(calls)
    return calls


def _check_denoiser(calls: CheckCalls, low: float) -> None:
    """Make the remaining calls before the measurement, and compare the outputs with those of a denoiser."""
    noise = calls.noise(0, 2).double()
    first, second = calls.between(1 / 3), calls.between(2 / 3)
    middle, x0 = calls.raw(noise[:1], first)
    calls.middle, calls.fingerprint = middle.float(), fingerprint_of(middle, x0, calls.coefficients(first)[1])
    if calls.denoiser.prediction in SIGN_AMBIGUOUS:
        calls.negative_slope = _negative_slope(calls, first * noise[:1], first, x0, first * noise[1:])
    if first != second and calls.denoiser.prediction not in SIGN_AMBIGUOUS:
        x0 = calls.denoised(second * (noise[:1] + (1 / second - 1 / first) * x0), second)
    calls.constant = _answers_equal(calls, low)
    if calls.constant:
        validate.warn(
            "the network answered the same to every question, so schedules for it are meaningless: does it use its "
            "inputs, and is its output not all zero?",
        )
        return
    prediction = calls.denoiser.prediction
    _check_top(calls, calls.assumed_deviation or float(x0.square().mean().sqrt()))
    if prediction == "edm":
        _check_raw_edm(calls, noise[1:])
    elif prediction in FLOW_LIKE:
        _check_middle(calls, x0, *noise.split(1))
    elif prediction != "v":
        _check_low(calls, x0, noise[1:], low)


@torch.no_grad()
def fingerprint(
    denoiser: Denoiser, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, beside: int = 0
) -> Tensor:
    """The network's fingerprint (`measurement.fingerprints`): its answer at one fixed state and level; one call.

    ``beside`` other samples are in the same call, before this one: a network may also go by the place in the batch.
    """
    calls = CheckCalls(denoiser, shape, device, dtype)
    third = calls.between(1 / 3)
    raw, denoised = (each[-1:] for each in calls.raw(calls.noise(*range(beside, -1, -1)), third))
    return fingerprint_of(raw, denoised, calls.coefficients(third)[1])


def _check_top(calls: CheckCalls, size: float) -> None:
    """Check the slope of ``D`` along the noise, and its size against the data's ``size``, at the highest level."""
    denoiser, top = calls.denoiser, calls.top
    if math.prod(calls.shape) < FEWEST_ELEMENTS:
        size = max(size, 1.0)
    elif denoiser.process.kind != "ve":
        size = max(size, LEAST_SIZE)
    slope, reach = top.slope, top.reach(calls.coefficients(top.level)[1])
    sigma = float(denoiser.process.sampler_sigma(torch.tensor(top.level, dtype=torch.float64, device="cpu")))
    where = f"at the highest level (sigma = {sigma:.6g})"
    high = top.level == calls.range[2] or top.level > TOP_LEVEL * size
    if high and top.level < math.inf and slope / top.level > TOP_JACOBIAN:
        silent = denoiser.prediction == "epsilon" and float(top.raw.norm()) < SILENT * float(top.noise.norm())
        untrained = ", as its outputs are near 0 (is it trained?)" if silent else ""
        finding = (
            f"{where} a denoiser depends little on its input, as the noise must far exceed the data there, but this "
            f"network returns {slope / top.level:.0%} of it{untrained}: {suspects(denoiser)}"
        )
        short = denoiser.process.kind == "ve" or SHORT_TABLE[0] <= top.level <= SHORT_TABLE[1]
        if not short or slope / top.level > CERTAIN_JACOBIAN:
            raise ValueError(finding)
        calls.top_fault = finding
    if slope < -0.5 * reach and -slope > 0.5 * size:
        raise ValueError(
            f"{where} the denoised sample moves against the noise ({slope:.2g} times it), which no denoiser does: "
            f"{suspects(denoiser)}{_if_untrained(denoiser.process)}"
        )
    if denoiser.prediction in VELOCITY_LIKE and slope > 0.5 * reach + (4 * size**2 / top.level) and slope > 0.5 * size:
        raise ValueError(
            f"{where} a denoiser depends little on its input, but this one contains {slope:.2g} times the noise: "
            f"{suspects(denoiser)}{_if_untrained(denoiser.process)}"
        )
    largest = float(top.denoised.square().mean().sqrt())
    if denoiser.process.kind != "vp" or largest <= DOUBTFUL_SIZE * size:
        return
    finding = (
        f"{where} the denoised sample is {largest:.3g} in size, and at most {size:.3g} at lower levels: the network is "
        f"useless there. {_lower_start(denoiser.process)}. If the highest level is right: {suspects(denoiser)}"
    )
    if largest > WRONG_SIZE * size and (largest > WRONG_FRACTION * top.level or top.level > WRONG_LEVEL):
        raise ValueError(finding)
    validate.warn(finding)


def _lower_start(process: NoiseProcess) -> str:
    """How to begin at a lower level, for a process of kind ``"vp"``; sigma up to 20 or 160 is usual."""
    if not isinstance(process, VariancePreserving):
        return "Choose a lower t_max"
    levels = process.trained_levels
    usual = next((bound for bound in USUAL_TOP if float(levels[-1]) > bound), float(levels[-2]))
    n = max(int((levels <= usual).sum()), 2)
    return f"Leave the last entries of the table out: alphas_cumprod[:{n}] ends at sigma {float(levels[n - 1]):.3g}"


def _if_untrained(process: NoiseProcess) -> str:
    """`_lower_start` as advice for a network that may be right and badly trained at the highest level; else empty."""
    if process.kind != "vp" or process.s_max <= USUAL_TOP[-1]:
        return ""
    return f". Or is it badly trained there? {_lower_start(process)}"


def _answers_equal(calls: CheckCalls, low: float) -> bool:
    """Whether all outputs are equal; for predictions of x0, which in 16 bits may be almost zero, nearly equal.

    For other predictions small differences may be correct: ``v`` and ``F`` are 0 where data are as ``a`` assumes.
    """
    most = ALIKE * low if calls.denoiser.prediction == "x0" else 0.0
    differences = (calls.top.raw[0] - calls.top.raw[1], calls.top.raw[:1] - calls.middle)
    return all(float(each.abs().max()) <= most for each in differences)


def check_cache(calls: CheckCalls) -> None:
    """ValueError if a network that seems constant at a level is so at a third, with another value; two calls."""
    one, other = (calls.at_third(seed)[0] for seed in (2, 0))
    if torch.equal(one, other) and not torch.equal(calls.middle, calls.top.raw[:1]):  # else it is constant everywhere
        raise ValueError(
            "the network gives the same output for different states of one level, as if it kept its first one, or "
            f"ignored its input: {STATE}"
        )


def _negative_slope(calls: CheckCalls, z: Tensor, s: float, x0: Tensor, other: Tensor | None = None) -> str | None:
    """A message if ``D``, which is ``x0`` at ``z``, moves against a step. One call, or three.

    If it moves only a little against the step, it must do so at ``other`` too.

    The Jacobian of a denoiser, ``Cov[x0 | z] / s^2``, has no negative eigenvalue. If ``R`` has the wrong sign, the
    Jacobian of ``D' = 2 a z - D`` has some, in directions in which data vary more than twice as much as ``a`` assumes,
    most likely that of the true ``D = 2 a z - D'``, along which the step goes.
    """
    a = calls.coefficients(s)[0]
    a *= float(calls.denoiser.process.alpha(torch.tensor(s, dtype=torch.float64, device="cpu")))  # D = a alpha z + c R
    step = x0 - calls.top.denoised.mean(0) - 2 * a * z
    step /= step.norm().clamp_min(1e-30)
    moved = calls.denoised(z + s * step, s) - x0
    along = float((moved * step).sum())
    if along >= min(NEGATIVE_COSINE * float(moved.norm()), NEGATIVE_SLOPE * a * s):
        return None
    if other is not None and along > CERTAIN_SLOPE * a * s:
        return _negative_slope(calls, other, s, calls.denoised(other, s))
    return (
        f"at level {s:.3g} the denoised sample moves by {along:.3g} along a step of {s:.3g} of the input, but a "
        "denoiser's does not move against it"
    )


def _check_middle(calls: CheckCalls, x0: Tensor, start: Tensor, noise: Tensor) -> None:
    """ValueError unless denoising brings a noisy sample nearer to the clean one; one call.

    The rough sample ``x0`` may lie between modes far apart, to which even a denoiser moves it. So if it moves too far,
    a sample of `FINER` steps from the same ``start`` is tried too, with `FINER` and one more calls. If this one does
    not, only `CheckCalls.middle_fault` is set, and not if the error is across the noise, as that of strong guidance.
    """
    if noise.numel() < FEWEST_ELEMENTS:
        return
    most = 1 + 1 / math.sqrt(noise.numel())
    s, left, along = _distance_left(calls, x0, noise)
    if left <= most:
        return
    fault = f"denoising a sample with noise of level {s:.3g} leaves it {left:.3g} times as far from clean"
    if _distance_left(calls, _finer_sample(calls, start), noise)[1] > most:
        raise ValueError(f"{fault} as it was: {suspects(calls.denoiser)}")
    if along > ALONG_NOISE:
        calls.middle_fault = fault


def _distance_left(calls: CheckCalls, x0: Tensor, noise: Tensor) -> tuple[float, float, float]:
    """A middle level ``s``, and for ``e = (D(x0 + s n) - x0) / s`` there ``||e|| / ||n||`` and ``<e, n> / ||n||^2``.

    One call.
    """
    s = calls.known(1.0 if calls.denoiser.process.kind == "flow" else 2 * float(x0.square().mean().sqrt()))
    error = (calls.denoised(x0 + s * noise, s) - x0) / s
    return s, float(error.norm() / noise.norm()), float((error * noise).sum() / noise.square().sum())


def _finer_sample(calls: CheckCalls, y: Tensor) -> Tensor:
    """A sample from noise ``y`` by `FINER` Euler steps."""
    levels = [calls.between(part / FINER) for part in range(FINER)]
    for s, following in pairwise(levels):
        y = y + (1 / following - 1 / s) * calls.denoised(s * y, s)
    return calls.denoised(levels[-1] * y, levels[-1])


def _check_raw_edm(calls: CheckCalls, noise: Tensor) -> None:
    """ValueError if the network returns its input ``z`` at a low level, as ``D(z, sigma)`` does; one call."""
    denoiser = calls.denoiser
    z = (denoiser.sigma_data * noise).to(calls.device, calls.dtype)
    s = torch.full((1,), LOW_LEVEL * denoiser.sigma_data, dtype=torch.float32, device=calls.device)
    answer = checked_call(partial(denoiser.network, z.clone(), s), z, s, calls.dtype)
    calls.model_calls += 1
    if float((answer.cpu().double() - z.cpu().double()).norm()) <= IDENTITY_RTOL * float(z.cpu().double().norm()):
        raise ValueError(
            "the network given to from_edm returns the denoised sample D(z, sigma), not the raw F(c_in z, c_noise): "
            f"pass the network that its wrapper keeps, or use Denoiser.from_denoiser{ANYWAY}"
        )


def _check_low(calls: CheckCalls, x0: Tensor, noise: Tensor, low: float) -> None:
    """Check that denoising changes little at the lowest level; with few elements, the path's end is checked later.

    The rough sample ``x0`` may be no data, as between the values of binary images. A denoiser then leads it to data,
    which it leaves where they are. Two more calls.
    """
    calls.low_fault = moved_at_lowest(calls, x0, noise, low)
    if calls.low_fault is None or noise.numel() < FEWEST_ELEMENTS:
        return
    if moved_at_lowest(calls, calls.denoised(x0 + low * noise, low), noise, low) is not None:
        raise ValueError(f"{calls.low_fault}: {suspects(calls.denoiser)}")
    calls.low_fault = None


def moved_at_lowest(calls: CheckCalls, x0: Tensor, noise: Tensor, low: float) -> str | None:
    """A message if denoising moves ``x0`` with noise of the lowest level too far, else None; one call."""
    z = x0 + low * noise
    error, size = float((calls.denoised(z, low) - z).norm()), low * math.sqrt(noise.numel())
    if error <= LOW_ERROR * size or error <= LOW_FRACTION * float(x0.norm()):
        return None
    return (
        f"at the lowest level (s = {low:.4g}) a denoiser returns nearly its input, but this one moves it by "
        f"{error / size:.3g} times the noise in it"
    )


def suspects(denoiser: Denoiser) -> str:
    """Questions to the user about likely mistakes, for what the network is declared to predict."""
    data_at = getattr(denoiser.process, "data_at", 0)
    sign = 1 if (denoiser.prediction == "velocity") == (data_at == 0) else -1
    flow = (
        f"is the network's time {1 - data_at} at the data (data_at={1 - data_at}), its sign the other one "
        f"(sign={-sign}), or does it predict the noise; does it take times within [0, 1], not 1000 times as large?"
    )
    return {
        "x0": "does the network predict the clean sample, or the noise (from_epsilon) or F (from_edm)?",
        "epsilon": "does the network predict v (from_v); are alphas_cumprod cumulative products, not alphas or betas, "
        "of all timesteps that it was trained on, not respaced; does it take the times 0, 1, 2, ..., unscaled?",
        "v": "does the network predict the noise (from_epsilon), is its sign the other one, the table the right one; "
        "does it take the times 0, 1, 2, ..., unscaled?",
        "velocity": flow,
        "reverse_velocity": flow,
        "score": "is the network's output the score of x in this parameterisation, or the noise or the clean sample; "
        "does it take the level (VE) or the time (VP) unscaled?",
        "edm": "is it the raw network F of EDM's preconditioning, with its sign and its scale; is sigma_data right; "
        "does it take c_noise = ln(s)/4?",
    }[denoiser.prediction] + ANYWAY
