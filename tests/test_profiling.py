"""Profiles: where the time goes is told apart, and nothing of the model is changed."""

import dataclasses
import json
import sys
import time
import types

import pytest
import torch
from models import exact_denoiser, mixture
from shell_runs import run

import fastsched as fs
from fastsched.measurement.timeline import TimedRun, Timeline
from fastsched.profiling import StepTimes

CPU = torch.device("cpu")


def slow_network(seconds):
    def denoise(z, s):
        time.sleep(seconds)
        return z / (1 + torch.as_tensor(s, dtype=z.dtype).view(-1, *(1,) * (z.ndim - 1)) ** 2)

    return fs.Denoiser.from_denoiser(denoise, 0.02, 80.0)


def test_no_peak_is_said_where_python_cannot_tell(monkeypatch):
    """As on Windows."""
    oracle = exact_denoiser(mixture(), 0.02, 80.0)
    assert fs.profile(oracle, (4,)).peak_gb > 0
    monkeypatch.setitem(sys.modules, "resource", None)
    assert fs.profile(oracle, (4,)).peak_gb == 0


def test_a_wrapped_network_has_the_name_that_its_schedules_have():
    class Precond(torch.nn.Module):
        sigma_data, sigma_min, sigma_max = 0.5, 0.02, 80.0

        def __init__(self):
            super().__init__()
            self.model = torch.nn.Identity()

        def forward(self, x, sigma):
            return 0.25 * x / (0.25 + sigma.reshape(-1, 1) ** 2)

    denoiser = fs.Denoiser.from_edm(Precond())
    assert fs.profile(denoiser, (4,)).model.endswith("Precond")
    assert fs.profile(slow_network(0), (4,)).model.endswith("denoise")


def test_inner_owners_take_time_from_outer_ones():
    timeline = Timeline(CPU)
    with timeline.within("scheduler"):
        time.sleep(0.02)
        with timeline.within("network"):
            time.sleep(0.05)
    (step,) = timeline.steps("scheduler")[:1]
    assert 0.02 <= step["scheduler"] < 0.05
    assert timeline.had("network")
    network = sum(seconds for owner, seconds in timeline.spans() if owner == "network")
    assert 0.05 <= network < 0.09


def test_the_time_is_that_of_the_device_s_own_stream(monkeypatch):
    """Not of the current device's: a process may have many, and set none."""
    recorded = []
    event = types.SimpleNamespace(record=lambda stream=None: recorded.append(stream))
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"stream of {device}")
    timeline = Timeline(torch.device("cuda:1"))
    timeline.owned("network", lambda: None)()
    assert recorded == ["stream of cuda:1"] * 3


def test_steps_end_with_a_span_of_their_last_owner():
    timeline = Timeline(CPU)
    for _ in range(3):
        timeline.owned("network", time.sleep)(0.001)
        timeline.owned("scheduler", time.sleep)(0.001)
    steps = timeline.steps("scheduler")
    assert len(steps) == 3
    assert all({"network", "scheduler"} <= set(step) for step in steps)


def test_the_end_of_a_measurement_counts_once_among_all_its_steps():
    """The median of five stands for 92 of 94; the last two wait for the device and compute the Gram matrix."""
    early, late = {"network": 0.9, "scheduler": 0.1}, {"network": 1.0, "scheduler": 3.0}
    slow = {"network": 0.9, "scheduler": 20.0}  # something is loaded
    found = StepTimes.of("measuring", TimedRun([{"network": 50.0}, slow, *[early] * 4, late, late], 60.0, None), 94)
    assert found.scheduler == pytest.approx((92 * 0.1 + 2 * 3.0) / (92 + 2 * 4.0))
    assert found.network + found.scheduler == pytest.approx(1.0)
    assert found.p50_ms == pytest.approx(1000.0)


def test_a_slow_network_has_the_time():
    found = fs.profile(slow_network(0.01), (8,), steps=4)
    for step in found.steps:
        assert step.p50_ms >= 10
        assert step.network > 0.8
        assert step.network + step.scheduler + step.rest == pytest.approx(1.0)
    assert found.calls == {"measure": 759, "fit": 800}
    assert found.minutes["measure"] >= 759 * 0.01 / 60
    assert found.image_seconds[20] >= 20 * 0.01
    saved = found.image_seconds[found.own_steps] - found.image_seconds[8]
    assert found.pays_after("fit") == pytest.approx(60 * found.minutes["fit"] / saved)


def test_the_page_and_the_json_say_the_same():
    found = fs.profile(exact_denoiser(mixture()), (4,), steps=3)
    values = json.loads(found.to_json())
    assert values["own_share"] == found.own_share
    assert f"{found.own_share:.2%}" in str(found)
    assert f"{found.steps[0].p50_ms:.2f}" in str(found)
    assert "parameters" not in str(found)  # the network is a formula


def test_a_network_of_parameters_is_described():
    network = torch.nn.Linear(6, 6).to(torch.bfloat16)
    given = fs.Denoiser.from_denoiser(lambda z, s: 0.1 * network(z), 0.1, 10.0)
    found = fs.profile(given, (6,), steps=3)
    assert found.parameters == 42
    assert found.dtype == "bfloat16"
    assert found.device == "cpu"
    assert "42 parameters" in str(found)


