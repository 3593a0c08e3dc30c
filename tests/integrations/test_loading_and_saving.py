"""The node Load Schedule and the samplers it gives, against a stand-in of ComfyUI's contract."""

import json
import math
import os
import sys

import pytest
import torch

import fastsched as fs
from fastsched.sampling.solvers import SOLVERS, STOCHASTIC_SOLVERS

ORACLE = fs.oracles.GaussianMixture.random(4, 3, seed=0)
SIGMAS = {
    "ve": [14.6, 6.0, 2.5, 1.1, 0.4, 0.1, 0.0],
    "vp": [14.6, 6.0, 2.5, 1.1, 0.4, 0.1, 0.0],
    "flow": [1.0, 0.9, 0.7, 0.45, 0.2, 0.05, 0.0],
}


@pytest.fixture
def load(package):
    return package.NODE_CLASS_MAPPINGS["FastschedLoad"]


@pytest.fixture
def samplers(package):
    return sys.modules[f"{package.__name__}.samplers"]


def save(comfy, noise="vp", solver="dpmpp_2m", sigmas=None, name="schedule.json", **more):
    values = torch.tensor(sigmas or SIGMAS[noise], dtype=torch.float64)
    schedule = fs.Schedule(values, solver, noise, **more)
    schedule.save(comfy.home / "input" / name)
    return schedule


def clean(x, sigma, flow):
    """``E[x0 | x]`` at one level, at states and sigmas as ComfyUI has them."""
    t = sigma.reshape(-1)[:1].double()
    s = (t / (1 - t)).clamp(max=1e6) if flow else t
    return ORACLE.denoise(x / t * s, s)


def denoiser_of(noise):
    if noise == "flow":
        return fs.Denoiser.from_velocity(lambda x, t: (x - clean(x, t, True)) / t.reshape(-1, 1))
    return fs.Denoiser.from_denoiser(lambda x, s: clean(x, s, False), 0.1, 14.6)


@pytest.mark.parametrize("noise", ["ve", "flow"])
def test_our_own_sampler_gives_the_samples_of_fastsched(samplers, noise):
    start = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigmas = torch.tensor(SIGMAS[noise], dtype=torch.float64)
    for name in (*SOLVERS, *STOCHASTIC_SOLVERS):
        expected = fs.sample(denoiser_of(noise), sigmas, name, start, seed=7 if name in STOCHASTIC_SOLVERS else None)
        calls, told = [], []
        model = lambda x, sigma, seen, seed: (seen.append(float(sigma[0])), clean(x, sigma, noise == "flow"))[1]
        found = samplers.sample_by_solver(
            model,
            start * sigmas[0],
            sigmas,
            {"seen": calls, "seed": 7},
            told.append,
            True,
            solver=name,
            flow=noise == "flow",
        )
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        assert len(calls) == (SOLVERS[name].model_calls(6) if name in SOLVERS else 6)
        assert [d["i"] for d in told] == list(range(6))
        assert [float(d["sigma"]) for d in told] == SIGMAS[noise][:-1]
        assert all(set(d) == {"x", "i", "sigma", "sigma_hat", "denoised"} for d in told)


@pytest.mark.parametrize("noise", ["ve", "flow"])
def test_a_part_of_the_sigmas_ends_in_a_state(samplers, noise):
    """As ComfyUI's SplitSigmas gives them: both parts, one after the other, are a first-order run of all."""
    start = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigmas, flow = torch.tensor(SIGMAS[noise], dtype=torch.float64), noise == "flow"
    model = lambda x, sigma: clean(x, sigma, flow)
    run = lambda x, part: samplers.sample_by_solver(model, x, part, disable=True, solver="ddim", flow=flow)
    whole = run(start * sigmas[0], sigmas)
    torch.testing.assert_close(run(run(start * sigmas[0], sigmas[:4]), sigmas[3:]), whole, rtol=1e-12, atol=1e-12)
    assert torch.equal(run(start, sigmas[:1]), start)


