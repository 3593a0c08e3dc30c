"""Cheap questions to a network that is measured: whether it is a denoiser at all, and the one that is claimed.

At most seven calls of one sample, five before the measurement, with fixed noises ``n``, and six more where ``v`` or
``F`` is unusual:

==============================  ================================================================================
question                        what a denoiser ``D = E[x0 | z]`` answers
==============================  ================================================================================
the highest level, two samples  Nearly the same for both, a mean of the data: its slope along the noise is at
                                most ``var / s`` and not negative, and its size not far above the data's.
the measurement's first call    The same for the sample that is in both: else the network is random, keeps a state
                                or mixes the samples of a batch. This question costs nothing.
pure noise at a third of the    (The first answer is also the network's fingerprint. Two steps of Euler's method
range, then at two thirds       lead to a rough sample ``x0``. Of EDM the size of the data is known.)
a step beside the third         Of ``v`` and ``F``, whose sign may be wrong: it does not move against the step. If it
                                hardly does, another noise is asked about.
``x0 + s n``, lowest level      Nearly its input; of few elements, whose ``x0`` may be far from all data, the end of
                                the first path is asked about too. Where a velocity makes ``D`` that whatever it is: at
                                a middle level ``x0`` with less noise than it was given, ``||D - x0|| < s ||n||``; an
                                EDM network is asked whether it returns ``D`` where it should return ``F``.
the first path, and its end     See `measurement.path_checks`.
at the end, the third again     The same as before: else the network has changed during the measurement.
==============================  ================================================================================

The bounds were set on 40 networks, trained or in closed form, and on 100 wrong readings of them: of a wrong prediction,
sign, time or table.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from fastsched.denoisers.denoiser import Denoiser
from fastsched.denoisers.edm import IDENTITY_RTOL, LOW_LEVEL
from fastsched.denoisers.network_errors import checked_output
from fastsched.denoisers.network_state import check_evaluation_mode, checked_training
from fastsched.measurement.fingerprints import fingerprint_of
from fastsched.measurement.questions import ELSEWHERE, STATE, Questions, Top
from fastsched.sampling.random_streams import noise_of

#: Network evaluations that the checks spend, before a measurement and after it, unless the network is unusual.
CHECK_CALLS = 7

#: ``||D - z||`` at the lowest level, in units of its noise; right networks stay below 0.6.
LOW_ERROR = 3.0
#: The same in units of the data: a network that predicts x0 may be that imprecise at the lowest level.
LOW_FRACTION = 0.1
#: Jacobian at the highest level; 1 is a network that returns its input. Right networks stay below 0.1.
TOP_JACOBIAN = 0.3
#: Size of ``D`` at the highest level against the data's: doubtful, and wrong. Right networks reach 11.
DOUBTFUL_SIZE, WRONG_SIZE = 20.0, 40.0
#: What the network predicts contains the noise with weights of at most 1, so that ``D`` is its input at low levels.
OF_UNIT_NOISE = ("v", "velocity", "reverse_velocity")
#: What may be of the wrong sign and yet have a ``D`` near its input at low levels, and the right one at the highest.
OF_A_SIGN = ("v", "edm")
#: How far ``D`` moves along a step, over how far it moves, and over how far ``a z`` does: below both it moves against
#: the step. Exact denoisers reach 0.06 of either; a trained one -0.2 of the second, where its error is all that moves.
AGAINST_STEP, AGAINST_SLOPE = -0.05, -0.3
#: Below this multiple of ``a z`` one such answer is enough; above, another noise is asked about, as trained networks
#: reach -0.7 where their error is all that moves, but not at two places.
AGAINST_SURELY = -1.0
#: With fewer elements, what one sample leaves says nothing, and its size little: data have 1 then, as VP assumes.
FEWEST_ELEMENTS = 8
#: That is asked above this many times the data's size; elsewhere levels were chosen that start lower.
TOP_LEVEL = 4.0
#: Clean samples that differ by less, in units of the lowest level, are the same.
ALIKE = 1e-4


@torch.no_grad()
def check_network(
    denoiser: Denoiser,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    s: Tensor | None = None,
    seed: int = 0,
    batch: int = 2,
) -> Questions:
    """Refuse a network that is no denoiser of its process, before it is measured; at most five calls of one sample.

    If it answers two states of the highest level alike, two calls more, and two if ``v`` or ``F`` hardly moves against
    a step. Warns if it answers the same to every question.

    Args:
        denoiser: The denoiser.
        shape: The shape of one sample.
        device: Where to run.
        dtype: What the network computes in.
        s: The levels of the measurement, descending; those of the process when None.
        seed: The seed of the last sample of its first batch, which is asked about at its first level.
        batch: The size of that batch. The question is asked of samples alone, or in two where the batch is one.

    Returns:
        The questions, asked; `Questions.check_first` and `Questions.check_last` are left.

    Raises:
        ValueError: If the network is in training mode, or answers as no denoiser does. The message says what it looks
            like.
    """
    check_evaluation_mode(denoiser.network)
    ask = Questions(denoiser, shape, device, dtype)
    levels = denoiser.levels(3) if s is None else s
    pair = noise_of(torch.tensor([seed, seed + ELSEWHERE], device="cpu"), shape)
    ask.top = Top(float(levels[0]), pair, 2 if batch == 1 else 1)
    with checked_training(denoiser.network, device):
        ask.top.ask(ask)
    try:
        _check_denoiser(ask, float(levels[-1]))
    except ValueError:
        ask.check_repeats()  # the better reason, if it is one
        raise
    if torch.equal(ask.top.raw[0], ask.top.raw[1]) and ask.top.size == 1:
        _check_cache(ask)
    return ask


def _check_denoiser(ask: Questions, low: float) -> None:
    """Ask what is left to ask before the measurement, and compare the answers with those of a denoiser."""
    noise = noise_of(torch.tensor([0, 2], device="cpu"), ask.shape).double()
    first, second = ask.between(1 / 3), ask.between(2 / 3)
    middle, x0 = ask.raw(noise[:1], first)
    ask.middle, ask.fingerprint = middle.float(), fingerprint_of(middle, x0, ask.factor(first))
    if ask.denoiser.prediction in OF_A_SIGN:
        ask.against = _moves_against(ask, first * noise[:1], first, x0, first * noise[1:])
    if first != second and ask.denoiser.prediction != "edm":
        x0 = ask.denoised(second * (noise[:1] + (1 / second - 1 / first) * x0), second)
    if _answers_alike(ask, low):
        warnings.warn(
            "the network answered the same to every question, so a schedule says nothing about it: is its condition "
            "connected, and is its output not all zero?",
            stacklevel=5,
        )
        return
    prediction = ask.denoiser.prediction
    _check_top(ask, ask.denoiser.sigma_data if prediction == "edm" else float(x0.square().mean().sqrt()))
    if prediction == "edm":
        _check_raw_edm(ask, noise[1:])
    elif prediction in ("velocity", "reverse_velocity"):
        _check_middle(ask, x0, noise[1:])
    elif prediction != "v":
        _check_low(ask, x0, noise[1:], low)


@torch.no_grad()
def fingerprint(denoiser: Denoiser, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """The network's fingerprint (`measurement.fingerprints`): its answer at one fixed state and level; one call."""
    ask = Questions(denoiser, shape, device, dtype)
    level = ask.between(1 / 3)
    return fingerprint_of(*ask.raw(noise_of(torch.tensor([0], device="cpu"), shape), level), ask.factor(level))


