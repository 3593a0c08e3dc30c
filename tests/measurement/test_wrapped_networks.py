"""Networks that are compiled, quantised or offloaded are measured as they are."""

import warnings
from dataclasses import replace

import pytest
import torch
from models import exact_denoisers
from torch import nn

import fastsched as fs

LEVELS, SHAPE = 12, (16,)


class Network(nn.Module):
    """A small network that removes noise: nearly the identity at low levels, nearly zero at high ones."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 16)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            with torch.no_grad():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))

    def forward(self, z, sigma):
        s = sigma.reshape(-1, 1)
        scale = 1 / (1 + s**2)
        return scale * (z + s.clamp(max=1.0) * self.last(torch.tanh(self.first(scale.sqrt() * z))))


def measured(network):
    denoiser = fs.Denoiser.from_denoiser(network, 0.02, 20.0)
    return fs.measure(denoiser, SHAPE, levels=LEVELS, samples=2, progress=False)


@pytest.fixture(scope="module")
def plain():
    return measured(Network().eval())


def test_a_compiled_network(plain):
    compiled = torch.compile(Network().eval(), backend="eager", fullgraph=True)
    assert torch.equal(measured(compiled).vector_gram, plain.vector_gram)


def test_a_quantised_network(plain):
    """Weights of 8 bits: within a few per cent, and the same at every call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch announces another module for this
        quantised = torch.ao.quantization.quantize_dynamic(Network().eval(), {nn.Linear}, dtype=torch.qint8)
    found = measured(quantised)
    assert torch.equal(measured(quantised).vector_gram, found.vector_gram)
    assert 0 < float((found.gram - plain.gram).norm() / plain.gram.norm()) < 0.05


def test_an_offloaded_network(plain):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate for its offload hooks")
    network = accelerate.cpu_offload(Network().eval(), execution_device=torch.device("cpu"))
    assert next(network.parameters()).device.type == "meta"  # between calls
    denoiser = fs.Denoiser.from_denoiser(network, 0.02, 20.0)
    found = fs.measure(denoiser, SHAPE, levels=LEVELS, samples=2, device="cpu", progress=False)
    assert torch.equal(found.vector_gram, plain.vector_gram)


def test_a_network_with_static_buffers(plain):
    """As a CUDA graph has them: its input is copied into one buffer, and its output is the same tensor each time."""
    network, state = Network().eval(), {}

    def graph(z, sigma):
        given = state.setdefault(z.shape, (torch.empty_like(z), torch.empty_like(z)))
        given[0].copy_(z)
        given[1].copy_(network(given[0], sigma))
        given[0].zero_()
        return given[1]

    assert torch.equal(measured(graph).vector_gram, plain.vector_gram)


def test_no_autograd_graph_is_kept():
    """Of a network whose output requires a gradient no tensor of the statistics does, nor what it is given."""
    network, given = Network(), []

    def asked(z, sigma):
        given.append(z)
        with torch.enable_grad():
            return network.eval()(z, sigma)

    denoiser = fs.Denoiser.from_denoiser(asked, 0.02, 20.0)
    stats = fs.measure(denoiser, SHAPE, levels=LEVELS, samples=2, keep_increments=True, progress=False)
    kept = (stats.gram, stats.ends, stats.increments, stats.responses, *given)
    assert not any(tensor.requires_grad for tensor in kept)


def test_activations_in_8_bits_with_one_scale_for_the_batch_are_only_warned_of():
    """As torch's dynamic quantisation has them: off by at most a few per cent, but not alike in every batch."""
    exact = exact_denoisers(fs.oracles.Gaussian(0.2, SHAPE))["edm"]

    def quantised(x, c_noise):
        raw = exact.network(x, c_noise)
        scale = raw.abs().max() / 31  # 1% at the highest level, as several layers in 8 bits
        return (raw / scale).round() * scale

    with pytest.warns(UserWarning, match="changes a little .* statistics over the batch .* must not") as told:
        fs.measure(replace(exact, network=quantised), SHAPE, levels=LEVELS, seed=1, progress=False)
    assert len(told) == 1
