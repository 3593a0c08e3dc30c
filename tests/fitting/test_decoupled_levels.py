"""Decoupled levels: what the network is told, apart from the state's level, in sampling and in tuning."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from models import exact_denoiser, exact_denoisers, mixture, rollout_of, told_lower, vp_table

import fastsched as fs
from fastsched.costs.secants import KnownAnswers, Secants
from fastsched.costs.surrogate import Surrogate
from fastsched.fitting.neighbourhood import OFFSET_REACH
from fastsched.fitting.run_record import RunRecord
from fastsched.fitting.run_secants import residuals
from fastsched.sampling.random_streams import noise_of
from fastsched.sampling.solvers import get_solver

ORACLE = mixture(d=4)
DENOISERS = exact_denoisers(ORACLE)


@pytest.mark.parametrize("kind", DENOISERS)
def test_the_network_is_told_the_level_and_its_output_read_at_the_states(kind):
    """Against Euler's method by hand, with the network's own output at the timestep that it is told."""
    denoiser, noise = DENOISERS[kind], noise_of(torch.arange(3), (4,)).double()
    asked = []
    network = lambda x, condition: (asked.append(condition.clone()), denoiser.network(x, condition))[1]
    schedule, process = told_lower(denoiser), denoiser.process
    found = fs.sample(dataclasses.replace(denoiser, network=network), schedule, noise=noise)
    s, told, y = process.level(schedule.sigmas), process.level(schedule.network_sigmas), noise
    for n in range(schedule.steps):
        x, level = y * process.sigma(s[n : n + 1]), told[n : n + 1]
        a, c = denoiser.coefficients(s[n : n + 1])
        if denoiser.prediction == "edm":
            condition, given = level.log() / 4, x / (s[n] ** 2 + denoiser.sigma_data**2).sqrt()
        else:
            timestep = process.timestep(level)
            condition, given = (level if timestep is None else timestep), x
        torch.testing.assert_close(asked[n], condition.expand(3))
        denoised = a * x + c * denoiser.network(given, condition.expand(3))
        y = denoised if n == schedule.steps - 1 else y + (1 / s[n + 1] - 1 / s[n]) * denoised
    torch.testing.assert_close(found, y, rtol=1e-9, atol=1e-9)
    coupled = fs.sample(denoiser, dataclasses.replace(schedule, network_sigmas=None), noise=noise)
    assert float((coupled - found).norm()) > 1e-3 * float(found.norm())


@pytest.mark.parametrize("kind", DENOISERS)
def test_the_denoised_sample_is_that_of_another_level(kind):
    """Against Euler's method by hand, with the exact ``D(z; s')`` of the sampler's state."""
    denoiser, noise = DENOISERS[kind], noise_of(torch.arange(3), (4,)).double()
    schedule, process = told_lower(denoiser, decoupled="denoiser"), denoiser.process
    found = fs.sample(denoiser, schedule, noise=noise)
    sigmas, told = schedule.sigmas.tolist(), schedule.network_sigmas.tolist()
    state = sigmas[0] * noise if math.isfinite(sigmas[0]) else None  # of pure noise only the first step is known
    for n, (own, other) in enumerate(zip(sigmas[:-1], told, strict=True)):
        s = process.level(torch.tensor([other], dtype=torch.float64))
        if math.isinf(float(s)):
            assert n == 0
            denoised = denoiser.denoise(noise, math.inf)
        else:
            denoised = ORACLE.denoise(state / (process.alpha(s) if kind == "velocity" else 1.0), s)
        away = noise if state is None else (state - denoised) / own
        state = denoised + sigmas[n + 1] * away
    torch.testing.assert_close(found, state, rtol=1e-6, atol=1e-6)
    of_timesteps = fs.sample(denoiser, dataclasses.replace(schedule, decoupled="timestep"), noise=noise)
    differs = float((of_timesteps - found).norm()) > 1e-3 * float(found.norm())
    assert differs == (denoiser.prediction != "x0")  # whose output is D itself


