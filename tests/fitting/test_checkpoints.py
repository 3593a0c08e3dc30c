"""No finished path or run of a fit is lost, whatever ends it."""

import errno
import os
from dataclasses import replace

import pytest
import torch
from models import exact_denoiser, mixture

import fastsched as fs
from fastsched.fitting.rollouts import Evaluations, Rollout
from fastsched.fitting.run_log import RunLog, identity
from fastsched.measurement.to_file import measure_to_file

ORACLE = mixture(5)
LEVELS, SAMPLES, STEPS = 12, 3, 4
PATH_CALLS = 2 * LEVELS - 2
CHECKS = 6  # of a network of five elements
CALLS = SAMPLES * PATH_CALLS + 67


class Failing:
    """The exact denoiser, until it has been called so often."""

    def __init__(self, after=10**6, error=None, oracle=ORACLE):
        self.after, self.error, self.oracle, self.calls = after, error, oracle, 0

    def __call__(self, z, s):
        self.calls += len(z)
        if self.calls > self.after:
            raise self.error
        return self.oracle.denoise(z, s)


def fit(network, **options):
    options = {"levels": LEVELS, "samples": SAMPLES, "model_calls": CALLS, "progress": False, **options}
    return fs.fit(fs.Denoiser.from_denoiser(network, 0.02, 20.0), (5,), STEPS, **options)


def same(one, two):
    assert torch.equal(one.sigmas, two.sigmas)
    assert one.measured_error == two.measured_error


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    network, path = Failing(), tmp_path_factory.mktemp("whole") / "fit.safetensors"
    return fit(network, checkpoint=path), network.calls, path


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("broken")])
@pytest.mark.parametrize("after", [3, 50, 70, 85, 100, 120])
def test_the_same_call_goes_on_to_the_same_bits(whole, tmp_path, error, after):
    path = tmp_path / "fit.safetensors"
    assert after < whole[1]
    with pytest.raises(type(error)):
        fit(Failing(after, error), checkpoint=path)
    again = Failing()
    same(fit(again, checkpoint=path), whole[0])
    assert again.calls <= whole[1] - after + PATH_CALLS + CHECKS + 1


@pytest.mark.parametrize("after", [9, 40, 60, 75])
def test_asking_the_network_again_takes_no_run_from_the_same_call(tmp_path, after):
    calls = SAMPLES * PATH_CALLS + CHECKS + 3 * SAMPLES * STEPS  # three runs of all samples, and no call more
    whole = fit(Failing(), checkpoint=tmp_path / "whole.safetensors", model_calls=calls)
    with pytest.raises(KeyboardInterrupt):
        fit(Failing(after, KeyboardInterrupt()), checkpoint=tmp_path / "fit.safetensors", model_calls=calls)
    found = fit(Failing(), checkpoint=tmp_path / "fit.safetensors", model_calls=calls)
    same(found, whole)
    assert found.origin.model_calls == whole.origin.model_calls


def test_a_finished_fit_is_read_from_its_files(whole):
    network = Failing()
    same(fit(network, checkpoint=whole[2]), whole[0])
    assert network.calls == 1  # whether it is the same network


def test_with_statistics_paths_and_runs_are_kept_too(tmp_path):
    path, denoiser = tmp_path / "fit.safetensors", exact_denoiser(ORACLE, 0.02, 20.0)
    stats = fs.measure(denoiser, (5,), levels=LEVELS, samples=SAMPLES, progress=False)
    with pytest.raises(KeyboardInterrupt):
        fit(Failing(90, KeyboardInterrupt()), checkpoint=path, stats=stats)
    again, whole = Failing(), Failing()
    same(fit(again, checkpoint=path, stats=stats), fit(whole, stats=stats, batch_size=1))
    assert again.calls <= whole.calls - 90 + PATH_CALLS + 2


