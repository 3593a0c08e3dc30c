"""Algorithm 2 of Score-Optimal Diffusion Schedules: a schedule that adapts to a network during its training."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsched import validate
from fastsched.denoisers.denoiser import Denoiser
from fastsched.denoisers.network_errors import checked_call
from fastsched.denoisers.network_state import (
    active_training_layer,
    random_state,
    unchanged_buffers,
    warned_of_draws,
)
from fastsched.denoisers.noise import LARGEST_SIGMA, SMALLEST_LEVEL
from fastsched.measurement.rounding import stored_squares, warn_of_rounded_costs
from fastsched.ops.backends import in_float64, widest_dtype
from fastsched.selection.arc_length import moved_to_equal_arc_length
from fastsched.selection.fixed_point import variation

#: Least relative distance of two levels: closer levels count as equal.
LEAST_GAP = 1e-9

#: Relative change of answers with the level of another sample that is a fault.
SHARED = 0.1

#: Answers within this relative squared distance of the noise, or of the score ``-n / s``, at all levels down to this
#: part of the highest, are no samples if these span the third number: ``D`` of data of deviation ``c`` contains
#: ``c^2 / s`` times the noise above the level ``c``, and ``s`` times it below, so it is near it at one level only.
NEAR_NOISE, HIGH_LEVELS, LEVEL_SPAN = 0.3, 0.1, 4.0

_RANDOM = (
    "the changes that they make are counted as cost, most at low levels; call eval() before observe_denoiser and "
    "train() after it, or fix the numbers"
)


class AdaptiveSchedule:
    """Noise levels for training, drawn from a schedule that is updated so that all its steps cost the same.

    For each batch, draw levels and train on them, then estimate the incremental costs ``L(t_i, t_{i+1})`` of the
    current grid and update it: ``t <- rate * UpdateSchedule(t, L) + (1 - rate) * t``, in ``log s``.

        >>> adaptive = fs.AdaptiveSchedule(fs.baselines.karras(32, 0.002, 80.0)[:-1])
        >>> for clean in loader:
        >>>     s = adaptive.draw(len(clean), device=clean.device)  # train on clean + s * noise
        >>>     ...
        >>>     adaptive.observe_denoiser(denoise, clean)  # denoise(z, s) -> x0
        >>>     adaptive.update()

    **Gradient accumulation**: observe every micro-batch, update once per optimiser step. **torch.distributed**: call
    `update` on every rank. It sums the observations over the ranks of ``group``, so that all have the same grid. Each
    rank draws and observes its own batches.

    The distribution of levels also weights the training loss. Levels far below the data's standard deviation become
    rare, because the corrector cost vanishes there. To train as with another density ``p`` of levels in ``log s``, draw
    a fraction ``a`` of each batch from ``p``, the rest by `draw`, and multiply the loss by ``p / (a p + (1 - a)
    density)``, which is at most ``1 / a``.

    Attributes:
        s: The grid, noisiest first, [N] float64; updates leave both ends. Another grid may be set.
        rate: ``gamma``, the step size of an update.
        order: ``p`` in ``L ~ delta * step^p``.
        updates: The number of updates so far.

    Args:
        s: The grid to start from, as levels ``s`` (`NoiseProcess.level` converts), descending, the last above 0.
        rate: Within (0, 1].
        order: 2 for the corrector cost, 4 for the predictor cost.
        group: The ``torch.distributed`` group whose observations are summed; all ranks when None.

    Raises:
        ValueError: If the levels do not descend or are beyond float32, or ``rate`` or ``order`` is out of range.

    Source: Williams, Campbell, Doucet and Syed, NeurIPS 2024 (arXiv 2412.07877), algorithm 2.
    """

    def __init__(self, s: Tensor | Sequence[float], *, rate: float = 0.1, order: int = 2, group: Any = None) -> None:
        validate.arguments(locals(), s=validate.anything, rate=validate.real, order=validate.positive_int)
        self.s = validate.descending_sigmas("s", s)
        self.rate, self.order, self.updates = float(rate), int(order), 0  # plain numbers, for files
        self.group = group
        self._checked = False  # whether answers were checked not to follow another sample's level
        self._warned_of_noise = False

    def __setattr__(self, name: str, value: Any) -> None:
        """Levels, rate and order are checked, also when they are replaced later; other levels drop the observations."""
        super().__setattr__(name, _CHECKED[name](value) if name in _CHECKED else value)
        if name == "s":
            self._clear()

    def _clear(self) -> None:
        # Sums and counts instead of means: they add up over micro-batches, and over ranks with batches of other sizes.
        # The third is what storage in 16 bits may have added to the sums.
        none = lambda: torch.zeros(len(self.s) - 1, dtype=torch.float64, device="cpu")
        self._sums, self._counts, self._rounding = none(), none(), none()

    def __repr__(self) -> str:
        ends = f"{float(self.s[0]):.4g} to {float(self.s[-1]):.4g}"
        return f"AdaptiveSchedule({len(self.s)} levels from {ends}, order={self.order}, {self.updates} updates)"

    def draw(self, n: int, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu") -> Tensor:
        """``n`` levels ``s`` for training, [n] float32: uniform along the schedule, log-linear between its levels.

        Args:
            n: The number of levels.
            generator: A random generator on the CPU.
            device: The device of the result.
        """
        validate.arguments(locals(), n=validate.positive_int, generator=_is_generator)
        place = torch.rand(n, generator=generator, dtype=torch.float64, device="cpu") * (len(self.s) - 1)
        drawn = np.interp(place.numpy(), np.arange(len(self.s)), self.s.log().numpy())
        return torch.from_numpy(np.exp(drawn)).to(device, torch.float32)

    def density(self, s: Tensor) -> Tensor:
        """The density of `draw` in ``log s``, shaped as ``s``: ``1 / ((N - 1) * width of the cell)``; 0 outside."""
        validate.tensor("s", s)
        logs = self.s.log().flip(0)
        values = s.detach().cpu().double().log()
        cell = torch.searchsorted(logs, values.contiguous(), right=True).clamp(1, len(logs) - 1)
        inside = (values >= logs[0]) & (values <= logs[-1])
        density = 1 / ((len(logs) - 1) * (logs[cell] - logs[cell - 1]))
        return torch.where(inside, density, 0.0).to(widest_dtype(s.device)).to(s.device)

    def observe(self, costs: Tensor, intervals: Tensor | None = None) -> None:
        """Add estimates of incremental costs on the current grid; `update` uses their mean.

        Args:
            costs: ``L(s_i, s_{i+1})`` for every interval [N-1], or single estimates [m] for some.
            intervals: The interval of each estimate, [m] int64; None for all intervals in order.

        Raises:
            ValueError: If a shape or index does not match the grid, or a cost or a sum of costs is NaN or inf.
        """
        validate.arguments(locals(), costs=validate.tensor, intervals=validate.optional(_is_index))
        values = costs.detach().cpu().double().flatten()
        if not bool(torch.isfinite(values).all()):
            raise ValueError("costs must be finite, got NaN or inf; skip such a batch")
        places = (
            torch.arange(len(self._sums), device="cpu") if intervals is None else intervals.detach().cpu().flatten()
        )
        if places.shape != values.shape:
            raise ValueError(f"costs must have one value for each of {len(places)} intervals, got {len(values)}")
        if len(places) and not 0 <= int(places.min()) <= int(places.max()) < len(self._sums):
            raise ValueError(f"intervals must be within [0, {len(self._sums) - 1}], got {places.tolist()}")
        # New tensors, because tensors made in inference mode cannot be written outside of it.
        sums = self._sums.index_add(0, places, values)
        if not bool(sums.isfinite().all()):
            raise ValueError("costs must have finite sums, but with the earlier ones they overflow float64")
        self._sums = sums
        self._counts = self._counts.index_add(0, places, torch.ones_like(values))

    @torch.no_grad()
    def observe_denoiser(
        self, denoise: Callable[[Tensor, Tensor], Tensor], clean: Tensor, *, generator: torch.Generator | None = None
    ) -> int:
        """Estimate corrector costs on a batch of data: ``s_i^2 ||score_{i+1}(z) - score_i(z)||^2``, ``z ~ p_i``.

        Each sample gives an estimate for one random interval; all intervals come up equally often. Takes two
        evaluations per sample, without gradients, and leaves the network's buffers as they are. The first time a third
        one checks that the answer for a sample does not follow another sample's level, as of a network that uses
        ``s[0]`` for all. Warns if it does, and if the network draws random numbers.

        Args:
            denoise: ``denoise(z, s) -> x0`` for states ``z = x0 + s eps`` [B, *shape] and levels [B], such as a
                `Denoiser`. Put the network in evaluation mode if it has dropout. Combine its output with ``z`` in
                float32: an ``x0`` rounded to 16 bits is too coarse at low levels.
            clean: Data, [B, *shape]; ``z`` has their dtype, and the levels at least float32.
            generator: A random generator on the CPU, for the noise and the intervals.

        Returns:
            The number of evaluations; a batch of B counts as B.

        Raises:
            TypeError: If the denoiser returns no floating-point tensor.
            ValueError: If ``clean`` holds no data, NaN or inf, or the denoiser returns another shape, NaN or inf.
        """
        validate.arguments(locals(), denoise=_is_denoise, clean=validate.tensor, generator=_is_generator)
        if clean.ndim < 2 or clean.numel() == 0:
            raise ValueError(f"clean must hold at least one sample, [B, *shape], got shape {tuple(clean.shape)}")
        count, cells = len(clean), len(self._sums)
        # Permutations instead of independent draws, so that no interval waits long for an observation.
        rounds = [torch.randperm(cells, generator=generator, device="cpu") for _ in range(-(-count // cells))]
        intervals = torch.cat(rounds)[:count]
        # In 16 bits, neighbouring levels and the differences of answers round away; only the network sees such states.
        dtype = torch.promote_types(clean.dtype, torch.float32)
        noise = torch.randn(clean.shape, generator=generator, dtype=dtype, device="cpu").to(clean.device)
        # A network with integer timesteps is asked at the nearest of its levels, so its scores are those of that level.
        levels = denoise.process.nearest(self.s) if isinstance(denoise, Denoiser) else self.s
        s_from, s_to = levels[intervals], levels[intervals + 1]
        wide = lambda values: values.to(noise).reshape(-1, *[1] * (clean.ndim - 1))
        z = (clean + wide(s_from) * noise).to(clean.dtype)
        # A network may write into its input, and return the same buffer every time.
        with unchanged_buffers(denoise), warned_of_draws(denoise, clean.device, _RANDOM):
            asked = [(s, partial(denoise, z.clone(), s.to(noise))) for s in (s_from, s_to)]
            answers = [checked_call(ask, z, s, z.dtype).clone() for s, ask in asked]
            checks = self._warn_of_shared_levels(denoise, z, s_from.to(noise), answers[0])
        scores = [(x0.to(dtype) - z) / wide(s).square() for x0, s in zip(answers, (s_from, s_to), strict=True)]
        squares = in_float64((scores[1] - scores[0]).flatten(1)).square().sum(1)
        costs = squares.cpu() * s_from.square()
        if not bool(costs.isfinite().all()):
            raise ValueError(f"{_cause_of_infinity(clean, z, answers, (s_from, s_to))}; skip such a batch")
        self.observe(costs, intervals)
        self._warn_of_noise(answers[0].to(noise), noise, wide(s_from), s_from)
        rounding = stored_squares(answers[1]) * s_from.square() / s_to.pow(4)
        self._rounding = self._rounding.index_add(0, intervals, rounding)
        return (2 + checks) * count

    def _warn_of_shared_levels(
        self, denoise: Callable[[Tensor, Tensor], Tensor], z: Tensor, s: Tensor, x0: Tensor
    ) -> int:
        """Warn, once, if answers ``x0`` at levels ``s`` follow the levels of other samples; returns the calls made."""
        if self._checked or len(z) == 1 or active_training_layer(denoise) is not None:
            return 0
        self._checked = True
        other, state, half = s.clone(), random_state(z.device), (len(z) + 1) // 2
        # To the end that is further from the first level; all to one end, so that their mean moves too.
        other[:half] = self.s[0] if s[0].square() < self.s[0] * self.s[-1] else self.s[-1]
        moved = checked_call(partial(denoise, z.clone(), other), z, other, z.dtype)
        before, after = in_float64(x0[half:]), in_float64(moved[half:])
        random = not torch.equal(state, random_state(z.device))
        if not random and float((after - before).norm()) > SHARED * float(before.norm()):
            validate.warn(
                "denoise must use the level of each sample: its answers for some samples changed with those of the "
                "others (does it use s[0] for all, or mix the samples of a batch?); the estimated costs are wrong"
            )
        return 1

    def _warn_of_noise(self, answers: Tensor, noise: Tensor, column: Tensor, s: Tensor) -> None:
        """Warn, once, if the answers at the highest of the levels ``s`` are the noise, or the score."""
        high = s >= HIGH_LEVELS * s.max()
        if self._warned_of_noise or float(s[high].max()) < LEVEL_SPAN * float(s[high].min()):
            return
        high = high.to(noise.device)
        allowed = NEAR_NOISE * noise[high].square().flatten(1).sum(1)
        for what, scaled in (("the noise", answers), ("the score", -column * answers)):
            distance = (scaled - noise)[high].square().flatten(1).sum(1)
            if bool((distance < allowed).all()):
                self._warned_of_noise = True
                validate.warn(
                    f"denoise must return x0, but its answers are nearly {what}, and the estimated costs wrong: pass a "
                    "Denoiser, such as Denoiser.from_epsilon or from_score makes"
                )

    @property
    def variation(self) -> float:
        """Coefficient of variation of the observed costs over the intervals; NaN while an interval has none.

        Uses the observations of this process since the last update.
        """
        return variation(self._sums / self._counts)

    def update(self) -> bool:
        """Move the grid and clear the observations. Collective: every rank of a distributed run must call it.

        Warns if an ``x0`` that was rounded to 16 bits is too coarse for the costs.

        Returns:
            Whether the grid moved. It does not move while an interval has no observation (the observations are kept),
            if all costs are 0 or negative, or if levels would meet because one interval has nearly all of the cost.

        Raises:
            ValueError: If grid, rate or order are not the same on all ranks, as when only some of them loaded a state.
        """
        _check_same_grid([len(self.s), self.rate, self.order, float(self.s.log().square().sum())], self.group)
        sums, counts = _reduced(torch.stack([self._sums, self._counts]), "SUM", self.group)
        if not bool((counts > 0).all()):
            return False
        lengths = (sums / counts).clamp_min(0.0).pow(1 / self.order)
        seen = self._counts.clamp_min(1)  # by this rank
        warn_of_rounded_costs(self._sums / seen, self._rounding / seen, self.order)
        self._clear()
        if float(lengths.sum()) == 0.0:  # no estimate is positive, so equal lengths are not defined
            return False
        moved = moved_to_equal_arc_length(self.s, lengths, self.rate)
        if not bool((moved[1:] < (1 - LEAST_GAP) * moved[:-1]).all()):
            return False
        self.s = moved
        self.updates += 1
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> AdaptiveSchedule:
        """A copy in the same group, which itself cannot be copied."""
        copied = copy.copy(self)
        others = {name: value for name, value in vars(self).items() if name != "group"}
        vars(copied).update(copy.deepcopy(others, memo))
        return copied

    def state_dict(self) -> dict[str, Any]:
        """The complete state as tensors and numbers, to resume training from."""
        return {
            "s": self.s.clone(),
            "rate": self.rate,
            "order": self.order,
            "updates": self.updates,
            "sums": self._sums.clone(),
            "counts": self._counts.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. In a distributed run load the same state on every rank.

        Raises:
            TypeError: If ``state`` is not a mapping, or an entry has the wrong type.
            ValueError: If an entry is missing, out of range or of the wrong size.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be what state_dict() returned, got {validate.shown(state)}")
        try:
            fresh = AdaptiveSchedule(state["s"], rate=state["rate"], order=state["order"])
            sums, counts = (validate.float64(f"state[{name!r}]", state[name]) for name in ("sums", "counts"))
            updates = validate.positive_int("state['updates']", state["updates"], minimum=0)
        except KeyError as error:
            raise ValueError(f"state lacks the entry {error}; pass what state_dict() returned") from None
        if sums.shape != fresh._sums.shape or counts.shape != fresh._sums.shape:
            shapes = f"{tuple(sums.shape)} and {tuple(counts.shape)}"
            raise ValueError(f"state must hold sums and counts of {len(fresh._sums)} intervals, got shapes {shapes}")
        if not bool(sums.isfinite().all()) or not bool((counts.isfinite() & (counts >= 0)).all()):
            raise ValueError("state must hold finite sums, and finite counts of at least 0")
        if bool((sums[counts == 0] != 0).any()):
            raise ValueError("state must hold a count of at least 1 for every interval whose sum is not 0")
        self.s, self.rate, self.order, self.updates = fresh.s, fresh.rate, fresh.order, updates
        self._sums, self._counts, self._rounding = sums.clone(), counts.clone(), torch.zeros_like(sums)


def _grid(levels: object) -> Tensor:
    s = validate.descending_sigmas("s", levels)
    low, high = float(s[-1]), float(s[0])
    if low <= 0 or math.isinf(high):
        hint = "; leave out the 0 at the end of a schedule by s[:-1]" if low == 0 else ""
        raise ValueError(f"s must be levels above 0 and below infinity, got {high:g} to {low:g}{hint}")
    if not SMALLEST_LEVEL <= low < high <= LARGEST_SIGMA:
        raise ValueError(
            f"s must be levels within {SMALLEST_LEVEL:g} and {LARGEST_SIGMA:g}, as training draws float32 numbers, "
            f"got {high:g} to {low:g}"
        )
    return s


def _rate(value: object) -> float:
    rate = validate.real("rate", value)
    if not 0 < rate <= 1:
        raise ValueError(f"rate must be within (0, 1], got {rate!r}")
    return rate


#: What is set on an `AdaptiveSchedule` only after a check.
_CHECKED: dict[str, Callable[[object], Any]] = {
    "s": _grid,
    "rate": _rate,
    "order": partial(validate.positive_int, "order"),
}


def _cause_of_infinity(clean: Tensor, z: Tensor, answers: Sequence[Tensor], levels: Sequence[Tensor]) -> str:
    """Why costs from these data, states and answers at two levels each are NaN or inf."""
    if not bool(clean.isfinite().all()):
        return "clean must be finite, but holds NaN or inf"
    if not bool(z.isfinite().all()):
        return f"clean must be of a size that {clean.dtype} can hold with noise added, or in float32, but z is infinite"
    for x0, s in zip(answers, levels, strict=True):
        bad = (~x0.flatten(1).isfinite().all(1)).nonzero()
        if len(bad):
            return f"denoise returned NaN or inf, first at s = {float(s[int(bad[0])]):g}"
    return "denoise returned numbers so large that the squares of their differences overflow"


def _is_denoise(name: str, value: object) -> None:
    """Check a function; methods of a `Denoiser` take other states than it does."""
    validate.function(name, value)
    owner = getattr(value, "__self__", None)
    if isinstance(owner, Denoiser) and value != owner.__call__:
        raise TypeError(f"{name} must be the Denoiser itself, as its methods take other states, got {value}")


def _is_generator(name: str, value: object) -> None:
    if value is not None and not (isinstance(value, torch.Generator) and value.device.type == "cpu"):
        raise TypeError(f"{name} must be a torch.Generator on the CPU, got {validate.shown(value)}")


def _is_index(name: str, value: object) -> None:
    if not isinstance(value, Tensor) or value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be a tensor of whole numbers, got {validate.shown(value)}")


def _check_same_grid(numbers: list[float], group: Any) -> None:
    """ValueError on all ranks of a distributed run unless they have the same ``numbers``, up to rounding."""
    own = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    largest, negated_least = _reduced(torch.stack([own, -own]), "MAX", group)
    if not torch.allclose(largest, -negated_least, rtol=1e-6, atol=0.0):  # processors round logarithms differently
        raise ValueError(
            "the grid, rate and order of an AdaptiveSchedule must be the same on all ranks; load the same state on all"
        )


def _reduced(values: Tensor, operation: str, group: Any) -> Tensor:
    """``values`` reduced over the ranks of a distributed run by "SUM" or "MAX"; as they are without one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    found = values.to(_device_of(group), copy=True)
    torch.distributed.all_reduce(found, getattr(torch.distributed.ReduceOp, operation), group=group)
    return found.cpu()


def _device_of(group: Any) -> torch.device:
    """A device whose tensors the group's backend can reduce: the CPU, or else this process's accelerator."""
    backends = torch.distributed.get_backend_config(group)  # as "cpu:gloo,cuda:nccl"
    if any(pair.startswith("cpu:") for pair in backends.split(",")):
        return torch.device("cpu")
    kind = backends.split(":")[0]
    return torch.device(kind, getattr(torch, kind).current_device())
