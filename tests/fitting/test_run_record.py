import dataclasses

import numpy as np
import pytest
import torch
from models import exact_denoiser, mixture, rollout_of

import fastsched as fs
from fastsched.fitting.rollouts import Rollout
from fastsched.fitting.run_record import RunRecord
from fastsched.sampling.fitted import chosen_solver

DENOISER = exact_denoiser(mixture(d=4), 0.01, 40.0)


def measure(denoiser=DENOISER, levels=24):
    return fs.measure(denoiser, (4,), levels=levels, samples=6, keep_increments=True, checks=False, progress=False)


@pytest.fixture(scope="module")
def stats():
    return measure()


def record_of(stats, schedules, denoiser=DENOISER, answers=True):
    record = RunRecord(stats, chosen_solver(schedules[0].solver))
    for schedule in schedules:
        rollout = rollout_of(denoiser, stats, schedule)
        record.add(schedule, rollout if answers else Rollout(rollout.ends))
    return record


def predicted(record, anchor, trial):
    """``q_b`` of a run as predicted from another, without a penalty."""
    near = dataclasses.replace(record.near(anchor), penalty=0.0)
    return near.squared_errors(near.outcome(trial.point.parameters[None]))[0]


@pytest.mark.parametrize("solver", ["dpmpp_2m", "unipc", "heun", "fitted"])
def test_a_run_predicts_itself(stats, solver):
    record = record_of(stats, [fs.optimal_schedule(stats, 5, solver)])
    # an error of size 1e-2 in float32 vectors of size 10, squared
    np.testing.assert_allclose(
        predicted(record, 0, record.trials[0]), record.trials[0].errors.numpy(), rtol=2e-3, atol=1e-6
    )


def test_answers_make_predictions_of_other_runs_better():
    """Of schedules among those that ran, from any of them; without responses the ends alone tell nothing of answers."""
    options = {"levels": 24, "samples": 6, "responses": False, "keep_increments": True}
    stats = fs.measure(DENOISER, (4,), **options, checks=False, progress=False)
    start = fs.optimal_schedule(stats, 6)
    schedules = [start, *fs.tune(DENOISER, stats, start, trials=4, progress=False).trials[1:]]

    def off(answers):
        record = record_of(stats, schedules, answers=answers)
        pairs = [(a, b) for a in range(len(schedules)) for b in range(len(schedules)) if a != b]
        return np.mean(
            [
                np.abs(np.log(predicted(record, a, record.trials[b]) / record.trials[b].errors.numpy())).mean()
                for a, b in pairs
            ]
        )

    assert off(True) < 0.7 * off(False)


def test_runs_of_two_stage_solvers_from_pure_noise_give_secants():
    """Their first step makes one call: fewer evaluations than steps elsewhere."""
    betas = torch.linspace(0.999, 0.0, 60, dtype=torch.float64)
    denoiser = fs.Denoiser.from_v(lambda x, t: 0.1 * x, betas)
    stats = measure(denoiser, levels=20)
    record = record_of(stats, [fs.optimal_schedule(stats, 4, "heun", polish=False)], denoiser)
    assert len(record.trials[0].s) == 6
    np.testing.assert_allclose(predicted(record, 0, record.trials[0]), record.trials[0].errors.numpy(), rtol=1e-3)


def test_samples_that_are_hit_exactly_leave_the_rest_predictable(stats):
    """Their error counts as what rounding makes of it, in what is learned from a run too."""
    start = fs.Schedule(fs.baselines.karras(6, 0.01, 40.0, spare_last=True), "dpmpp_2m")
    rollout = rollout_of(DENOISER, stats, start)
    ends = rollout.ends.clone()
    ends[:2] = stats.ends[:2]
    record = RunRecord(stats, chosen_solver("dpmpp_2m"))
    record.add(start, dataclasses.replace(rollout, ends=ends))
    found = predicted(record, 0, record.trials[0])
    np.testing.assert_allclose(found[2:], record.trials[0].errors[2:].numpy(), rtol=1e-3)


def test_parameters_stand_for_levels_and_weights(stats):
    near = record_of(stats, [fs.optimal_schedule(stats, 5, "fitted")]).near(0)
    point = near.point(near.anchor)
    np.testing.assert_allclose(point.levels, near.run.levels, rtol=1e-12)
    np.testing.assert_allclose(point.weights, near.run.weights, atol=1e-12)
    np.testing.assert_allclose(point.weights.sum(1), 1.0, rtol=1e-12)
    assert point.coupled
    np.testing.assert_array_equal(point.network_levels, point.levels[:-1])
    assert len(near.anchor) == near.inner + 10


def test_levels_too_close_to_each_other_are_forbidden(stats):
    near = record_of(stats, [fs.optimal_schedule(stats, 4)]).near(0)
    crossed = near.anchor[None].copy()
    crossed[0, 1] = crossed[0, 0]
    assert near.predicted(crossed)[0] == np.inf
    assert np.isfinite(near.predicted(near.anchor[None])[0])
