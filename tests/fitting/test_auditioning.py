import pytest
import torch
from models import counted_denoiser, exact_denoiser, exact_denoisers, mixture

import fastsched as fs
from fastsched.fitting.auditioning import ranked
from fastsched.fitting.candidates import candidates_in_turn
from fastsched.fitting.loop import fit_by_running
from fastsched.fitting.rollouts import Rollout, Runner
from fastsched.metrics import power_mean
from fastsched.sampling.fitted import chosen_solver
from fastsched.sampling.random_streams import noise_of

ORACLE = mixture(d=4)
DENOISER = exact_denoiser(ORACLE, 0.01, 40.0)


@pytest.fixture(scope="module")
def stats():
    return fs.measure(DENOISER, (4,), levels=32, samples=6, progress=False)


@pytest.fixture(scope="module")
def outcome(stats):
    return fs.audition(DENOISER, stats, 6, progress=False)


def test_errors_are_the_samplers_own(stats, outcome):
    noise = noise_of(stats.seeds, (4,))
    for row in outcome.table:
        found = fs.sample(DENOISER, row.schedule.sigmas, "dpmpp_2m", noise[: len(row.errors)])
        expected = (found - stats.ends[: len(row.errors)]).double().square().sum(1)
        torch.testing.assert_close(row.errors, expected, rtol=1e-3, atol=1e-9)  # float32 in other batch shapes
        assert row.schedule.measured_error == pytest.approx(row.error)


def test_results_are_shown_without_their_samples(outcome):
    """They took 16,000 characters, and more for images."""
    reference = fs.converged_reference(DENOISER, (4,), samples=4, steps=8, progress=False)
    compared = fs.compare(DENOISER, {"a": outcome.winner}, reference=reference, progress=False)
    for shown, names in ((outcome, "log_ratio"), (reference, "steps=8"), (compared, "typical_error")):
        assert names in repr(shown)
        assert "tensor(" not in repr(shown)


def test_the_predicted_error_of_another_solver_is_dropped(stats):
    for solver, kept in (("ddim", True), ("heun", False)):
        given = fs.optimal_schedule(stats, 5, "ddim")
        found = fs.audition(DENOISER, stats, 5, solver, {"given": given}, progress=False).winner
        assert found.solver == solver
        assert found.predicted_error == (given.predicted_error if kept else None)


def test_winner_is_the_best_of_those_who_ran_all(outcome):
    finalists = [row for row in outcome.table if len(row.errors) == 6]
    assert outcome.winner is outcome.table[0].schedule
    assert outcome.table[0].error == min(row.error for row in finalists)
    assert len(finalists) == 2 < len(outcome.table) <= 6
    assert all(len(row.errors) == 3 for row in outcome.table if row not in finalists)


def test_paired_standard_errors(outcome):
    best, other = outcome.table[0], outcome.table[1]
    difference = other.errors.log() - best.errors.log()
    assert other.log_ratio == pytest.approx(float(difference.mean()))
    assert other.stderr == pytest.approx(float(difference.std() / 6**0.5))
    assert (best.log_ratio, best.stderr) == (0.0, 0.0)


def test_model_calls_are_counted(stats):
    counted, calls = counted_denoiser(ORACLE, 0.01, 40.0)
    for solver in ("dpmpp_2m", "heun"):
        calls.clear()
        assert fs.audition(counted, stats, 5, solver, progress=False).model_calls == sum(calls)


def test_a_planted_best_candidate_wins(stats):
    good = fs.optimal_schedule(stats, 12)
    bad = torch.linspace(40, 0, 13, dtype=torch.float64)
    outcome = fs.audition(DENOISER, stats, 12, candidates={"linear": bad, "good": good}, progress=False)
    assert [row.name for row in outcome.table] == ["good", "linear"]
    assert "linear" in str(outcome)


