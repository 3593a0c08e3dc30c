"""What a measurement and a sampler launch beside the network does not grow."""

import pytest
import torch
from launches import Launches
from models import exact_denoisers, mixture

import fastsched as fs

D = 65536


def counted(kind, run):
    """Runs something with a network of that kind; returns the launches, and where each call of the network began."""
    known, launches, marks = exact_denoisers(mixture())[kind], Launches(), []
    answer = torch.randn(1, D)

    def network(x, condition):
        marks.append(len(launches.seen))
        return answer

    with launches:
        run(type(known)(network, known.process, known.prediction))
    return launches, marks


@pytest.mark.parametrize(
    ("kind", "reference", "deviated"),
    [
        # ops, those on states, states that pass through memory
        ("x0", (21, 17, 39), (14, 9, 18)),
        ("velocity", (28, 19, 44), (21, 11, 22)),
        ("epsilon", (46, 19, 45), (39, 11, 22)),
        ("edm", (28, 19, 44), (21, 11, 22)),
    ],
)
def test_a_level_of_a_measurement(kind, reference, deviated):
    measure = lambda denoiser: fs.measure(denoiser, (D,), samples=1, checks=False, progress=False)
    launches, marks = counted(kind, measure)
    for part, most in ((marks[5:46], reference), (marks[50:91], deviated)):
        # the limits are rounded means
        found = launches.per_step(part, 4 * D)
        assert all(each < limit + 0.5 for each, limit in zip(found, most, strict=True)), found


@pytest.mark.parametrize(
    ("solver", "most"),
    [
        ("ddim", (7, 14)),
        ("dpmpp_2m", (8, 17)),
        ("dpmpp_3m", (9, 20)),
        ("heun", (9, 20)),
        ("ipndm", (12, 28)),
        ("unipc", (11, 26)),
        ("fitted", (14, 34)),
    ],
)
def test_a_step_of_a_sampler(solver, most):
    def run(denoiser):
        s = torch.cat([denoiser.levels(12), torch.zeros(1, dtype=torch.float64)])
        weights = torch.ones(12, 12, dtype=torch.float64).tril()
        weights = weights / weights.sum(1, keepdim=True) if solver == "fitted" else None
        schedule = fs.Schedule.from_levels(denoiser.process, s, solver, weights=weights)
        fs.sample(denoiser, schedule, noise=torch.randn(1, D))

    launches, marks = counted("velocity", run)
    _, *found = launches.per_step(marks[4:11], 4 * D)
    assert all(each < limit + 0.5 for each, limit in zip(found, most, strict=True)), found
