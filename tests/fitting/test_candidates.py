import itertools
import math

import pytest
import torch
from fastsched.selection.polish import polish_objective
from models import exact_denoisers, mixture, vp_table

import fastsched as fs
from fastsched.fitting import candidates
from fastsched.fitting.candidates import SAME_PLACE, default_candidates

KINDS = exact_denoisers(mixture(d=4))
ZERO_TERMINAL = torch.cat([vp_table(200)[:-1], torch.zeros(1)])
KINDS["zero-terminal"] = fs.Denoiser.from_v(lambda x, t: 0.1 * x, ZERO_TERMINAL)
KINDS["zero-terminal-integer"] = fs.Denoiser.from_v(lambda x, t: 0.1 * x, ZERO_TERMINAL, integer_timesteps=True)
KINDS["integer"] = fs.Denoiser.from_epsilon(
    lambda x, t: 0.1 * x, torch.linspace(0.999, 0.005, 200), integer_timesteps=True
)
LEVELS = 10


def measure(kind, **options):
    return fs.measure(KINDS[kind], (4,), levels=LEVELS, samples=2, progress=False, **options)


def check(stats, found, steps, solver):
    """What every set of candidates must be."""
    assert 1 <= len(found) <= 9
    assert next(iter(found)) == "optimal"
    for schedule in found.values():
        assert (schedule.steps, schedule.solver) == (steps, fs.Schedule([1.0, 0.0], solver).solver)
        assert float(schedule.sigmas[0]) == pytest.approx(float(stats.sigmas[0]), rel=1e-12)
        assert float(schedule.sigmas[-1]) == 0.0
        assert bool((schedule.sigmas.diff() < 0).all())
        if getattr(stats.process, "integer_timesteps", False):
            assert schedule.timesteps.tolist() == schedule.timesteps.round().tolist()
    for one, other in itertools.combinations(found.values(), 2):
        apart = (one.sigmas[1:-1] / other.sigmas[1:-1]).log().abs().max()
        assert float(apart) >= SAME_PLACE


@pytest.mark.parametrize("steps", [1, 2, 5, LEVELS - 1])
@pytest.mark.parametrize("kind", ["x0", "velocity", "epsilon", "integer", "zero-terminal", "zero-terminal-integer"])
def test_candidates_of_every_process(kind, steps):
    stats = measure(kind)
    for solver in ("dpmpp_2m", "heun")[: 1 if steps > 5 else 2]:
        found = default_candidates(stats, steps, solver)
        check(stats, found, steps, solver)
        default = fs.optimal_schedule(stats, steps, solver)
        assert torch.equal(found["optimal"].sigmas, default.sigmas)
        assert found["optimal"].predicted_error == default.predicted_error
        if steps == 1:
            assert len(found) == 1


@pytest.mark.parametrize("kind", ["x0", "velocity", "integer"])
def test_candidates_without_sensitivity(kind):
    stats = measure(kind, sensitivity=None)
    found = default_candidates(stats, 4, "ipndm")
    check(stats, found, 4, "ipndm")
    assert torch.equal(found["optimal"].sigmas, fs.optimal_schedule(stats, 4, "ipndm", weight=None).sigmas)
    assert not any(name.startswith(("geometric", "isotropic", "directional")) for name in found)


def test_polished_candidates_are_near_a_minimum_of_their_own_objective():
    stats = measure("x0")
    found = default_candidates(stats, 5, "dpmpp_2m")
    for doubt in (0.2, 0.8):
        objective = polish_objective(stats, "dpmpp_2m", doubt)
        value = lambda name: float(objective(stats.process.level(found[name].sigmas)[None].numpy())[0])  # noqa: B023 - used at once
        polished = [value(name) for name in found if name.endswith(f"doubt {doubt:g}")]
        plain = [value(name) for name in found if "doubt" not in name and name != "optimal"]
        assert polished
        assert max(polished) < min(plain)
        assert polished == sorted(polished)


def test_unknown_number_of_steps():
    with pytest.raises(ValueError, match=f"steps must be at most {LEVELS - 1}"):
        default_candidates(measure("x0"), LEVELS, "ddim")
    assert math.isinf(float(measure("zero-terminal-integer").s[0]))


def test_candidates_are_made_when_asked_for(monkeypatch):
    """The first takes none of the descents of the others."""
    stats, asked = measure("x0"), []
    monkeypatch.setattr(candidates, "_polished", lambda *given: asked.append(given) or {})
    turn = candidates.candidates_in_turn(stats, 4, "dpmpp_2m")
    label, first = next(turn)
    assert label == "optimal"
    assert torch.equal(first.sigmas, fs.optimal_schedule(stats, 4, "dpmpp_2m", weight="geometric").sigmas)
    assert not asked
    assert next(turn)[0] != "optimal"
    assert len(asked) == len(candidates.DOUBTS)
