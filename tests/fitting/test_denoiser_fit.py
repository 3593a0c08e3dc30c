import dataclasses
import math
from itertools import islice

import numpy as np
import pytest
import torch
from models import counted_denoiser, exact_denoiser, exact_denoisers, mixture, vp_table

import fastsched as fs
from fastsched.fitting.auditioning import FINALISTS
from fastsched.fitting.candidates import candidates_in_turn
from fastsched.fitting.denoiser_fit import fit_report
from fastsched.fitting.loop import CANDIDATES, affordable
from fastsched.sampling.fitted import chosen_solver

ORACLE = mixture(d=5)
LEVELS, SAMPLES = 42, 8
#: Calls of one sample that check a network before it is measured, and its fingerprint.
CHECKS = 6
SIGMAS = torch.logspace(2, -2, LEVELS, dtype=torch.float64)


def counted():
    return counted_denoiser(ORACLE, 0.01, 100.0)


@pytest.fixture(scope="module")
def stats():
    denoiser = exact_denoiser(ORACLE, 0.01, 100.0)
    return fs.measure(denoiser, (5,), levels=SIGMAS, samples=SAMPLES, keep_increments=True, progress=False)


def report(denoiser, steps, solver="dpmpp_2m", **options):
    options = {"checks": "stats" not in options, **options}  # else one more call asks if it is the network measured
    return fit_report(denoiser, (5,), steps, solver, progress=False, **options)


