"""Apple's GPUs have no float64: nothing that the library computes goes there in it (imitated on the CPU)."""

import pytest
import torch
from apple_gpu import AppleGpu
from models import exact_denoiser, mixture

import fastsched as fs
from fastsched import ops

MIXTURE = mixture()
DENOISER = exact_denoiser(MIXTURE, 0.05, 20.0)
CLEAN = MIXTURE.sample(6, seed=0)
COST = {"shape": (4,), "sigmas": [5.0, 1.0, 0.5, 0.1], "samples": 3, "progress": False}


def adapted(clean):
    adaptive = fs.AdaptiveSchedule([5.0, 1.0, 0.5, 0.1])
    adaptive.observe_denoiser(MIXTURE.denoise, clean, generator=torch.Generator().manual_seed(0))
    adaptive.observe(clean[0, :3].abs())
    return adaptive._sums


CASES = {
    "observations": adapted,
    "density": lambda clean: fs.AdaptiveSchedule([5.0, 1.0, 0.1]).density(clean.abs()).cpu().double(),
    "distances": lambda clean: fs.metrics.squared_distances(clean, clean + 1),
    "floor": fs.metrics.rounding_floor,
    "frechet": lambda clean: torch.tensor(fs.metrics.frechet_distance(clean, 2 * clean)),
    "power mean": lambda clean: torch.from_numpy(fs.metrics.power_mean(clean.abs())),
    "geometric mean": lambda clean: torch.tensor(fs.metrics.geometric_mean(clean.abs())),
    "standard error": lambda clean: torch.tensor(fs.metrics.mean_and_standard_error(clean)),
    "level gram": lambda clean: ops.level_increment_gram(clean[:, None], None, 6 * [0.0], torch.arange(1.0, 7.0)),
    "hutchinson": lambda clean: torch.stack(ops.hutchinson_reduce(clean[None].sign(), clean[None])),
    "corrector": lambda clean: fs.costs.stein_corrector(DENOISER, data=clean, device=clean.device, **COST).adjacent,
    "klub": lambda clean: fs.costs.klub(DENOISER, data=clean, device=clean.device, **COST).adjacent,
    "Gaussian": lambda clean: fs.oracles.Gaussian(0.5, (4,)).fisher_rao_length(clean.abs()),
    "mixture": lambda clean: fs.oracles.GaussianMixture(clean[:1, 0].abs(), clean[:1], torch.eye(4)[None]).means,
}


@pytest.mark.parametrize("name", CASES)
def test_no_float64(name, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    expected = CASES[name](CLEAN)
    with AppleGpu():
        found = CASES[name](CLEAN.to("mps"))
        found = found.cpu()
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-6)
