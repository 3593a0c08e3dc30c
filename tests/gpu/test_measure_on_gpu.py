"""Measuring and fitting on a GPU gives what the CPU gives, however the network is run there."""

import copy

import pytest
import torch

import fastsched as fs
from fastsched import ops
from fastsched.measurement.deviated_paths import deviated_paths
from fastsched.measurement.memory import need
from fastsched.measurement.path_following import Measurement

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

SHAPE = (4, 16, 16)
RTOL = 5e-3  # of a level: float32 sums in another order, and a network that amplifies them


class SmallUNet(torch.nn.Module):
    """A convolutional network of the level and the image, bounded so that the paths converge."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Conv2d(SHAPE[0] + 1, 32, 3, padding=1)
        self.second = torch.nn.Conv2d(32, 32, 3, padding=1)
        self.last = torch.nn.Conv2d(32, SHAPE[0], 3, padding=1)

    def forward(self, x, t):
        level = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(len(x)).view(-1, 1, 1, 1)
        x = torch.cat([x, level.expand(-1, 1, *x.shape[2:])], 1)
        x = torch.nn.functional.silu(self.first(x))
        return torch.tanh(self.last(torch.nn.functional.silu(self.second(x))))


class Denoising(torch.nn.Module):
    """``D(z; s)`` of unit data: the Gaussian answer and a bounded correction by the network."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, z, s):
        s = torch.as_tensor(s, dtype=z.dtype, device=z.device)
        s = s.view(-1, *(1,) * (z.ndim - 1)) if s.ndim else s
        inside = z / (1 + s * s).sqrt()
        return inside / (1 + s * s).sqrt() + 0.3 * self.network(inside, s.flatten().log() / 4) / (1 + s)


def denoiser(network):
    return fs.Denoiser.from_denoiser(network, sigma_min=0.01, sigma_max=50.0)


def network(device):
    return Denoising(SmallUNet()).to(device).eval()


def measured(given, device="cuda", **settings):
    options = {"levels": 32, "samples": 4, "device": device, "progress": False} | settings
    return fs.measure(denoiser(given), SHAPE, **options)


@pytest.fixture(scope="module")
def on_cpu():
    return measured(network("cpu"), "cpu")


def assert_same(stats, wanted, rtol=RTOL, errors=20 * RTOL):
    """The same Gram matrix to ``rtol``, and predicted errors, small differences of its entries, to ``errors``."""
    size = wanted.gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    assert ((stats.gram - wanted.gram).abs() <= rtol * size).all()
    for solver in ("ddim", "dpmpp_2m", "fitted"):
        ours, theirs = (fs.predict_error(each, fs.optimal_schedule(wanted, 6, solver)) for each in (stats, wanted))
        assert ours == pytest.approx(theirs, rel=errors)


@pytest.mark.parametrize("batch_size", [None, 1])
def test_the_gpu_measures_what_the_cpu_does(on_cpu, batch_size):
    assert_same(measured(network("cuda"), batch_size=batch_size), on_cpu)


def test_a_measurement_repeats_to_the_bit():
    torch.backends.cudnn.deterministic = True
    first, second = measured(network("cuda")), measured(network("cuda"))
    assert torch.equal(first.gram, second.gram)
    assert torch.equal(first.response_gram, second.response_gram)


@pytest.mark.parametrize("keep_increments", [False, True])
def test_vectors_in_page_locked_memory(keep_increments):
    options = {"batch_size": 2, "keep_increments": keep_increments}
    one, other = (measured(network("cuda"), store=store, **options) for store in ("device", "cpu"))
    # float32 sums in another order: 1e-7 of a level was seen, and 1e-3 of the error at 6 fitted steps
    assert_same(other, one, rtol=1e-6, errors=5e-3)


@pytest.mark.parametrize("store", ["device", "cpu"])
def test_the_device_holds_what_is_predicted(store):
    d, levels = 1 << 22, 32
    given = fs.Denoiser.from_denoiser(lambda z, s: 0.5 * z, 0.02, 20.0)
    s, paths = given.levels(levels), deviated_paths(levels)
    run = Measurement(given, s, torch.device("cuda"), torch.float32, paths, store=store)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fs.measure(given, (d,), levels=levels, samples=1, store=store, device="cuda", checks=False, progress=False)
    found = torch.cuda.max_memory_allocated() - before
    assert found <= need(run, 1, 1, d).device
    assert found >= 0.5 * need(run, 1, 1, d).device


