"""How much memory a measurement takes, by counting allocators, and what happens where there is less."""

import pytest
import torch
from models import exact_denoiser, exact_denoisers, mixture
from torch.profiler import ProfilerActivity, profile
from waiting_device import DEVICE, waiting_device

import fastsched as fs
from fastsched.measurement import memory
from fastsched.measurement.batches import Batches, measured
from fastsched.measurement.deviated_paths import deviated_paths
from fastsched.measurement.path_following import Measurement, measurement_steps
from fastsched.sampling.random_streams import sample_seeds

GIB = 2**30


def denoiser_of(calls=None):
    def network(z, s):
        if calls is not None:
            calls.append(len(z))
        return z / (1 + s[0] ** 2)

    return fs.Denoiser.from_denoiser(network, 0.02, 20.0)


def run_of(levels=48, keep=False):
    s = denoiser_of().levels(levels)
    return Measurement(denoiser_of(), s, torch.device("cpu"), torch.float32, deviated_paths(levels), keep, "device")


def peak_on_cpu(run):
    """The most bytes that PyTorch's CPU allocator had given out at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


@pytest.mark.parametrize("keep", [False, True])
def test_a_path_takes_the_states_that_are_documented(keep):
    """At most 2.4 N float32 states, the output of the network among them, and no more than was predicted."""
    d, levels = 250_000, 48
    options = {"levels": levels, "samples": 1, "keep_increments": keep, "progress": False}
    peak = peak_on_cpu(lambda: fs.measure(denoiser_of(), (d,), **options))
    run = run_of(levels, keep)
    predicted = memory.need(run, 1, 1, d).cpu
    assert 2 * levels * 4 * d < peak < 2.4 * levels * 4 * d
    assert 0.9 * predicted < peak < predicted


def test_batches_take_no_more_than_their_vectors():
    """All samples' vectors are kept once, whatever is joined."""
    d, levels, samples = 50_000, 24, 6
    options = {"levels": levels, "samples": samples, "batch_size": 2, "progress": False, "checks": False}
    peak = peak_on_cpu(lambda: fs.measure(denoiser_of(), (d,), keep_increments=True, **options))
    run = run_of(levels, keep=True)
    assert peak < memory.need(run, 2, samples, d).cpu
    assert peak < 1.5 * samples * run.vectors * 4 * d


def test_tuning_takes_no_copy_of_what_was_measured():
    """Beside the increments and responses: what runs find, 13 vectors a run of 6 steps, and parts in float64."""
    d, samples = 100_000, 6
    stats = fs.measure(denoiser_of(), (d,), levels=24, samples=samples, keep_increments=True, progress=False)
    start = fs.Schedule(fs.baselines.karras(6, 0.02, 20.0, spare_last=True), "dpmpp_2m")
    peak = peak_on_cpu(lambda: fs.tune(denoiser_of(), stats, start, trials=1, checks=False, progress=False))
    assert stats.responses is not None
    assert peak < 1.4 * (stats.increments.nbytes + stats.responses.nbytes)


@pytest.mark.parametrize("kind", ["epsilon", "velocity", "edm"])
@pytest.mark.parametrize("store", ["device", "cpu"])
def test_the_device_holds_what_is_documented(store, kind):
    levels, d, paths = 24, 20_000, 2
    known = exact_denoisers(mixture())[kind]
    denoiser = type(known)(lambda x, condition: 0.5 * x, known.process, known.prediction)
    s = denoiser.levels(levels)
    run = Measurement(denoiser, s, DEVICE, torch.float32, deviated_paths(levels), store=store)
    with waiting_device() as waits, torch.no_grad():
        run.drive(measurement_steps(run, sample_seeds(0, paths), (d,)))
    rows = 0 if store == "cpu" else 2 * levels - 3
    assert waits.peak <= 4 * d * paths * (memory.WORKING + rows) == memory.need(run, paths, paths, d).device
    assert waits.peak > 4 * d * paths * (memory.WORKING - 3 + rows)