@pytest.mark.parametrize("kind", ["velocity", "epsilon"])
def test_other_processes_have_candidates(kind):
    denoiser = exact_denoisers(ORACLE)[kind]
    stats = fs.measure(denoiser, (4,), levels=24, samples=2, progress=False)
    schedule = fs.fit(denoiser, (4,), 5, stats=stats, progress=False)
    assert schedule.noise == stats.process.kind
    assert schedule.measured_error > 0
    names = dict(candidates_in_turn(stats, 5, "ddim"))
    assert any("karras" in name or "exponential" in name or "uniform" in name for name in names)


def test_integer_networks_audition_on_their_timesteps():
    denoiser = fs.Denoiser.from_epsilon(lambda x, t: 0.1 * x, torch.linspace(0.999, 0.005, 200), integer_timesteps=True)
    stats = fs.measure(denoiser, (4,), levels=20, samples=2, checks=False, progress=False)
    for schedule in dict(candidates_in_turn(stats, 6, "dpmpp_2m")).values():
        assert schedule.timesteps.tolist() == schedule.timesteps.round().tolist()


def test_fit_is_reproducible_and_checks_its_statistics(stats):
    one, two = (fs.fit(DENOISER, (4,), 5, samples=3, levels=24, seed=2, progress=False) for _ in range(2))
    assert torch.equal(one.sigmas, two.sigmas)
    with pytest.raises(ValueError, match="stats are of samples of shape"):
        fs.fit(DENOISER, (5,), 5, stats=stats)


def test_never_far_above_the_common_schedules(stats):
    """On noises not seen: the winner against the best of karras and exponential, both ways."""
    winner = fs.audition(DENOISER, stats, 8, progress=False).winner
    rivals = {
        f"{make.__name__}{spare}": make(8, 0.01, 40.0, spare_last=spare)
        for make in (fs.baselines.karras, fs.baselines.exponential)
        for spare in (False, True)
    }
    table = fs.compare(DENOISER, {"ours": winner, **rivals}, "dpmpp_2m", shape=(4,), samples=128, progress=False)
    assert table.ranked[0].name == "ours"


def test_any_sampler_can_be_ranked(stats):
    """The sampler is a callback; a candidate that it cannot run is dropped, and all of them is an error."""
    schedules = {name: fs.Schedule([40.0, sigma, 0.0], "ddim") for name, sigma in (("a", 1.0), ("b", 2.0), ("c", 4.0))}
    asked = []

    def run(schedule, first, last):
        asked.append((float(schedule.sigmas[1]), first, last))
        if float(schedule.sigmas[1]) == 1.0:
            return None
        return Rollout(stats.ends[first:last] + float(schedule.sigmas[1]))

    found = ranked(run, stats, schedules, 2, 6)
    assert [row.name for row in found.table] == ["b", "c"]
    assert found.table[0].error == pytest.approx(float(power_mean(torch.full((6,), 4 * 4.0))))
    assert asked == [(1.0, 0, 3), (2.0, 0, 3), (4.0, 0, 3), (2.0, 3, 6), (4.0, 3, 6)]
    assert found.model_calls == 2 * 3 * 5
    with pytest.raises(ValueError, match="under every one of 1 schedules"):
        ranked(run, stats, {"a": schedules["a"]}, 2, 6)


def test_a_finalist_that_fails_on_the_remaining_samples_is_dropped(stats):
    schedules = {name: fs.Schedule([40.0, sigma, 0.0], "ddim") for name, sigma in (("a", 1.0), ("b", 2.0), ("c", 4.0))}
    fails = lambda schedule, first: first > 0 and float(schedule.sigmas[1]) < 3
    run = lambda schedule, first, last: (
        None if fails(schedule, first) else Rollout(stats.ends[first:last] + float(schedule.sigmas[1]))
    )
    found = ranked(run, stats, schedules, 2, 6)
    assert [row.name for row in found.table] == ["c"]
    assert found.model_calls == 2 * 3 * 5


