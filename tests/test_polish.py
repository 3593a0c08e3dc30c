import pytest
import torch
from models import exact_denoisers, mixture

import fastsched as fs
from fastsched.polish import APART, polish, polish_objective
from fastsched.solvers import SOLVERS

KINDS = exact_denoisers(mixture(d=4))


@pytest.fixture(scope="module")
def stats():
    return fs.measure(KINDS["x0"], (4,), levels=12, samples=6, progress=False)


@pytest.mark.parametrize("name", SOLVERS)
def test_polish_never_raises_the_objective(stats, name):
    start = stats.process.level(stats.sigmas[[0, 3, 6, 9, 12]]).numpy()
    after = polish(stats, start, name)
    objective = polish_objective(stats, name)
    assert objective(after[None])[0] <= objective(start[None])[0]
    assert (after[1:-1] < start[0]).all()
    assert (after[1:-1] / after[:-2] < 1 - 0.9 * APART).all()
    assert (after[0], after[-1]) == (start[0], 0.0)


@pytest.mark.parametrize("kind", ["x0", "velocity", "epsilon"])
def test_polished_schedules_lower_the_prediction(kind):
    stats = fs.measure(KINDS[kind], (4,), levels=24, samples=4, progress=False)
    plain = fs.optimal_schedule(stats, 6, polish=False)
    polished = fs.optimal_schedule(stats, 6, polish=True)
    assert fs.predict_error(stats, polished) <= fs.predict_error(stats, plain) * 1.5
    assert polished.sigmas[0] == plain.sigmas[0]


def test_polish_keeps_integer_timesteps():
    denoiser = fs.Denoiser.from_epsilon(lambda x, t: 0.1 * x, torch.linspace(0.999, 0.005, 200), integer_timesteps=True)
    stats = fs.measure(denoiser, (4,), levels=20, samples=2, progress=False)
    t = fs.optimal_schedule(stats, 5, polish=True).timesteps
    assert t.tolist() == t.round().tolist()
