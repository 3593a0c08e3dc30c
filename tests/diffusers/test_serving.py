"""Requests to serving engines: the noise levels that reach the network are those of the schedule.

The engines need GPUs. What they do with a request's list is written anew here, as read in vllm-omni 0.30.0 and SGLang
0.5.23: docs/serving.md.
"""

import inspect
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from shell_runs import one_line, run

import fastsched as fs

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers
import pipelines
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from fastsched.cli import exporting
from fastsched.diffusers import serving

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
SIGMAS = torch.tensor([1.0, 0.83, 0.55, 0.21, 0.0], dtype=torch.float64)
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
CONFIGS = [
    ({"shift": 3.0}, None),
    (DYNAMIC, 1.15),
    (DYNAMIC | {"time_shift_type": "linear"}, 1.15),
    (DYNAMIC | {"shift_terminal": 0.21}, 0.9),  # as Qwen-Image has; it stretches every list to this end
]


def flow():
    return fs.Schedule(SIGMAS, "ddim", "flow")


def vllm_omni(scheduler, parameters, mu):
    """Flow times at which vllm-omni asks the network: a step a sigma, and the shift of the size with every list."""
    scheduler = type(scheduler).from_config(scheduler.config)
    shifting = {"mu": mu} if scheduler.config.use_dynamic_shifting else {}
    scheduler.set_timesteps(sigmas=parameters["sigmas"], device="cpu", **shifting)
    return asked(scheduler)


def asked(scheduler):
    """Of a scheduler that is set: the network's timesteps as flow times, and the noise of its state at each of them.

    Where the network answers the velocity 1, noise 1 less data 0, a state is its flow time.
    """
    state, found = torch.ones(1, 1), []
    for t in scheduler.timesteps:
        found.append([float(t) / 1000, float(state)])
        state = scheduler.step(torch.ones_like(state), t, state, return_dict=False)[0]
    return torch.tensor([*found, [0.0, float(state)]], dtype=torch.float64).T


@pytest.mark.parametrize(("config", "mu"), CONFIGS)
def test_vllm_omni_samples_at_the_sigmas_of_the_schedule(config, mu):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    parameters = fs.diffusers.serving_parameters(flow(), scheduler, "vllm-omni", mu=mu)
    assert parameters["num_inference_steps"] == len(parameters["sigmas"]) == 4
    assert json.loads(json.dumps(parameters)) == parameters
    timesteps, states = vllm_omni(scheduler, parameters, mu)
    torch.testing.assert_close(timesteps, SIGMAS, rtol=1e-6, atol=0)  # float32 within the scheduler
    torch.testing.assert_close(states, SIGMAS, rtol=1e-6, atol=1e-7)
    unshifted = {"sigmas": SIGMAS[:-1].tolist()}  # what a reader would paste: the test can tell them apart
    assert (vllm_omni(scheduler, unshifted, mu)[0] - SIGMAS).abs().max() > 0.03


@pytest.mark.parametrize(("config", "mu"), CONFIGS[:1])
def test_sglang_calls_the_pipeline_with_the_arguments(config, mu):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    pipe = pipelines.oracle_pipeline(scheduler, fs.oracles.GaussianMixture.random(8, 3, seed=0))
    request = json.loads(json.dumps(fs.diffusers.serving_parameters(flow(), scheduler, "sglang", mu=mu)))
    pipe("a cat", num_inference_steps=request["num_inference_steps"], **request["diffusers_kwargs"])
    torch.testing.assert_close(pipe.scheduler.sigmas.double(), SIGMAS, rtol=1e-6, atol=0)
    torch.testing.assert_close(pipe.scheduler.timesteps.double() / 1000, SIGMAS[:-1], rtol=1e-6, atol=0)


def test_sglang_passes_timesteps_on_too():
    scheduler = diffusers.HeunDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    schedule = fs.Schedule(torch.tensor([14.6, 3.0, 0.5, 0.0], dtype=torch.float64), "heun", "vp")
    found = fs.diffusers.serving_parameters(schedule, scheduler, "sglang")
    assert found == {
        "num_inference_steps": 3,
        "diffusers_kwargs": fs.diffusers.export(schedule, scheduler).arguments,
    }
    with pytest.raises(ValueError, match="the only one whose sigmas vllm-omni takes, got HeunDiscreteScheduler"):
        fs.diffusers.serving_parameters(schedule, scheduler, "vllm-omni")


def test_what_engines_cannot_take_is_refused():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    with pytest.raises(ValueError, match="engine must be one of 'vllm-omni', 'sglang', got 'vllm'; did you mean"):
        fs.diffusers.serving_parameters(flow(), scheduler, "vllm", mu=1.0)
    with pytest.raises(ValueError, match="mu must be given"):
        fs.diffusers.serving_parameters(flow(), scheduler, "sglang")
    array = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    with pytest.raises(ValueError, match="must take a list, which a request can hold; UniPC"):
        fs.diffusers.serving_parameters(flow(), array, "sglang")


def test_the_shell_knows_the_engines():
    assert exporting.ENGINES == serving.ENGINES
    assert set(exporting.ENGINES) <= set(exporting.TARGETS)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with what the page's commands name."""
    monkeypatch.chdir(tmp_path)
    flow().save("flow.json")
    diffusers.FlowMatchEulerDiscreteScheduler(**DYNAMIC).save_pretrained("my_flow_pipeline_folder/scheduler")
    return tmp_path


def test_the_commands_and_the_code_of_the_page_run(folder):
    text = PAGE.read_text(encoding="utf-8")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    found = {}
    for command in re.findall(r"^fastsched (.*)$", text, re.MULTILINE):
        result = run(*shlex.split(command))
        assert result.exit_code == 0, result.stderr
        engine = "sglang" if "sglang" in command else "vllm-omni"
        found[engine] = result.stdout.strip()
    (block,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    names = {"pipe": pipelines.OraclePipeline(pipelines.OracleUNet(), scheduler)}
    exec(compile(block, str(PAGE), "exec"), names)
    parameters = eval(found["vllm-omni"], {"OmniDiffusionSamplingParams": dict})
    assert parameters == names["parameters"]
    assert json.loads(found["sglang"])["diffusers_kwargs"]["sigmas"] == parameters["sigmas"]
    as_json = json.loads(run("export", "flow.json", *shlex.split(command)[2:], "--json").stdout)
    assert as_json["parameters"] == json.loads(found["sglang"])
    assert "needs --scheduler" in one_line(run("export", "flow.json", "--to", "sglang"))


def test_the_shift_of_the_page_is_that_of_the_pipelines():
    """The formula as the page has it, against diffusers' own, which both engines repeat."""
    (formula,) = re.findall(r"^    mu = (.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    config = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
    assert list(inspect.signature(calculate_shift).parameters)[1:] == [
        "base_seq_len", "max_seq_len", "base_shift", "max_shift",
    ]  # fmt: skip
    for tokens in (1024, 4096, 8100):
        expected = calculate_shift(tokens, 256, 4096, 0.5, 1.15)
        assert eval(formula, {**config, "tokens": tokens}) == pytest.approx(expected, rel=1e-12)
    assert eval(formula, {**config, "tokens": (1024 / 16) * (1024 / 16)}) == pytest.approx(1.15)