@pytest.mark.parametrize("solver", ["dpmpp_2m", "fitted"])
def test_a_fit_whose_finalists_all_fail_gives_the_best_of_the_first_round(solver):
    stats = fs.measure(DENOISER, (4,), levels=16, samples=8, keep_increments=True, progress=False)
    runner = Runner(DENOISER, stats, chosen_solver(solver), None, None, None)
    run = lambda schedule, first, last: None if first > 0 else runner(schedule, first, last)
    candidates = candidates_in_turn(stats, 5, solver)
    with pytest.warns(UserWarning, match="best on 3 of them, and is not tuned"):
        found = fit_by_running(run, stats, 5, solver, candidates, calls=5)
    assert found.tuning is None
    assert found.schedule.measured_error == pytest.approx(found.audition.table[0].error)


def test_statistics_of_another_network_are_refused(stats):
    other = fs.Denoiser.from_denoiser(lambda z, s: 0.1 * z, 0.01, 100.0)
    with pytest.raises(ValueError, match="stats were measured on another network"):
        fs.audition(other, stats, 6, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"samples": 7}, "samples must be at most the 6 that were measured"),
     ({"candidates": {}}, "at least one entry"), ({"solver": "dmpp_2m"}, "did you mean"),
     ({"candidates": {"a": [1.0, 0.0]}}, r"candidates\['a'\] has 1 steps, not 6"),
     ({"candidates": {"a": [1.0, 2.0, 0.0]}}, r"candidates\['a'\] must strictly descend"),
     ({"candidates": {"a": [1.0, 0.0]}, "solver": "fitted"}, r"candidates\['a'\]: weights must be given")],
)  # fmt: skip
def test_bad_arguments(stats, options, message):
    with pytest.raises(ValueError, match=message):
        fs.audition(DENOISER, stats, 6, progress=False, **options)


def test_statistics_are_no_candidate(stats):
    with pytest.raises(TypeError, match=r"candidates\['a'\] must be sigmas or a Schedule, .* got PathStatistics"):
        fs.audition(DENOISER, stats, 6, candidates={"a": stats}, progress=False)


def test_names_of_candidates_must_be_text(stats):
    schedule = fs.Schedule([40.0, 1.0, 0.0], "dpmpp_2m")
    with pytest.raises(TypeError, match="candidates must have names that are text, got None"):
        fs.audition(DENOISER, stats, 2, candidates={None: schedule}, progress=False)
    with pytest.raises(TypeError, match="schedules must have names that are text, got 8"):
        fs.plot.plot_schedules({8: schedule})


@pytest.mark.parametrize("ran", [0, 2, 7])
def test_an_interrupted_audition_ranks_what_was_run(stats, outcome, ran):
    calls = 6 * ran + 3 + 1  # in the midst of the next run; the first call is the check's

    def stopped(x, s):
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise KeyboardInterrupt
        return ORACLE.denoise(x, s)

    denoiser = fs.Denoiser.from_denoiser(stopped, 0.01, 40.0)
    if ran == 0:
        with pytest.raises(KeyboardInterrupt):
            fs.audition(denoiser, stats, 6, progress=False)
        return
    with pytest.warns(UserWarning, match=rf"interrupted: this ranking is of the {min(ran, 6)} of 6 candidates"):
        found = fs.audition(denoiser, stats, 6, progress=False)
    whole = {row.name: row for row in outcome.table}
    assert len(found.table) == min(ran, 6)
    for row in found.table:
        assert torch.equal(row.errors, whole[row.name].errors[: len(row.errors)])
    assert found.model_calls == 6 * 3 * ran + 1  # three samples in each of these runs
    calls = 1000
    kept = fs.measure(denoiser, (4,), levels=32, samples=6, keep_increments=True, progress=False)
    assert fs.tune(denoiser, kept, found, trials=1, progress=False).schedule.steps == 6
