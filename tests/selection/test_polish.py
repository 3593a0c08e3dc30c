import math

import numpy as np
import pytest
import torch
from fastsched.selection.polish import DOUBTFUL_SPREAD, polish, polish_objective
from models import exact_denoiser, exact_denoisers, mixture, vp_table

import fastsched as fs
from fastsched.costs.surrogate import Surrogate
from fastsched.sampling.solvers import SOLVERS
from fastsched.selection.constraints import APART, at_known_levels, known_levels, measured_range

KINDS = exact_denoisers(mixture(d=4))
ZERO_TERMINAL = torch.cat([vp_table(200)[:-1], torch.zeros(1)])
TABLE = torch.linspace(0.999, 0.005, 200)
DENOISERS = {
    "x0": KINDS["x0"],
    "velocity": KINDS["velocity"],
    "integer": fs.Denoiser.from_epsilon(lambda x, t: 0.1 * x, TABLE, integer_timesteps=True),
    "zero-terminal": fs.Denoiser.from_v(lambda x, t: 0.1 * x, ZERO_TERMINAL),
    "zero-terminal-integer": fs.Denoiser.from_v(lambda x, t: 0.1 * x, ZERO_TERMINAL, integer_timesteps=True),
}


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


def test_objective_by_its_definition(stats):
    """The geometric mean over samples of ``||error||^2 + doubt^2 sum ||deviation||^2``."""
    levels = np.stack(
        [stats.process.level(stats.sigmas[nodes]).numpy() for nodes in ([0, 3, 6, 9, 12], [0, 1, 2, 7, 12])]
    )
    surrogate, gram = Surrogate.of(stats), stats.gram.numpy()
    doubt = 0.7 * min(1.0, surrogate.spread / DOUBTFUL_SPREAD)
    assert doubt > 0.1
    for row, found in zip(levels, polish_objective(stats, "heun", 0.7)(levels), strict=True):
        outcome = surrogate.run(row[None], "heun")
        squared = np.einsum("p,bpq,q->b", outcome.error[0], gram, outcome.error[0])
        squared += doubt**2 * np.einsum("vp,bpq,vq->b", outcome.deviations[0], gram, outcome.deviations[0])
        assert found == pytest.approx(float(np.exp(np.log(squared).mean())), rel=1e-9)


def test_objective_forbids_levels_too_close(stats):
    top = float(stats.s[0])
    near, far = math.exp(-0.9 * APART), math.exp(-1.1 * APART)
    levels = np.array([[top, top * near, 1.0, 0.0], [top, 1.0, near, 0.0], [top, 1.0, far, 0.0], [top, 1.0, 2.0, 0.0]])
    assert np.isfinite(polish_objective(stats, "ddim")(levels)).tolist() == [False, False, True, False]


def test_on_gaussian_data_there_is_hardly_doubt():
    denoiser = exact_denoiser(fs.oracles.Gaussian(0.5, (4,)), 0.002, 80.0)
    spread = Surrogate.of(fs.measure(denoiser, (4,), levels=48, samples=2, progress=False)).spread
    assert spread == pytest.approx(0.03, abs=0.005)  # as the comment on `DOUBTFUL_SPREAD` has it


@pytest.mark.parametrize("steps", [1, 2, 11])
@pytest.mark.parametrize("kind", ["x0", "velocity", "integer", "zero-terminal", "zero-terminal-integer"])
def test_polished_schedules_of_any_steps_have_a_prediction(kind, steps):
    """Nodes nearer than the fourfold grid's levels, too: they are told apart by order."""
    stats = fs.measure(DENOISERS[kind], (4,), levels=12, samples=2, progress=False)
    for solver in ("dpmpp_2m", "heun"):
        schedule = fs.optimal_schedule(stats, steps, solver)
        assert math.isfinite(schedule.predicted_error)
        assert schedule.steps == steps
        assert float(schedule.sigmas[0]) == float(stats.sigmas[0])


def test_known_levels_of_an_integer_network():
    process = DENOISERS["integer"].process
    levels = np.array([[30.0, 1.0, 0.0]])
    found = known_levels(process, levels)
    assert set(found[0, :2]) <= set(process.trained_levels.tolist())
    assert found[0, 2] == 0.0
    objective = at_known_levels(process, lambda levels: levels.sum(1))
    close = np.array([[5.0, 1.0, 0.9999, 0.0], [5.0, 1.0, 0.5, 0.0]])  # one timestep for both; two
    assert np.isfinite(objective(close)).tolist() == [False, True]
    assert measured_range(fs.measure(DENOISERS["zero-terminal"], (4,), levels=5, samples=1, progress=False))[1] < 1e3
