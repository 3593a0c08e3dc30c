from dataclasses import replace

import numpy as np
import pytest
import torch
from models import counted_denoiser, exact_denoiser, exact_denoisers, mixture

import fastsched as fs
from fastsched.fitting.rollouts import Rollout, distances
from fastsched.fitting.run_record import RunRecord
from fastsched.fitting.tuning import run_trials
from fastsched.metrics import power_mean
from fastsched.sampling.random_streams import noise_of
from fastsched.sampling.solvers import get_solver

ORACLE = mixture(d=4)
DENOISER = exact_denoiser(ORACLE, 0.01, 40.0)


def measure(denoiser=DENOISER, **options):
    options = {"levels": 24, "samples": 6, "keep_increments": True, "checks": False, "progress": False, **options}
    return fs.measure(denoiser, (4,), **options)


@pytest.fixture(scope="module")
def stats():
    return measure()


@pytest.fixture(scope="module")
def start():
    return fs.Schedule(fs.baselines.karras(6, 0.01, 40.0, spare_last=True), "dpmpp_2m")


@pytest.fixture(scope="module")
def tuning(stats, start):
    return fs.tune(DENOISER, stats, start, trials=6, progress=False)


def counted():
    return counted_denoiser(ORACLE, 0.01, 40.0)


def test_tuning_lowers_the_error_on_a_mixture(tuning):
    first, *others = tuning.trials
    assert 1 <= len(others) <= 6
    assert tuning.schedule.measured_error == min(trial.measured_error for trial in tuning.trials)
    assert tuning.schedule.measured_error < 0.3 * first.measured_error  # karras leaves much to win


def test_a_tuned_schedule_says_where_it_comes_from(stats, start, tuning):
    assert tuning.schedule.origin == replace(stats.origin, model_calls=stats.model_calls + tuning.model_calls)
    audition = fs.audition(DENOISER, stats, 4, progress=False)
    found = fs.tune(DENOISER, stats, audition, trials=1, progress=False)
    assert found.schedule.origin.model_calls == stats.model_calls + audition.model_calls + found.model_calls
    again = fs.tune(DENOISER, stats, found.schedule, trials=1, progress=False)
    assert again.schedule.origin.model_calls == found.schedule.origin.model_calls + again.model_calls
    assert fs.tune(DENOISER, replace(stats, origin=None), start, trials=0, progress=False).schedule.origin is None


def test_tuned_error_is_the_samplers_own(stats, tuning):
    """The errors, and each trial's, from sampling again."""
    noise = noise_of(stats.seeds, (4,))
    for trial in tuning.trials:
        errors = distances(stats, fs.sample(DENOISER, trial, noise=noise))
        assert trial.measured_error == pytest.approx(float(power_mean(errors)), rel=1e-4)
    errors = distances(stats, fs.sample(DENOISER, tuning.schedule, noise=noise))
    torch.testing.assert_close(tuning.errors, errors, rtol=1e-4, atol=0)


def test_schedules_tuned_keep_their_ends_and_steps(tuning, start):
    for trial in tuning.trials:
        assert (trial.steps, trial.solver) == (6, "dpmpp_2m")
        assert (float(trial.sigmas[0]), float(trial.sigmas[-1])) == (40.0, 0.0)
    assert torch.equal(tuning.trials[0].sigmas, start.sigmas)
    assert str(tuning).count("\n") == len(tuning.trials)


def test_tuning_helps_on_noises_not_seen(tuning, start):
    fresh = measure(seed=1, samples=64, responses=False, keep_increments=False, levels=48)
    noise = noise_of(fresh.seeds, (4,))
    error = lambda schedule: float(distances(fresh, fs.sample(DENOISER, schedule, noise=noise)).log().mean().exp())
    assert error(tuning.schedule) < 0.7 * error(start)


def test_tuning_is_repeatable(stats, start, tuning):
    again = fs.tune(DENOISER, stats, start, trials=6, progress=False)
    assert len(again.trials) == len(tuning.trials)
    assert all(torch.equal(a.sigmas, b.sigmas) for a, b in zip(again.trials, tuning.trials, strict=True))
    assert torch.equal(again.errors, tuning.errors)


@pytest.mark.parametrize("solver", ["dpmpp_2m", "heun"])
@pytest.mark.parametrize("trials", [0, 2])
def test_model_calls_are_counted(stats, solver, trials):
    denoiser, calls = counted()
    start = fs.Schedule(fs.baselines.exponential(4, 0.01, 40.0), solver)
    found = fs.tune(denoiser, stats, start, trials=trials, batch_size=4, progress=False)
    assert found.model_calls == sum(calls)
    assert len(found.trials) <= 1 + trials
    if trials == 0:
        assert torch.equal(found.schedule.sigmas, start.sigmas)