@pytest.mark.parametrize(
    ("options", "message"),
    [({"levels": 13}, "other levels"), ({"samples": 2}, "more than 2 samples"), ({"seed": 1}, "another seed"),
     ({"model_calls": 134}, "model_calls = 133, not 134"), ({"solver": "ddim"}, "solver = 'dpmpp_2m', not 'ddim'"),
     ({"batch_size": 2}, "batch_size = 1, not 2"), ({"dtype": torch.float64}, "dtype")],
)  # fmt: skip
def test_another_calls_checkpoint_is_refused(whole, options, message):
    with pytest.raises(ValueError, match=message):
        fit(Failing(), checkpoint=whole[2], **options)


def test_more_samples_are_not_added_to_the_measurement_of_a_fit(whole):
    network = Failing(0, AssertionError("was called"))
    with pytest.raises(ValueError, match="with 3 samples, not 4"):
        fit(network, checkpoint=whole[2], samples=4, model_calls=200)
    denoiser = fs.Denoiser.from_denoiser(network, 0.02, 20.0)
    for keep in (False, True):
        with pytest.raises(ValueError, match="with 3 samples, not 4"):
            fs.measure(denoiser, (5,), levels=LEVELS, samples=4, keep_increments=keep, checkpoint=whole[2])
    with pytest.raises(ValueError, match="with 3 samples, not 4"):
        measure_to_file(denoiser, (5,), whole[2], levels=LEVELS, samples=4, resume=True)
    same(fit(Failing(), checkpoint=whole[2]), whole[0])


@pytest.mark.parametrize("begun", [torch.float32, torch.float64])
def test_an_unfinished_measurement_goes_on_in_its_own_dtype(tmp_path, begun):
    path, other = tmp_path / "fit.safetensors", {torch.float32: torch.float64, torch.float64: torch.float32}[begun]
    with pytest.raises(KeyboardInterrupt):
        fit(Failing(50, KeyboardInterrupt()), checkpoint=path, dtype=begun)
    assert fs.PathStatistics.load(path).samples < SAMPLES
    with pytest.raises(ValueError, match=f"was measured with dtype {begun}; resume it with the same settings"):
        fit(Failing(), checkpoint=path, dtype=other)
    fit(Failing(), checkpoint=path, dtype=begun)


def test_another_networks_checkpoint_is_refused(whole):
    with pytest.raises(ValueError, match="another one than that of the earlier measurement"):
        fit(Failing(oracle=mixture(5, seed=1)), checkpoint=whole[2])


def test_files_are_checked_before_the_first_call(tmp_path):
    network = Failing(0, AssertionError("was called"))
    os.mkdir(tmp_path / "fit.runs")
    for path in (tmp_path / "no" / "fit", tmp_path / "fit"):
        with pytest.raises(OSError, match=r"no folder|is a folder"):
            fit(network, checkpoint=path)
    assert network.calls == 0


@pytest.mark.parametrize(
    ("after", "message"),
    [(CHECKS + 2 * PATH_CALLS + 5, "optimal_schedule for the 2 paths"), (100, r"the best of the \d that were run")],
)
def test_an_interrupt_hands_back_the_best_schedule(after, message):
    with pytest.warns(UserWarning, match=message):
        found = fit(Failing(after, KeyboardInterrupt()), batch_size=1)
    assert found.steps == STEPS
    assert (found.measured_error is not None) == (after == 100)
    with pytest.raises(KeyboardInterrupt):
        fit(Failing(3, KeyboardInterrupt()))


def test_the_best_so_far_is_a_schedule_that_was_run():
    """After the last run nothing is better than what the finished fit returns."""
    network = Failing()
    found = fit(network)
    with pytest.warns(UserWarning, match="interrupted"):
        partial = fit(Failing(network.calls - 1, KeyboardInterrupt()))
    assert partial.measured_error >= found.measured_error
    assert found.origin.model_calls == network.calls
    assert partial.origin == replace(found.origin, model_calls=network.calls - SAMPLES * STEPS)  # without the last run