def test_what_levels_are_decoupled():
    plain = fs.Schedule([4.0, 2.0, 0.0], "ddim", decoupled="denoiser")
    assert plain.decoupled is None  # no levels are
    told = fs.Schedule([4.0, 2.0, 0.0], "ddim", network_sigmas=[3.0, 1.0])
    assert told.decoupled == "timestep"  # as in files of earlier versions
    assert told != dataclasses.replace(told, decoupled="denoiser")
    with pytest.raises(ValueError, match="decoupled must be one of 'denoiser', 'timestep'"):
        fs.Schedule([4.0, 2.0, 0.0], "ddim", network_sigmas=[3.0, 1.0], decoupled="sigma")
    with pytest.raises(ValueError, match="both start at pure noise"):
        fs.Schedule([math.inf, 2.0, 0.0], "ddim", "vp", network_sigmas=[3.0, 1.0], decoupled="denoiser")


def test_solvers_that_cannot_have_decoupled_levels_are_refused():
    denoiser, schedule = DENOISERS["epsilon"], told_lower(DENOISERS["epsilon"])
    for solver in ("heun", "dpm_2", "ancestral"):
        with pytest.raises(ValueError, match="one call a step"):
            dataclasses.replace(schedule, solver=solver)
        with pytest.raises(ValueError, match="one call a step"):
            fs.sample(denoiser, schedule, solver, torch.zeros(1, 4))
    with pytest.raises(ValueError, match="one call a step"):
        fs.fit(denoiser, (4,), 4, "heun", decoupled=True, progress=False)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ([3.0, 2.0], "one value for each sigma but the last"),
        ([3.0, 1.0, 1.0], "descend"),
        ([3.0, 1.0, 0.0], "positive"),
        ([3.0, 1.0, math.nan], "network_sigmas"),
    ],
)
def test_wrong_network_sigmas(told, message):
    with pytest.raises(ValueError, match=message):
        fs.Schedule([4.0, 2.0, 1.0, 0.0], "ddim", network_sigmas=told)


def test_a_flow_is_told_times():
    for told in (1.5, math.inf):
        with pytest.raises(ValueError, match="network_sigmas of a flow model are times"):
            fs.Schedule([0.9, 0.3, 0.0], "ddim", "flow", network_sigmas=[told, 0.2])
    assert float(fs.Schedule([0.9, 0.3, 0.0], "ddim", "flow", network_sigmas=[1.0, 0.2]).network_sigmas[0]) == 1.0


@pytest.mark.parametrize(("decoupled", "version"), [("timestep", 3), ("denoiser", 4)])
def test_a_schedule_keeps_what_the_network_is_told(tmp_path, decoupled, version):
    schedule = told_lower(DENOISERS["velocity"], decoupled=decoupled)
    schedule.save(tmp_path / "schedule.json")
    read = fs.Schedule.load(tmp_path / "schedule.json")
    assert read == schedule
    assert torch.equal(read.network_sigmas, schedule.network_sigmas)
    assert torch.equal(
        read.timesteps, DENOISERS["velocity"].process.timestep(read.network_sigmas / (1 - read.network_sigmas))
    )
    assert read != dataclasses.replace(schedule, network_sigmas=None)
    assert f'"version": {version}' in (tmp_path / "schedule.json").read_text()
    assert "network told" in repr(schedule)
    assert "network told" in schedule._repr_html_()


def test_compare_samples_as_the_network_is_told():
    denoiser = DENOISERS["velocity"]
    schedule = told_lower(denoiser)
    plain = dataclasses.replace(schedule, network_sigmas=None)
    found = fs.compare(denoiser, {"told": schedule, "plain": plain}, shape=(4,), samples=8, progress=False)
    ends = fs.sample(denoiser, schedule, noise=found.reference.noise)
    squared = fs.metrics.squared_distances(ends, found.reference.ends)
    errors = {row.name: row.mean_error for row in found.rows}
    assert errors["told"] == pytest.approx(float(squared.mean()), rel=1e-5)
    assert errors["told"] != pytest.approx(errors["plain"], rel=0.05)
    with pytest.raises(ValueError, match="one call a step"):
        fs.compare(denoiser, {"told": schedule}, "heun", shape=(4,), samples=8, progress=False)


