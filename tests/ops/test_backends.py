from types import SimpleNamespace

import pytest
import torch

from fastsched.kernels import config
from fastsched.ops import backends, resolve_backend

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "_warned", set())


@pytest.fixture
def gpu(monkeypatch):
    """A function that makes ``cuda:0`` a GPU of a given compute capability, with or without Triton installed."""

    def set_gpu(
        capability: tuple[int, int], *, hip: str | None = None, triton: bool = True, version: tuple[int, ...] = (3, 3)
    ) -> None:
        major, minor = capability
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major, minor=minor)
        )
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: object() if triton else None)
        monkeypatch.setattr(backends, "_TRITON", version)

    return set_gpu


@pytest.mark.parametrize("device", ["cpu", "mps", "meta"])
def test_auto_is_pytorch_without_a_gpu(device):
    assert resolve_backend(device) == resolve_backend(torch.device(device), backend="torch") == "torch"


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_supported_gpus(gpu, capability, backend):
    gpu(capability)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert resolve_backend(GPU, dtype, backend=backend) == "triton"
    assert resolve_backend("cuda:0", backend="torch") == "torch"


def test_the_oldest_supported_gpu_is_the_oldest_that_has_a_launch():
    major, minor = backends._LEAST_CAPABILITY
    assert config.nearest(10 * major + minor) == "sm_80"
    with pytest.raises(ValueError, match="compute capability"):
        config.nearest(10 * major + minor - 1)


def test_float64_on_a_gpu(gpu):
    gpu((9, 0))
    assert resolve_backend(GPU, torch.float64) == "torch"
    with pytest.raises(ValueError, match="reads float32, bfloat16 and float16; got float64"):
        resolve_backend(GPU, torch.float64, backend="triton")


@pytest.mark.parametrize(
    ("capability", "triton", "reason"),
    [((7, 5), True, "needs compute capability 8.0; cuda:0 has 7.5"), ((9, 0), False, "needs the package triton")],
)
def test_unsupported_gpu_warns_once(gpu, capability, triton, reason):
    gpu(capability, triton=triton)
    with pytest.warns(UserWarning, match=reason + '.*backend="auto" uses PyTorch'):
        assert resolve_backend(GPU) == "torch"
    assert resolve_backend(GPU) == "torch"
    assert resolve_backend(GPU, backend="torch") == "torch"
    with pytest.raises(ValueError, match=f'backend="triton" {reason}.*pass backend="torch" or "auto"'):
        resolve_backend(GPU, backend="triton")


@pytest.mark.parametrize("hip", [None, "6.2"])
def test_a_triton_that_cannot_compile_the_kernels_is_not_used(gpu, hip):
    gpu((9, 0), hip=hip, version=(3, 2))
    with pytest.warns(UserWarning, match=r"needs triton 3\.3, which torch 2\.7 and newer bring; installed is 3\.2"):
        assert resolve_backend(GPU) == "torch"
    with pytest.raises(ValueError, match="needs triton"):
        resolve_backend(GPU, backend="triton")


def test_the_installed_triton_is_found():
    triton = pytest.importorskip("triton", reason="needs the extra fastsched[triton]")
    assert backends._installed_triton() == tuple(map(int, triton.__version__.split(".")[:2]))


def test_amd_gpus_have_no_compute_capability(gpu):
    gpu((0, 0), hip="6.4")
    assert resolve_backend(GPU) == "triton"


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'triton', 'torch', got 'cuda'"):
        resolve_backend("cpu", backend="cuda")
