"""`fs.sample` does not wait for the device before its end, whatever the solver."""

import pytest
import torch
from models import exact_denoisers, mixture
from waiting_device import DEVICE, waiting_device

import fastsched as fs
from fastsched.fitting.rollouts import RecordingDenoiser
from fastsched.sampling.solvers import SOLVERS, STOCHASTIC_SOLVERS

STEPS = 5


def counted(denoiser, solver, waits, answer=lambda x, call: 0.5 * x, made=lambda denoiser: denoiser):
    """Samples on the waiting device; returns them, and how many waits there were before each call of the network."""
    before = []

    def network(x, condition):
        assert x.device == condition.device == DEVICE
        before.append(len(waits.seen))
        return answer(x, len(before))

    watched = type(denoiser)(network, denoiser.process, denoiser.prediction)
    s = torch.cat([denoiser.process.levels(STEPS), torch.zeros(1, dtype=torch.float64)])
    schedule = fs.Schedule.from_levels(denoiser.process, s, "ddim")
    noise = torch.ones(2, 4, device=DEVICE)
    weights = torch.eye(STEPS, dtype=torch.float64)
    run = fs.Schedule(schedule.sigmas, solver, schedule.noise, weights=weights if solver == "fitted" else None)
    return fs.sample(made(watched), run, noise=noise), before


@pytest.mark.parametrize("solver", [*SOLVERS, "fitted", *STOCHASTIC_SOLVERS])
def test_one_wait_at_the_end_of_every_solver(solver):
    with waiting_device() as waits:
        samples, before = counted(exact_denoisers(mixture())["epsilon"], solver, waits)
        assert before == [0] * len(before)
        assert len(before) >= STEPS
        assert len(waits.seen) <= 1  # were all answers finite?
        assert samples.device == DEVICE
        assert samples.own.isfinite().all()


@pytest.mark.parametrize("kind", ["x0", "v", "velocity", "edm", "score"])
def test_one_wait_at_the_end_for_every_kind_of_network(kind):
    with waiting_device() as waits:
        _, before = counted(exact_denoisers(mixture())[kind], "dpmpp_2m", waits)
        assert before == [0] * STEPS
        assert len(waits.seen) <= 1


def test_recording_the_outputs_of_a_run_does_not_wait():
    kept = []
    with waiting_device() as waits:
        record = lambda denoiser: kept.append(RecordingDenoiser.of(denoiser)) or kept[0]
        _, before = counted(exact_denoisers(mixture())["epsilon"], "unipc", waits, made=record)
        assert before == [0] * STEPS
        assert len(kept[0].evaluations().denoised) == STEPS


@pytest.mark.parametrize("solver", ["heun", "ancestral"])
def test_the_first_level_that_was_not_finite_is_named_in_the_end(solver):
    denoiser = exact_denoisers(mixture())["epsilon"]
    sigma = float(denoiser.process.sampler_sigma(denoiser.process.levels(STEPS)[1]))
    place = {"heun": 3, "ancestral": 2}[solver]  # the call at the second level
    with waiting_device() as waits, pytest.raises(ValueError, match=f"NaN or inf at sigma = {sigma:g}"):
        counted(denoiser, solver, waits, lambda x, call: x * float("nan") if call >= place else 0.5 * x)
    assert len(waits.seen) == 1