# --- the file of runs


def rollout(seed, evaluations=True):
    noise = torch.Generator().manual_seed(seed)
    make = lambda: torch.randn(2, 3, generator=noise)
    kept = Evaluations((float("inf"), 0.1), (make(), make()), (make(), make()))
    return Rollout(make(), kept if evaluations else None)


def schedule(top):
    return fs.Schedule([top, 1.0, 0.0], "ddim")


@pytest.fixture(scope="module")
def what():
    stats = fs.measure(exact_denoiser(ORACLE), (5,), levels=6, samples=2, progress=False)
    return identity(stats, steps=2)


def equal(one, two):
    if one is None or two is None:
        return one is two
    if (one.evaluations is None) != (two.evaluations is None) or not torch.equal(one.ends, two.ends):
        return False
    found, wanted = one.evaluations, two.evaluations
    return found is None or (
        found.s == wanted.s
        and all(map(torch.equal, found.states, wanted.states))
        and all(map(torch.equal, found.denoised, wanted.denoised))
    )


def refuse():
    raise AssertionError("was made again")


RUNS = [(3.0, rollout(0)), (4.0, rollout(1, evaluations=False)), (5.0, None), (6.0, rollout(2))]


@pytest.fixture
def filled(tmp_path, what):
    path = tmp_path / "x.runs"
    for top, made in RUNS:
        assert RunLog(path, what).run(schedule(top), 0, 2, lambda made=made: made) is made
    return path


def test_runs_are_read_as_they_were(filled, what):
    log = RunLog(filled, what)
    assert len(log) == 4
    for top, made in RUNS:
        assert equal(log.run(schedule(top), 0, 2, refuse), made)
    for other in ((schedule(3.0), 0, 1), (schedule(3.5), 0, 2), (fs.Schedule([3.0, 1.0, 0.0], "heun"), 0, 2)):
        with pytest.raises(AssertionError, match="made again"):
            log.run(*other, refuse)


def test_an_unfinished_end_is_dropped(filled, what):
    whole = filled.read_bytes()
    first = RunLog(filled, what)._found
    starts = sorted(start for start, _ in first.values())
    for size in [*range(starts[-1] - 40, len(whole), 97), len(whole) - 1]:
        filled.write_bytes(whole[:size])
        log = RunLog(filled, what)
        assert len(log) == 3
        assert equal(log.run(schedule(6.0), 0, 2, lambda: RUNS[3][1]), RUNS[3][1])
        assert filled.read_bytes() == whole


def test_a_full_disk_is_reported_with_the_file_s_name(filled, what, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    log = RunLog(filled, what)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*x\.runs"):
        log.run(schedule(7.0), 0, 2, lambda: RUNS[0][1])


def test_damage_is_noticed(filled, what):
    whole = bytearray(filled.read_bytes())
    last = max(start for start, _ in RunLog(filled, what)._found.values())
    for position in range(last - 40, len(whole), 31):
        damaged = bytearray(whole)
        damaged[position] ^= 4
        filled.write_bytes(damaged)
        if position >= last - 32:
            with pytest.warns(UserWarning, match="damaged after its first 3 runs"):
                log = RunLog(filled, what)
        else:
            log = RunLog(filled, what)  # longer than the file: as if unfinished
        assert len(log) == 3


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 100])
def test_another_file_is_refused(tmp_path, what, content):
    path = tmp_path / "x.runs"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="does not hold runs of fastsched"):
        RunLog(path, what)
    assert path.read_bytes() == content


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_in_a_run_says_what_to_lower(tmp_path, error):
    path = tmp_path / "fit.safetensors"
    with pytest.raises(MemoryError, match=r"2 samples at once; lower batch_size \(now 2\)"):
        fit(Failing(90, error), batch_size=2, checkpoint=path)
    assert fs.PathStatistics.load(path).samples == SAMPLES


