import json
import struct

import pytest
import torch
from models import exact_denoisers, mixture
from safetensors.torch import load_file, save_file

import fastsched as fs

KINDS = exact_denoisers(mixture())


def measure(kind="x0", **options):
    return fs.measure(KINDS[kind], (4,), progress=False, **{"levels": 12, "samples": 3, **options})


@pytest.fixture(scope="module")
def stats():
    return measure()


def assert_same(one, two):
    assert one.process == two.process
    assert one.shape == two.shape
    assert one.model_calls == two.model_calls
    assert one.data_std == two.data_std
    for name in ("s", "seeds", "gram", "ends", "cross", "w_squared"):
        left, right = getattr(one, name), getattr(two, name)
        assert (left is None and right is None) or torch.equal(left, right), name


@pytest.mark.parametrize("kind", ["x0", "epsilon", "velocity"])
@pytest.mark.parametrize("sensitivity", ["finite-difference", None])
def test_save_and_load(tmp_path, kind, sensitivity):
    measured = measure(kind, sensitivity=sensitivity)
    measured.save(tmp_path / "stats.safetensors")
    assert_same(fs.PathStatistics.load(tmp_path / "stats.safetensors"), measured)
    assert [file.name for file in tmp_path.iterdir()] == ["stats.safetensors"]


def ratio(stats, k, increments):
    """Mean squared product of w_k with some increments, over their mean square."""
    pairs = [(b, q) for b in range(stats.samples) for q in increments]
    return sum(float(stats.cross[b, k - 1, q]) ** 2 for b, q in pairs) / sum(
        float(stats.gram[b, q, q]) for b, q in pairs
    )


def test_psi_by_its_definition(stats):
    n = stats.levels
    at_end = ratio(stats, n, range(n - 1))
    for k in range(1, n):
        expected = ratio(stats, k, range(max(0, k - 6), k)) / at_end
        assert float(stats.psi[k]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_psi_of_a_gaussian_has_no_noise_of_probes(seed):
    """All increments of a path are parallel, so one sample gives phi of the closed form but for the path's error."""
    oracle = fs.oracles.Gaussian(0.5, (8,))
    denoiser = fs.Denoiser.from_denoiser(oracle.denoise, 0.01, 20.0)
    stats = fs.measure(denoiser, (8,), levels=128, samples=1, seed=seed, progress=False)
    torch.testing.assert_close(stats.psi[1:-1], oracle.sensitivity(stats.s[1:]).double(), rtol=0.05, atol=0)


def test_merge_is_measuring_more(stats):
    more = measure(seed=1)
    both = stats.merge(more)
    assert both.samples == 6
    assert both.model_calls == stats.model_calls + more.model_calls
    torch.testing.assert_close(both.phi[1:-1], (stats.phi + more.phi)[1:-1] / 2)
    assert torch.equal(both.select([3, 4, 5]).gram, more.gram)


def test_merge_refuses_the_same_paths_twice(stats):
    with pytest.raises(ValueError, match="repeats 3 of these paths"):
        stats.merge(stats)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"levels": 13}, "other levels"), ({"kind": "v"}, "another noise process"),
     ({"sensitivity": None}, "sensitivity exactly if")],
)  # fmt: skip
def test_merge_refuses_what_does_not_fit(stats, options, message):
    with pytest.raises(ValueError, match=message):
        stats.merge(measure(seed=1, **options))


def test_truncated_file(stats, tmp_path):
    path = tmp_path / "stats.safetensors"
    stats.save(path)
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            fs.PathStatistics.load(path)


