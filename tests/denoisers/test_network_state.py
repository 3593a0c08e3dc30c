"""What is known of the modules behind a network, and put back after its calls."""

import torch
from torch import nn

import fastsched as fs
from fastsched.denoisers.network_state import modules_of, unchanged_buffers


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
