import math

import numpy as np
import pytest
import torch
from models import exact_denoisers, mixture, vp_table

import fastsched as fs
from fastsched.selection.constraints import APART, distinct_known_levels, distinct_levels, known_levels, separate

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


def test_objective_forbids_levels_too_close(stats):
    top = float(stats.s[0])
    near, far = math.exp(-0.9 * APART), math.exp(-1.1 * APART)
    levels = np.array([[top, top * near, 1.0, 0.0], [top, 1.0, near, 0.0], [top, 1.0, far, 0.0], [top, 1.0, 2.0, 0.0]])
    assert separate(stats.process, levels).tolist() == [False, False, True, False]


@pytest.mark.parametrize("steps", [1, 2, 11])
@pytest.mark.parametrize("kind", ["x0", "velocity", "integer", "zero-terminal", "zero-terminal-integer"])
def test_polished_schedules_of_any_steps_have_a_prediction(kind, steps):
    stats = fs.measure(DENOISERS[kind], (4,), levels=12, samples=2, checks=False, progress=False)
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
    close = known_levels(process, np.array([[5.0, 1.0, 0.9999, 0.0], [5.0, 1.0, 0.5, 0.0]]))  # one timestep; two
    assert separate(process, close).tolist() == [False, True]
    trained = process.trained_levels.flip(0).numpy()
    lowest = distinct_known_levels(process, np.array([5.0, trained[-3], trained[-3] * 0.999, 0.0]), trained[-3])
    assert lowest.tolist() == [known_levels(process, np.array([[5.0]]))[0, 0], *trained[-4:-2], 0.0]
    stats = fs.measure(DENOISERS["zero-terminal"], (4,), levels=5, samples=1, checks=False, progress=False)
    assert stats.finite_range[1] < 1e3


def test_distinct_levels_keep_their_order_and_leave_room_for_the_rest():
    known = torch.tensor([math.inf, 8.0, 4.0, 2.0, 1.0])
    for levels, expected in [
        ([math.inf, 3.9, 3.8, 0.0], [math.inf, 4.0, 2.0, 0.0]),
        ([1.2, 1.1, 1.0, 0.0], [4.0, 2.0, 1.0, 0.0]),
        ([9.0, 8.0, 7.0, 6.0, 5.0, 0.0], [*known.tolist(), 0.0]),
    ]:
        assert distinct_levels(torch.tensor(levels), known).tolist() == expected