def test_the_page_has_numbers_of_a_small_network_and_of_a_large_one():
    found = fs.profile(exact_denoiser(mixture()), (4,), steps=3)
    small = dataclasses.replace(
        found, parameters=1_234_000, weights_gb=0.004936, gram_bandwidth=3.8e8, minutes={"measure": 0.25, "fit": 0.5}
    )
    assert "1.23 M parameters" in str(small)
    assert "weights 0.00494 GB" in str(small)
    assert " 0.38 GB/s" in str(small)
    assert "15.0 s" in str(small)
    assert " min" not in str(small)
    large = dataclasses.replace(
        found, parameters=12_000_000_000, gram_bandwidth=3.94e12, minutes={"measure": 25.0, "fit": 26.0}
    )
    assert "12 B parameters" in str(large)
    assert " 3940 GB/s" in str(large)
    assert "25.0 min" in str(large)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"shape": None}, "shape must be given"),
        ({"shape": (4,), "steps": 2}, "steps must be"),
        ({"shape": (4,), "prompt": "a cat"}, "prompt: only the call of a pipeline"),
    ],
)
def test_wrong_arguments(arguments, problem):
    with pytest.raises((TypeError, ValueError), match=problem):
        fs.profile(exact_denoiser(mixture()), **arguments)


def test_other_models_are_refused():
    with pytest.raises(TypeError, match=r"model must be a pipeline of diffusers or a fastsched\.Denoiser, got int"):
        fs.profile(3)


def test_a_pipeline_is_left_as_it_was(tmp_path):
    pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")
    import diffusers
    import pipelines

    pipe, call, _ = pipelines.stable_diffusion(diffusers.DPMSolverMultistepScheduler())
    pipe.set_progress_bar_config(disable=True)
    scheduler, trace = pipe.scheduler, tmp_path / "trace.json"
    found = fs.profile(pipe, steps=3, trace=trace, **call)
    assert pipe.scheduler is scheduler
    assert "step" not in vars(scheduler)
    assert "forward" not in vars(pipe.unet)
    assert found.parameters == sum(each.numel() for each in pipe.unet.parameters())
    assert found.own_steps == 50
    assert all(step.network > 0 for step in found.steps)
    assert json.loads(trace.read_text())["traceEvents"]


def test_a_scheduler_that_does_not_take_what_the_pipeline_passes_to_step_is_named():
    diffusers = pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")
    import pipelines

    pipe = diffusers.DDPMPipeline(pipelines.small_unet(), diffusers.UniPCMultistepScheduler())
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match=r"calls its scheduler's step with generator, which UniPC\w+ does not take"):
        fs.profile(pipe, steps=3)


def test_both_networks_that_a_pipeline_calls_in_turn_count_however_few_the_steps():
    pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")
    import diffusers
    import pipelines

    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe, call, _ = pipelines.wan_of_two_experts(scheduler, 0.9)
    pipe.set_progress_bar_config(disable=True)
    networks = (pipe.transformer, pipe.transformer_2)
    found = fs.profile(pipe, steps=3, **call)
    assert found.parameters == sum(each.numel() for network in networks for each in network.parameters())


def test_a_latent_consistency_model_is_profiled():
    pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")
    import pipelines

    pipe, call, _ = pipelines.latent_consistency()
    pipe.set_progress_bar_config(disable=True)
    scheduler, state = pipe.scheduler, torch.get_rng_state()
    found = fs.profile(pipe, steps=3, **call)
    assert found.parameters == sum(each.numel() for each in pipe.unet.parameters())
    assert pipe.scheduler is scheduler
    assert torch.equal(torch.get_rng_state(), state)


def test_more_steps_than_timesteps_are_refused_by_the_name_of_the_argument():
    few = fs.Denoiser.from_epsilon(lambda x, t: x, [0.9, 0.5, 0.2, 0.01], integer_timesteps=True)
    with pytest.raises(ValueError, match="steps must be at most 4, the network's number of timesteps, got 8"):
        fs.profile(few, (4,))
    assert len(fs.profile(few, (4,), steps=4).steps) == 3


@pytest.mark.parametrize("name", ["no/such/trace.json", "."])
def test_a_trace_that_cannot_be_written_is_known_before(name, tmp_path):
    def network(z, s):
        raise AssertionError("called")

    with pytest.raises(OSError, match=r"create it first|is a folder"):
        fs.profile(fs.Denoiser.from_denoiser(network, 0.02, 80.0), (4,), steps=3, trace=tmp_path / name)


def test_a_trace_that_pytorch_does_not_write_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", lambda self, path: None)
    old = tmp_path / "trace.json"
    old.write_text("old")
    with pytest.raises(OSError, match="PyTorch could not write its trace"):
        fs.profile(
            fs.Denoiser.from_denoiser(lambda z, s: z / (1 + s[:, None] ** 2), 0.02, 80.0), (4,), steps=3, trace=old
        )
    assert old.read_text() == "old"


def test_an_applied_schedule_stays_applied():
    pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")
    import diffusers
    import pipelines

    pipe, call, _ = pipelines.stable_diffusion(diffusers.DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    fs.diffusers.apply(fs.diffusers.fit(pipe, 3, levels=8, samples=2, audition=False, progress=False, **call), pipe)
    before = pipe.scheduler.step
    fs.profile(pipe, steps=3, **call)
    assert pipe.scheduler.step == before


def test_the_command(tmp_path):
    result = run("profile", "digits", "--steps", "3", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["model"] == "DigitsNetwork"
    assert "own share" in run("profile", "digits", "--steps", "3").stdout


def test_the_command_on_a_saved_pipeline(tmp_path):
    pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")
    import diffusers
    import pipelines

    pipe, _, _ = pipelines.unconditional(diffusers.DDIMScheduler(clip_sample=False))
    pipe.save_pretrained(tmp_path / "pipe")
    result = run("profile", tmp_path / "pipe", "--steps", "3", "--quiet", "--call", "batch_size=2")
    assert result.exit_code == 0, result.output
    assert "DDIMPipeline" in result.stdout