def test_comfyui_s_own_samplers_are_given_where_they_are_our_solvers(comfy, load, samplers):
    expected = {
        ("vp", "dpmpp_2m"): ("dpmpp_2m", {}),
        ("vp", "ddim"): ("euler", {}),
        ("flow", "ddim"): ("euler", {}),
        ("flow", "heun"): ("heun", {}),
        ("ve", "dpmpp_2s"): ("dpmpp_2s_ancestral", {"eta": 0.0}),
        ("flow", "ipndm_2"): ("ipndm", {"max_order": 2}),
        ("vp", "ancestral"): ("euler_ancestral", {}),
    }
    for (noise, solver), own in expected.items():
        save(comfy, noise, solver)
        _, sampler, text, _ = load().load("schedule.json")
        assert (sampler.name, sampler.options) == own == comfy.chosen[-1]
        assert f"SAMPLER is ComfyUI's {own[0]}" in text
    for noise, solver in (
        ("flow", "ancestral"),
        ("flow", "dpmpp_2m"),
        ("flow", "dpmpp_2s"),
        ("vp", "unipc"),
        ("ve", "deis_2"),
    ):
        save(comfy, noise, solver)
        sampler = load().load("schedule.json")[1]
        assert sampler.sampler_function is samplers.sample_by_solver
        assert sampler.extra_options == {"solver": solver, "flow": noise == "flow"}
    assert set(samplers.STOCHASTIC) == set(STOCHASTIC_SOLVERS)
    for choice in samplers.CHOICES:
        fs.Schedule([2.0, 1.0, 0.0], choice, weights=torch.eye(2) if choice == "fitted" else None)


def test_a_fitted_schedule_comes_with_its_weights(comfy, load):
    weights = torch.tensor([[1.0, 0.0, 0.0], [-0.5, 1.5, 0.0], [0.25, -0.5, 1.25]], dtype=torch.float64)
    schedule = save(comfy, "flow", "fitted", [1.0, 0.6, 0.2, 0.0], weights=weights)
    sigmas, sampler, text, _ = load().load("schedule.json")
    start = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = lambda x, sigma, **_: clean(x, sigma, True)
    found = sampler.sampler_function(model, start, sigmas, {}, None, True, **sampler.extra_options)
    torch.testing.assert_close(found, fs.sample(denoiser_of("flow"), schedule, noise=start), rtol=1e-5, atol=1e-5)
    assert "fitted solver" in text


def test_with_a_model_sigmas_are_on_its_trained_levels(comfy, load, given):
    timesteps = torch.tensor([999.0, 871.4, 640.0, 399.5, 150.0, 20.0])
    save(comfy, timesteps=timesteps)
    model = given()["model"]
    alone, _, text, _ = load().load("schedule.json")
    assert torch.equal(alone, torch.tensor(SIGMAS["vp"], dtype=torch.float32))
    assert "rounds this model's timesteps, by up to 0.5 here" in text
    sigmas, _, text, _ = load().load("schedule.json", model)
    table = model.model.model_sampling.sigmas
    assert bool(torch.isin(sigmas[:-1], table).all())
    change = float((sigmas[:-1] / alone[:-1] - 1).abs().max())
    assert f"moved to the model's trained levels, by up to {change:.2%}" in text
    nearest = [(table.log() - value.log()).abs().argmin() for value in alone[:-1]]
    assert torch.equal(sigmas[:-1], table[torch.stack(nearest)])


def test_the_fitted_solver_s_sigmas_stay_with_a_warning(comfy, load, given):
    save(comfy, "vp", "fitted", [14.6, 3.0, 0.033, 0.0], weights=torch.eye(3))
    model = given()["model"]
    sigmas, _, text, _ = load().load("schedule.json", model)
    assert torch.equal(sigmas, torch.tensor([14.6, 3.0, 0.033, 0.0]))
    table = model.model.model_sampling.sigmas
    change = max(float((table / value - 1).abs().min()) for value in (14.6, 3.0, 0.033))
    told = float(text.split("changed by up to ")[1].split("%")[0]) / 100
    assert told == pytest.approx(change, rel=0.2)  # nearest in the logarithm, so a little apart


def test_levels_stay_different(package, given):
    nearest = sys.modules[f"{package.__name__}.measuring"].nearest_trained
    table = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    assert nearest(torch.tensor([8.0, 7.9, 7.8, 0.0]), table).tolist() == [8.0, 4.0, 2.0, 0.0]
    assert nearest(torch.tensor([1.2, 1.1, 1.0, 0.0]), table).tolist() == [4.0, 2.0, 1.0, 0.0]
    assert nearest(torch.tensor([math.inf, 3.0, 0.0]), table).tolist() == [8.0, 4.0, 0.0]
    with pytest.raises(ValueError, match="at most 4"):
        nearest(torch.tensor([8.0, 7.0, 6.0, 5.0, 4.0, 0.0]), table)


def test_a_schedule_for_another_model_is_refused_or_warned_of(comfy, load, given, kinds):
    save(comfy, "flow")
    with pytest.raises(ValueError, match="for a flow model, and this is a model of sigmas"):
        load().load("schedule.json", given()["model"])
    save(comfy, "vp")
    with pytest.raises(ValueError, match="a model of sigmas, and this is a flow model"):
        load().load("schedule.json", given(kinds["flow"]())["model"])
    save(comfy, "ve", sigmas=[40.0, 3.0, 0.0])
    text = load().load("schedule.json", given(kinds["continuous"]())["model"])[2]
    assert "starts at sigma 40, and this model at 80" in text