def test_where_vectors_are_kept_changes_no_bit():
    for keep in (False, True):
        options = {"levels": 12, "samples": 3, "keep_increments": keep, "progress": False}
        one, other = (
            fs.measure(exact_denoiser(mixture()), (4,), store=store, **options) for store in ("device", "cpu")
        )
        assert torch.equal(one.vector_gram, other.vector_gram)
    with pytest.raises(ValueError, match="store must be one of 'device', 'cpu', got 'disk'"):
        fs.measure(denoiser_of(), (4,), store="disk")


def with_free(monkeypatch, **free):
    monkeypatch.setattr(memory, "free_bytes", lambda device: free.get(device.type))


def test_what_does_not_fit_is_refused_before_the_first_call(monkeypatch):
    calls = []
    measure = lambda **options: fs.measure(denoiser_of(calls), (100_000,), samples=8, progress=False, **options)
    one = memory.need(run_of(), 1, 8, 100_000).cpu
    with_free(monkeypatch, cpu=int(2.5 * one))
    with pytest.raises(
        MemoryError, match=r"8 paths at once over 48 levels of 100,000 elements take .*batch_size=2 fits"
    ):
        measure(batch_size=8)
    with_free(monkeypatch, cpu=one // 2)
    with pytest.raises(MemoryError, match=r"lower batch_size \(now 8\), then levels"):
        measure()
    with pytest.raises(MemoryError, match=r"increments of 8 samples take .*lower samples"):
        measure(keep_increments=True)
    assert calls == []


def test_what_a_group_gathers_is_predicted(monkeypatch):
    """The first process gets the increments of all samples, beside its own; a process that sends has pieces."""
    run = run_of(keep=True)
    d, samples, processes = 2_000_000, 8, 4
    alone, first, other = (
        memory.need(run, 1, samples // processes, d, gathered=gathered).cpu
        for gathered in ((0, 1), (samples, processes), (0, processes))
    )
    vectors = run.vectors * 4 * d
    assert first > (samples + samples // processes) * vectors
    assert alone <= other < first - samples * vectors
    with_free(monkeypatch, cpu=(alone + first) // 2)
    batches = Batches((d,), sample_seeds(0, 2), 1, gathered=(samples, processes), progress=False)
    with pytest.raises(MemoryError, match="increments of 2 samples"):
        measured(run, batches)


def test_where_the_caller_did_not_choose_fewer_paths_are_followed_at_once(monkeypatch):
    calls = []
    one = memory.need(run_of(), 1, 8, 100_000).cpu
    with_free(monkeypatch, cpu=int(2.5 * one))
    with pytest.warns(UserWarning, match=r"2 paths are followed at once instead of all 8.*batch_size=2"):
        fs.measure(denoiser_of(calls), (100_000,), samples=8, progress=False, checks=False)
    assert set(calls) == {2}


def test_vectors_are_kept_on_the_cpu_where_they_would_take_half_of_the_device(monkeypatch):
    run = Measurement(denoiser_of(), denoiser_of().levels(48), DEVICE, torch.float32, deviated_paths(48))
    size = memory.need(memory.replace(run, store="device"), 4, 4, 1000).device
    with_free(monkeypatch, meta=2 * size + 2)
    assert memory.with_store(run, 4, 1000).store == "device"
    with_free(monkeypatch, meta=2 * size - 2)
    with pytest.warns(UserWarning, match="kept in the CPU's memory, because of .* free on meta they would take"):
        assert memory.with_store(run, 4, 1000).store == "cpu"
    with_free(monkeypatch)
    assert memory.with_store(run, 4, 1000).store == "device"


def test_free_memory_is_that_of_the_machine_and_its_control_group(monkeypatch, tmp_path):
    cpu = torch.device("cpu")
    assert GIB / 16 < memory.free_bytes(cpu) < 2**50
    for name, text in (("max", "3000000"), ("current", "1000000"), ("stat", "anon 5\ninactive_file 200000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.free_bytes(cpu) == 2_200_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_bytes(cpu) > GIB / 16
    assert memory.free_bytes(torch.device("meta")) is None
