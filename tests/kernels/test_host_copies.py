"""What a launch copies between host and device. A CUDA graph cannot capture a copy from pageable host memory.

No GPU is needed: the device ``meta``, whose tensors have no data, takes its place, and the kernel is left out.
"""

from unittest import mock

import pytest
import torch
from kernel_worker import build
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class HostTensors(TorchDispatchMode):
    """Names of the operations that read or make a tensor on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        if any(t.device.type == "cpu" for t in tensors):
            self.names.append(str(func))
        return out


class NoKernel:
    """Stands for a kernel: counts its launches."""

    launches = 0

    def __getitem__(self, grid):
        return self

    def __call__(self, *arguments, **options):
        self.launches += 1


def run_gram(N: int, per_sample: bool, coefficients_on: str) -> tuple[list[str], int]:
    from fastsched.kernels import config, level_gram

    device = mock.patch.multiple(config, architecture=lambda device: "sm_90", processors=lambda device: 132)
    with mock.patch.object(level_gram, "gram_kernel", NoKernel()) as kernel, device, HostTensors() as seen:
        R = torch.empty(N, 2, 1024, device="meta")
        coefficients = torch.empty(2, N, dtype=torch.float64, device=coefficients_on)
        seen.names.clear()
        level_gram.level_gram(R, R[0], coefficients, per_sample, "bf16x3")
    return seen.names, kernel.launches


@pytest.mark.parametrize("per_sample", [False, True], ids=["mean", "per_sample"])
@pytest.mark.parametrize("N", [48, 200])
def test_gram_copies_nothing_if_coefficients_are_on_the_device(N, per_sample):
    assert build(run_gram, N, per_sample, "meta") == ([], 1)


def test_gram_copies_coefficients_from_the_host():
    names, launches = build(run_gram, 200, False, "cpu")
    assert any("_to_copy" in name for name in names)
    assert launches == 1


def run_hutchinson(shared: bool) -> tuple[list[str], int]:
    from fastsched.kernels import hutchinson

    with mock.patch.object(hutchinson, "hutchinson_kernel", NoKernel()) as kernel, HostTensors() as seen:
        JV = torch.empty(5, 2, 1024, device="meta")
        hutchinson.hutchinson(JV[0] if shared else JV, JV)
    return seen.names, kernel.launches


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "levels"])
def test_hutchinson_copies_nothing(shared):
    assert build(run_hutchinson, shared) == ([], 1)
