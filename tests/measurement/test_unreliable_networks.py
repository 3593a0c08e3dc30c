"""Networks that are random, mix the samples of a batch, or change from call to call are refused."""

import itertools
import random

import numpy as np
import pytest
import torch
from test_network_checks import DATA, measure
from torch import nn

import fastsched as fs


def test_random_networks_are_refused():
    generator = torch.Generator().manual_seed(0)
    noisy = lambda z, s: z / (1 + s.reshape(-1, 1) ** 2) + 0.05 * torch.randn(z.shape, generator=generator)
    with pytest.raises(ValueError, match="it is random"):
        measure(fs.Denoiser.from_denoiser(noisy, 0.01, 20.0))


def test_networks_that_are_random_at_some_levels_are_warned_of():
    noisy = lambda z, s: DATA.denoise(z, s) + 0.1 * torch.randn(z.shape) * ((s > 0.3) & (s < 1.0)).reshape(-1, 1)
    denoiser = fs.Denoiser.from_denoiser(noisy, 0.02, 20.0)
    told = r"random numbers were drawn during the measurement: if the network's answers depend on them"
    with pytest.warns(UserWarning, match=told):  # some networks draw numbers that they do not use
        measure(denoiser)
    measure(denoiser, checks=False)

    def seeded(z, s):  # the same numbers in every call, and the caller's go on as if it had drawn none
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return DATA.denoise(z, s) + 0.01 * torch.randn(z.shape[1:]) * ((s > 0.3) & (s < 1.0)).reshape(-1, 1)

    measure(fs.Denoiser.from_denoiser(seeded, 0.02, 20.0))


def test_random_numbers_of_numpy_and_python_are_noticed():
    draws = {
        "NumPy": lambda z: torch.from_numpy(np.random.randn(*z.shape)).to(z),  # noqa: NPY002 - as networks do
        "Python": lambda z: z.new_tensor([[random.gauss(0, 1) for _ in row] for row in z]),
    }
    for name, draw in draws.items():
        some = lambda z, s, draw=draw: DATA.denoise(z, s) + 0.1 * draw(z) * ((s > 0.3) & (s < 1.0)).reshape(-1, 1)
        with pytest.warns(UserWarning, match=f"^{name}'s random numbers were drawn during the measurement"):
            measure(fs.Denoiser.from_denoiser(some, 0.02, 20.0))


MIXING = {
    "mean": lambda z, s: (z - 0.5 * z.mean(0)) / (1 + s.reshape(-1, 1) ** 2),
    "last in place of first": lambda z, s: DATA.denoise(z, s).flip(0),
    "first for all": lambda z, s: DATA.denoise(z[:1], s[:1]).expand(len(z), -1),
    "first alone": lambda z, s: torch.cat([DATA.denoise(z[:1], s[:1]), 0.9 * DATA.denoise(z[1:], s[1:])]),
    "nothing of several": lambda z, s: DATA.denoise(z, s) * (len(z) == 1),
}


@pytest.mark.parametrize(("name", "samples"), [*itertools.product(MIXING, [2, 3]), ("mean", 1)])
def test_networks_that_mix_the_batch_are_refused(name, samples):
    with pytest.raises(ValueError, match="mixes the samples of a batch"):
        measure(fs.Denoiser.from_denoiser(MIXING[name], 0.01, 20.0), samples=samples)


def test_a_random_network_whose_answer_at_the_highest_level_is_always_the_mean_is_random():
    dropped = lambda z, s: DATA.denoise(nn.functional.dropout(z, 0.1), s)
    with pytest.raises(ValueError, match="it is random"):
        measure(fs.Denoiser.from_denoiser(dropped, 0.02, 20.0))


class Counting(nn.Module):
    """A mixture's denoiser, times a factor that follows the number of its calls."""

    def __init__(self, factor):
        super().__init__()
        self.factor, self.calls = factor, 0

    def forward(self, z, s):
        self.calls += 1
        return DATA.denoise(z, s) * self.factor(self.calls)


@pytest.mark.parametrize("near", [0.0, 0.1])
def test_networks_that_keep_the_answer_of_a_level_are_refused(near):
    kept = {}

    def network(z, s):
        level = float(s.log()[0])
        if not kept or abs(level - kept["level"]) > near or kept["answer"].shape != z.shape:
            kept.update(level=level, answer=DATA.denoise(z, s))
        return kept["answer"]

    with pytest.raises(ValueError, match="same output for different states of one level"):
        measure(fs.Denoiser.from_denoiser(network, 0.02, 20.0), samples=3)


@pytest.mark.filterwarnings("ignore:.*table of levels the right one")  # of the same networks, before they are refused
@pytest.mark.parametrize("from_one", [fs.Denoiser.from_denoiser, fs.Denoiser.from_score])
def test_networks_that_keep_the_answer_of_a_level_are_refused_one_sample_at_a_time(from_one):
    """Both samples at the highest level are asked in one batch, of which such networks keep another answer."""
    kept = {}
    right = DATA.denoise if from_one == fs.Denoiser.from_denoiser else lambda z, s: (DATA.denoise(z, s) - z) / s[0] ** 2
    network = lambda z, s: kept.setdefault((float(s[0]), len(z)), right(z, s))
    with pytest.raises(ValueError, match="same output for different states of one level"):
        measure(from_one(network, 0.02, 20.0), samples=3, batch_size=1)
    measure(from_one(right, 0.02, 20.0), samples=3, batch_size=1)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_networks_that_ignore_the_state_are_refused(batch_size):
    network = lambda z, s: (1 / (1 + s**2)).reshape(-1, *[1] * (z.ndim - 1)).expand(z.shape)
    with pytest.raises(ValueError, match="same output for different states of one level"):
        measure(fs.Denoiser.from_denoiser(network, 0.02, 20.0), samples=3, batch_size=batch_size)


CHANGING = {
    "first call": lambda n: 0.9 if n == 1 else 1.0,
    "first two calls": lambda n: 0.9 if n <= 2 else 1.0,
    "drift": lambda n: 1 + 2e-4 * n,
    "after the checks": lambda n: 1.0 if n < 8 else 0.97,
    "midway": lambda n: 1.0 if n < 20 else 0.97,
}


@pytest.mark.parametrize("name", CHANGING)
def test_networks_that_change_from_call_to_call_are_refused(name):
    network = Counting(CHANGING[name])
    with pytest.raises(ValueError, match="keeps a state"):
        measure(fs.Denoiser.from_denoiser(network, 0.01, 20.0))
    assert measure(fs.Denoiser.from_denoiser(network, 0.01, 20.0), checks=False).samples == 2
