"""The paper's schedule, from a denoiser: Algorithm 1 on the corrector cost."""

import math

import numpy as np
import pytest
import torch
from models import exact_denoisers, gaussian, mixture

import fastsched as fs
from fastsched.costs import stein_corrector
from fastsched.denoisers.level_grids import log_uniform


def test_summed_lengths_approach_the_closed_form():
    oracle, denoiser = gaussian(64)
    exact = float(oracle.corrector_length(80.0) - oracle.corrector_length(0.002))
    settings = {"shape": (64,), "samples": 2048, "dtype": torch.float64, "progress": False}
    settings["data"] = oracle.sample(2048, seed=1, dtype=torch.float64)
    # To 1%. Steps of h in log s: "noisier" is h too long at high noise (h = 0.0066 at 1,600 levels), "cleaner" only
    # h^2 / 6 (0.2% at 96). The states' norms, chi-squares of 64 x 2,048 terms, leave sqrt(2 / 131,072) / 2 = 0.2%.
    for velocity, levels in (("noisier", 1600), ("cleaner", 96)):
        cost = stein_corrector(denoiser, sigmas=denoiser.levels(levels), velocity=velocity, **settings)
        assert float(cost.lengths.sum()) == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("from_data", [True, False], ids=["data", "path"])
@pytest.mark.parametrize("steps", [4, 8, 16])
def test_gaussian_schedule_has_equal_exact_lengths(steps, from_data):
    oracle, denoiser = gaussian(64)
    settings = {"shape": (64,), "levels": 256, "samples": 16, "progress": False}
    data = oracle.sample(64, seed=1) if from_data else None
    schedule = fs.score_optimal_schedule(denoiser, steps, data=data, **settings)
    lengths = -oracle.corrector_length(schedule.sigmas).diff()
    assert schedule.steps == schedule.model_calls == steps
    assert (lengths / lengths.mean() - 1).abs().max() < 0.02


def test_last_node_is_replaced_by_zero_or_kept():
    _, denoiser = gaussian(64)
    settings = {"shape": (64,), "samples": 4, "progress": False}
    replaced = fs.score_optimal_schedule(denoiser, 6, **settings)
    kept = fs.score_optimal_schedule(denoiser, 7, spare_last=False, **settings)
    torch.testing.assert_close(kept.sigmas[:6], replaced.sigmas[:6])
    assert kept.end_sigma == pytest.approx(0.002)
    assert replaced.sigmas[-1] == kept.sigmas[-1] == 0
    assert fs.score_optimal_schedule(denoiser, 1, **settings).sigmas.tolist() == pytest.approx([80.0, 0.0])


def _cosine_table():
    u = torch.arange(1001, dtype=torch.float64) / 1000
    curve = torch.cos((u + 0.008) / 1.008 * torch.pi / 2).square()
    return torch.cumprod((curve[1:] / curve[:-1]).clamp(min=1e-3), 0)


@pytest.mark.parametrize("method", ["corrector", "path cost"])
def test_four_dynamics_agree_in_s(method):
    oracle = mixture(d=8)
    asked = exact_denoisers(oracle)
    models = {name: asked[name] for name in ("x0", "epsilon", "velocity")}  # VE, VP-linear, flow
    models["VP-cosine"] = exact_denoisers(oracle, _cosine_table())["epsilon"]
    levels = log_uniform(70.0, 0.025, 48)  # known to all four
    found = {}
    for name, model in models.items():
        if method == "corrector":
            schedule = fs.score_optimal_schedule(model, 10, shape=(8,), levels=levels, samples=32, progress=False)
        else:
            stats = fs.measure(model, (8,), levels=levels, samples=32, progress=False)
            schedule = fs.optimal_schedule(stats, 10, "ddim")
        found[name] = model.process.level(schedule.sigmas)[1:10].log()
    cell = float((levels[0] / levels[1]).log())
    for nodes in found.values():
        # Two cells are asked for. Each path starts at its process's own highest level, 70 to 1e4: what that changes in
        # a state at the levels compared is below 1%, and a cell is 17%.
        assert (nodes - found["x0"]).abs().max() < 0.5 * cell


def test_flow_models_start_from_pure_noise():
    oracle, exploding = gaussian(16, 2e-3 / (1 - 2e-3), 100.0)
    flow = fs.Denoiser.from_velocity(exact_denoisers(oracle)["velocity"].network)
    schedule = fs.score_optimal_schedule(flow, 5, shape=(16,), progress=False)
    assert schedule.sigmas[0] == 1
    assert schedule.sigmas[-1] == 0
    assert schedule.noise == "flow"
    assert len(schedule.sigmas) == 6
    # The inner nodes are those of the variance-exploding model between the same finite levels.
    expected = fs.score_optimal_schedule(exploding, 5, shape=(16,), progress=False).sigmas
    torch.testing.assert_close(schedule.sigmas[1:5], (expected / (1 + expected))[1:5], rtol=0.01, atol=0.0)


def test_integer_timesteps_are_levels_the_network_knows():
    abar = torch.linspace(0.999, 0.002, 100, dtype=torch.float64)
    denoiser = fs.Denoiser.from_epsilon(lambda x, t: x * 0.9, abar, integer_timesteps=True)
    schedule = fs.score_optimal_schedule(denoiser, 6, shape=(4,), progress=False)
    trained = ((1 - abar) / abar).sqrt()
    assert all(float((trained - sigma).abs().min()) < 1e-12 for sigma in schedule.sigmas[:-1])
    assert schedule.timesteps is not None
    assert torch.equal(schedule.timesteps, schedule.timesteps.round())


def test_same_seed_same_schedule_and_bad_steps():
    _, denoiser = gaussian(8)
    first, again = (fs.score_optimal_schedule(denoiser, 5, shape=(8,), seed=4, progress=False) for _ in range(2))
    assert torch.equal(first.sigmas, again.sigmas)
    counted = fs.score_optimal_schedule(denoiser, 5, shape=(8,), seed=4, levels=np.int64(48), progress=False)
    assert torch.equal(first.sigmas, counted.sigmas)  # 48 is the default
    with pytest.raises(ValueError, match="steps must be at least 1"):
        fs.score_optimal_schedule(denoiser, 0, shape=(8,), progress=False)
    assert math.isclose(float(first.sigmas[0]), 80.0)


@pytest.mark.parametrize("levels", [[math.inf, 10.0, 1.0], [10.0, 1.0, 0.0]])
def test_levels_without_a_score_are_refused_by_name(levels):
    flow = fs.Denoiser.from_velocity(lambda x, t: x)
    with pytest.raises(ValueError, match=r"levels must be above 0 and finite, .* got .(inf|10\.0), "):
        fs.score_optimal_schedule(flow, 2, shape=(4,), levels=torch.tensor(levels), progress=False)
