"""Warnings point at the line of the user's own code, however deep in the package they are made."""

import warnings

import pytest
import torch

import fastsched as fs

MIXTURE, OTHER = (
    fs.Denoiser.from_denoiser(fs.oracles.GaussianMixture.random(4, 3, seed=seed).denoise, 0.01, 10.0) for seed in (0, 1)
)


def of_measure():
    fs.measure(MIXTURE, (4,), levels=torch.linspace(3.0, 0.5, 8), samples=1, progress=False)


def of_compare():  # within a decorator of torch
    reference = fs.converged_reference(OTHER, (4,), samples=2, steps=8, progress=False)
    fs.compare(MIXTURE, {"a": [10.0, 1.0, 0.0]}, "ddim", reference=reference, progress=False)


def of_export():
    pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")
    from diffusers import EulerDiscreteScheduler

    fs.Schedule([10.0, 1.0, 0.0], "ddim", "vp").to_diffusers(EulerDiscreteScheduler())


@pytest.mark.parametrize(
    ("warns", "words"),
    [(of_measure, "the levels end at"), (of_compare, "made with another network"), (of_export, "export")],
)
def test_a_warning_is_of_the_line_that_called_the_package(warns, words):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warns()
    assert [each.filename for each in found if words in str(each.message)] == [__file__]