def test_foreign_file(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not hold path statistics"):
        fs.PathStatistics.load(tmp_path / "other.safetensors")
    (tmp_path / "text").write_text("a text")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        fs.PathStatistics.load(tmp_path / "text")
    with pytest.raises(FileNotFoundError, match="no such statistics file"):
        fs.PathStatistics.load(tmp_path / "missing")


def header_of(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["fastsched"])


@pytest.mark.parametrize(
    ("change", "message"),
    [({"version": 99}, "version 99, newer than"), ({"process": {"kind": "vq"}}, "did you mean 've'|kind must be"),
     ({"data_std": None}, "lacks an entry")],
)  # fmt: skip
def test_changed_header(stats, tmp_path, change, message):
    path = tmp_path / "stats.safetensors"
    stats.save(path)
    header = header_of(path) | change
    save_file(load_file(path), path, metadata={"fastsched": json.dumps(header)})
    with pytest.raises(ValueError, match=message):
        fs.PathStatistics.load(path)


def test_missing_or_misshapen_tensor(stats, tmp_path):
    path = tmp_path / "stats.safetensors"
    stats.save(path)
    header, tensors = header_of(path), load_file(path)
    metadata = {"fastsched": json.dumps(header)}
    save_file({name: value for name, value in tensors.items() if name != "gram"}, path, metadata=metadata)
    with pytest.raises(ValueError, match="lacks an entry"):
        fs.PathStatistics.load(path)
    save_file(tensors | {"gram": tensors["gram"][:, :5].contiguous()}, path, metadata=metadata)
    with pytest.raises(ValueError, match="gram has shape"):
        fs.PathStatistics.load(path)


def test_refined_statistics_describe_the_same_path(stats):
    fine = stats.refine(3)
    assert fine.levels == 3 * (stats.levels - 1) + 1
    assert torch.equal(fine.s[::3], stats.s)
    # a coarse increment is the sum of its parts
    parts = fine.gram.reshape(3, 11, 3, 11, 3).sum((2, 4))
    torch.testing.assert_close(parts, stats.gram, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(fine.phi[3::3], stats.phi[1:-1], rtol=1e-12, atol=0)
    torch.testing.assert_close(
        fine.cross[:, 2::3].reshape(3, 11, 11, 3).sum(3), stats.cross[:, :-1], rtol=1e-12, atol=1e-12
    )
    assert torch.equal(fine.cross[:, -1].reshape(3, 11, 3).sum(2), stats.cross[:, -1]) or torch.allclose(
        fine.cross[:, -1].reshape(3, 11, 3).sum(2), stats.cross[:, -1]
    )


def test_refined_path_errors_agree(stats):
    """The same schedule on both grids has the same error: the finer path is the same piecewise linear one."""
    from fastsched.costs import path_cost

    nodes = [0, 3, 7, 10, 12]
    for solver in ("ddim", "dpmpp_2m", "ipndm", "heun"):
        coarse = path_cost(stats, solver, None).of(nodes)
        fine = path_cost(stats.refine(4), solver, None).of([4 * n for n in nodes[:-1]] + [45])
        torch.testing.assert_close(torch.from_numpy(coarse), torch.from_numpy(fine), rtol=1e-9, atol=1e-12)


def test_flow_statistics_refine_below_pure_noise():
    flow = measure("velocity")
    fine = flow.refine(2)
    assert fine.levels == 2 * (flow.levels - 2) + 2
    assert fine.s[0] == float("inf")
    with pytest.raises(ValueError, match="parts must be at least 1"):
        flow.refine(0)


def test_file_with_nan(stats, tmp_path):
    path = tmp_path / "stats.safetensors"
    stats.save(path)
    header, tensors = header_of(path), load_file(path)
    tensors["gram"][0, 0, 0] = float("nan")
    save_file(tensors, path, metadata={"fastsched": json.dumps(header)})
    with pytest.raises(ValueError, match="gram holds NaN or inf"):
        fs.PathStatistics.load(path)


def test_prints_in_a_line(stats):
    assert repr(stats) == "PathStatistics(ve, 12 levels, 3 samples of (4,), with sensitivity, 69 model calls)"
    assert len(repr(KINDS["epsilon"].process)) < 100


def test_increments_go_with_their_samples():
    one, two = (measure(seed=seed, keep_increments=True) for seed in (0, 1))
    assert torch.equal(one.select([2, 0]).increments, one.increments[[2, 0]])
    both = one.merge(two)
    assert torch.equal(both.increments, torch.cat([one.increments, two.increments]))
    assert torch.equal(both.select([3, 4, 5]).increments, two.increments)


def test_increments_of_some_samples_alone_are_dropped():
    one, two = measure(keep_increments=True), measure(seed=1)
    assert one.merge(two).increments is None
    assert two.merge(one).increments is None
    assert measure().select([0]).increments is None


def test_increments_are_neither_refined_nor_saved(tmp_path):
    kept = measure(keep_increments=True)
    assert kept.refine(2).increments is None
    kept.save(tmp_path / "stats.safetensors")
    loaded = fs.PathStatistics.load(tmp_path / "stats.safetensors")
    assert loaded.increments is None
    assert_same(loaded, kept)
    assert "increments" not in load_file(tmp_path / "stats.safetensors")
