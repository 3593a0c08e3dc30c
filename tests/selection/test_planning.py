import pytest
import torch
from models import exact_denoiser, exact_denoisers, mixture

import fastsched as fs
from fastsched.selection.planning import SAFETY, target_error

DENOISER = exact_denoiser(mixture(d=4), 0.01, 40.0)


@pytest.fixture(scope="module")
def stats():
    return fs.measure(DENOISER, (4,), levels=24, samples=4, progress=False)


@pytest.fixture(scope="module")
def long_curve(stats):
    return fs.error_curve(stats, "dpmpp_2m", 16)


@pytest.mark.parametrize(("solver", "most"), [("dpmpp_2m", 16), ("heun", 5), ("fitted", 5)])
def test_curve_is_that_of_schedules_as_good_as_the_optimal_ones(stats, long_curve, solver, most):
    curve = long_curve if solver == "dpmpp_2m" else fs.error_curve(stats, solver, most)
    assert curve.steps == tuple(range(1, most + 1))
    for steps, schedule, error in zip(curve.steps, curve.schedules, curve.predicted_errors, strict=True):
        assert schedule.steps <= steps
        if steps in (1, 2, 5, 8):
            assert error <= fs.optimal_schedule(stats, steps, solver).predicted_error * (1 + 1e-9)
        assert fs.predict_error(stats, schedule) == pytest.approx(error, rel=1e-6)
    assert "predicted error" in str(curve)


def test_more_steps_are_never_predicted_to_be_worse(long_curve):
    errors = long_curve.predicted_errors
    assert list(errors) == sorted(errors, reverse=True)
    assert errors[9] < 0.2 * errors[2]


def test_more_steps_than_levels(stats):
    with pytest.raises(ValueError, match="max_steps must be at most 23 on 24 levels"):
        fs.error_curve(stats, "ddim", 24)


def test_no_more_steps_are_tried_than_levels_allow():
    stats = fs.measure(DENOISER, (4,), levels=10, samples=2, progress=False)
    with pytest.raises(ValueError, match="no schedule of up to 9 steps"):
        fs.steps_needed(stats, target=1e-30, max_steps=1000)
    assert fs.error_curve(stats, "ddim", progress=False).steps == tuple(range(1, 10))


def test_progress_counts_schedules(stats):
    seen = []
    fs.error_curve(stats, "ddim", 3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    seen.clear()
    target = 1.01 * SAFETY * fs.error_curve(stats, "ddim", 3, progress=False).predicted_errors[1]
    assert fs.steps_needed(
        stats, "ddim", target=target, max_steps=5, progress=lambda done, total: seen.append((done, total))
    ) == len(seen)
    assert seen == [(1, 5), (2, 5)]


def test_steps_needed_is_the_first_that_reaches_the_target(stats, long_curve):
    for target in (0.5, 0.05):
        reached = [error <= target / SAFETY for error in long_curve.predicted_errors]
        expected = long_curve.steps[reached.index(True)]
        assert 1 < expected < 16
        assert fs.steps_needed(stats, target=target) == expected


def test_as_good_as_karras(stats):
    """Tried: the schedule of the answer's steps is as good as karras at 12 steps, on noises not seen."""
    steps = fs.steps_needed(stats, "dpmpp_2m", target=("karras", 12))
    assert steps < 12
    karras = fs.baselines.karras(12, 0.01, 40.0)
    assert fs.steps_needed(stats, "dpmpp_2m", target=karras) == steps
    schedules = {"ours": fs.optimal_schedule(stats, steps), "karras": karras}
    table = fs.compare(DENOISER, schedules, "dpmpp_2m", shape=(4,), samples=256, progress=False)
    assert table["ours"].typical_error <= table["karras"].typical_error


def test_common_schedules_are_targets_of_the_fitted_solver_with_dpmpp_2m(stats):
    """As `fastsched compare --baselines` runs them: the fitted solver's weights are for one schedule."""
    for name in ("karras", "exponential"):
        assert target_error(stats, "fitted", (name, 8)) == target_error(stats, "dpmpp_2m", (name, 8))


def test_flow_targets_are_in_its_own_sigmas():
    denoiser = exact_denoisers(mixture(d=4))["velocity"]
    stats = fs.measure(denoiser, (4,), levels=24, samples=2, progress=False)
    assert 1 <= fs.steps_needed(stats, "ddim", target=("karras", 10)) <= 10
    karras = fs.baselines.karras(10, *stats.sigmas[[-2, 0]].tolist())
    assert target_error(stats, "ddim", ("karras", 10)) == fs.predict_error(stats, karras, "ddim")
    uniform = torch.linspace(1, 0, 11, dtype=torch.float64)
    assert target_error(stats, "ddim", ("uniform", 10)) == pytest.approx(fs.predict_error(stats, uniform, "ddim"))


@pytest.mark.parametrize(
    ("target", "message"),
    [(0.0, "target must be a positive error"), (float("nan"), "target must be a positive error"),
     (("karas", 20), "did you mean 'karras'"), (1e-30, "no schedule of up to 5 steps"),
     (("uniform", 20), "uniform is for flow models")],
)  # fmt: skip
def test_bad_targets(stats, target, message):
    with pytest.raises(ValueError, match=message):
        fs.steps_needed(stats, target=target, max_steps=5)


def test_a_tensor_may_be_an_error_or_sigmas(stats):
    assert fs.steps_needed(stats, target=torch.tensor(0.5)) == fs.steps_needed(stats, target=0.5)
    with pytest.raises(ValueError, match="target must end in 0"):
        fs.steps_needed(stats, target=torch.tensor([20.0, 1.0]))


def test_prediction_refuses_what_does_not_end_in_zero(stats):
    with pytest.raises(ValueError, match="sigmas must end in 0"):
        fs.predict_error(stats, [40.0, 1.0])
