import json
import math
import struct
from dataclasses import replace

import pytest
import torch
from models import exact_denoisers, mixture
from safetensors.torch import load_file, save_file

import fastsched as fs
from fastsched.measurement.measuring import measured_levels
from fastsched.sampling.origin import Origin

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
    for name in ("s", "seeds", "gram", "ends", "response_cross", "response_gram", "fingerprint"):
        left, right = getattr(one, name), getattr(two, name)
        assert (left is None and right is None) or torch.equal(left, right), name


@pytest.mark.parametrize("kind", ["x0", "epsilon", "velocity"])
@pytest.mark.parametrize("responses", [True, False])
def test_save_and_load(tmp_path, kind, responses):
    measured = measure(kind, responses=responses)
    measured.save(tmp_path / "stats.safetensors")
    assert_same(fs.PathStatistics.load(tmp_path / "stats.safetensors"), measured)
    assert [file.name for file in tmp_path.iterdir()] == ["stats.safetensors"]


def test_merge_is_measuring_more(stats):
    more = measure(seed=1)
    both = stats.merge(more)
    assert both.samples == 6
    assert both.model_calls == stats.model_calls + more.model_calls
    assert torch.equal(both.response_gram, torch.cat([stats.response_gram, more.response_gram]))
    assert torch.equal(both.select([3, 4, 5]).gram, more.gram)


def test_merge_refuses_the_same_paths_twice(stats):
    with pytest.raises(ValueError, match="repeats 3 of these paths"):
        stats.merge(stats)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"levels": 13}, "other levels"), ({"kind": "v"}, "another noise process"),
     ({"responses": False}, "responses of the same deviated paths"),
     ({"dtype": torch.bfloat16}, "other was measured in torch.bfloat16, and these statistics in torch.float32")],
)  # fmt: skip
def test_merge_refuses_what_does_not_fit(stats, options, message):
    with pytest.raises(ValueError, match=message):
        stats.merge(measure(seed=1, **options))


def test_merge_refuses_another_call_of_a_pipeline(stats):
    call = Origin(pipeline="P", fingerprint="a" * 12 + "-b-c-float32-d")
    calls = {"call": "e-b-c-float32-d", "weights": "a" * 12 + "-b-c-float32-e", "disk": "a" * 12 + "-b-c-float32-"}
    one, more = replace(stats, fingerprint=None, origin=call), replace(measure(seed=1), fingerprint=None, origin=call)
    others = {name: replace(more, origin=replace(call, fingerprint=digits)) for name, digits in calls.items()}
    for name, message in (("call", "called with the same prompts and arguments"), ("weights", "the same weights")):
        with pytest.raises(ValueError, match=f"other must be of .*{message}"):
            one.merge(others[name])
    assert one.merge(more).samples == one.merge(others["disk"]).samples == 6  # not known where weights were on disk


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


def test_prints_in_a_line(stats):
    bare = replace(stats, origin=None)
    assert repr(bare) == "PathStatistics(ve, 12 levels, 3 samples of (4,), with responses, 72 model calls)"
    assert repr(stats) == repr(bare)[:-1] + f", of GaussianMixture.denoise, {stats.origin.date})"
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


def test_merge_refuses_another_network(stats):
    other = exact_denoisers(mixture(seed=1))["x0"]
    with pytest.raises(ValueError, match="another network"):
        stats.merge(fs.measure(other, (4,), levels=12, samples=3, seed=1, progress=False))


def test_increments_are_saved_only_if_asked_for(tmp_path):
    kept = measure(keep_increments=True)
    kept.save(tmp_path / "stats.safetensors")
    loaded = fs.PathStatistics.load(tmp_path / "stats.safetensors")
    assert loaded.increments is None
    assert_same(loaded, kept)
    assert "increments" not in load_file(tmp_path / "stats.safetensors")
    kept.save(tmp_path / "all.safetensors", vectors=True)
    loaded = fs.PathStatistics.load(tmp_path / "all.safetensors")
    assert torch.equal(loaded.increments, kept.increments)
    assert torch.equal(loaded.responses, kept.responses)


def rewritten(path, header=None, tensors=None, **options):
    """Write the file again with changes, as version 2 wrote it: without a checksum."""
    entries, found = header_of(path) | {"version": 2} | (header or {}), load_file(path)
    del entries["sha256"]
    found = {name: value for name, value in (found | (tensors or {})).items() if value is not None}
    contiguous = {name: value.contiguous() for name, value in found.items()}
    save_file(contiguous, path, metadata={"fastsched": json.dumps(entries)})


def test_files_of_version_2_load(stats, tmp_path):
    path = tmp_path / "stats.safetensors"
    stats.save(path)
    rewritten(path)
    assert_same(fs.PathStatistics.load(path), stats)


