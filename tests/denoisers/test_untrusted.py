"""Networks that write where they should not, or answer in odd ways."""

import math

import pytest
import torch

import fastsched as fs
from fastsched.denoisers.denoiser import placement


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


def test_stop_iteration_is_named():
    batches = iter([])
    denoiser = fs.Denoiser.from_denoiser(lambda z, s: next(batches), 0.1, 2.0)
    with pytest.raises(RuntimeError, match="the network raised StopIteration"):
        denoiser(torch.ones(2, 3), 1.0)


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
    with pytest.raises(TypeError, match="denoiser must be a fastsched"):
        fs.measure(shrink, (3,), progress=False)


def test_tensors_that_come_in_are_copied():
    sigmas = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
    timesteps = torch.tensor([900.0, 100.0], dtype=torch.float64)
    schedule = fs.Schedule(sigmas, "ddim", "vp", timesteps=timesteps)
    sigmas.zero_()
    timesteps.zero_()
    assert schedule.sigmas.tolist() == [2.0, 1.0, 0.0]
    assert schedule.timesteps.tolist() == [900.0, 100.0]