def _check_top(ask: Questions, size: float) -> None:
    """The slope along the noise, the Jacobian, and the size against that of the data, at the highest level."""
    denoiser, top = ask.denoiser, ask.top
    if math.prod(ask.shape) < FEWEST_ELEMENTS:
        size = max(size, 1.0)
    slope, reach = top.slope, top.reach(ask.factor(top.level))
    sigma = float(denoiser.process.sampler_sigma(torch.tensor(top.level, dtype=torch.float64, device="cpu")))
    where = f"at the highest level (sigma = {sigma:.6g})"
    high = top.level == ask.range[2] or top.level > TOP_LEVEL * size
    if high and top.level < math.inf and slope / top.level > TOP_JACOBIAN:
        raise ValueError(
            f"{where} a denoiser hardly depends on its input, but this network returns {slope / top.level:.0%} of it: "
            f"{suspects(denoiser)}"
        )
    if slope < -0.5 * reach and -slope > 0.5 * size:
        raise ValueError(
            f"{where} the denoised sample moves against the noise ({slope:.2g} times it), which no denoiser does: "
            f"{suspects(denoiser)}"
        )
    if denoiser.prediction in OF_UNIT_NOISE and slope > 0.5 * reach + (4 * size**2 / top.level) and slope > 0.5 * size:
        raise ValueError(
            f"{where} a denoiser hardly depends on its input, but this network contains {slope:.2g} times the noise: "
            f"{suspects(denoiser)}"
        )
    largest, usual = float(top.denoised.square().mean().sqrt()), max(size, 0.1)
    if denoiser.process.kind != "vp" or largest <= DOUBTFUL_SIZE * usual:
        return
    finding = (
        f"{where} the denoised sample is {largest:.3g} in size, and {size:.3g} at lower levels: the network is of no "
        "use there. Leave the last entries of the table out (alphas_cumprod[:n]; sigma up to 20 or 160 is usual). If "
        f"the table is right: {suspects(denoiser)}"
    )
    if largest > WRONG_SIZE * usual:
        raise ValueError(finding)
    warnings.warn(finding, stacklevel=6)


