"""Decoupled levels: what the network is told, and unknowns that are found again."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import fastsched as fs
from benchmarks.quality.decoupled import Decoupled, Unknowns, optimised
from benchmarks.quality.models import digits, digits_vp


@pytest.mark.parametrize("model", [digits, digits_vp])
def test_only_what_the_network_is_told_moves(model):
    denoiser, shape = model().denoiser, model().shape
    told, seen = [], []

    def network(x, condition):
        seen.append(x.clone())
        told.append(float(condition[0]))
        return denoiser.network(x, condition)

    values = {"process": denoiser.process, "prediction": denoiser.prediction, "sigma_data": denoiser.sigma_data}
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    plain = fs.Denoiser(network, **values).denoise(noise, 3.0)
    offset = Decoupled(network, **values, offsets=iter([0.3])).denoise(noise, 3.0)
    asked = fs.Denoiser(network, **values)
    asked.denoise(noise, 3.0 * math.exp(0.3))
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-6, atol=1e-6)
    assert told[1] == pytest.approx(told[2], rel=1e-6)
    a, c = denoiser.coefficients(torch.tensor(3.0, dtype=torch.float64))
    answer = denoiser.network(seen[0], torch.full((2,), told[1]))
    x = noise * float(denoiser.process.sigma(torch.tensor(3.0, dtype=torch.float64)))
    torch.testing.assert_close(offset, float(a) * x + float(c) * answer, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(offset, plain, atol=1e-3)


def test_offsets_that_were_put_in_are_taken_out_again():
    """The sampler's ends without offsets are what is aimed at; with offsets to begin with, they have to be undone."""
    denoiser, shape = digits().denoiser, digits().shape
    steps = 4
    levels = fs.baselines.exponential(steps, 0.05, 20.0)[:-1].log().numpy()
    truth = Unknowns(levels, np.zeros(steps), None)
    reference = fs.converged_reference(denoiser, shape, samples=4, steps=4, progress=False)
    reference = replace(reference, ends=truth.sample(denoiser, "ddim", reference.noise) + 1e-3)
    torch.testing.assert_close(
        truth.sample(denoiser, "ddim", reference.noise),
        fs.sample(denoiser, np.append(np.exp(levels), 0.0).tolist(), "ddim", reference.noise),
    )
    start = replace(truth, offsets=np.array([0.0, 0.1, -0.1, 0.05]))
    found, runs = optimised(start, ("offsets",), denoiser, "ddim", reference, 8)
    assert 0 < runs <= 1 + 8 * (steps + 4)
    np.testing.assert_allclose(found.offsets[1:], 0.0, atol=0.02)
