"""Zero terminal SNR: a schedule starts at an infinite sigma, and baselines at the largest finite one."""

import pytest
import torch

import fastsched as fs
from fastsched.cli.comparing import _baselines
from fastsched.denoisers.noise import VariancePreserving


def test_baselines_start_at_the_largest_finite_sigma():
    alphas_cumprod = torch.linspace(0.99, 0.0, 100, dtype=torch.float64)
    process = VariancePreserving(alphas_cumprod)
    schedule = fs.Schedule(torch.tensor([torch.inf, 3.0, 1.0, 0.0]), "ddim", "vp")
    names = ["karras", "exponential", "linear", "kl_optimal", "vp_uniform", "cosine", "beta"]
    added = _baselines(process, names, {"own": schedule}, False)
    abar = float(alphas_cumprod[-2])
    for name in names:
        sigmas = added[name].sigmas
        assert len(sigmas) == 4
        assert torch.isfinite(sigmas).all()
        assert float(sigmas[0]) == pytest.approx(((1 - abar) / abar) ** 0.5)
