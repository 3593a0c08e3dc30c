import math

import numpy as np
import pytest
import torch
from models import exact_denoiser, exact_denoisers, mixture, rollout_of

import fastsched as fs
from fastsched.costs.secants import KnownAnswers, Secants
from fastsched.costs.surrogate import Surrogate
from fastsched.fitting import run_secants
from fastsched.fitting.rollouts import Evaluations, RecordingDenoiser, Rollout
from fastsched.fitting.run_secants import residuals, with_runs
from fastsched.sampling.random_streams import noise_of
from fastsched.sampling.solvers import get_solver

ORACLE = mixture(d=4)
DENOISERS = {"ve": exact_denoiser(ORACLE, 0.01, 40.0), "flow": exact_denoisers(ORACLE)["velocity"]}


@pytest.fixture(scope="module", params=DENOISERS)
def measured(request):
    denoiser = DENOISERS[request.param]
    return denoiser, fs.measure(denoiser, (4,), levels=24, samples=3, keep_increments=True, progress=False)


def run_of(denoiser, stats, schedule):
    """A run from the measured noises: levels of its evaluations, error [B, d], residuals [B, evaluations, d]."""
    run = rollout_of(denoiser, stats, schedule)
    found = residuals(Surrogate.of(stats), stats, run.evaluations)
    return np.array(run.evaluations.s), (run.ends - stats.ends).double(), found.double()


def schedule_of(stats, steps, solver):
    return fs.optimal_schedule(stats, steps, solver, polish=False)


def levels_of(stats, schedule):
    return stats.process.level(schedule.sigmas).numpy()


def combined(coefficients, stats, *vectors):
    """``C v`` [B, d] of coefficients [n] over the increments and the vectors."""
    basis = torch.cat([stats.increments.double(), *vectors], dim=1)
    return torch.einsum("q,bqd->bd", torch.from_numpy(coefficients), basis)


def check_deviations(denoiser, stats, schedule, s, deviations):
    """Against the states of the run: ``z - z_path``, the path's as the surrogate has it from its ``D_0``."""
    noise = noise_of(stats.seeds, stats.shape)
    noisiest = stats.ends.double() - stats.increments.double().sum(1)
    states = rollout_of(denoiser, stats, schedule).evaluations.states
    for level, state, deviation in zip(s, states, deviations, strict=True):
        if math.isfinite(level):
            coefficients = Surrogate.of(stats).path(np.array([level]))[0][0]
            path = combined(coefficients, stats) + noise + (1 / level - 1 / float(stats.s[0])) * noisiest
            # float32 states y of size 1 / s and more
            atol = 1e-6 * level * float(state.abs().max())
            torch.testing.assert_close(deviation, level * (state.double() - path), rtol=1e-4, atol=atol)


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpm_2", "dpmpp_2m", "ipndm", "unipc_3"])
def test_a_run_is_the_surrogate_and_its_residuals(measured, solver):
    """On the model with a run's own residuals the sampler ends where the run did: predictors, correctors and all."""
    denoiser, stats = measured
    schedule, method = schedule_of(stats, 6, solver), get_solver(solver)
    s, error, found = run_of(denoiser, stats, schedule)
    levels, first, more = levels_of(stats, schedule), stats.levels - 1, found.shape[1]
    assert more == method.model_calls(6)
    surrogate = Surrogate.of(stats)
    rolled = surrogate.run(levels[None], method, KnownAnswers(first, first + more))
    check_deviations(denoiser, stats, schedule, s, [combined(each, stats, found) for each in rolled.deviations[:, 0]])
    plain = surrogate.run(levels[None], method, Secants.none(first)).outcome.error[0]
    again = combined(rolled.outcome.error[0], stats, found)
    torch.testing.assert_close(again, error, rtol=1e-4, atol=2e-5)  # float32 states of size 40, halved some times
    assert float((combined(plain, stats) - error).norm()) > 0.02 * float(error.norm())


