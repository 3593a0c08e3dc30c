import itertools

import pytest
import torch

from fastsched.kernels import config

SIZES = [2, 16, 33, 64, 65, 128, 129, 256]


@pytest.mark.parametrize("arch", config.ARCHITECTURES)
def test_every_case_has_a_launch(arch):
    for N, itemsize, precision, aligned, cross in itertools.product(
        SIZES, (2, 4), ("bf16x3", "tf32x3", "ieee"), (True, False), (True, False)
    ):
        launch = config.gram_launch(N, itemsize, arch, precision=precision, aligned=aligned, cross=cross)
        assert launch.rows in (64, 128)
        assert launch.columns in (16, 32, 64)
        assert launch.warps in (2, 4, 8)
        assert launch.stages in (2, 3)
        assert launch.programs in (1, 2)
    for probe in ("seed", "shared", "levels"):
        assert config.hutchinson_launch(probe).stages in (2, 3)


def test_table_is_complete():
    assert set(config.FAMILIES) == set(config.SHARED_MEMORY) == set(config.ARCHITECTURES)
    shapes = set(config.GRAM["hopper"])
    assert len(shapes) == 6
    assert all(set(row) == shapes for row in config.GRAM.values())
    assert set(config.FAMILIES.values()) <= set(config.GRAM)


@pytest.mark.parametrize(
    ("capability", "name"),
    [(80, "sm_80"), (86, "sm_80"), (89, "sm_89"), (90, "sm_90"), (100, "sm_100"), (103, "sm_100"), (121, "sm_120")],
)
def test_nearest(capability, name):
    assert config.nearest(capability) == name


def test_too_old():
    with pytest.raises(ValueError, match=r"at least 8\.0; got 7\.5"):
        config.nearest(75)


def test_unknown_names_borrow_a_launch():
    options = {"precision": "bf16x3", "aligned": True, "cross": False}
    assert config.gram_launch(64, 4, "gfx950", **options) == config.gram_launch(64, 4, "gfx942", **options)
    assert config.gram_launch(64, 4, "sm_999", **options) == config.gram_launch(64, 4, "sm_80", **options)


def test_no_float32_product_on_the_tensor_core_of_sm_100():
    for N, cross in itertools.product(SIZES, (True, False)):
        launch = config.gram_launch(N, 4, "sm_100", precision="ieee", aligned=True, cross=cross)
        assert launch.warps < 4


def test_splits_fill_the_device_and_no_more():
    assert config.splits(tiles=10_000, samples=1, programs=2, processors=132) == 264
    assert config.splits(tiles=10_000, samples=8, programs=2, processors=132) == 33
    assert config.splits(tiles=5, samples=1, programs=2, processors=132) == 5
    assert config.splits(tiles=5, samples=1000, programs=2, processors=132) == 1


def test_architecture_wants_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="device must be a CUDA or HIP device; got cpu"):
        config.architecture(torch.device("cpu"))