HEADERS = [
    ({"version": 3}, "its checksum is another one"), ({"version": 99}, "version 99, and the"),
    ({"version": "1"}, "version '1'"), ({"version": None}, "version None"), ({"version": True}, "version True"),
    ({"process": {"kind": "vq"}}, "kind must be"), ({"process": "ve"}, "is wrong"),
    ({"process": None}, "is wrong"), ({"process": {"kind": "ve", "sigma_min": 9, "sigma_max": 1}}, "sigma_min must be"),
    ({"data_std": None}, "data_std = None"), ({"data_std": -1.0}, "data_std = -1.0"), ({"model_calls": "x"}, "calls"),
    ({"changes": [[1.0, 2.0]]}, r"change \[1.0, 2.0\]"), ({"changes": [[2, 1]]}, "2 levels s"),
    ({"changes": None}, "changes = None"),
    ({"deviated": [[2]]}, "values to unpack|expected 2"), ({"deviated": []}, "deviated paths together|has shape"),
    ({"deviated": [[3, 1], [2, 2]]}, r"deviated path \[3, 1\]"), ({"deviated": [[0, 1], [2, 2]]}, r"path \[0, 1\]"),
    ({"deviated": [[2, 7], [2, 2]]}, r"deviated path \[2, 7\]"), ({"deviated": None}, "deviated = None"),
    ({"spare": 1}, "not known: spare"), ({"format": "x"}, "does not hold path statistics"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), HEADERS)
def test_changed_header(stats, tmp_path, change, message):
    path = tmp_path / "stats.safetensors"
    stats.save(path)
    rewritten(path, change)
    with pytest.raises(ValueError, match=message) as caught:
        fs.PathStatistics.load(path)
    assert str(path) in str(caught.value)