@pytest.mark.parametrize("value", ["missing", None])
def test_a_file_that_lost_its_network_sigmas_is_refused(tmp_path, value):
    """Its sigmas are of no use to a network that is told the levels of the states."""
    path = tmp_path / "schedule.json"
    told_lower(DENOISERS["x0"], decoupled="denoiser").save(path)
    entries = json.loads(path.read_text())
    entries = {name: each for name, each in entries.items() if name not in ("network_sigmas", "sha256")}
    path.write_text(json.dumps(entries | ({} if value == "missing" else {"network_sigmas": value})))
    with pytest.raises(ValueError, match=r"schedule\.json .*network_sigmas must be there"):
        fs.Schedule.load(path)


def test_comfyui_and_predictions_refuse_decoupled_levels():
    denoiser = exact_denoiser(ORACLE, 0.01, 40.0)
    schedule = told_lower(denoiser)
    stats = fs.measure(denoiser, (4,), levels=12, samples=2, progress=False)
    for use in (schedule.to_comfyui, lambda: fs.predict_error(stats, schedule)):
        with pytest.raises(ValueError, match="decoupled levels"):
            use()


@pytest.fixture(scope="module", params=["ve", "velocity", "epsilon"])
def measured(request):
    denoiser = exact_denoiser(ORACLE, 0.01, 40.0) if request.param == "ve" else DENOISERS[request.param]
    return denoiser, fs.measure(denoiser, (4,), levels=24, samples=4, keep_increments=True, progress=False)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "unipc"])
def test_a_run_is_the_surrogate_and_its_residuals(measured, solver):
    """What the told levels change is part of the residuals: with them the surrogate ends where the run did."""
    denoiser, stats = measured
    schedule, surrogate = told_lower(denoiser, 6, solver), Surrogate.of(stats)
    run = rollout_of(denoiser, stats, schedule)
    found = residuals(surrogate, stats, run.evaluations).double()
    first, more = stats.levels - 1, found.shape[1]
    levels = stats.process.level(schedule.sigmas).numpy()
    basis = torch.cat([stats.increments.double(), found], dim=1)
    error = (run.ends - stats.ends).double()
    ends = lambda known: torch.einsum(
        "q,bqd->bd",
        torch.from_numpy(surrogate.run(levels[None], get_solver(solver), known).outcome.error[0]),
        basis,
    )
    torch.testing.assert_close(ends(KnownAnswers(first, first + more)), error, rtol=1e-4, atol=2e-5)
    coupled = rollout_of(denoiser, stats, dataclasses.replace(schedule, network_sigmas=None))
    assert float((coupled.ends - run.ends).norm()) > 0.01 * float(error.norm())
    none = Secants.none(3)
    assert none.answer(0, none.at(np.zeros(1)), np.zeros((1, 3)), np.ones(1))[0].shape == (1, 3)


def test_parameters_of_a_neighbourhood(measured):
    denoiser, stats = measured
    schedule = told_lower(denoiser, 5)
    record = RunRecord(stats, get_solver("ddim"), decoupled="timestep")
    record.add(schedule, rollout_of(denoiser, stats, schedule))
    near = record.near(0)
    assert len(near.anchor) == 3 + 1 + 5
    point = near.point(near.anchor)
    np.testing.assert_allclose(point.network_levels, stats.process.level(schedule.network_sigmas).numpy(), rtol=1e-12)
    again = point.schedule(stats.process, "ddim", "timestep")
    torch.testing.assert_close(again.network_sigmas, schedule.network_sigmas)
    assert again.decoupled == "timestep"
    low, high = near.bounds(0.5, *stats.finite_range)
    for x in (low, high):
        told = near.point(np.concatenate([near.anchor[:-5], x[-5:]])).network_levels
        finite = np.isfinite(told)
        assert (told[finite] <= stats.finite_range[1] * (1 + 1e-9)).all()
        assert (told[finite] >= stats.finite_range[0] * (1 - 1e-9)).all()
        assert np.isinf(told[~finite]).all()
    gap = np.log(near.run.levels[2] / near.run.levels[3])
    assert (high - low)[-3] <= 2 * OFFSET_REACH * 0.5 * gap + 1e-9
    none = near.anchor.copy()
    none[-5:] = 0.0
    assert near.point(none).coupled
    crossed = near.anchor.copy()
    crossed[-3], crossed[-2] = -5.0, 5.0
    outside = near.anchor.copy()
    outside[-1] = -9.0
    assert np.isinf(near.predicted(np.stack([crossed, outside]))).all()
    assert np.isfinite(near.predicted(near.anchor[None])).all()