def test_an_audition_brings_its_finalists(stats):
    denoiser, calls = counted()
    audition = fs.audition(denoiser, stats, 5, progress=False)
    assert audition.model_calls == sum(calls)
    calls.clear()
    found = fs.tune(denoiser, stats, audition, trials=3, progress=False)
    assert found.model_calls == sum(calls) == 5 * 6 * (len(found.trials) - 2)
    assert [trial.measured_error for trial in found.trials[:2]] == [
        pytest.approx(row.error) for row in audition.table[:2]
    ]
    assert found.schedule.measured_error <= audition.winner.measured_error * (1 + 1e-12)


def test_an_audition_of_some_samples_is_run_on_all(stats):
    denoiser, calls = counted()
    audition = fs.audition(denoiser, stats, 5, samples=3, progress=False)
    calls.clear()
    found = fs.tune(denoiser, stats, audition, trials=1, progress=False)
    assert torch.equal(found.trials[0].sigmas, audition.winner.sigmas)
    assert len(found.errors) == 6
    assert found.model_calls == sum(calls) == 5 * 6 * len(found.trials)


@pytest.mark.parametrize("solver", ["ddim", "dpm_2", "unipc_3", "ipndm", "fitted"])
def test_never_worse_than_the_start(stats, solver):
    start = fs.optimal_schedule(stats, 4, solver)
    found = fs.tune(DENOISER, stats, start, trials=3, progress=False)
    assert found.schedule.measured_error <= found.trials[0].measured_error


@pytest.mark.parametrize("kind", ["velocity", "epsilon", "v"])
def test_other_processes_are_tuned(kind):
    denoiser = exact_denoisers(ORACLE)[kind]
    stats = measure(denoiser, levels=16, samples=4)
    start = fs.Schedule.from_levels(stats.process, torch.cat([stats.s[[0, 4, 7, 11]], torch.zeros(1)]), "dpmpp_2m")
    found = fs.tune(denoiser, stats, start, trials=4, progress=False)
    assert found.schedule.measured_error < 0.8 * found.trials[0].measured_error
    assert found.schedule.sigmas[0] == start.sigmas[0]


def test_integer_timesteps_stay_integer():
    denoiser = fs.Denoiser.from_epsilon(
        lambda x, t: 0.9 * x / (1 + t[:, None] / 200), torch.linspace(0.999, 0.005, 200), integer_timesteps=True
    )
    stats = measure(denoiser, levels=16, samples=2)
    found = fs.tune(denoiser, stats, fs.optimal_schedule(stats, 4, polish=False), trials=4, progress=False)
    assert len(found.trials) > 1
    for trial in found.trials:
        assert trial.timesteps.tolist() == trial.timesteps.round().tolist()


def test_one_step_has_nothing_to_tune(stats):
    denoiser, calls = counted()
    found = fs.tune(denoiser, stats, fs.Schedule([40.0, 0.0], "dpmpp_2m"), progress=False)
    assert found.model_calls == sum(calls) == 6
    assert found.schedule.sigmas.tolist() == [40.0, 0.0]


def test_two_steps_find_the_best_node(stats):
    """One node: against a scan of all places for it."""
    noise = noise_of(stats.seeds, (4,))
    error = lambda s: float(np.log(power_mean(distances(stats, fs.sample(DENOISER, [40.0, s, 0.0], "ddim", noise)))))
    scanned = min(error(float(s)) for s in torch.logspace(-1.5, 1.5, 200))
    found = fs.tune(DENOISER, stats, fs.Schedule([40.0, 8.0, 0.0], "ddim"), trials=12, progress=False)
    assert np.log(found.schedule.measured_error) < scanned + 0.02


def test_gaussian_data_converge_in_few_runs():
    """The surrogate is exact there, so that its own descent is the tuning: later runs have little left to win."""
    denoiser = exact_denoiser(fs.oracles.Gaussian(0.5, (4,)), 0.01, 40.0)
    stats = measure(denoiser, levels=48, samples=2)
    start = fs.Schedule(fs.baselines.karras(5, 0.01, 40.0, spare_last=True), "dpmpp_2m")
    found = fs.tune(denoiser, stats, start, trials=6, progress=False)
    errors = [trial.measured_error for trial in found.trials]
    assert errors[1] < 0.1 * errors[0]  # within reach
    assert found.schedule.measured_error < 1e-3 * errors[0]


def test_outputs_of_runs_help_to_fit_weights(monkeypatch):
    """The fitted solver's weights follow what the network answered; the ends alone tell them little."""
    denoiser = exact_denoiser(mixture(d=16), 0.01, 40.0)
    stats = fs.measure(denoiser, (16,), levels=24, samples=6, keep_increments=True, checks=False, progress=False)
    start = fs.optimal_schedule(stats, 7, "fitted")
    learned = fs.tune(denoiser, stats, start, trials=5, progress=False)
    empty = lambda self, found, levels: (np.zeros(0), self._vectors[0][:, :0])
    monkeypatch.setattr(RunRecord, "_levels_and_residuals", empty)
    blind = fs.tune(denoiser, stats, start, trials=5, progress=False)
    assert learned.schedule.measured_error < 0.4 * blind.schedule.measured_error


