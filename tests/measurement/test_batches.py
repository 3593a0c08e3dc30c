"""No finished path is lost, whatever ends a measurement."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from models import exact_denoiser, mixture

import fastsched as fs
from fastsched.denoisers.noise import FlowMatching, VarianceExploding
from fastsched.measurement.to_file import measure_to_file

ORACLE = mixture()


class Thousand(FlowMatching):
    """Flow matching whose network is given times up to 1000."""

    def timestep(self, s):
        return 1000 * super().timestep(s)


@dataclass(frozen=True)
class Named(VarianceExploding):
    """A noise process with an entry that files do not have."""

    name: str = "mine"


class Failing:
    """The exact denoiser, until it has been called so often."""

    def __init__(self, after, error):
        self.after, self.error, self.calls = after, error, 0

    def __call__(self, z, s):
        self.calls += 1
        if self.calls > self.after:
            raise self.error
        return ORACLE.denoise(z, s)


def measure(network, **options):
    denoiser = fs.Denoiser.from_denoiser(network, 0.02, 20.0)
    return fs.measure(denoiser, (4,), **{"levels": 12, "samples": 4, "progress": False, **options})


CALLS = 22  # of a path over 12 levels


def same(one, two):
    names = ("seeds", "gram", "ends", "response_cross", "response_gram", "increments", "responses")
    for name in names:
        left, right = getattr(one, name), getattr(two, name)
        assert (left is None) == (right is None), name
        assert left is None or torch.equal(left, right), name
    assert one.data_std == two.data_std


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("broken")])
@pytest.mark.parametrize("after", [3, 30, 60, 90])
def test_the_same_call_goes_on_to_the_same_bits(tmp_path, keep, error, after):
    path = tmp_path / "part.safetensors"
    options = {"keep_increments": keep, "checkpoint": path}
    with pytest.raises(type(error)):
        measure(Failing(after, error), **options)
    left = max(0, after - 5) // CALLS  # five calls check the network, of two samples the first
    assert (fs.PathStatistics.load(path).samples if path.exists() else 0) == left
    again = Failing(10**6, error)
    found = measure(again, **options)
    assert again.calls <= 6 + (4 - left) * CALLS
    whole = measure(ORACLE.denoise, keep_increments=keep, batch_size=1)
    same(found, whole)
    assert found.model_calls == whole.model_calls  # asking the network again does not count
    same(fs.PathStatistics.load(path), found)


def test_an_interrupt_hands_back_what_was_finished():
    with pytest.warns(UserWarning, match="hold the 2 paths that were finished"):
        partial = measure(Failing(5 + 2 * CALLS + 3, KeyboardInterrupt()), batch_size=1)
    same(partial, measure(ORACLE.denoise, samples=2, batch_size=1))
    with pytest.raises(KeyboardInterrupt):
        measure(Failing(5 + 3, KeyboardInterrupt()), batch_size=1)


def test_an_error_carries_what_was_finished():
    with pytest.raises(ValueError, match="broken") as caught:
        measure(Failing(5 + 2 * CALLS + 3, ValueError("broken")), batch_size=1)
    assert caught.value.partial.samples == 2


def test_a_last_warning_that_is_an_error_carries_all_paths():
    def drawing(z, s):
        np.random.random()  # noqa: NPY002 - of which the measurement warns when it is finished
        return ORACLE.denoise(z, s)

    with pytest.raises(UserWarning, match="random numbers were drawn during the measurement") as caught:
        measure(drawing)
    assert caught.value.partial.samples == 4


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_says_what_to_lower(error):
    with pytest.raises(MemoryError, match=r"4 paths at once over 12 levels .*lower batch_size \(now 4\)"):
        measure(Failing(10, error))
    with pytest.raises(MemoryError, match="out of memory") as caught:
        measure(Failing(5 + 2 * CALLS + 3, error), batch_size=1)
    assert caught.value.partial.samples == 2


def test_a_checkpoint_of_another_measurement_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    measure(ORACLE.denoise, checkpoint=path)
    other = mixture(seed=1)
    with pytest.raises(ValueError, match="another one than that of the earlier measurement"):
        measure(other.denoise, checkpoint=path)
    with pytest.raises(ValueError, match="other levels"):
        measure(ORACLE.denoise, checkpoint=path, levels=13)
    with pytest.raises(ValueError, match="increments not kept"):
        measure(ORACLE.denoise, checkpoint=path, keep_increments=True)


def test_increments_in_a_checkpoint_are_not_dropped(tmp_path):
    path, denoiser = tmp_path / "m.safetensors", fs.Denoiser.from_denoiser(ORACLE.denoise, 0.02, 20.0)
    measure(ORACLE.denoise, checkpoint=path, keep_increments=True, samples=2)
    with pytest.raises(ValueError, match="keep_increments=True"):
        measure(ORACLE.denoise, checkpoint=path)
    with pytest.raises(ValueError, match="keep_increments=True"):
        measure_to_file(denoiser, (4,), path, levels=12, samples=4, resume=True, progress=False)
    assert measure(ORACLE.denoise, checkpoint=path, samples=2).increments is not None  # nothing to add: all of the file
    assert measure(ORACLE.denoise, checkpoint=path, keep_increments=True).samples == 4


def test_the_file_is_checked_before_the_first_call(tmp_path):
    network = Failing(0, AssertionError("was called"))
    denoiser = fs.Denoiser.from_denoiser(network, 0.02, 20.0)
    for path, error in ((tmp_path / "no" / "x", FileNotFoundError), (tmp_path, IsADirectoryError)):
        with pytest.raises(error):
            measure_to_file(denoiser, (4,), path, overwrite=True, progress=False)
        with pytest.raises((error, ValueError)):
            measure(network, checkpoint=path)
    assert network.calls == 0


def test_a_measurement_into_a_file_resumes(tmp_path):
    path, denoiser = tmp_path / "m.safetensors", exact_denoiser(ORACLE, 0.02, 20.0)
    options = {"levels": 12, "progress": False}
    measure_to_file(denoiser, (4,), path, samples=2, **options)
    with pytest.raises(FileExistsError, match="resume it"):
        measure_to_file(denoiser, (4,), path, samples=4, **options)
    more = measure_to_file(denoiser, (4,), path, samples=4, resume=True, **options)
    assert more.samples == 4
    assert measure_to_file(denoiser, (4,), path, samples=2, overwrite=True, **options).samples == 2


def test_a_measurement_in_16_bits_resumes_where_they_are_rounded_otherwise(tmp_path):
    """On another device the fingerprint differs by up to 1%, more than that of another network in float32 may."""
    scale = lambda factor: lambda z, s: (factor * ORACLE.denoise(z.float(), s)).to(z.dtype)
    options = {"checkpoint": tmp_path / "part.safetensors", "dtype": torch.bfloat16}
    measure(scale(1.0), samples=2, **options)
    assert measure(scale(1.01), samples=4, **options).samples == 4


def test_the_former_module_still_works():
    with pytest.warns(DeprecationWarning, match="measurement.to_file"):
        from fastsched.measure_file import measure_to_file as former
    assert former is measure_to_file


def test_a_noise_process_of_the_users_own_class_resumes_with_a_warning(tmp_path):
    own = fs.Denoiser(lambda x, t: x * (t / 1000).reshape(-1, 1), Thousand(), "velocity")
    options = {"levels": 12, "checks": False, "progress": False, "checkpoint": tmp_path / "a.safetensors"}
    for samples in (2, 3):
        with pytest.warns(UserWarning, match="keeps the noise process Thousand as FlowMatching, .* another timestep"):
            stats = fs.measure(own, (4,), samples=samples, **options)
    assert isinstance(stats.process, Thousand)
    assert fs.optimal_schedule(stats, 2).timesteps[0] == 1000


def test_a_noise_process_that_no_file_can_keep_is_refused_before_the_first_call(tmp_path):
    network = Failing(0, AssertionError)
    denoiser = fs.Denoiser(network, Named(0.02, 20.0), "x0")
    with pytest.raises(ValueError, match="'ve' cannot be read from"):
        fs.measure(denoiser, (4,), samples=2, progress=False, checkpoint=tmp_path / "a.safetensors")
    assert network.calls == 0
