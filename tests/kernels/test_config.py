import itertools
import math

import pytest
import torch

from fastsched.kernels import config

SIZES = [2, 16, 33, 64, 65, 128, 129, 256]


@pytest.mark.parametrize("arch", config.FAMILIES)
def test_every_case_has_a_launch(arch):
    for N, itemsize, precision, aligned in itertools.product(
        SIZES, (2, 4), ("bf16x3", "tf32x3", "ieee"), (True, False)
    ):
        launch = config.gram_launch(N, itemsize, arch, precision=precision, aligned=aligned)
        assert launch.rows in (32, 64, 128)
        assert launch.columns in (16, 32, 64)
        assert launch.warps in (2, 4, 8)
        assert launch.stages in (1, 2, 3, 4)
        assert launch.programs in (1, 2, 3, 4)


def test_table_is_complete():
    shapes = {"64", "128", "256"}
    for row in config.GRAM.values():
        plain = {shape for shape in row if " " not in shape}
        special = {tuple(shape.split()) for shape in set(row) - plain}
        assert plain == shapes
        assert {shape for shape, _ in special} <= shapes
        assert {what for _, what in special} <= {"bf16x3", "tf32x3", "16-bit"}
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
    options = {"precision": "bf16x3", "aligned": True}
    assert config.gram_launch(64, 4, "gfx950", **options) == config.gram_launch(64, 4, "gfx942", **options)
    assert config.gram_launch(64, 4, "sm_999", **options) == config.gram_launch(64, 4, "sm_80", **options)


@pytest.mark.parametrize("aligned", [True, False])
def test_sm_100_gets_no_float32_products_that_become_tf32(aligned):
    for N in SIZES:
        assert config.gram_launch(N, 4, "sm_100", precision="ieee", aligned=aligned).rows < 64


def test_special_entries_are_reached():
    options = {"aligned": True}
    assert config.gram_launch(128, 2, "sm_90", precision="bf16x3", **options).columns == 64
    assert config.gram_launch(128, 4, "sm_90", precision="bf16x3", **options).columns == 32
    assert config.gram_launch(200, 4, "sm_90", precision="tf32x3", **options).rows == 64
    assert config.gram_launch(200, 4, "sm_90", precision="bf16x3", **options).rows == 128


@pytest.mark.parametrize(
    ("tiles", "samples", "slots", "parts"),
    [
        (10_000, 1, 264, 264),  # one wave that fills the device
        (10_000, 8, 264, 33),
        (5, 1, 264, 5),  # no more programs than tiles
        (5, 1000, 264, 1),
        (1, 1, 1, 1),
    ],
)
def test_splits(tiles, samples, slots, parts):
    assert config.splits(tiles, samples, slots) == parts


@pytest.mark.parametrize("slots", [132, 264])
@pytest.mark.parametrize("samples", [1, 4, 7, 48, 90, 100, 131, 132, 133, 200, 264, 265, 300, 1000])
def test_splits_keep_the_device_busy(samples, slots):
    """Of all program slots, over all waves, at least nine in ten do work."""
    tiles = 4096
    parts = config.splits(tiles, samples, slots)
    waves, longest = math.ceil(parts * samples / slots), math.ceil(tiles / parts)
    assert tiles * samples / (waves * slots * longest) >= 0.9


def test_architecture_wants_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="device must be a CUDA or HIP device; got cpu"):
        config.architecture(torch.device("cpu"))