@pytest.fixture(scope="module")
def measured():
    denoiser = exact_denoiser(ORACLE, 0.02, 20.0)
    return fs.measure(denoiser, (5,), levels=LEVELS, samples=SAMPLES, keep_increments=True, progress=False)


def tune(network, stats, start=None, **options):
    start = fs.optimal_schedule(stats, STEPS) if start is None else start
    denoiser = fs.Denoiser.from_denoiser(network, 0.02, 20.0)
    return fs.tune(denoiser, stats, start, **{"trials": 3, "progress": False, **options})


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("broken")])
@pytest.mark.parametrize("after", [1, 8, 20, 40])
def test_tuning_goes_on_to_the_same_bits(measured, tmp_path, error, after):
    path, network, again = tmp_path / "tune.runs", Failing(), Failing()
    whole = tune(network, measured, batch_size=1)
    with pytest.raises(type(error)):
        tune(Failing(after, error), measured, checkpoint=path)
    found = tune(again, measured, checkpoint=path)
    same(found.schedule, whole.schedule)
    assert torch.equal(found.errors, whole.errors)
    assert found.trials == whole.trials
    assert again.calls <= network.calls - after + STEPS + 1  # at most one run twice, and whether it is the network


def test_tuning_goes_on_with_more_trials_and_from_an_audition(measured, tmp_path):
    path, denoiser = tmp_path / "tune.runs", exact_denoiser(ORACLE, 0.02, 20.0)
    tune(Failing(), measured, checkpoint=path, trials=1)
    more, network = tune(Failing(), measured, batch_size=1), Failing()
    assert tune(network, measured, checkpoint=path).trials == more.trials
    assert network.calls == 2 * SAMPLES * STEPS + 1  # the first two runs are in the file
    audition = fs.audition(denoiser, measured, STEPS, progress=False)
    again, first = tmp_path / "again.runs", tune(Failing(), measured, audition, batch_size=1)
    for _ in range(2):
        assert tune(Failing(), measured, audition, checkpoint=again).trials == first.trials


def test_an_interrupted_tuning_hands_back_the_best_run(measured):
    with pytest.warns(UserWarning, match="the best of the 2 schedules that were run"):
        found = tune(Failing(1 + 2 * SAMPLES * STEPS + 3, KeyboardInterrupt()), measured)
    assert len(found.trials) == 2
    with pytest.raises(KeyboardInterrupt):
        tune(Failing(3, KeyboardInterrupt()), measured)


def test_a_file_of_other_runs_is_refused_before_a_run(measured, tmp_path):
    path = tmp_path / "tune.runs"
    tune(Failing(), measured, checkpoint=path, trials=0)
    other = fs.optimal_schedule(measured, STEPS - 1)
    for start, options in ((other, {}), (None, {"batch_size": 2})):
        network = Failing()
        with pytest.raises(ValueError, match="runs of another call"):
            tune(network, measured, start, checkpoint=path, **options)
        assert network.calls == 1
    with pytest.raises(OSError, match="folder"):
        tune(Failing(0, AssertionError()), measured, checkpoint=tmp_path / "none" / "x")


@pytest.mark.parametrize("what", ["measure", "fit", "tune"])
def test_relative_files_stay_in_the_folder_of_the_call(measured, tmp_path, monkeypatch, what):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    monkeypatch.chdir(first)

    class Moving(Failing):
        def __call__(self, z, s):
            os.chdir(second)
            return super().__call__(z, s)

    if what == "tune":
        tune(Moving(), measured, checkpoint="kept")
    elif what == "fit":
        fit(Moving(), checkpoint="kept")
    else:
        denoiser = fs.Denoiser.from_denoiser(Moving(), 0.02, 20.0)
        fs.measure(denoiser, (5,), levels=LEVELS, samples=2, checkpoint="kept", progress=False)
    assert not list(second.iterdir())
    assert {file.name for file in first.iterdir()} == {"kept", *(["kept.runs"] if what == "fit" else [])}
