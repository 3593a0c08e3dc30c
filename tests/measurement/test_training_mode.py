"""Networks in training mode, whose answers are random or depend on the batch, are refused and left as they were."""

import pytest
import torch
from torch import nn

import fastsched as fs

#: Structured data, as real data are: near a few points of 16 dimensions.
DATA = fs.oracles.GaussianMixture.random(16, 3, seed=0)


def measure(denoiser, **options):
    return fs.measure(denoiser, (16,), levels=12, samples=2, progress=False, **options)


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, z, s):
        return z / (1 + s.reshape(-1, 1) ** 2) + 0.05 * self.layer(z)


@pytest.mark.parametrize("make", [lambda: nn.Dropout(0.1), lambda: nn.BatchNorm1d(16)], ids=["Dropout", "BatchNorm1d"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_training_mode_is_refused_and_changes_nothing(make, wrapped):
    layer = make()
    net = Net(layer)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    denoiser = fs.Denoiser.from_denoiser((lambda z, s: net(z, s)) if wrapped else net, 0.01, 20.0)
    with pytest.raises(ValueError, match=f"active {type(layer).__name__}: call network.eval"):
        fs.measure(denoiser, (16,), levels=12, samples=2, progress=False)
    fs.measure(denoiser, (16,), levels=12, samples=2, progress=False, checks=False)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    net.eval()
    fs.measure(denoiser, (16,), levels=12, samples=2, progress=False)


def rows_dropped(net, z):
    """As labels are for guidance; one of a few samples may show nothing of it."""
    return (torch.rand(len(z), 1) > 1e-6).float() - 1 if net.training else 0 * z


def weights_normalised(net, z):
    if net.training:
        with torch.no_grad():
            net.weight.copy_(net.weight / net.weight.norm())
    return 0 * z


class Custom(nn.Module):
    """A network that does something of its own in training mode."""

    def __init__(self, extra):
        super().__init__()
        self.weight, self.extra = nn.Parameter(torch.tensor([3.0, 4.0])), extra

    def forward(self, z, s):
        return DATA.denoise(z, s) + self.extra(self, z)


@pytest.mark.parametrize(
    ("extra", "what"), [(rows_dropped, "draws random numbers"), (weights_normalised, "writes to its parameters")]
)
def test_what_a_network_of_one_s_own_does_in_training_mode_is_refused(extra, what):
    net = Custom(extra)
    denoiser = fs.Denoiser.from_denoiser(net, 0.02, 20.0)
    for run in (
        lambda: measure(denoiser),
        lambda: fs.costs.klub(denoiser, shape=(16,), sigmas=[9.0, 2.0, 0.5], samples=2, progress=False),
    ):
        with pytest.raises(ValueError, match=f"in training mode, and {what}: call network.eval"):
            run()
    assert net.weight.tolist() == [3.0, 4.0]
    net.eval()
    measure(denoiser)


def of_one_channel(norm):
    return nn.Sequential(nn.Unflatten(1, (1, 16)), norm, nn.Flatten())


@pytest.mark.parametrize(
    "layer",
    [
        of_one_channel(nn.InstanceNorm1d(1, track_running_stats=True)),
        nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16)),
    ],
    ids=["InstanceNorm1d", "SpectralNorm"],
)
def test_layers_with_other_outputs_in_training_mode_are_refused(layer, request):
    denoiser = fs.Denoiser.from_denoiser(Net(layer), 0.01, 20.0)
    with pytest.raises(ValueError, match=f"active {request.node.callspec.id}: call network.eval"):
        measure(denoiser)
    layer.eval()
    measure(denoiser)


def test_layers_with_equal_outputs_in_training_mode_are_accepted():
    """Such as instance norm that keeps no statistics, and dropout of nothing."""
    for layer in (of_one_channel(nn.InstanceNorm1d(1)), nn.Dropout(0.0), nn.GroupNorm(4, 16)):
        measure(fs.Denoiser.from_denoiser(Net(layer), 0.01, 20.0))


GLOBAL = nn.BatchNorm1d(16)


@pytest.mark.parametrize("name", ["in a list", "global"])
def test_modules_in_lists_and_global_ones_are_known(name):
    listed = [nn.BatchNorm1d(16)]

    def in_a_list(z, s):
        return DATA.denoise(listed[0](z), s)

    def by_name(z, s):
        return DATA.denoise(GLOBAL(z), s)

    layer, network = (listed[0], in_a_list) if name == "in a list" else (GLOBAL, by_name)
    before = layer.running_mean.clone()
    denoiser = fs.Denoiser.from_denoiser(network, 0.02, 20.0)
    with pytest.raises(ValueError, match="training mode"):
        measure(denoiser)
    measure(denoiser, checks=False)
    assert torch.equal(layer.running_mean, before)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_frozen_modules_of_torchscript_which_have_no_mode_are_measured():
    torch.manual_seed(0)
    net = Net(nn.Linear(16, 16)).eval()
    frozen = torch.jit.freeze(torch.jit.script(net))
    expected, stats = (measure(fs.Denoiser.from_denoiser(each, 0.01, 20.0)) for each in (net, frozen))
    assert torch.allclose(stats.gram, expected.gram, rtol=1e-4)
    with pytest.raises(ValueError, match="in training mode"):
        measure(fs.Denoiser.from_denoiser(torch.jit.script(Net(nn.Dropout(0.1))), 0.01, 20.0))
