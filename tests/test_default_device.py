"""A program's default device reaches neither what the library computes nor its files.

Here it is one without numbers, so that any tensor made on it is noticed. Networks may rely on it, as these do not.
"""

from dataclasses import replace

import pytest
import torch
from models import exact_denoisers, mixture

import fastsched as fs
from fastsched.denoisers.digits import load_digits_network

KINDS = exact_denoisers(mixture())
SHAPE = (4,)


def on_cpu(denoiser):
    def network(x, t):
        with torch.device("cpu"):
            return denoiser.network(x, t)

    return replace(denoiser, network=network)


DENOISER = on_cpu(KINDS["v"])
NOISE = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
STATS = fs.measure(DENOISER, SHAPE, levels=8, samples=2, keep_increments=True, progress=False)
SCHEDULE = fs.optimal_schedule(STATS, 3)
RUN = {"shape": SHAPE, "samples": 2, "progress": False}
COST = {"sigmas": [5.0, 1.0, 0.5, 0.1], **RUN}


def adapted():
    adaptive = fs.AdaptiveSchedule([5.0, 1.0, 0.5, 0.1])
    adaptive.observe_denoiser(DENOISER, NOISE)
    adaptive.update()
    return torch.cat([adaptive.s, adaptive.draw(2, generator=torch.Generator().manual_seed(0))])


def saved(path):
    STATS.save(path)
    return fs.PathStatistics.load(path).gram


CASES = {
    **{f"measure {kind}": lambda path, kind=kind: measured(kind) for kind in KINDS},
    "checkpoint": lambda path: measured("v", checkpoint=path),
    "files": saved,
    "fit": lambda path: fs.fit(DENOISER, SHAPE, 3, levels=8, samples=2, model_calls=100, progress=False).sigmas,
    "fitted": lambda path: fs.optimal_schedule(STATS, 3, "fitted").weights,
    "tune": lambda path: fs.tune(DENOISER, STATS, SCHEDULE, trials=2, progress=False).schedule.sigmas,
    "sample": lambda path: fs.sample(DENOISER, SCHEDULE, noise=NOISE),
    "ancestral": lambda path: fs.sample(DENOISER, SCHEDULE.sigmas, "ancestral", NOISE, seed=1),
    "compare": lambda path: fs.compare(DENOISER, {"a": SCHEDULE}, reference_steps=4, **RUN).reference.ends,
    "score-optimal": lambda path: fs.score_optimal_schedule(DENOISER, steps=3, **RUN).sigmas,
    "klub": lambda path: fs.costs.klub(DENOISER, **COST).matrix,
    "predictor": lambda path: fs.costs.stein_predictor(DENOISER, **COST).matrix,
    "errors": lambda path: fs.standard_errors(STATS, 2).log_sigmas,
    "steps": lambda path: torch.tensor(fs.steps_needed(STATS, "ddim", target=("karras", 3)), device="cpu"),
    "online": lambda path: adapted(),
    "data": lambda path: fs.oracles.Empirical(NOISE).sample(3, seed=0),
    "Gaussian data": lambda path: fs.oracles.Gaussian(1.0, SHAPE, 0.5).sample(3, seed=0),
    "digits": lambda path: load_digits_network().inward.weight,
}


def measured(kind, **options):
    return fs.measure(on_cpu(KINDS[kind]), SHAPE, levels=8, samples=2, progress=False, **options).gram


@pytest.mark.parametrize("name", CASES)
def test_results_are_those_of_the_usual_one(name, tmp_path):
    expected = CASES[name](tmp_path / "one.safetensors")
    with torch.device("meta"):
        found = CASES[name](tmp_path / "other.safetensors")
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
