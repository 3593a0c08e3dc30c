"""Compare the steps of a watched pipeline (`fastsched.diffusers.watching`), which may differ only in latents and level.

* A value that does not depend on the latents may depend only on the level, so it must be equal at two visits of a
  level. Such values are equal at the first two steps, which have the same level and unrelated latents.
* Numbers and flags such as ``conditioning_scale`` or ``_guidance_scale``, tensors that are equal at the first two
  levels (embeddings), and the networks' weights, buffers and settings must be equal at every step.
* If the pipeline's output is a linear combination of the networks' outputs (guidance), its coefficients must be equal
  at two visits of a level.

A noise level may start or end guidance or a prompt. That looks like a window of steps until its levels are visited
again, so a measurement lets arguments change along its reference path, and compares them at the second visits. It finds
between which levels they change, and runs, which visit no level twice, may differ there only.

A network that is first called at a later step (the second of two used in turn) is compared from that step on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from fastsched import validate
from fastsched.denoisers.deferred_checks import DeferredChecks
from fastsched.diffusers.watching.formula import NOT_LINEAR, Formula
from fastsched.diffusers.watching.network_facts import progresses
from fastsched.diffusers.watching.step_checks import UNALIKE
from fastsched.diffusers.watching.watch import SeenStep, is_number, observed
from fastsched.measurement.deviated_paths import asked_levels

#: A step that runs less than this fraction of the layers that another step runs is taken to reuse earlier results.
FEWER_LAYERS = 0.8


class Consistency:
    """Compares the steps of a measurement or a run; the errors say what changed.

    Args:
        levels: The number of levels of a measurement; 0 for a run.
        changes: For a run, whether arguments may change at the step with this number.
    """

    def __init__(self, levels: int = 0, changes: Callable[[int], bool] = lambda index: False) -> None:
        self._levels, self._may_change = levels, changes
        self._changed: dict[str, list[tuple[int, str]]] = {}
        self._steps: dict[int, SeenStep] = {}
        self._visits: dict[int, int] = {}  # the first step at each level
        self._formulas: dict[int, Formula | None] = {}
        self._fixed: set[str] = set()
        self._constant: dict[str, Any] = {}
        self._late: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        self._layers: dict[tuple[str, int], tuple[int, int]] = {}

    def note(self, index: int, level: int, seen: SeenStep, output: Tensor, deferred: DeferredChecks) -> None:
        """`check` a step in which the scheduler was given ``output``, when ``deferred`` is run: then a ValueError."""
        found, resolve = observed(seen, output)

        def check(values: Tensor) -> None:
            wrong = self.check(index, level, *resolve(values))
            if wrong is not None:
                raise ValueError(f"{wrong}; {UNALIKE}")

        deferred.add(found, check)

    def check(self, index: int, level: int, step: SeenStep, formula: Formula | None) -> str | None:
        """What is wrong with step ``index``, at the level with the index ``level``; None if nothing is.

        Steps must be checked in order, each as `observed` returns it.
        """
        self._steps[index], self._formulas[index] = step, formula
        if index == 0:
            self._skipped_layers(index, step)
            return None
        if index == 1:
            wrong = self._unlike(0, 1)
            if wrong is not None:
                return wrong
            before = self._steps[0].facts
            self._fixed = {name for name, fact in step.facts.items() if name in before and before[name] == fact}
        if index == 2:
            first = self._steps[1].facts
            self._constant = {
                name: first[name]
                for name in self._fixed
                if is_number(first[name]) or step.facts.get(name) == first[name]
            }
        wrong = (
            self._changed_early(index, step)
            or self._changed_late(index, step)
            or self._changed_constant(index, level, step)
            or self._skipped_layers(index, step)
            or (self._unconfirmed() if index == self._levels else None)
        )
        if wrong is None and level in self._visits:
            wrong = self._unlike(self._visits[level], index)
        elif wrong is None and level == index - 1:
            wrong = self._changed_first(index, level)
        self._visits.setdefault(level, index)
        return wrong

    def _changed_first(self, index: int, level: int) -> str | None:
        """What changed after the first or second level. They get no second visit, so consecutive steps are compared.

        A formula that keeps changing, as with guidance of bounded size, depends on the level or the latents: no error.
        """
        before, step = self._steps[index - 1], self._steps[index]
        same = before.calls.keys() == step.calls.keys()
        if level in (1, 2) and same and before.calls != step.calls:
            return f"at step {index}, the networks were called {dict(step.calls)} times, not {dict(before.calls)}"
        known, found, last = (self._formulas.get(n) for n in (index - 2, index - 1, index))
        if level > 3 or found is None or last is None:
            return None
        if (found.size == 0) != (last.size == 0):
            return f"at step {index}, {_difference(found, last)} than at step {index - 1}"
        if known is None or not last.explains(found) or not found.contradicts(known):
            return None
        return (
            f"at step {index - 1}, {_difference(known, found)} than at step {index - 2} (if a noise level ends a "
            "part of guidance so early, as a large pag_adaptive_scale does, more levels show it)"
        )

    def _other_formula(self, earlier: int, index: int) -> str | None:
        """What is wrong with the formula of step ``index``, at the same level as step ``earlier``; None if nothing is.

        Coefficients that may depend on the latents are wrong only if they are settled at both steps (`_settled`).
        """
        known, found = (self._formulas.get(n) for n in (earlier, index))
        if known is None or found is None or not found.contradicts(known):
            return None
        settled = all(self._settled(n) for n in (earlier, index))
        return _difference(known, found) if settled or not found.may_follow(known) else None

    def _settled(self, index: int) -> bool:
        """Whether the formula of a step equals that of the step before, which is at another level."""
        before, found = (self._formulas.get(n) for n in (index - 1, index))
        return before is not None and found is not None and index > 1 and found.explains(before, factor=2.0)

    def _changed_early(self, index: int, step: SeenStep) -> str | None:
        """What differed at step 0, or at steps 0 and 1, from two equal values at the next two steps, if anything.

        Or only at step 1: a value that follows the latents would not be at step 2 what it was at step 0.
        """
        if index not in (2, 3):
            return None
        formula = self._formulas[index - 1]
        if formula is not None and formula.size == 0:  # an output of 0: the latents are those of the step before
            return None
        if index == 3 and self._may_change(2):
            return None
        before, first = self._steps[index - 2].facts, self._steps[index - 1].facts
        names = first if index == 2 else self._fixed
        for name in sorted(names, key=lambda name: (not is_number(first.get(name)), name)):  # a mode says more
            if progresses(name) or not _applies_to(name, step) or before.get(name, ...) == first.get(name, ...):
                continue
            if name not in before and _holder(name)[0] == "pipe":  # a callback made it, such as a progress mark
                continue
            now = step.facts.get(name, ...)  # or absent
            if now == first.get(name, ...):
                return f"at step {index - 2}, {_shown(name)} was different from that at all later steps"
            if index == 2 and now == before.get(name, ...):
                return f"at step 1, {_shown(name)} was different from that at the steps before and after"
        return None

    def _changed_late(self, index: int, step: SeenStep) -> str | None:
        """What differed only at the first step of a network that was not called at step 1; None if nothing did.

        A value that is equal at its first two steps must be constant from then on.
        """
        for holder in step.calls.keys() - self._steps[1].calls.keys():
            seen = self._late.setdefault(holder, [])
            if len(seen) == 3:
                continue
            now = {name: fact for name, fact in step.facts.items() if _holder(name)[0] == holder}
            seen.append((index, now))
            same = {name for name, fact in now.items() if len(seen) > 1 and seen[-2][1].get(name, ...) == fact}
            if len(seen) == 2:
                self._constant |= {name: now[name] for name in same}
            start, first = seen[0]
            for name in sorted(same):
                if len(seen) == 3 and not progresses(name) and first.get(name, ...) != now[name]:
                    return f"at step {start}, {_shown(name)} was different from that at all later steps"
        return None

    def _changed_constant(self, index: int, level: int, step: SeenStep) -> str | None:
        for name, value in sorted(self._constant.items()):
            given = step.facts.get(name, ...)
            if given == value or progresses(name) or not _applies_to(name, step):
                continue
            inner = any(word in name for word in (".settings", ".weights"))  # hashes, and no arguments
            detail = f": {given!r} instead of {value!r}" if is_number(value) and is_number(given) and not inner else ""
            changed = f"{_shown(name)} was different from that at the first step{detail}"
            if inner or name not in self._fixed:
                return f"at step {index}, {changed}"
            if level in self._visits:
                continue  # it must be equal to that at the first visit
            if not (index <= self._levels or self._may_change(index)):
                return f"at step {index}, {changed}"
            self._constant[name] = given
            self._changed.setdefault(name, []).append((level, changed))
        return None

    def changes(self, s: Sequence[float]) -> tuple[tuple[float, float], ...]:
        """The pairs of neighbouring levels, of those ``s`` of the measurement, between which arguments changed."""
        changed = {level for found in self._changed.values() for level, _ in found}
        return tuple((s[level - 1], s[level]) for level in sorted(changed))

    def constants(self) -> dict[str, Any]:
        """The arguments of networks that do not follow the level, at least not at the first three steps."""
        facts = [self._steps[index].facts if index in self._steps else {} for index in (1, 2)]
        return {name: facts[0][name] for name in self._fixed if "#" in name and facts[0][name] == facts[1].get(name)}

    def _unconfirmed(self) -> str | None:
        """What changed between levels so that no level from one change to the next is visited again, if anything."""
        asked = {*asked_levels(self._levels)}
        for _, found in sorted(self._changed.items()):
            borders = [0, *(level for level, _ in found), self._levels]
            if not all(asked & {*range(*pair)} for pair in pairwise(borders)):
                return (
                    f"at step {found[0][0] + 1}, {found[0][1]} (if a noise level starts or ends that, as Z-Image's "
                    "cfg_truncation does, more levels show it)"
                )
        return None

    def _unlike(self, earlier: int, index: int) -> str | None:
        """What is wrong with step ``index``, at the same level as step ``earlier``; None if nothing is."""
        other, step = self._steps[earlier], self._steps[index]
        # Before step 0 prompts were encoded, by networks that are not called again.
        calls = {name: other.calls[name] for name in step.calls} if earlier == 0 else other.calls
        differing = (name for name in sorted(self._fixed) if other.facts.get(name) != step.facts.get(name))
        if calls != step.calls:
            changed = f"the networks were called {dict(step.calls)} times, not {dict(calls)},"
        elif (name := next(differing, None)) is not None:
            changed = f"{_shown(name)} was different"
        else:
            changed = self._other_formula(earlier, index)
        return changed and f"at step {index}, {changed} than at step {earlier}, at the same timestep"

    def _skipped_layers(self, index: int, step: SeenStep) -> str | None:
        for name, calls in step.calls.items():
            key, layers = (name, calls), step.layers[name]  # 0 if it was called and reused its whole output
            low, high = self._layers.get(key, (layers, layers))
            self._layers[key] = low, high = min(low, layers), max(high, layers)
            if low < FEWER_LAYERS * high:
                other = high + low - layers
                return f"at step {index}, {name} ran {layers} of its layers, and {other} at another step (a cache?)"
        return None


def warn_of_other_call(known: dict[Any, Any], arguments: dict[str, Any], found: dict[str, Any]) -> None:
    """Warn, once, if the `constants` of a pipeline's call differ from those ``known`` of one with the same prompts.

    Samples of another number, as in the last call, are not compared.
    """
    prompts = {name: value for name, value in arguments.items() if "prompt" in name}  # also negative and second ones
    before = known.setdefault(("constants", repr(prompts)), found)
    name = next((name for name, fact in sorted(found.items()) if not _alike(before.get(name, fact), fact)), None)
    if name is not None and not known.get("warned"):
        known["warned"] = True
        validate.warn(
            f"{_shown(name)} was different in another call of the pipeline with the same prompts, so its runs differ "
            "by more than their schedules: does the pipeline keep a state between its calls, draw random numbers that "
            "no seed reaches, or tell its network the number of steps?"
        )


def _alike(one: Any, other: Any) -> bool:
    """Whether two facts, numbers or a tensor's shape and sums, are equal up to rounding, or cannot be compared."""
    if not (isinstance(one, tuple) and isinstance(other, tuple)):
        return one == other
    shape, *sums = one
    size = max(sums[-1], other[-1], 1e-30)
    return shape != other[0] or not any(abs(a - b) > 1e-2 * size for a, b in zip(sums, other[1:], strict=True))


def _difference(known: Formula, found: Formula) -> str:
    if max(found.error, known.error) > NOT_LINEAR:
        return "the networks' outputs were combined in another way (clipped or rescaled at only one of the two)"
    sample = int((found.coefficients - known.coefficients).norm(dim=-1).argmax())
    numbers = [", ".join(f"{x:.3g}" for x in formula.coefficients[sample].tolist()) for formula in (found, known)]
    return f"the networks' outputs were combined with other coefficients ({numbers[0]} instead of {numbers[1]})"


def _shown(name: str) -> str:
    """A fact's name in messages; a network's first call in a step is not counted."""
    return name.replace("#0", "")


def _applies_to(name: str, step: SeenStep) -> bool:
    """Whether a fact belongs to the pipeline, or to a network call that was made in this step."""
    holder, turn = _holder(name)
    return holder == "pipe" or step.calls[holder] > turn


def _holder(name: str) -> tuple[str, int]:
    """The network (or ``pipe``) that a fact belongs to, and the index of the network's call within the step."""
    holder, _, turn = name.split(".")[0].partition("#")
    return holder, int(turn or 0)
