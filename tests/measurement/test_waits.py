"""A measurement does not wait for the device before the end of a batch."""

import pytest
import torch
from models import exact_denoisers, mixture
from waiting_device import DEVICE, waiting_device

from fastsched.measurement.deviated_paths import deviated_paths
from fastsched.measurement.path_following import Measurement, measurement_steps
from fastsched.sampling.random_streams import sample_seeds


def on_device(denoiser, levels, store):
    s = denoiser.levels(levels)
    return Measurement(denoiser, s, DEVICE, torch.float32, deviated_paths(levels), store=store)


def test_the_device_counts_what_makes_the_host_wait():
    with waiting_device() as waits:
        x = torch.ones(3, device=DEVICE)
        (2 * x + 1).sum().mul_(torch.tensor(2.0))
        torch.empty(3).copy_(x, non_blocking=True)
        x[:2].copy_(torch.ones(2), non_blocking=True)
        assert waits.seen == []
        assert x.own.tolist() == [1.0, 1.0, 1.0]
        (
            bool((x > 0).all()),
            float(x.sum()),
            torch.equal(x, x),
            x.cpu(),
            torch.ones(2).to(DEVICE),
            x[x > 0],
            x[torch.tensor([0])],
        )
        assert len(waits.seen) == 7
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(3)


@pytest.mark.parametrize("store", ["device", "cpu"])
@pytest.mark.parametrize("kind", ["x0", "epsilon", "v", "velocity", "edm", "score"])
def test_no_wait_between_the_first_call_and_the_last(kind, store):
    denoiser = exact_denoisers(mixture())[kind]
    before = []

    def network(x, condition):
        assert x.device == condition.device == DEVICE
        before.append(len(waits.seen))
        return 0.5 * x

    run = on_device(type(denoiser)(network, denoiser.process, denoiser.prediction), 12, store)
    with waiting_device() as waits, torch.no_grad():
        stats = run.drive(measurement_steps(run, sample_seeds(0, 2), (4,)))
    assert len(before) == run.calls == 22
    assert before[0] <= 1  # the noise, copied once
    assert before[-1] == before[0]
    assert len(waits.seen) <= before[0] + 4  # finite?, the Gram matrix, the ends
    assert stats.gram.isfinite().all()