def _answers_alike(ask: Questions, low: float) -> bool:
    """Whether the answers are one; of clean samples, which in 16 bits may be all but zero, up to next to nothing.

    Of other predictions next to nothing may be right: ``v`` and ``F`` are 0 where data are as ``a`` assumes.
    """
    most = ALIKE * low if ask.denoiser.prediction == "x0" else 0.0
    differences = (ask.top.raw[0] - ask.top.raw[1], ask.top.raw[:1] - ask.middle)
    return all(float(each.abs().max()) <= most for each in differences)


def _check_cache(ask: Questions) -> None:
    """Whether a network that answers two states alike at the highest level does so at the third too; two calls."""
    one, other = (
        ask.raw(noise_of(torch.tensor([seed], device="cpu"), ask.shape), ask.between(1 / 3))[0] for seed in (2, 0)
    )
    if torch.equal(one, other) and not torch.equal(ask.middle, ask.top.raw[:1]):  # else it is constant
        raise ValueError(
            f"the network answers different states of one level alike, as if it kept its answer to the first: {STATE}"
        )


def _moves_against(ask: Questions, z: Tensor, s: float, x0: Tensor, other: Tensor | None = None) -> str | None:
    """What is wrong if ``D``, ``x0`` at ``z``, moves against a step, and if it hardly does, at ``other`` too.

    One call, or three.

    The Jacobian of a denoiser, ``Cov[x0 | z] / s^2``, has no negative eigenvalue. Where ``R`` has the wrong sign, that
    of ``D' = 2 a z - D`` has, along all in which data vary more than twice as much as ``a`` assumes: most likely along
    ``D``, which would be ``2 a z - D'``.
    """
    a = float(ask.denoiser.coefficients(torch.tensor(s, dtype=torch.float64, device="cpu"))[0])
    a *= float(ask.denoiser.process.alpha(torch.tensor(s, dtype=torch.float64, device="cpu")))  # D = a alpha z + c R
    step = x0 - ask.top.denoised.mean(0) - 2 * a * z
    step /= step.norm().clamp_min(1e-30)
    moved = ask.denoised(z + s * step, s) - x0
    along = float((moved * step).sum())
    if along >= min(AGAINST_STEP * float(moved.norm()), AGAINST_SLOPE * a * s):
        return None
    if other is not None and along > AGAINST_SURELY * a * s:
        return _moves_against(ask, other, s, ask.denoised(other, s))
    return (
        f"at level {s:.3g} the denoised sample moves by {along:.3g} along a step of {s:.3g} of the input, where a "
        "denoiser's does not move against it"
    )


