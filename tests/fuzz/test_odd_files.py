"""Damaged and made-up files: read as they were written, or refused by an error that names the file."""

import copy
import functools
import json
import math
import os
import tempfile

import pytest
import torch
from fuzz.amounts import of_all
from hypothesis import given
from hypothesis import strategies as st
from models import exact_denoiser, mixture
from safetensors.torch import save

import fastsched as fs
from fastsched.fitting.rollouts import Rollout
from fastsched.fitting.run_log import RunLog
from fastsched.measurement import statistics_files
from fastsched.sampling import schedule_files


@functools.cache
def stats():
    denoiser = exact_denoiser(mixture(d=2), 0.02, 20.0)
    return fs.measure(denoiser, (2,), levels=5, samples=2, progress=False)


@functools.cache
def originals():
    """Every kind of file: its bytes, and what reads it."""
    fitted = fs.optimal_schedule(stats(), 3, "fitted")
    timed = fs.Schedule([10.0, 1.0, 0.0], "dpmpp_2m", "vp", timesteps=[900.0, 100.5], predicted_error=0.25)
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for name, thing, load in (
            ("statistics", stats(), fs.PathStatistics.load),
            ("schedule", timed, fs.Schedule.load),
            ("fitted schedule", fitted, fs.Schedule.load),
        ):
            path = os.path.join(folder, name)
            thing.save(path)
            with open(path, "rb") as file:
                found[name] = file.read(), load
        return found


def equal(one, other):
    for field in vars(one):
        left, right = getattr(one, field), getattr(other, field)
        same = (
            torch.equal(left, right)
            if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor)
            else left == right
        )
        if not same:
            return False
    return True