@pytest.mark.parametrize("solver", ["heun", "dpmpp_2m", "unipc_3"])
def test_secants_reproduce_the_run_they_are_of(measured, solver, monkeypatch):
    denoiser, stats = measured
    monkeypatch.setattr(run_secants, "DAMPING", (0.0, 1.0))
    method, surrogate, schedule = get_solver(solver), Surrogate.of(stats), schedule_of(stats, 6, solver)
    s, error, found = run_of(denoiser, stats, schedule)
    levels, first, more = levels_of(stats, schedule), stats.levels - 1, found.shape[1]
    basis = torch.cat([stats.increments.double(), found], dim=1)
    metric = (basis @ basis.transpose(1, 2)).mean(0).numpy()
    deviations = surrogate.run(levels[None], method, KnownAnswers(first, first + more)).deviations[:, 0]
    columns, offsets = first + np.arange(len(s)), np.zeros(len(s))
    runs = (each[None] for each in (s, deviations, columns, offsets))
    known = with_runs(Secants.none(first), *runs, 0, metric, 1.0)
    outcome = surrogate.run(levels[None], method, known).outcome
    torch.testing.assert_close(combined(outcome.error[0], stats, found), error, rtol=1e-4, atol=2e-5)


def answers(deviations, levels, metric, away, lam=0.0, offsets=None, offset=None):
    """What runs with one evaluation each answer to ``away``, and explain of it."""
    n = len(metric) - len(deviations)
    told = np.zeros(len(levels)) if offsets is None else np.array(offsets)
    runs = (np.array(each)[:, None] for each in (levels, deviations, n + np.arange(len(levels)), told))
    known = with_runs(Secants.none(n), *runs, 0, metric, 0.5)
    return known.answer(0, known.at(np.full(len(away), lam)), away, offset)


def test_secants_of_a_linear_map_are_exact_on_what_was_seen(monkeypatch):
    """Residuals ``R a_m`` of runs at one level: any deviation in the span of the ``a_m`` is answered by ``R a``."""
    monkeypatch.setattr(run_secants, "DAMPING", (0.0, 1.0))
    generator = np.random.default_rng(0)
    n, runs = 7, 3
    R = generator.standard_normal((n, n))
    basis = generator.standard_normal((n + runs, 40))  # vectors in 40 dimensions: n of the measurement ...
    a = np.concatenate([generator.standard_normal((runs, n)), np.zeros((runs, runs))], axis=1)
    basis[n:] = a[:, :n] @ R @ basis[:n]  # ... and the residual of each run
    seen = generator.standard_normal((5, runs)) @ a
    answer, explained = answers(a, [2.0] * runs, basis @ basis.T, seen)
    np.testing.assert_allclose(answer @ basis, seen[:, :n] @ R @ basis[:n], rtol=1e-9)
    np.testing.assert_allclose(explained, seen, rtol=1e-9, atol=1e-9)


def test_an_offset_of_the_level_is_one_more_coordinate(monkeypatch):
    """Residuals ``R a_m + o_m g``: what a run answers to both is known, and to a deviation alone without ``g``."""
    monkeypatch.setattr(run_secants, "DAMPING", (0.0, 1.0))
    generator = np.random.default_rng(0)
    n, runs = 7, 4
    R, g, offsets = generator.standard_normal((n, n)), generator.standard_normal(40), [0.1, -0.2, 0.0, 0.3]
    basis = generator.standard_normal((n + runs, 40))
    a = np.concatenate([generator.standard_normal((runs, n)), np.zeros((runs, runs))], axis=1)
    basis[n:] = a[:, :n] @ R @ basis[:n] + np.outer(offsets, g)
    mixed = generator.standard_normal((5, runs))
    asked = mixed @ a, mixed @ np.array(offsets)
    answer, _ = answers(a, [2.0] * runs, basis @ basis.T, asked[0], offsets=offsets, offset=asked[1])
    np.testing.assert_allclose(answer @ basis, asked[0][:, :n] @ R @ basis[:n] + np.outer(asked[1], g), rtol=1e-8)