NAN = float("nan")
TENSORS = {
    "gram missing": (lambda t: {"gram": None}, "lacks an entry"),
    "gram misshapen": (lambda t: {"gram": t["gram"][:, :5]}, "gram has shape"),
    "gram NaN": (lambda t: {"gram": t["gram"] * NAN}, "holds NaN or inf in gram"),
    "gram negative": (lambda t: {"gram": -t["gram"]}, "negative squared norms"),
    "gram not symmetric": (lambda t: {"gram": t["gram"].triu()}, "not symmetric"),
    "gram half": (lambda t: {"gram": t["gram"].half()}, "gram in torch.float16"),
    "gram of no vectors": (lambda t: {"gram": t["gram"] - t["gram"].diagonal(dim1=1, dim2=2).diag_embed()}, "exceed"),
    "gram too large": (lambda t: {"gram": t["gram"] * 1e300}, "gram beyond float32"),
    "cross of no vectors": (lambda t: {"cross": t["cross"] * 1e6}, "response_cross with products"),
    "no fingerprint": (lambda t: {"fingerprint": t["fingerprint"][:0]}, "fingerprint has shape"),
    "s rising": (lambda t: {"s": t["s"].flip(0)}, "do not descend"),
    "s NaN": (lambda t: {"s": t["s"] * NAN}, "NaN or inf"),
    "s repeating": (lambda t: {"s": t["s"].clamp(max=1.0)}, "do not descend"),
    "s integers": (lambda t: {"s": torch.arange(12, 0, -1)}, "s in torch.int64"),
    "s of two dimensions": (lambda t: {"s": t["s"][:, None]}, "s has shape"),
    "s elsewhere": (lambda t: {"s": t["s"] * 1e6}, "far outside"),
    "ends NaN": (lambda t: {"ends": t["ends"] * NAN}, "NaN or inf"),
    "ends of one dimension": (lambda t: {"ends": t["ends"][:, 0]}, "no samples"),
    "ends fewer": (lambda t: {"ends": t["ends"][:2]}, "ends has shape"),
    "seeds floating": (lambda t: {"seeds": t["seeds"].float()}, "seeds in torch.float32"),
    "seeds repeating": (lambda t: {"seeds": t["seeds"] * 0}, "repeat or are negative"),
    "no samples": (lambda t: {k: v if k in ("s", "fingerprint") else v[:0] for k, v in t.items()}, "no samples"),
    "half of the responses": (lambda t: {"w_squared": None}, "together"),
    "negative responses": (lambda t: {"w_squared": -t["w_squared"]}, "negative squared norms"),
    "spare tensor": (lambda t: {"spare": t["s"].clone()}, "not known: spare"),
    "increments alone": (lambda t: {"increments": torch.zeros(3, 11, 4)}, "increments and responses"),
    "increments misshapen": (lambda t: {"increments": torch.zeros(3, 9, 4)}, "increments has shape"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_changed_tensor(stats, tmp_path, name):
    change, message = TENSORS[name]
    path = tmp_path / "stats.safetensors"
    stats.save(path)
    rewritten(path, tensors=change(load_file(path)))
    with pytest.raises(ValueError, match=message) as caught:
        fs.PathStatistics.load(path)
    assert str(path) in str(caught.value)


def test_a_flipped_bit_of_any_byte_is_found(tmp_path):
    path = tmp_path / "stats.safetensors"
    fs.measure(KINDS["x0"], (4,), levels=4, samples=1, progress=False).save(path)
    whole = path.read_bytes()
    accepted = []
    for n in range(0, 8 * len(whole), 3):  # two or three bits of every byte
        damaged = bytearray(whole)
        damaged[n // 8] ^= 1 << n % 8
        path.write_bytes(damaged)
        try:
            fs.PathStatistics.load(path)
            accepted.append(n)
        except ValueError:
            pass
    assert accepted == []


@pytest.mark.parametrize("levels", [[20.0, 1.0, 1e-9], [1e9, 1.0, 0.1], [math.inf, 1.0, 0.1]])
def test_levels_that_no_file_could_hold_are_refused_before_the_calls(levels):
    with pytest.raises(ValueError, match=r"levels must be near those of the noise process, 0\.01 to 9"):
        measured_levels(
            fs.Denoiser.from_denoiser(fs.oracles.Gaussian(0.5, (3,)).denoise, 0.01, 9.0), torch.tensor(levels)
        )


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    denoiser = fs.Denoiser.from_denoiser(fs.oracles.Gaussian(0.5, (3,)).denoise, 0.01, 9.0)
    stats = fs.measure(denoiser, (3,), levels=8, samples=2, progress=False)
    stats.save(tmp_path / "s")
    before = (tmp_path / "s").read_bytes()
    for wrong in (stats.select([0, 0]), replace(stats, gram=stats.gram * math.nan)):
        with pytest.raises(ValueError, match="cannot be written, because it could not be read again: it holds"):
            wrong.save(tmp_path / "s")
    assert (tmp_path / "s").read_bytes() == before


@pytest.fixture(scope="module")
def measured() -> fs.PathStatistics:
    denoiser = fs.Denoiser.from_denoiser(fs.oracles.Gaussian(0.5, (3,)).denoise, 0.01, 9.0)
    return fs.measure(denoiser, (3,), levels=8, samples=2, keep_increments=True, progress=False)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gram", lambda x: x.half(), "holds gram in torch.float16"),
        ("gram", lambda x: x.tolist(), "holds gram = .* not a tensor"),
        ("gram", lambda x: x[:1], "gram has shape"),
        ("gram", lambda x: x.clone().requires_grad_(), "without gradients"),
        ("s", lambda x: x.flip(0), "levels s that do not descend"),
        ("s", lambda x: 1e5 * x, "levels s far outside"),
        ("shape", lambda _: (4,), "ends are of shape"),
        ("seeds", lambda x: x.double(), "holds seeds in torch.float64"),
        ("data_std", lambda _: math.nan, "has data_std = nan"),
        ("model_calls", lambda _: -1, "has model_calls = -1"),
        ("process", lambda _: "ve", "holds process = 've'"),
        ("deviated", lambda _: (), "response_cross has shape"),
        ("origin", lambda _: "me", "holds origin = 'me'"),
    ],
)
def test_statistics_made_by_hand_are_checked(measured, name, change, message):
    with pytest.raises((TypeError, ValueError), match=f"PathStatistics .*{message}"):
        replace(measured, **{name: change(getattr(measured, name))})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x * math.nan, "holds NaN or inf in gram"),
        (lambda x: -x, "negative squared norms"),
        (lambda x: x.triu(), "not symmetric"),
        (lambda x: 0 * x, "exceed those of their norms"),
    ],
)
def test_products_of_no_vectors_are_refused_where_they_are_used(measured, change, message):
    wrong = replace(measured, gram=change(measured.gram))
    for use in (lambda: fs.optimal_schedule(wrong, 3), lambda: fs.predict_error(wrong, [9.0, 1.0, 0.0], "ddim")):
        with pytest.raises(ValueError, match=f"stats .*{message}"):
            use()


def test_writing_into_levels_and_products_does_not_change_statistics(stats):
    """The file of a measurement, and every schedule that follows from it, would be of other levels."""
    before, given = fs.optimal_schedule(stats, 4), stats.gram
    other = replace(stats, gram=given)
    for name in ("s", "seeds", "gram", "response_cross", "response_gram", "fingerprint"):
        getattr(stats, name).fill_(1)
    given.fill_(1.0)
    assert fs.optimal_schedule(stats, 4) == fs.optimal_schedule(other, 4) == before
    assert replace(stats) == stats