def test_outputs_in_one_static_buffer(on_cpu):
    inner, buffers = network("cuda"), {}

    def static(z, s):
        out = inner(z, s)
        return buffers.setdefault(out.shape, torch.empty_like(out)).copy_(out)

    assert_same(measured(static), on_cpu)


# torch captures an empty graph to start its pool of memory, and warns of it.
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_networks(on_cpu, mode):
    assert_same(measured(torch.compile(network("cuda"), mode=mode)), on_cpu)


def test_a_captured_cuda_graph_as_the_network(on_cpu):
    inner = network("cuda")
    given = denoiser(inner)
    z, s = torch.zeros(4, *SHAPE, device="cuda"), torch.ones((), device="cuda")
    with torch.no_grad():
        inner(z, s)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = inner(z, s)

    def replayed(x, level):
        z[: len(x)].copy_(x)
        s.copy_(torch.as_tensor(level, dtype=s.dtype).flatten()[0])
        graph.replay()
        return out[: len(x)]

    assert given.process.kind == "ve"
    assert_same(measured(replayed, checks=False), on_cpu)


def test_offloaded_networks(on_cpu):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate for its offload hooks")
    offloaded = accelerate.cpu_offload(network("cpu"), execution_device=torch.device("cuda"))
    assert_same(measured(offloaded), on_cpu)


def test_two_streams(on_cpu):
    given, found = network("cuda"), []
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for stream in streams:
        with torch.cuda.stream(stream):
            found.append(measured(copy.deepcopy(given)))
    for stats in found:
        assert_same(stats, on_cpu)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_networks_in_16_bits_give_as_good_a_schedule(on_cpu, dtype, solver):
    stats = measured(network("cuda").to(dtype), dtype=dtype)
    chosen, best = (fs.predict_error(on_cpu, fs.optimal_schedule(each, 6, solver)) for each in (stats, on_cpu))
    assert chosen <= 1.5 * best


@pytest.mark.parametrize("solver", ["dpmpp_2m", "fitted"])
def test_fit_finds_as_good_a_schedule(solver):
    given = denoiser(network("cuda"))
    settings = {"levels": 32, "samples": 4, "model_calls": 300, "progress": False}
    ours = fs.fit(given, SHAPE, 6, solver, device="cuda", **settings)
    theirs = fs.fit(denoiser(network("cpu")), SHAPE, 6, solver, device="cpu", **settings)
    reference = fs.converged_reference(given, SHAPE, samples=16, seed=1, device="cuda", progress=False)
    errors = []
    for schedule in (ours, theirs):
        end = fs.sample(given, schedule, solver, reference.noise.cuda())
        errors.append(fs.metrics.geometric_mean(fs.metrics.squared_distances(end.cpu(), reference.ends)))
    assert errors[0] == pytest.approx(errors[1], rel=0.25)


def test_a_gram_within_a_cuda_graph():
    R = torch.randn(48, 2, 4096, device="cuda")
    a, c = torch.zeros(48, dtype=torch.float64, device="cuda"), torch.ones(48, dtype=torch.float64, device="cuda")
    call = lambda: torch.ops.fastsched.level_gram(R, None, torch.stack([a, c]), True, "bf16x3", True)
    expected = call().clone()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    found.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found, expected)


def test_more_elements_than_32_bits_count():
    """Offsets beyond 2^31: a third of the levels lies there."""
    N, d = 48, 1 << 26
    R = torch.zeros(N, 1, d, dtype=torch.bfloat16, device="cuda")
    R[:, :, -64:] = torch.randn(N, 1, 64, device="cuda")
    whole = ops.level_increment_gram(R, None, torch.zeros(N), torch.ones(N), backend="triton")
    part = ops.level_increment_gram(R[:, :, -64:].contiguous(), None, torch.zeros(N), torch.ones(N))
    assert torch.allclose(whole, part, rtol=1e-4, atol=1e-4)
