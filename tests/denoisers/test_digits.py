from importlib import resources

import pytest
import torch
from sklearn.datasets import load_digits

from fastsched.denoisers.digits import DigitsNetwork, load_digits_network
from fastsched.denoisers.oracles import Empirical, GaussianMixture


@pytest.fixture(scope="module")
def network():
    return load_digits_network()


@pytest.fixture(scope="module")
def data():
    pixels, _ = load_digits(return_X_y=True)
    return torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 8 - 1


def _denoise(network, z, s):
    total = (s**2 + network.sigma_data**2) ** 0.5
    raw = network(z / total, torch.full((len(z),), s).log() / 4)
    return (network.sigma_data / total) ** 2 * z + s * network.sigma_data / total * raw


def _noised(data, s):
    return data + s * torch.randn(data.shape, generator=torch.Generator().manual_seed(0))


def test_asset_is_small():
    asset = resources.files("fastsched.denoisers") / "assets" / "digits.safetensors"
    assert len(asset.read_bytes()) < 2_000_000


def test_network_is_ready_for_use(network, data):
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert network.sigma_data == pytest.approx(float(data.std()), rel=1e-6)
    assert (network.sigma_min, network.sigma_max, network.shape) == (0.002, 80.0, (1, 8, 8))
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), load_digits_network().parameters(), strict=True))


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_shapes(network, batch):
    assert network(torch.zeros(batch, 1, 8, 8), torch.zeros(batch)).shape == (batch, 1, 8, 8)


def test_each_sample_has_its_own_level(network):
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    levels = torch.tensor([-1.5, 0.0, 1.0])
    together = network(x, levels)
    apart = torch.cat([network(x[i : i + 1], levels[i : i + 1]) for i in range(3)])
    # Rounding of sums of 256 terms, through some ten layers.
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
    assert (network(x, levels) - network(x, levels.flip(0))).abs().max() > 0.1


# The network's share of the linear denoiser's squared error. Measured: 0.86, 0.73, 0.67, 0.63, 0.63, 0.76; over 1,797
# digits that figure moves by about a hundredth from one noise to another.
@pytest.mark.parametrize(
    ("s", "share"), [(0.01, 0.9), (0.05, 0.78), (0.1, 0.72), (0.2, 0.68), (0.5, 0.68), (1.0, 0.81)]
)
def test_better_than_the_best_linear_denoiser(network, data, s, share):
    flat = data.flatten(1).double()
    linear = GaussianMixture(torch.ones(1), flat.mean(0)[None], torch.cov(flat.T)[None])
    z = _noised(data, s)
    ours = (_denoise(network, z, s) - data).square().mean()
    fitted = (linear.denoise(z.flatten(1).double(), s).reshape(data.shape) - data).square().mean()
    assert ours < share * fitted


@pytest.mark.parametrize("s", [5.0, 20.0, 80.0])
def test_near_the_best_possible_at_high_noise(network, data, s):
    z = _noised(data, s)
    ours = (_denoise(network, z, s) - data).square().mean()
    best = (Empirical(data).denoise(z, s) - data).square().mean()
    assert ours < 1.03 * best


def test_finite_over_the_whole_range(network, data):
    for s in torch.logspace(torch.tensor(0.002).log10(), torch.tensor(80.0).log10(), 40).tolist():
        denoised = _denoise(network, _noised(data[:64], s), s)
        assert denoised.isfinite().all()
        assert denoised.abs().max() < 3


def test_samples_look_like_digits(network, data):
    sigmas = torch.logspace(torch.tensor(80.0).log10(), torch.tensor(0.002).log10(), 60).tolist()
    z = 80.0 * torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for s, t in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        z = z + (t - s) * (z - _denoise(network, z, s)) / s
    distance = torch.cdist(z.flatten(1), data.flatten(1)).amin(1)
    between = torch.cdist(data.flatten(1), data.flatten(1)).fill_diagonal_(torch.inf).amin(1)
    # Nearly as near to some digit as digits are to one another: 1.22 times; a Gaussian fitted to them: 1.76 times.
    assert distance.median() < 1.35 * between.median()
    assert (z.abs() > 1.5).float().mean() < 0.005  # the data's range is [-1, 1]


def test_untrained_network_gives_zero():
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(DigitsNetwork()(x, torch.zeros(2)), torch.zeros_like(x))
