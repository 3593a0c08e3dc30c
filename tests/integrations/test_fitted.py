"""Fitted schedules in ComfyUI and in k-diffusion's convention."""

import inspect
import json
import math
import pathlib
import sys
import types

import pytest
import torch

import fastsched as fs
from fastsched.sampling.k_diffusion import sample_fitted

ROOT = pathlib.Path(__file__).parents[2]
WEIGHTS = [[1.0, 0.0, 0.0], [-0.5, 1.5, 0.0], [0.25, -0.5, 1.25]]
ORACLE = fs.oracles.GaussianMixture.random(4, 3, seed=0)
SIGMAS = {"ve": [14.6, 1.5, 0.2, 0.0], "vp": [14.6, 1.5, 0.2, 0.0], "flow": [1.0, 0.7, 0.2, 0.0]}


@pytest.fixture(scope="module")
def node(module_of):
    return module_of(ROOT / "integrations" / "comfyui" / "fastsched_fitted.py")


def schedule(noise="ve"):
    sigmas = torch.tensor(SIGMAS[noise], dtype=torch.float64)
    return fs.Schedule(sigmas, "fitted", noise, weights=torch.tensor(WEIGHTS, dtype=torch.float64))


def noise_of(count=16):
    return torch.randn(count, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def denoised(x, s):
    """``E[x0 | x = x0 + s eps]`` at one level, also at pure noise."""
    level = s.reshape(-1)[:1].clamp(max=1e6)
    return ORACLE.denoise(x, level)


def flow_denoised(x, t):
    """``E[x0 | x = (1 - t) x0 + t eps]``: that of ``z = x / (1 - t)`` at ``s = t / (1 - t)``; the mean at t = 1."""
    t = t.reshape(-1)[:1].to(torch.float64).clamp(max=1 - 1e-9)
    s = (t / (1 - t)).clamp(max=1e6)
    return ORACLE.denoise(x / t * s, s)


def expected(noise):
    if noise == "flow":
        denoiser = fs.Denoiser.from_velocity(lambda x, t: (x - flow_denoised(x, t)) / t[:1])
    else:
        denoiser = fs.Denoiser.from_denoiser(ORACLE.denoise, 0.002, 80.0)
    return fs.sample(denoiser, schedule(noise), noise=noise_of())


class ModelSampling:
    """ComfyUI's scalings of the first noise and of the last state, from its contract: EPS, or CONST for flows."""

    def __init__(self, flow):
        self.flow = flow

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        return sigma * noise + ((1 - sigma) * latent_image if self.flow else latent_image)

    def inverse_noise_scaling(self, sigma, latent):
        return latent / (1 - sigma) if self.flow else latent


class KSampler:
    """ComfyUI's contract of KSAMPLER: what it passes to a sampler's function, and how."""

    def __init__(self, sampler_function, extra_options={}, inpaint_options={}):  # noqa: B006 - as ComfyUI declares it
        self.sampler_function, self.extra_options = sampler_function, extra_options

    def sample(self, model, model_sampling, sigmas, noise, callback):
        x = model_sampling.noise_scaling(sigmas[0], noise, torch.zeros_like(noise))
        told = lambda d: callback(d["i"], d["denoised"], d["x"], len(sigmas) - 1)
        extra = {"model_options": {}, "seed": 7, "denoise_mask": None}
        x = self.sampler_function(model, x, sigmas, extra_args=extra, callback=told, disable=True, **self.extra_options)
        return model_sampling.inverse_noise_scaling(sigmas[-1], x)


@pytest.fixture
def comfyui(tmp_path, monkeypatch):
    """ComfyUI's modules that the node imports; returns the input folder."""
    samplers = types.ModuleType("comfy.samplers")
    samplers.KSAMPLER = KSampler
    comfy = types.ModuleType("comfy")
    comfy.samplers = samplers
    monkeypatch.setitem(sys.modules, "comfy", comfy)
    monkeypatch.setitem(sys.modules, "comfy.samplers", samplers)
    monkeypatch.setitem(sys.modules, "folder_paths", types.SimpleNamespace(get_input_directory=lambda: str(tmp_path)))
    return tmp_path


@pytest.mark.parametrize("noise", SIGMAS)
def test_comfyui_s_sampler_gives_the_samples_of_fs_sample(node, comfyui, noise):
    schedule(noise).save(comfyui / "schedule.json")
    sampler, sigmas = node.FastschedFittedLoader().load("schedule.json")
    calls, steps = [], []

    def model(x, sigma, denoise_mask, model_options={}, seed=None):  # noqa: B006 - as ComfyUI declares it
        calls.append(sigma)
        assert sigma.shape == (16,)
        assert (denoise_mask, model_options, seed) == (None, {}, 7)
        return (flow_denoised if noise == "flow" else denoised)(x, sigma.double())

    callback = lambda i, denoised, x, total: steps.append((i, total, denoised.shape, x.shape))
    found = sampler.sample(model, ModelSampling(noise == "flow"), sigmas, noise_of(), callback)
    torch.testing.assert_close(found, expected(noise), rtol=1e-5, atol=1e-5)  # sigmas are float32 in ComfyUI
    assert torch.equal(torch.stack(calls)[:, 0].float(), sigmas[:-1])
    assert steps == [(i, 3, (16, 4), (16, 4)) for i in range(3)]


@pytest.mark.parametrize("noise", SIGMAS)
def test_k_diffusion_s_convention_gives_the_samples_of_fs_sample(noise):
    fitted, seen = schedule(noise), []
    found = sample_fitted(
        lambda x, sigma, scale: scale * (flow_denoised if noise == "flow" else denoised)(x, sigma),
        noise_of() * fitted.sigmas[0],
        fitted.sigmas,
        {"scale": 1.0},
        seen.append,
        True,
        weights=fitted.weights,
    )
    torch.testing.assert_close(found, expected(noise), rtol=1e-9, atol=1e-9)
    assert [d["i"] for d in seen] == [0, 1, 2]
    assert all(set(d) == {"x", "i", "sigma", "sigma_hat", "denoised"} for d in seen)
    assert [float(d["sigma"]) for d in seen] == SIGMAS[noise][:-1]


def test_states_of_whole_numbers_are_refused():
    with pytest.raises(TypeError, match="x must be a floating-point tensor"):
        sample_fitted(lambda x, s: x, torch.ones(1, 4, dtype=torch.int64), [2.0, 1.0, 0.0], weights=[[1.0, 0.0]] * 2)


def test_wrong_sigmas_and_weights_are_refused():
    fitted = schedule()
    sample = lambda sigmas, weights: sample_fitted(denoised, noise_of(), sigmas, weights=weights, disable=True)
    with pytest.raises(ValueError, match="a row for each of 2 steps of the schedule, got 3"):
        sample(fitted.sigmas[1:], fitted.weights)
    with pytest.raises(ValueError, match="finite and end in 0"):
        sample(fitted.sigmas[:-1], fitted.weights[:2, :2])
    with pytest.raises(ValueError, match="sum to 1"):
        sample(fitted.sigmas, 2 * fitted.weights)
    with pytest.raises(ValueError, match="weights must be given with sigmas"):
        sample(fitted.sigmas, None)
    with pytest.raises(ValueError, match="weights must be left out with a schedule"):
        sample(fitted, fitted.weights)
    with pytest.raises(ValueError, match="sigmas must be a schedule of the fitted solver, got one for 'ddim'"):
        sample(fs.Schedule(fitted.sigmas, "ddim", fitted.noise), None)


def test_a_schedule_stands_for_its_sigmas_and_weights():
    fitted = schedule()
    start = noise_of() * fitted.sigmas[0]
    found = sample_fitted(denoised, start, fitted, disable=True)
    assert torch.equal(found, sample_fitted(denoised, start, fitted.sigmas, weights=fitted.weights, disable=True))


def test_the_node_follows_comfyui_s_contract(node, comfyui):
    loader = node.NODE_CLASS_MAPPINGS["FastschedFittedLoader"]
    assert set(node.NODE_DISPLAY_NAME_MAPPINGS) == set(node.NODE_CLASS_MAPPINGS)
    assert loader.RETURN_TYPES == ("SAMPLER", "SIGMAS")
    (name, (kind, options)) = next(iter(loader.INPUT_TYPES()["required"].items()))
    assert (kind, "default" in options) == ("STRING", True)
    for method in (loader.VALIDATE_INPUTS, loader.IS_CHANGED, getattr(loader(), loader.FUNCTION)):
        assert list(inspect.signature(method).parameters) == [name]
    assert loader.VALIDATE_INPUTS(**{name: None}) is True
    assert math.isnan(loader.IS_CHANGED(**{name: None}))
    schedule().save(comfyui / "schedule.json")
    assert loader.VALIDATE_INPUTS("schedule.json") is True
    before = loader.IS_CHANGED("schedule.json")
    schedule("vp").save(comfyui / "schedule.json")
    assert before != loader.IS_CHANGED("schedule.json")
    sigmas = getattr(loader(), loader.FUNCTION)("schedule.json")[1]
    assert (sigmas.dtype, sigmas.ndim, float(sigmas[-1])) == (torch.float32, 1, 0.0)


def test_sigmas_of_another_schedule_are_refused(node, comfyui):
    schedule().save(comfyui / "schedule.json")
    sampler, sigmas = node.FastschedFittedLoader().load("schedule.json")
    for other in (sigmas[1:], 1.001 * sigmas, sigmas[:-1]):
        with pytest.raises(ValueError, match="connect the SIGMAS of the node that gave the SAMPLER"):
            sampler.sample(lambda x, sigma, **_: x, ModelSampling(False), other, noise_of(), None)


DAMAGED = {
    "none": (None, "has no weights"),
    "text": ("1", "lists of 3 finite numbers"),
    "too few": (WEIGHTS[:2], "lists of 3 finite numbers"),
    "short rows": ([[1.0], [0.5, 0.5], [0.0, 0.0, 1.0]], "lists of 3 finite numbers"),
    "not numbers": ([["1", 0, 0], [0, 1, 0], [0, 0, 1]], "lists of 3 finite numbers"),
    "booleans": ([[True, 0, 0], [0, 1, 0], [0, 0, 1]], "lists of 3 finite numbers"),
    "infinite": ([[math.inf, 0, 0], [0, 1, 0], [0, 0, 1]], "lists of 3 finite numbers"),
    "beyond float64": ([[10**400, 0, 0], [0, 1, 0], [0, 0, 1]], "lists of 3 finite numbers"),
    "above the diagonal": ([[0.5, 0.5, 0], [0, 1, 0], [0, 0, 1]], "0 above the diagonal"),
    "not summing to 1": ([[1, 0, 0], [0, 2, 0], [0, 0, 1]], "sum to 1"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_the_node_says_what_is_wrong_with_weights(node, comfyui, kind):
    weights, reason = DAMAGED[kind]
    entries = {"format": "fastsched.schedule", "version": 2, "solver": "fitted", "noise": "ve", "sigmas": [3, 2, 1, 0]}
    (comfyui / "schedule.json").write_text(json.dumps({**entries, "weights": weights}))
    message = node.FastschedFittedLoader.VALIDATE_INPUTS("schedule.json")
    assert reason in message
    assert len(message) < 500


def test_the_node_reads_only_files_of_the_input_folder(node, comfyui, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "schedule.json"
    schedule().save(outside)
    assert "must be inside" in node.FastschedFittedLoader.VALIDATE_INPUTS(str(outside))


def test_the_node_says_that_it_needs_the_other_file(module_of, tmp_path):
    alone = tmp_path / "fastsched_fitted.py"
    alone.write_text((ROOT / "integrations" / "comfyui" / "fastsched_fitted.py").read_text())
    with pytest.raises(ImportError, match="copy both"):
        module_of(alone)


def test_a_model_may_write_into_its_input_and_return_one_buffer():
    sigmas, weights = torch.tensor([10.0, 3.0, 1.0, 0.0]), torch.tensor([[1.0, 0, 0], [-0.5, 1.5, 0], [0.2, -0.7, 1.5]])
    noise, buffer = 10 * torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), torch.empty(2, 3)
    clean = lambda x, sigma: x / (1 + sigma.reshape(-1, 1) ** 2)

    def writing(x, sigma):
        buffer.copy_(clean(x, sigma))
        x.zero_()
        return buffer

    found, wanted = (
        sample_fitted(each, noise.clone(), sigmas, weights=weights, disable=True) for each in (writing, clean)
    )
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda x, s: None, TypeError, "returned NoneType"),
        (lambda x, s: x[:1], ValueError, "returned shape"),
        (lambda x, s: x.clone().fill_(math.nan) if s[0] < 1 else x, ValueError, "NaN or inf at sigma = 0.5"),
    ],
)
def test_wrong_answers_are_refused(model, error, message):
    with pytest.raises(error, match=message):
        sample_fitted(model, torch.ones(2, 4), [2.0, 0.5, 0.0], weights=[[1.0, 0.0], [0.0, 1.0]], disable=True)


@pytest.mark.parametrize("noise", SIGMAS)
def test_noise_that_is_not_scaled_is_warned_of(noise):
    sigmas = torch.tensor(SIGMAS[noise], dtype=torch.float64)
    settings = {"disable": True, "weights": WEIGHTS}
    sample_fitted(denoised, sigmas[0] * noise_of(), sigmas, **settings)
    if noise == "flow":  # whose first sigma is 1
        sample_fitted(denoised, noise_of(), sigmas, **settings)
        return
    with pytest.warns(UserWarning, match=r"x must be noise times sigmas\[0\] = 14.6, but its root mean square is"):
        sample_fitted(denoised, noise_of(), sigmas, **settings)
