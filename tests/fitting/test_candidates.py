import itertools
import math

import pytest
import torch
from models import exact_denoisers, mixture, vp_table

import fastsched as fs
from fastsched.fitting import candidates
from fastsched.fitting.candidates import candidates_in_turn
from fastsched.selection.optimal import SAME

KINDS = exact_denoisers(mixture(d=4))
ZERO_TERMINAL = torch.cat([vp_table(200)[:-1], torch.zeros(1)])
KINDS["zero-terminal"] = fs.Denoiser.from_v(lambda x, t: 0.1 * x, ZERO_TERMINAL)
KINDS["zero-terminal-integer"] = fs.Denoiser.from_v(lambda x, t: 0.1 * x, ZERO_TERMINAL, integer_timesteps=True)
KINDS["integer"] = fs.Denoiser.from_epsilon(
    lambda x, t: 0.1 * x, torch.linspace(0.999, 0.005, 200), integer_timesteps=True
)
LEVELS = 10


def measure(kind, **options):
    return fs.measure(KINDS[kind], (4,), levels=LEVELS, samples=2, checks=False, progress=False, **options)


def check(stats, found, steps, solver):
    """What every set of candidates must be."""
    assert len(found) >= 1
    assert next(iter(found)) == "optimal"
    for schedule in found.values():
        assert (schedule.steps, schedule.solver) == (steps, fs.Schedule([1.0, 0.0], solver).solver)
        assert float(schedule.sigmas[0]) == pytest.approx(float(stats.sigmas[0]), rel=1e-12)
        assert float(schedule.sigmas[-1]) == 0.0
        assert bool((schedule.sigmas.diff() < 0).all())
        if getattr(stats.process, "integer_timesteps", False):
            assert schedule.timesteps.tolist() == schedule.timesteps.round().tolist()
    for one, other in itertools.combinations(found.values(), 2):
        levels = [stats.process.level(schedule.sigmas)[1:-1] for schedule in (one, other)]
        apart = (levels[0] / levels[1]).log().abs().max()
        assert float(apart) > 0.99 * SAME


@pytest.mark.parametrize("steps", [1, 5, LEVELS - 1])
@pytest.mark.parametrize("kind", ["x0", "velocity", "epsilon", "integer", "zero-terminal", "zero-terminal-integer"])
def test_candidates_of_every_process(kind, steps):
    stats = measure(kind)
    for solver in ("dpmpp_2m", "heun")[: 1 if steps > 5 else 2]:
        found = dict(candidates_in_turn(stats, steps, solver))
        check(stats, found, steps, solver)
        default = fs.optimal_schedule(stats, steps, solver)
        assert torch.equal(found["optimal"].sigmas, default.sigmas)
        assert found["optimal"].predicted_error == default.predicted_error
        if steps == 1:
            assert len(found) == 1


@pytest.mark.parametrize("kind", ["x0", "velocity", "integer"])
def test_candidates_without_responses(kind):
    stats = measure(kind, responses=False)
    check(stats, dict(candidates_in_turn(stats, 4, "ipndm")), 4, "ipndm")


def test_the_most_promising_come_first():
    stats = measure("x0")
    found = list(dict(candidates_in_turn(stats, 5, "dpmpp_2m")).values())
    predicted = [fs.predict_error(stats, schedule) for schedule in found]
    assert predicted[0] == min(predicted)


def test_no_two_candidates_have_one_name():
    """The best start may be a candidate beside the end of the descent from it."""
    for steps, solver in itertools.product((4, 5, 6), ("ddim", "dpmpp_2m", "fitted")):
        names = [name for name, _ in candidates_in_turn(measure("x0"), steps, solver)]
        assert len(set(names)) == len(names)


def test_a_fitted_schedule_has_a_stock_one_among_its_candidates():
    """The same samples as the stock solver's own schedule gives."""
    stats = measure("x0")
    found = dict(candidates_in_turn(stats, 5, "fitted"))
    as_fitted = found[candidates.NEAREST_STOCK]
    stock = fs.optimal_schedule(stats, 5, candidates.NEAREST_STOCK)
    noise = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    ours = fs.sample(KINDS["x0"], as_fitted, noise=noise)
    torch.testing.assert_close(ours, fs.sample(KINDS["x0"], stock, noise=noise), rtol=1e-5, atol=1e-5)


def test_unknown_number_of_steps():
    with pytest.raises(ValueError, match=f"steps must be at most {LEVELS - 1}"):
        next(candidates_in_turn(measure("x0"), LEVELS, "ddim"))
    assert math.isinf(float(measure("zero-terminal-integer").s[0]))