def _check_middle(ask: Questions, x0: Tensor, noise: Tensor) -> None:
    """Denoising brings a noisy sample nearer to the clean one."""
    s = ask.known(1.0 if ask.denoiser.process.kind == "flow" else 2 * float(x0.square().mean().sqrt()))
    left = float((ask.denoised(x0 + s * noise, s) - x0).norm() / (s * noise.norm()))
    if noise.numel() >= FEWEST_ELEMENTS and left > 1 + 1 / math.sqrt(noise.numel()):
        raise ValueError(
            f"denoising a sample with noise of level {s:.3g} leaves it {left:.3g} times as far from clean as it was: "
            f"{suspects(ask.denoiser)}"
        )


def _check_raw_edm(ask: Questions, noise: Tensor) -> None:
    """Whether the network, asked for ``D(z, sigma)`` at a low level, returns ``z``."""
    denoiser = ask.denoiser
    z = (denoiser.sigma_data * noise).to(ask.device, ask.dtype)
    s = torch.full((1,), LOW_LEVEL * denoiser.sigma_data, dtype=torch.float32, device=ask.device)
    answer = checked_output(denoiser.network(z.clone(), s), z)
    ask.model_calls += 1
    if float((answer.cpu().double() - z.cpu().double()).norm()) <= IDENTITY_RTOL * float(z.cpu().double().norm()):
        raise ValueError(
            "the network given to from_edm returns the denoised sample D(z, sigma), not the raw F(c_in z, c_noise): "
            "pass the network that its wrapper keeps, or use Denoiser.from_denoiser"
        )


def _check_low(ask: Questions, x0: Tensor, noise: Tensor, low: float) -> None:
    """At the lowest level the denoised sample is nearly the input; of few elements, asked again at a path's end."""
    ask.moved = moved_at_lowest(ask, x0, noise, low)
    if ask.moved is not None and noise.numel() >= FEWEST_ELEMENTS:
        raise ValueError(f"{ask.moved}: {suspects(ask.denoiser)}")


def moved_at_lowest(ask: Questions, x0: Tensor, noise: Tensor, low: float) -> str | None:
    """What is wrong with how ``x0`` with noise of the lowest level is denoised, None if nothing; one call."""
    z = x0 + low * noise
    error, size = float((ask.denoised(z, low) - z).norm()), low * math.sqrt(noise.numel())
    if error <= LOW_ERROR * size or error <= LOW_FRACTION * float(x0.norm()):
        return None
    return (
        f"at the lowest level (s = {low:.4g}) a denoiser returns nearly its input, but this one moves it by "
        f"{error / size:.3g} times the noise in it"
    )


def suspects(denoiser: Denoiser) -> str:
    """What to look at, by what the network is said to predict."""
    return {
        "x0": "does the network predict the clean sample, or the noise (from_epsilon) or F (from_edm)?",
        "epsilon": "does the network predict v (from_v); are alphas_cumprod cumulative products, not alphas or betas?",
        "v": "does the network predict the noise (from_epsilon), is its sign the other one, the table the right one?",
        "velocity": "is the network's time 1 at the data (data_at=1), its sign the other one (sign=-1), or is it eps?",
        "reverse_velocity": "is the network's time 0 at the data (data_at=0), or its sign the other one?",
        "score": "is the network's output the score of x in this parameterisation, or the noise or the clean sample?",
        "edm": "is it the raw network F of EDM's preconditioning, sigma_data right, its sign and scale not other ones?",
    }[denoiser.prediction] + " (checks=False measures it all the same)"
