"""Networks that write where they should not, or answer in odd ways."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastsched as fs
from fastsched.denoisers.denoiser import placement
from fastsched.sampling.k_diffusion import sample_fitted


def shrink(x, t):
    return 0.1 * x


def test_a_network_may_write_into_its_input():
    def writing(x, t):
        t.zero_()
        return x.mul_(0.1)

    y, s = torch.ones(2, 3), torch.tensor([1.0, 0.5], dtype=torch.float64)
    for one, other in (
        (fs.Denoiser.from_velocity(writing), fs.Denoiser.from_velocity(shrink)),
        (fs.Denoiser.from_denoiser(writing, 0.1, 2.0), fs.Denoiser.from_denoiser(shrink, 0.1, 2.0)),
    ):
        assert torch.equal(one.denoise(y, s), other.denoise(y, s))
        assert torch.equal(one.raw_output(y, s), other.raw_output(y, s))
    assert torch.equal(y, torch.ones(2, 3))
    assert s.tolist() == [1.0, 0.5]


def test_a_network_may_return_the_same_buffer_at_every_call():
    buffer = torch.empty(2, 3)
    denoiser = fs.Denoiser.from_velocity(lambda x, t: torch.mul(x, 0.1, out=buffer))
    first = denoiser.raw_output(torch.ones(2, 3), 1.0)
    denoiser.raw_output(torch.zeros(2, 3), 1.0)
    assert torch.equal(first, torch.full((2, 3), 0.1))


def test_the_same_statistics_from_a_network_with_one_buffer():
    def velocity(x, t):
        s = t.reshape(-1, 1)  # of data N(0, 1), a little bent
        return (2 * s - 1) * x / ((1 - s) ** 2 + s**2) - 0.02 * torch.tanh(x)

    buffers = {}

    def buffered(x, t):
        out = buffers.setdefault(len(x), torch.empty_like(x))
        out.copy_(velocity(x, t))
        x.zero_()
        return out

    def stats(fn):
        return fs.measure(fs.Denoiser.from_velocity(fn), (3,), levels=12, samples=2, seed=1, progress=False)

    one, other = stats(buffered), stats(velocity)
    assert torch.equal(one.gram, other.gram)
    assert torch.equal(one.ends, other.ends)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "velocity"])
def test_answers_need_to_hold_until_the_next_call_only(prediction, samples):
    """As those of CUDA graphs: whatever was answered before is overwritten by the next call, the checks' included."""
    oracle = fs.oracles.GaussianMixture.random(8, 3, seed=0)
    before = []

    def wiped(answer):
        for each in before:
            each.fill_(math.nan)
        before.append(answer)
        return answer

    def stats(keep):
        if prediction == "velocity":
            net = lambda x, t: keep((x - oracle.denoise(x / (1 - t[:, None]), t / (1 - t))) / t[:, None])
            denoiser = fs.Denoiser.from_velocity(net, t_max=0.999)
        elif prediction == "x0":
            denoiser = fs.Denoiser.from_denoiser(lambda z, s: keep(oracle.denoise(z, s)), 0.02, 40.0)
        else:
            abar = 1 / (1 + torch.logspace(-1.7, 1.6, 100, dtype=torch.float64) ** 2)
            s = ((1 - abar) / abar).sqrt()
            at = lambda x, t: oracle.denoise(x * (1 + s[t, None] ** 2).sqrt(), s[t])
            net = lambda x, t: keep((x * (1 + s[t, None] ** 2).sqrt() - at(x, t)) / s[t, None])
            denoiser = fs.Denoiser.from_epsilon(net, abar, integer_timesteps=True)
        return fs.measure(denoiser, (8,), levels=12, samples=samples, dtype=torch.float64, progress=False)

    assert stats(wiped) == stats(lambda answer: answer)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_outputs_must_be_floating_point(dtype):
    denoiser = fs.Denoiser.from_denoiser(lambda z, s: z.to(dtype), 0.1, 2.0)
    with pytest.raises(TypeError, match="floating-point"):
        denoiser(torch.ones(2, 3), 1.0)


