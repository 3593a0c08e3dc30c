"""Odd arguments of every public function: taken, or refused by an error that names the argument."""

import contextlib
import inspect
import math
import os
import tempfile
import warnings

import numpy as np
import pytest
import torch
from fuzz.amounts import of_all
from hypothesis import given
from hypothesis import strategies as st
from test_arguments import RIGHT, cost, denoiser, reference, schedule, stats

import fastsched as fs

#: Whole numbers that make no long work, or are out of every range.
WHOLE = st.integers(-3, 4) | st.sampled_from([2**31, -(2**31), 2**63, 2**64, 10**30, -(10**400)])
REAL = st.floats(width=64) | st.sampled_from([0.0, -0.0, math.inf, math.nan, 1e308, 5e-324, 0.1, 1.0, 7.5])
NUMBER = WHOLE | REAL
SIMPLE = st.none() | st.booleans() | NUMBER | st.text(max_size=6) | st.binary(max_size=6) | st.complex_numbers()
NAMED = st.sampled_from(
    ["ddim", "DPM++ 2M", "euler", "dpmpp_2m", "ancestral", "fitted", "karras", "all", "arc_length", "cuda", "cpu",
     "meta", "noisier", "flow", "vp", "float32", "sd15"]
)  # fmt: skip
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool])
SHAPES = st.lists(st.integers(0, 4), max_size=3)
TENSORS = st.builds(
    lambda shape, dtype, seed: (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 9).to(dtype),
    SHAPES,
    DTYPES | st.just(torch.complex64),
    st.integers(0, 9),
)
ARRAYS = TENSORS.filter(lambda x: x.dtype != torch.bfloat16).map(lambda x: x.numpy())
SORTED = st.lists(REAL, max_size=6).map(lambda values: sorted(values, reverse=True))
LISTS = st.lists(SIMPLE, max_size=4) | st.lists(NUMBER, max_size=6) | SORTED | SHAPES.map(tuple)
OBJECTS = st.sampled_from(
    [object(), iter(()), torch.device("cpu"), torch.Generator(), np.float32(1.5), np.int64(3),
     np.nan, torch.nn.Identity(), os.curdir, ..., range(3), slice(3), NotImplemented, math]
)  # fmt: skip
OURS = st.sampled_from([denoiser, stats, schedule, cost, reference]).map(lambda make: make())
MAPPINGS = st.dictionaries(st.text(max_size=3) | NUMBER, LISTS | TENSORS | OURS | SIMPLE, max_size=2)
ANYTHING = SIMPLE | NAMED | DTYPES | TENSORS | ARRAYS | LISTS | SORTED.map(torch.tensor) | OBJECTS | OURS | MAPPINGS


class Called(Exception):
    """The network was called: the arguments were taken."""


@pytest.fixture(scope="module", autouse=True)
def no_calls():
    for make in (denoiser, stats, schedule, cost, reference):
        make()

    def called(*_, **__):
        raise Called

    before, fs.Denoiser.borrowed_output = fs.Denoiser.borrowed_output, called
    yield
    fs.Denoiser.borrowed_output = before


@pytest.fixture(scope="module", autouse=True)
def in_a_folder_of_its_own():
    """Paths are arguments too."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        yield
        os.chdir(before)


@st.composite
def calls(draw):
    name = draw(st.sampled_from(sorted(RIGHT)))
    parameters = list(inspect.signature(RIGHT[name][0]).parameters)
    odd = draw(st.lists(st.sampled_from(parameters), min_size=1, max_size=2, unique=True))
    return name, {argument: draw(ANYTHING) for argument in odd}


@of_all(0.42)
@given(calls())
def test_odd_arguments_are_taken_or_named(call):
    name, odd = call
    function, right = RIGHT[name]
    problem = None
    try:
        with warnings.catch_warnings(), contextlib.suppress(Called):
            warnings.simplefilter("ignore")
            function(**{**right(), **odd, **quiet(function)})
    except (TypeError, ValueError, OSError) as error:
        named = any(argument in str(error) for argument in inspect.signature(function).parameters)
        a_file = isinstance(error, OSError) or "path" in odd
        problem = None if named or a_file else error
    except Exception as error:
        problem = error
    if problem is not None:
        told(name, odd, problem)


def quiet(function):
    """No progress bars."""
    return {"progress": False} if "progress" in inspect.signature(function).parameters else {}


def told(name, odd, error):
    arguments = ", ".join(f"{argument}={value!r}" for argument, value in odd.items())
    program = f"{'fs.' if name[0].islower() or '.' in name else ''}{name}({arguments})"
    pytest.fail(
        f"{type(error).__name__}: {error}\n--- program (the other arguments are right)\n{program}", pytrace=False
    )