def test_zero_terminal_snr_starts_at_comfyui_s_own_sigma(comfy, load, given, kinds):
    save(comfy, "vp", "unipc", [math.inf, 3.0, 1.0, 0.0])
    model = given(kinds["zero SNR"]())["model"]
    for arguments in ((), (model,)):
        sigmas, _, text, _ = load().load("schedule.json", *arguments)
        assert float(sigmas[0]) == pytest.approx(4518.76, rel=1e-6)
        assert "starts at" not in text


def test_the_dropdown_lists_regular_files_without_opening_them(comfy, load):
    save(comfy)
    (comfy.home / "input" / "inner").mkdir()
    save(comfy, name="inner/other.json")
    os.mkfifo(comfy.home / "input" / "pipe.json")
    (comfy.home / "input" / "link.json").symlink_to("/etc/passwd")
    (comfy.home / "input" / "loop").symlink_to(comfy.home / "input", target_is_directory=True)
    (comfy.home / "input" / "image.png").write_bytes(b"")
    listed = load.INPUT_TYPES()["required"]["file"][0]
    assert sorted(listed) == ["inner/other.json", "schedule.json"]
    assert all(load.VALIDATE_INPUTS(file) is True for file in listed)
    for file in (
        "pipe.json",
        "link.json",
        "../x.json",
        "/etc/passwd",
        "x.json [output]",
        "../../x.json [output]",
        " [output]",
    ):
        assert isinstance(load.VALIDATE_INPUTS(file), str)
    assert load.VALIDATE_INPUTS(None) is True
    for n in range(520):
        (comfy.home / "input" / f"many{n}.json").touch()
    assert len(load.INPUT_TYPES()["required"]["file"][0]) == 500


def test_what_is_passed_on_has_every_digit_of_the_file(comfy, load):
    schedule = save(comfy, sigmas=[14.614641189575195, math.pi, 0.1, 0.0], predicted_error=0.25)
    found = load().load("schedule.json")[3].schedule
    assert torch.equal(found.sigmas, schedule.sigmas)
    assert (found.solver, found.noise, found.predicted_error) == (schedule.solver, schedule.noise, 0.25)


def test_a_changed_file_is_another(comfy, load):
    save(comfy)
    before = load.IS_CHANGED("schedule.json")
    assert before == load.IS_CHANGED("schedule.json", None)
    save(comfy, sigmas=[14.6, 1.0, 0.0])
    assert load.IS_CHANGED("schedule.json") != before


DAMAGED = {
    "unknown solver": ({"solver": "magic"}, "does not hold a valid schedule"),
    "no solver": ({"solver": ""}, "does not hold a valid schedule"),
    "weights of a stock solver": ({"weights": [[1, 0], [0, 1]]}, "weights must be None for the solver"),
    "fitted without weights": ({"solver": "fitted"}, "weights must be given for the solver"),
    "timesteps": ({"timesteps": [1, 2, 3]}, "does not hold a valid schedule"),
    "timesteps of text": ({"timesteps": ["x", "y"]}, "does not hold a valid schedule"),
    "huge timesteps": ({"timesteps": [10**400, 1]}, "does not hold a valid schedule"),
    "error of text": ({"measured_error": "small"}, "does not hold a valid schedule"),
    "error a list": ({"predicted_error": [1]}, "does not hold a valid schedule"),
    "half decoupled": ({"decoupled": "denoiser"}, "lacks network_sigmas"),
    "checksum": ({"sha256": "0" * 64}, "changed or damaged"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_a_message(comfy, load, kind):
    changes, reason = DAMAGED[kind]
    entries = {"format": "fastsched.schedule", "version": 2, "solver": "ddim", "noise": "ve", "sigmas": [3, 1, 0]}
    (comfy.home / "input" / "schedule.json").write_text(json.dumps({**entries, **changes}))
    message = load.VALIDATE_INPUTS("schedule.json")
    assert reason in message
    assert len(message) < 600


def test_the_dropdown_shows_the_newest_of_many_files_of_both_folders(comfy, load):
    for n in range(510):
        path = comfy.home / "input" / f"old{n}.json"
        path.touch()
        os.utime(path, (1000 + n, 1000 + n))
    saved = comfy.home / "output" / "fastsched"
    saved.mkdir()
    for name in ("a", "b"):
        (saved / f"{name}.json").touch()
    listed = load.INPUT_TYPES()["required"]["file"][0]
    assert {"a.json [output]", "b.json [output]"} == set(listed[:2])
    assert listed[2:] == [f"old{n}.json" for n in reversed(range(12, 510))]
