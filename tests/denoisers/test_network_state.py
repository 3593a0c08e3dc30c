"""What is put back after a network's calls."""

import pytest
import torch
from torch import nn

import fastsched as fs
from fastsched.denoisers.network_modules import modules_of
from fastsched.denoisers.network_state import MOST_ELEMENTS, unchanged_buffers


def test_buffers_are_put_back():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, z, s):
            self.calls += 1
            return 0.1 * z

    net = Counting()
    with unchanged_buffers(lambda z, s: net(z, s)):
        net(torch.ones(1), None)
    assert float(net.calls) == 0
    assert modules_of(net.forward) == [net]
    fs.measure(fs.Denoiser.from_denoiser(net, 0.01, 10.0), (3,), levels=8, samples=1, progress=False)
    assert float(net.calls) == 0


@pytest.mark.parametrize("change", ["resized", "of another dtype", "counted up", "replaced"])
@pytest.mark.parametrize("inference", [False, True])
def test_buffers_that_cannot_be_written_as_they_are_are_put_back_too(change, inference):
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("kept", torch.arange(3.0))

        def forward(self, z, s):
            with torch.inference_mode(self.kept.is_inference()):
                if change == "resized":
                    self.kept.resize_(len(z), 2).fill_(7.0)
                elif change == "replaced":
                    self.kept = torch.cat([self.kept, self.kept])
                elif change == "of another dtype":
                    self.kept.data = torch.full((2,), 7.0, dtype=torch.float64)
                else:
                    self.kept += 1
            return 0.1 * z

    with torch.inference_mode(inference):
        net = Changing()
    with unchanged_buffers(net):
        net(torch.ones(2, 3), None)
    assert net.kept.dtype == torch.float32
    assert net.kept.tolist() == [0.0, 1.0, 2.0]


SIGMAS = torch.tensor([20.0, 5.0, 1.0, 0.1, 0.01])
CALLS = {
    "sample": lambda denoiser: fs.sample(denoiser, SIGMAS, "heun", torch.ones(2, 8)),
    "ancestral": lambda denoiser: fs.sample(denoiser, SIGMAS, "ancestral", torch.ones(2, 8)),
    "fit": lambda denoiser: fs.fit(
        denoiser, (8,), 3, levels=10, samples=6, model_calls=200, checks=False, progress=False
    ),
    "compare": lambda denoiser: fs.converged_reference(denoiser, (8,), samples=2, steps=5, progress=False),
    "costs": lambda denoiser: fs.costs.klub(denoiser, shape=(8,), sigmas=SIGMAS, samples=2, progress=False),
    "training": lambda denoiser: fs.AdaptiveSchedule(SIGMAS).observe_denoiser(denoiser, torch.ones(4, 8)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_every_call_puts_buffers_back(name, training):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(8)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, z, s):
            self.calls += 1
            return z / (1 + s.reshape(-1, 1) ** 2) + 0 * self.norm(z)

    net = Net().train(training and name not in ("compare", "costs"))  # which refuse training mode
    before = {key: value.clone() for key, value in net.state_dict().items()}
    CALLS[name](fs.Denoiser.from_denoiser(net, 0.01, 20.0))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_large_buffers_are_not_copied():
    """Those of a quantised network hold its weights."""
    net = nn.Module()
    net.register_buffer("weight", torch.zeros(MOST_ELEMENTS + 1, dtype=torch.int32))
    with unchanged_buffers(net):
        net.weight += 1
    assert int(net.weight[0]) == 1


def test_buffers_elsewhere_are_left_alone():
    class Offloaded(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("far", torch.empty(3, device="meta"))
            self.weight = nn.Parameter(torch.empty(3, device="meta"))

        def forward(self, z, s):
            return z / (1 + s.reshape(-1, 1) ** 2)

    denoiser = fs.Denoiser.from_denoiser(Offloaded(), 0.01, 20.0)
    assert fs.measure(denoiser, (16,), levels=8, samples=2, progress=False).samples == 2


@pytest.mark.parametrize("name", CALLS)
def test_a_network_may_turn_gradients_on(name):
    """Its parameters would spread them to all that is computed from its answers."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, z, s):
            torch.set_grad_enabled(True)
            return self.scale * z / (1 + s.reshape(-1, 1) ** 2)

    CALLS[name](fs.Denoiser.from_denoiser(Network().eval(), 0.01, 20.0))


@pytest.mark.parametrize("before", [True, False])
def test_a_call_leaves_gradients_on_or_off(before):
    def network(z, s):
        torch.set_grad_enabled(not before)
        return 0.1 * z

    with torch.set_grad_enabled(before):
        fs.Denoiser.from_denoiser(network, 0.01, 20.0).raw_output(torch.ones(2, 3), 1.0)
        assert torch.is_grad_enabled() == before


def added(network):
    network.last += 1


def replaced(network):
    network.last = network.last + 1


@pytest.mark.parametrize("write", [added, replaced])
def test_threads_that_share_a_network_leave_its_buffers_as_they_were(write):
    network = nn.Module()
    network.register_buffer("last", torch.zeros(3))
    first, second = unchanged_buffers(network), unchanged_buffers(network)
    with first:
        write(network)
        second.__enter__()  # another thread begins now, and ends after this one
        write(network)
    second.__exit__(None, None, None)
    assert network.last.tolist() == [0.0, 0.0, 0.0]
    with unchanged_buffers(network):
        write(network)
    assert network.last.tolist() == [0.0, 0.0, 0.0]


def test_a_network_that_converts_itself_keeps_its_new_buffers():
    """As one that moves to a device at its first call: its parameters are there too."""
    network = nn.BatchNorm1d(3).eval()
    with unchanged_buffers(network):
        network.double()
    assert network.weight.dtype == network.running_mean.dtype == torch.float64