@pytest.mark.parametrize("solver", ["dpmpp_2m", "heun", "fitted"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("budget", [60, 300])
def test_calls_stay_within_the_budget(stats, steps, solver, budget):
    denoiser, calls = counted()
    found = report(denoiser, steps, solver, stats=stats, model_calls=budget)
    assert sum(calls) <= budget
    assert found.model_calls == stats.model_calls + sum(calls)
    assert (found.schedule.steps, found.schedule.solver) == (steps, solver)
    one_run = chosen_solver(solver).model_calls(steps) * SAMPLES
    if one_run <= budget < 2 * one_run and solver == "fitted" and steps > 1:
        assert found.tuning is None
        assert found.schedule.measured_error is None  # moved once more, and not run
        assert found.schedule.predicted_error > 0
    elif one_run <= budget:
        assert found.schedule.measured_error == min(
            [row.schedule.measured_error for row in found.audition.table if len(row.errors) == SAMPLES]
            + [trial.measured_error for trial in (found.tuning.trials if found.tuning else ())]
        )
    else:
        assert not calls


@pytest.mark.parametrize(("steps", "budget"), [(20, 230), (40, 159)])
def test_calls_of_many_steps_stay_within_the_budget(stats, steps, budget):
    """Of 40 steps no run of eight samples fits."""
    denoiser, calls = counted()
    found = report(denoiser, steps, "ddim", stats=stats, model_calls=budget)
    assert (sum(calls) > 0) == (steps == 20)
    assert sum(calls) <= budget
    assert found.model_calls == stats.model_calls + sum(calls)
    assert found.schedule.steps == steps


@pytest.mark.parametrize(("solver", "steps"), [("dpmpp_2m", 1), ("dpmpp_2m", 4), ("heun", 3), ("fitted", 4)])
def test_as_many_candidates_as_can_be_ranked(stats, steps, solver):
    """By counting the audition's own calls; more than two if the first round takes a quarter of the budget at most.

    Of a budget for 15 runs two could be run in the first round, but not both on all eight samples.
    """
    each = chosen_solver(solver).model_calls(steps)
    for budget in (0, each * SAMPLES - 1, each * SAMPLES, 15 * each, 30 * each, 1000 * each):
        most = affordable(each, SAMPLES, budget)
        if budget < each * SAMPLES:
            assert most == 0
            continue
        found = dict(islice(candidates_in_turn(stats, steps, solver), most))
        denoiser, calls = counted()
        fs.audition(denoiser, stats, steps, solver, found, checks=False, progress=False)
        assert sum(calls) <= budget
        assert most <= FINALISTS or most * each * 3 <= budget / 4  # 3 of 8 samples in the first round
    assert most == CANDIDATES


def test_default_budget_is_spent_on_candidates_and_tuning(stats):
    denoiser, calls = counted()
    found = report(denoiser, 6, stats=stats)
    assert len(found.audition.table) > 2
    assert found.tuning is not None
    assert found.schedule.measured_error <= found.audition.winner.measured_error
    assert sum(calls) == found.audition.model_calls + found.tuning.model_calls <= 740


def test_without_a_budget_the_schedule_is_the_optimal_one(stats):
    denoiser, calls = counted()
    found = report(denoiser, 5, stats=stats, model_calls=0)
    assert not calls
    assert found.audition is found.tuning is None
    assert torch.equal(found.schedule.sigmas, fs.optimal_schedule(stats, 5).sigmas)
    assert found.schedule.measured_error is None


def test_paths_are_followed_again_where_increments_were_not_kept(stats, tmp_path):
    stats.save(tmp_path / "stats.safetensors")
    loaded = fs.PathStatistics.load(tmp_path / "stats.safetensors")
    denoiser, calls = counted()
    found = report(denoiser, 5, stats=loaded)
    assert found.stats.increments is not None
    assert found.model_calls == stats.model_calls + sum(calls)
    assert sum(calls) == 1 + (2 * LEVELS - 2) * SAMPLES + found.audition.model_calls + found.tuning.model_calls
    assert torch.equal(found.schedule.sigmas, report(denoiser, 5, stats=stats).schedule.sigmas)


def test_a_fit_measures_by_itself():
    denoiser, calls = counted()
    found = report(denoiser, 4, levels=16, samples=2, model_calls=100)
    assert found.stats.model_calls == 2 * (2 * 16 - 2) + CHECKS
    assert found.model_calls == sum(calls) <= 100
    same = fs.fit(denoiser, (5,), 4, levels=16, samples=2, model_calls=100, progress=False)
    assert torch.equal(same.sigmas, found.schedule.sigmas)
    assert same.measured_error == found.schedule.measured_error


@pytest.mark.parametrize(
    ("steps", "options", "message"),
    [(0, {}, "steps must be at least 1"), (16, {"levels": 16}, "steps must be at most 15 on 16 levels"),
     (4, {"model_calls": -1}, "model_calls must be at least 0"),
     (4, {"levels": 16, "samples": 4, "model_calls": 126}, "measuring takes 127 model calls and"),
     (40, {"model_calls": 60}, "measuring takes 89 model calls and model_calls allows 60 "),
     (4, {"solver": "ancestral"}, "solver must be deterministic"), (4, {"samples": 0}, "samples must be at least 1")],
)  # fmt: skip
def test_bad_arguments_spend_no_call(steps, options, message):
    denoiser, calls = counted()
    with pytest.raises(ValueError, match=message):
        fit_report(denoiser, (5,), steps, progress=False, **options)
    assert not calls


def test_further_checks_of_an_unusual_network_are_part_of_its_calls():
    """Data wider than ``F`` is trained for costs four more checks; over one run's calls some total is used up."""
    oracle = fs.oracles.GaussianMixture.random(8, 3, seed=0, spread=4.0)
    denoiser = exact_denoisers(oracle)["edm"]
    for total in range(80, 84):
        calls = []
        network = lambda x, t, calls=calls: (calls.append(len(x)), denoiser.network(x, t))[1]
        counted = dataclasses.replace(denoiser, network=network)
        options = {"levels": 12, "samples": 1, "model_calls": total, "progress": False}
        report = fit_report(counted, (8,), 4, "ddim", **options)
        assert report.model_calls == sum(calls) <= total


def test_the_last_move_lowers_the_error_of_other_noises():
    """With 100 calls a fitted schedule is run once, and moved by what the run tells: 3 seeds, 256 other noises."""
    denoiser, ratios = exact_denoiser(mixture(d=32), 0.01, 100.0), []
    reference = fs.converged_reference(denoiser, (32,), samples=256, seed=5, steps=200, progress=False)
    for seed in range(3):
        found = fit_report(denoiser, (32,), 5, "fitted", model_calls=100, seed=seed, progress=False)
        assert found.tuning is None
        assert found.model_calls <= 100
        both = {"run": found.audition.winner, "moved": found.schedule}
        rows = fs.compare(denoiser, both, reference=reference, progress=False).rows
        ratios.append(rows[1].typical_error / rows[0].typical_error)
    assert math.prod(ratios) ** (1 / 3) < 0.9


def test_numbers_of_numpy_are_taken_and_saved(tmp_path):
    denoiser, calls = counted()
    options = {"levels": 16, "samples": 2, "checkpoint": tmp_path / "fit.safetensors", "progress": False}
    schedule = fs.fit(denoiser, (5,), np.uint8(5), model_calls=np.int64(100), batch_size=np.int64(1), **options)
    schedule.save(tmp_path / "schedule.json")
    assert fs.Schedule.load(tmp_path / "schedule.json").steps == 5
    assert sum(calls) <= 100


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(tmp_path, dtype):
    denoiser = exact_denoiser(ORACLE, 0.01, 100.0)
    options = {"model_calls": 200, "progress": False}
    wanted = fs.fit(denoiser, (5,), 5, **options)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = fs.fit(denoiser, (5,), 5, checkpoint=tmp_path / "fit.safetensors", dtype=torch.float32, **options)
    finally:
        torch.set_default_dtype(before)
    torch.testing.assert_close(found.sigmas, wanted.sigmas, rtol=1e-6, atol=0.0)


def test_an_error_in_the_runs_carries_the_measurement():
    denoiser, calls = counted()

    def fails_late(z, s):
        if sum(calls) > 160:
            raise RuntimeError("the device is gone")
        return denoiser.network(z, s)

    failing = fs.Denoiser.from_denoiser(fails_late, 0.01, 100.0)
    with pytest.raises(RuntimeError, match="gone") as caught:
        fs.fit(failing, (5,), 5, levels=16, samples=4, model_calls=400, progress=False)
    assert caught.value.partial.samples == 4
    assert fs.optimal_schedule(caught.value.partial, 5).steps == 5


def test_statistics_with_other_timesteps_are_refused_where_no_run_shows_it():
    def denoiser(table, integers=False):
        return fs.Denoiser.from_epsilon(lambda x, t: x, table, integer_timesteps=integers)

    options = {"levels": 12, "samples": 2, "checks": False, "progress": False}
    stats = fs.measure(denoiser(vp_table()), (4,), **options)
    given = {"shape": (4,), "steps": 4, "stats": stats, "model_calls": 0, "progress": False}
    for other in (
        denoiser(vp_table(beta_max=15.0)),
        denoiser(vp_table(100)),
        fs.Denoiser.from_vp_score(lambda x, t: x),
    ):
        with pytest.raises(ValueError, match="stats are of another noise process than this model's: with other timest"):
            fs.fit(other, **given)
    whole = fs.fit(denoiser(vp_table().float()), **given)
    assert fs.fit(denoiser(vp_table(), integers=True), **given) == whole  # only rounded
    few = {**given, "stats": fs.measure(denoiser(vp_table(100)), (4,), **options)}
    assert fs.fit(denoiser(vp_table(100), integers=True), **few) == fs.fit(denoiser(vp_table(100)), **few)
    continuous = fs.measure(fs.Denoiser.from_vp_score(lambda x, t: x), (4,), **options)
    with pytest.raises(ValueError, match="with other timesteps"):
        fs.fit(fs.Denoiser.from_vp_score(lambda x, t: x, beta_max=15.0), **{**given, "stats": continuous})
    flow = fs.measure(fs.Denoiser.from_velocity(lambda x, t: x), (4,), **options)
    with pytest.raises(ValueError, match="direction of time"):
        fs.fit(fs.Denoiser.from_velocity(lambda x, t: x, data_at=1), **{**given, "stats": flow})
    assert fs.fit(fs.Denoiser.from_velocity(lambda x, t: x, t_min=0.01, t_max=0.99), **{**given, "stats": flow})