@pytest.mark.parametrize("by", ["denoiser", "sample_fitted", "observe_denoiser"])
def test_stop_iteration_is_named(by):
    """Raised in a generator, as the loop of a training may be, it would end the loop as if the data had ended."""
    batches, noise = iter([]), torch.ones(2, 3)
    network = lambda z, s: next(batches)
    schedule = fs.Schedule([2.0, 0.5, 0.0], "fitted", weights=[[1.0, 0.0], [0.0, 1.0]])
    run = {
        "denoiser": lambda: fs.Denoiser.from_denoiser(network, 0.1, 2.0)(noise, 1.0),
        "sample_fitted": lambda: sample_fitted(network, noise, schedule.sigmas, weights=schedule.weights, disable=True),
        "observe_denoiser": lambda: fs.AdaptiveSchedule([2.0, 0.5, 0.1]).observe_denoiser(network, noise),
    }[by]
    with pytest.raises(RuntimeError, match="the network raised StopIteration"):
        run()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [({"dtype": torch.int32}, TypeError, "dtype must be a floating-point dtype"),
     ({"dtype": "float32"}, TypeError, "dtype must be a floating-point dtype"),
     ({"device": "gpu"}, ValueError, "device must be one that PyTorch knows"),
     ({"device": 1.5}, TypeError, "device must be a torch.device")],
)  # fmt: skip
def test_placement_is_checked(options, error, message):
    with pytest.raises(error, match=message):
        placement(fs.Denoiser.from_denoiser(shrink, 0.1, 2.0), **options)


def test_a_denoiser_must_be_one():
    with pytest.raises(TypeError, match="denoiser must be of class Denoiser"):
        fs.measure(shrink, (3,), progress=False)


def test_tensors_that_come_in_are_copied():
    sigmas = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
    timesteps = torch.tensor([900.0, 100.0], dtype=torch.float64)
    schedule = fs.Schedule(sigmas, "ddim", "vp", timesteps=timesteps)
    sigmas.zero_()
    timesteps.zero_()
    assert schedule.sigmas.tolist() == [2.0, 1.0, 0.0]
    assert schedule.timesteps.tolist() == [900.0, 100.0]


class Elsewhere(torch.Tensor):
    """A tensor that holds its numbers in another one, as tensors that are distributed or masked do."""

    @staticmethod
    def __new__(cls, held):
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return cls(function(*(each.held if isinstance(each, cls) else each for each in args), **(kwargs or {})))


class Named(torch.Tensor):
    """A subclass that computes as any tensor does."""


def fake(z):
    with FakeTensorMode():
        return torch.zeros(z.shape)


UNUSUAL = {
    "Elsewhere": (Elsewhere, "a tensor of class Elsewhere"),
    "FakeTensor": (fake, "a tensor of class FakeTensor"),
    "nested": (lambda z: torch.nested.nested_tensor(list(z), layout=torch.jagged), "a nested tensor"),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_tensors_of_other_kinds_are_refused_by_name(name):
    made, what = UNUSUAL[name]
    denoiser = fs.Denoiser.from_denoiser(lambda z, s: made(z), 0.1, 2.0)
    schedule = fs.Schedule([2.0, 0.5, 0.0], "fitted", weights=[[1.0, 0.0], [0.0, 1.0]])
    noise = torch.ones(2, 3)
    for run in (
        lambda: denoiser(noise, 1.0),
        lambda: fs.measure(denoiser, (3,), levels=12, samples=2, progress=False),
        lambda: fs.sample(denoiser, schedule, noise=noise),
        lambda: sample_fitted(denoiser.network, noise, schedule.sigmas, weights=schedule.weights, disable=True),
        lambda: fs.AdaptiveSchedule([2.0, 0.5, 0.1]).observe_denoiser(denoiser.network, noise),
    ):
        with pytest.raises(TypeError, match=f"the network returned {what}"):
            run()


def test_subclasses_that_compute_as_tensors_do_are_taken():
    denoiser = fs.Denoiser.from_denoiser(lambda z, s: z.as_subclass(Named), 0.1, 2.0)
    assert denoiser(torch.ones(2, 3), 1.0).tolist() == [[1.0] * 3] * 2