def test_secants_find_the_nearest_deviation_that_was_seen():
    """What is orthogonal to all that was seen is not answered; levels further off count less."""
    n, metric = 4, np.eye(6)
    a, b = np.eye(6)[0], np.eye(6)[1]
    answer, explained = answers([a, a + b], [1.0, 1.0], metric, np.eye(6)[2:3])
    assert not answer.any()
    assert not explained.any()
    damping = run_secants.DAMPING
    for level in (1.0, np.e):
        answer, explained = answers([a, a + b], [1.0, level], metric, (2 * a + b)[None])
        # argmin |2a + b - c0 a - c1 (a + b)|^2 + mu0 c0^2 + 2 mu1 c1^2, by its gradient
        mu = damping[0], damping[0] + damping[1] * np.log(level) ** 2
        normal = np.array([[1 + mu[0], 1.0], [1.0, 2 + 2 * mu[1]]])
        expected = np.linalg.solve(normal, [2.0, 3.0])
        np.testing.assert_allclose(answer[0, n:], expected, rtol=1e-9)
        np.testing.assert_allclose(explained[0], expected[0] * a + expected[1] * (a + b), rtol=1e-9)


def test_deviations_of_rounding_are_not_learned_from():
    answer, explained = answers([1e-6 * np.eye(3)[0]], [1.0], np.eye(3), np.eye(3)[:1])
    assert not answer.any()
    assert not explained.any()


def test_at_pure_noise_nothing_is_learned():
    """Runs whose first levels differ, one of them pure noise."""
    deviation, away = np.eye(4)[0], np.eye(4)[:1]
    assert not answers([deviation, deviation], [np.inf, 50.0], np.eye(4), away)[0].any()
    answer = answers([deviation, deviation], [50.0, np.inf], np.eye(4), away)[0]
    assert answer[0, 2] > 0.9
    assert answer[0, 3] == 0.0


def test_a_recording_denoiser_returns_the_outputs_of_its_denoiser():
    denoiser = exact_denoisers(ORACLE)["v"]
    recorder = RecordingDenoiser.of(denoiser)
    noise = noise_of(torch.arange(5), (4,))
    s = denoiser.levels(6)
    schedule = fs.Schedule.from_levels(denoiser.process, torch.cat([s, s.new_zeros(1)]), "heun")
    assert torch.equal(fs.sample(recorder, schedule, noise=noise), fs.sample(denoiser, schedule, noise=noise))
    found = recorder.evaluations()
    assert len(found.s) == 11
    assert found.s[0] == pytest.approx(float(s[0]))
    for level, state, denoised in zip(found.s, found.states, found.denoised, strict=True):
        assert torch.equal(denoised, denoiser.denoise(state, level))


def test_a_recorder_asks_a_denoiser_of_another_kind():
    class Halved(fs.Denoiser):
        def denoise(self, y, s, *, dtype=None):
            return 0.5 * super().denoise(y, s, dtype=dtype)

    own = Halved(lambda z, s: z, DENOISERS["ve"].process, "x0")
    y = torch.ones(2, 4)
    assert torch.equal(RecordingDenoiser.of(own).denoise(y, 2.0), own.denoise(y, 2.0))
    assert not torch.equal(own.denoise(y, 2.0), fs.Denoiser.denoise(own, y, 2.0))


def test_rollouts_are_joined_and_cut():
    ends = torch.arange(6.0).reshape(3, 2)
    whole = Rollout(ends, Evaluations((2.0, 1.0), (ends, 2 * ends), (3 * ends, 4 * ends)))
    parts = [
        Rollout(ends[rows], Evaluations((2.0, 1.0), (ends[rows], 2 * ends[rows]), (3 * ends[rows], 4 * ends[rows])))
        for rows in (slice(0, 2), slice(2, 3))
    ]
    joined = Rollout.joined(parts)
    assert torch.equal(joined.ends, ends)
    assert joined.evaluations.s == whole.evaluations.s
    for found, expected in ((joined, whole), (whole.samples(0, 2), parts[0])):
        for name in ("states", "denoised"):
            pairs = zip(getattr(found.evaluations, name), getattr(expected.evaluations, name), strict=True)
            assert all(torch.equal(one, other) for one, other in pairs)
    assert Rollout.joined([parts[0], Rollout(ends[2:])]).evaluations is None
    assert Rollout(ends).samples(0, 1).evaluations is None