def read(load, content):
    """What a file of these bytes holds; None if it is refused by an error that names the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "odd file")
        with open(path, "wb") as file:
            file.write(content)
        try:
            return load(path)
        except ValueError as error:
            if "odd file" not in str(error) or len(str(error)) > 1000:
                told(content, error)
        except Exception as error:
            told(content, error)
    return None


def told(content, why):
    shown = repr(content) if len(content) < 3000 else f"{content[:3000]!r}..."
    pytest.fail(f"{type(why).__name__}: {str(why)[:2000]}\n--- the file\n{shown}", pytrace=False)


@pytest.mark.parametrize("name", ["schedule", "fitted schedule"])
def test_every_flipped_bit_is_refused(name):
    """But for those in a last digit that leave the number as it is."""
    content, load = originals()[name]
    for position in range(len(content)):
        for bit in range(8) if name == "schedule" else [position % 8]:
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            if read(load, bytes(damaged)) is not None and json.loads(damaged) != json.loads(content):
                told(bytes(damaged), ValueError(f"bit {bit} of byte {position} was flipped, and nobody noticed"))


def load_bytes(load, content):
    found = read(load, content)
    assert found is not None
    return found


@st.composite
def damages(draw):
    """A file with a few changes to its bytes."""
    name = draw(st.sampled_from(sorted(originals())))
    content = bytearray(originals()[name][0])
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        to = min(len(content), at + draw(st.integers(0, 40)))
        kind = draw(st.sampled_from(["flip", "cut", "end", "insert", "repeat", "swap", "zero", "mark"]))
        if kind == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del content[at:to]
        elif kind == "end":
            del content[at:]
        elif kind == "insert":
            content[at:at] = draw(
                st.binary(max_size=12) | st.sampled_from([b"1e999", b"NaN", b"[" * 3000, b",", b"\0"])
            )
        elif kind == "repeat":
            content[to:to] = content[at:to]
        elif kind == "swap":
            content[at:to] = content[at:to][::-1]
        elif kind == "zero":
            content[at:to] = bytes(to - at)
        else:
            content[:0] = b"\xef\xbb\xbf"
    return name, bytes(content)


@of_all(0.2)
@given(damages())
def test_damage_is_refused(case):
    name, content = case
    before, load = originals()[name]
    found = read(load, content)
    if found is not None and not equal(found, load_bytes(load, before)):
        told(content, ValueError("was changed, and nobody noticed"))


NUMBERS = st.floats() | st.integers() | st.sampled_from([2**70, -1, 0, 1e-320, 1e308, math.inf, 10**400])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5) | st.sampled_from(["inf", "ddim", "fitted", "vp"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=6,
) | st.lists(st.floats(0, 20), max_size=5).map(lambda values: [*sorted(set(values), reverse=True), 0.0])  # fmt: skip


@st.composite
def schedules(draw):
    """Entries of a schedule file, with a right checksum or none."""
    content, _ = originals()[draw(st.sampled_from(["schedule", "fitted schedule"]))]
    entries = json.loads(content)
    keys = [*entries, "weights", "timesteps", "extra"]
    for key in draw(st.lists(st.sampled_from(keys), min_size=1, max_size=3, unique=True)):
        if draw(st.booleans()):
            entries[key] = draw(VALUES)
        else:
            entries.pop(key, None)
    if draw(st.booleans()):
        entries["sha256"] = schedule_files._checksum(entries)
    else:
        entries.pop("sha256", None)
    return json.dumps(entries).encode()


@of_all(0.08)
@given(schedules())
def test_entries_of_a_schedule_are_checked(content):
    found = read(fs.Schedule.load, content)
    if found is None:
        return
    sigmas = found.sigmas
    if not (bool((sigmas[1:] < sigmas[:-1]).all()) and float(sigmas[-1]) == 0.0 and bool(sigmas[1:].isfinite().all())):
        told(content, ValueError(f"was read as {found}"))
    with tempfile.TemporaryDirectory() as folder:
        found.save(os.path.join(folder, "x"))
        if not equal(fs.Schedule.load(os.path.join(folder, "x")), found):
            told(content, ValueError("is another schedule after it was saved again"))


@st.composite
def statistics(draw):
    """Header and tensors of a statistics file, with a right checksum."""
    content, _ = originals()["statistics"]
    length = int.from_bytes(content[:8], "little")
    header = copy.deepcopy(json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["fastsched"]))
    own = stats()
    tensors = {"s": own.s, "seeds": own.seeds, "gram": own.gram, "ends": own.ends, "fingerprint": own.fingerprint}
    tensors |= {"cross": own.response_cross, "w_squared": own.response_gram}
    for _ in range(draw(st.integers(1, 2))):
        if draw(st.booleans()):
            header[draw(st.sampled_from([*header, "sensitivity", "extra"]))] = draw(VALUES)
            continue
        name = draw(st.sampled_from(sorted(tensors)))
        change = draw(st.sampled_from(["drop", "dtype", "shape", "value", "sign", "rows", "order"]))
        tensors[name] = changed(
            tensors.get(name), change, draw(st.sampled_from([0.0, -1.0, math.nan, math.inf, 1e300]))
        )
    tensors = {key: value.contiguous().clone() for key, value in tensors.items() if value is not None}
    header["sha256"] = statistics_files._checksum(header, tensors)
    return save(tensors, metadata={"fastsched": json.dumps(header)})


def changed(tensor, change, value):
    if tensor is None or change == "drop":
        return None
    if change == "dtype":
        return tensor.to(torch.float16 if tensor.dtype != torch.float16 else torch.int32)
    if change == "shape":
        return tensor[None]
    if change == "rows":
        return tensor[:-1]
    if change == "sign":
        return -tensor
    if change == "order":
        return tensor.flip(-1)
    new = tensor.clone().flatten()
    if new.numel():
        new[0] = torch.tensor(value).to(new.dtype) if new.is_floating_point() else -3
    return new.reshape(tensor.shape)


@of_all(0.06)
@given(statistics())
def test_entries_of_statistics_are_checked(content):
    found = read(fs.PathStatistics.load, content)
    if found is None:
        return
    schedule = fs.optimal_schedule(found, 2, "ddim")
    if not bool((schedule.sigmas[1:] < schedule.sigmas[:-1]).all()) or not math.isfinite(schedule.predicted_error):
        told(content, ValueError(f"was read as {found}, which gives {schedule}"))


@of_all(0.02)
@given(at=st.integers(0, 5000), bit=st.integers(0, 7), cut=st.booleans())
def test_runs_of_a_fit_are_never_wrong(at, bit, cut):
    what, made = {"format": "fastsched.runs", "version": 1}, Rollout(torch.ones(2, 3))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "odd file")
        for top in (3.0, 4.0, 5.0):
            RunLog(path, what).run(fs.Schedule([top, 1.0, 0.0], "ddim"), 0, 2, lambda: made)
        with open(path, "rb") as file:
            content = bytearray(file.read())
        at %= len(content)
        if cut:
            del content[at:]
        else:
            content[at] ^= 1 << bit
        with open(path, "wb") as file:
            file.write(content)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *_, **__: None)
            try:
                log = RunLog(path, what)
            except ValueError as error:
                if "odd file" not in str(error):
                    raise
                return
            for top in (3.0, 4.0, 5.0):
                found = log.run(fs.Schedule([top, 1.0, 0.0], "ddim"), 0, 2, lambda: made)
                assert torch.equal(found.ends, made.ends)