@pytest.mark.parametrize("seed", range(3))
def test_levels_and_weights_are_tuned_together(seed):
    """To a small fraction of what weights that follow the path step by step leave; on other noises too.

    Of 16 elements: six samples of four are hardly more numbers than there are levels and weights.
    """
    denoiser = exact_denoiser(mixture(d=16), 0.01, 40.0)
    options = {"levels": 24, "samples": 6, "seed": seed, "keep_increments": True, "checks": False, "progress": False}
    stats = fs.measure(denoiser, (16,), **options)
    start = fs.optimal_schedule(stats, 6, "fitted")
    found = fs.tune(denoiser, stats, start, trials=10, progress=False)
    assert found.schedule.measured_error < 0.25 * found.trials[0].measured_error
    assert not torch.equal(found.schedule.weights, start.weights)
    reference = fs.converged_reference(denoiser, (16,), samples=32, seed=3, progress=False)
    error = lambda schedule: power_mean(
        fs.metrics.squared_distances(fs.sample(denoiser, schedule, noise=reference.noise), reference.ends)
    )
    assert error(found.schedule) < 0.5 * error(start)


def test_no_schedule_is_run_twice():
    """Integer timesteps leave few schedules."""
    denoiser = fs.Denoiser.from_epsilon(lambda x, t: 0.1 * x, torch.linspace(0.999, 0.005, 40), integer_timesteps=True)
    stats = measure(denoiser, levels=16)
    for steps in (3, 4, 5, 6):
        outcome = fs.audition(denoiser, stats, steps, progress=False)
        found = fs.tune(denoiser, stats, outcome, trials=10, progress=False)
        assert len({tuple(trial.timesteps.tolist()) for trial in found.trials}) == len(found.trials)


def test_what_cannot_be_run_is_passed_over(stats, start):
    """The callback may decline; then shorter moves are tried, up to the number of trials."""
    asked = []

    def decline(schedule, first, last):
        asked.append(schedule)

    known = Rollout(fs.sample(DENOISER, start, noise=noise_of(stats.seeds, (4,))))
    record = RunRecord(stats, get_solver(start.solver), [(start, known)])
    assert run_trials(decline, record, 4) == 4 == len(asked)
    assert [trial.schedule for trial in record.trials] == [start]


def test_bad_arguments(stats, start):
    denoiser, calls = counted()
    with pytest.raises(ValueError, match="measure with keep_increments=True"):
        fs.tune(denoiser, measure(keep_increments=False), start)
    with pytest.raises(ValueError, match="trials must be at least 0"):
        fs.tune(denoiser, stats, start, trials=-1)
    with pytest.raises(ValueError, match="solver must be deterministic"):
        fs.tune(denoiser, stats, fs.Schedule([40.0, 1.0, 0.0], "ancestral"))
    assert not calls


def test_statistics_of_another_network_are_refused():
    options = {"levels": 12, "samples": 2, "keep_increments": True, "progress": False}
    stats = fs.measure(DENOISER, (4,), **options)
    start, other = fs.optimal_schedule(stats, 3), exact_denoiser(mixture(d=4, seed=7), 0.01, 40.0)
    with pytest.raises(ValueError, match="another network"):
        fs.tune(other, stats, start, progress=False)
    assert fs.tune(other, stats, start, trials=0, checks=False, progress=False).trials
    denoiser, calls = counted()
    assert fs.tune(denoiser, stats, start, trials=1, progress=False).model_calls == sum(calls)


class Changing:
    """An exact network until a call, and a tenth less from then on."""

    def __init__(self, after):
        self.after, self.calls = after, 0

    def __call__(self, z, s):
        self.calls += 1
        return ORACLE.denoise(z, s) * (1.0 if self.calls <= self.after else 0.9)


@pytest.mark.parametrize("run", ["tune", "audition", "fit"])
def test_networks_that_change_between_runs_are_warned_of_once(run, stats, start):
    """The one call before a tuning or an audition, and the checks of a fit's measurement, are right still."""

    def call(network, checks=True):
        denoiser = fs.Denoiser.from_denoiser(network, 0.01, 40.0)
        return {
            "tune": lambda: fs.tune(denoiser, stats, start, trials=2, checks=checks, progress=False),
            "audition": lambda: fs.audition(denoiser, stats, 6, checks=checks, progress=False),
            "fit": lambda: fs.fit(denoiser, (4,), 6, samples=4, levels=24, checks=checks, progress=False),
        }[run]()

    exact = Changing(10**6)
    call(exact)
    with pytest.warns(UserWarning, match="first outputs in a run of the sampler") as said:
        call(Changing(exact.calls - 8))
    assert len(said) == 1
    call(Changing(exact.calls - 8), checks=False)