@pytest.mark.parametrize("decoupled", ["denoiser", "timestep"])
@pytest.mark.parametrize("solver", ["ddim", "unipc", "fitted"])
def test_a_decoupled_fit_is_tuned_by_its_own_runs(measured, solver, decoupled):
    denoiser, stats = measured
    options = {"stats": stats, "model_calls": 14 * 4 * 5, "progress": False}
    schedule = fs.fit(denoiser, (4,), 5, solver, decoupled=decoupled, **options)
    ends = fs.sample(denoiser, schedule, noise=noise_of(stats.seeds, stats.shape))
    squared = (ends - stats.ends).double().square().sum(1)
    assert schedule.measured_error == pytest.approx(float(fs.metrics.power_mean(squared)), rel=1e-4)
    if solver == "ddim":
        assert schedule.decoupled == decoupled
        assert schedule.predicted_error is None
        assert schedule.measured_error < 0.7 * fs.fit(denoiser, (4,), 5, solver, **options).measured_error


@pytest.mark.parametrize(
    ("steps", "calls", "why"),
    [(5, 10, "model_calls is too small"), (1, 400, "of one step")],
    ids=["calls", "steps"],
)
def test_a_decoupled_fit_that_tunes_nothing_says_so(measured, steps, calls, why):
    denoiser, stats = measured
    with pytest.warns(UserWarning, match=f"decoupled='denoiser' had no effect: .*{why}"):
        found = fs.fit(denoiser, (4,), steps, stats=stats, model_calls=calls, decoupled=True, progress=False)
    assert found.network_sigmas is None


def test_a_decoupled_schedule_is_tuned_on(measured):
    denoiser, stats = measured
    start = fs.fit(denoiser, (4,), 5, "ddim", stats=stats, model_calls=10 * 4 * 5, decoupled=True, progress=False)
    assert start.network_sigmas is not None
    tuning = fs.tune(denoiser, stats, start, trials=3, progress=False)
    assert tuning.schedule.measured_error <= start.measured_error * (1 + 1e-6)
    assert all(trial.decoupled == "denoiser" for trial in tuning.trials)


def test_integer_timesteps_stay_integers():
    oracle = mixture(d=4)
    plain = exact_denoisers(oracle)["epsilon"]

    def network(x, t):
        assert t.dtype == torch.int64
        return plain.network(x, t)

    denoiser = fs.Denoiser.from_epsilon(network, vp_table(), integer_timesteps=True)
    options = {"levels": 24, "samples": 4, "model_calls": 700, "progress": False}
    schedule = fs.fit(denoiser, (4,), 5, "ddim", decoupled=True, **options)
    assert schedule.network_sigmas is not None
    assert bool((schedule.timesteps == schedule.timesteps.round()).all())


def test_an_interrupted_decoupled_fit_goes_on_to_the_same_bits(tmp_path):
    denoiser = exact_denoiser(ORACLE, 0.01, 40.0)
    options = {"levels": 16, "samples": 3, "model_calls": 400, "decoupled": True, "progress": False}
    path, calls = tmp_path / "fit", []

    def failing(z, s):
        calls.append(len(z))
        if len(calls) == 220:
            raise RuntimeError("stopped")
        return denoiser.network(z, s)

    whole = fs.fit(denoiser, (4,), 5, "ddim", checkpoint=tmp_path / "whole", **options)
    with pytest.raises(RuntimeError, match="stopped"):
        fs.fit(dataclasses.replace(denoiser, network=failing), (4,), 5, "ddim", checkpoint=path, **options)
    resumed = fs.fit(denoiser, (4,), 5, "ddim", checkpoint=path, **options)
    assert resumed == whole
    with pytest.raises(ValueError, match="another call"):
        fs.fit(denoiser, (4,), 5, "ddim", checkpoint=path, **{**options, "decoupled": "timestep"})
