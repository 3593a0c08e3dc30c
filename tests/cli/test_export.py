import itertools
import json
import re

import pytest
import torch
from shell_runs import one_line, run

import fastsched as fs
from fastsched.sampling.solvers import SOLVERS


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    path = tmp_path_factory.mktemp("flow") / "flow.json"
    fs.Schedule(torch.tensor([1.0, 0.7, 0.25, 0.0]), "ddim", "flow").save(path)
    return path


def numbers(text: str) -> list[float]:
    return [float(value) for value in re.findall(r"\d+\.\d*", text)]


def test_text_has_every_digit(folder):
    sigmas = fs.Schedule.load(folder / "x-4.json").sigmas.tolist()
    assert [float(value) for value in run("export", folder / "x-4.json", "--to", "text").stdout.split(", ")] == sigmas


def test_comfyui_is_what_manual_sigmas_reads(folder):
    result = run("export", folder / "x-4.json", "--to", "comfyui")
    assert result.stdout.strip() == fs.Schedule.load(folder / "x-4.json").to_comfyui().text
    assert "choose the sampler euler" in result.stderr


def test_a_solver_without_a_sampler_is_said(tmp_path):
    path = tmp_path / "a.json"
    fs.Schedule(torch.tensor([9.0, 1.0, 0.0]), "unipc").save(path)
    comfyui = run("export", path, "--to", "comfyui")
    assert comfyui.exit_code == 0
    assert "no sampler that is unipc" in comfyui.stderr
    assert "use the file in the node Load Schedule" in one_line(comfyui)
    for program in ("k-diffusion", "sd.cpp"):
        result = run("export", path, "--to", program)
        assert result.exit_code == 2
        assert "has no sampler that is unipc" in one_line(result)
    for refused in (comfyui, result):  # `fit` takes no solvers that add noise
        solvers = refused.stderr.split("fit a schedule for one of ")[1].strip().split(", ")
        assert "dpmpp_2m" in solvers
        assert set(solvers) <= set(SOLVERS)


def test_k_diffusion_cannot_start_from_pure_noise(tmp_path):
    fs.Schedule(torch.tensor([torch.inf, 5.0, 1.0, 0.0]), "ddim", "vp").save(tmp_path / "a.json")
    assert "starts from a finite sigma" in one_line(run("export", tmp_path / "a.json", "--to", "k-diffusion"))


def test_neither_the_input_nor_a_measurement_is_replaced(folder, tmp_path):
    schedule, stats = tmp_path / "a.json", tmp_path / "s.safetensors"
    schedule.write_bytes((folder / "x-4.json").read_bytes())
    stats.write_bytes((folder / "s.safetensors").read_bytes())
    before = schedule.read_bytes(), stats.read_bytes()
    refused = run("export", schedule, "--to", "text", "-o", schedule)
    assert "output must be another file than" in one_line(refused)
    assert "measurements are not replaced here" in one_line(run("export", schedule, "--to", "text", "-o", stats))
    assert "output must be another file than" in one_line(run("select", stats, "--steps", "4", "-o", stats))
    (tmp_path / "s-4.safetensors").write_bytes(before[1])
    several = run("select", tmp_path / "s-4.safetensors", "--steps", "4,5", "-o", stats)
    assert several.exit_code != 0
    assert (schedule.read_bytes(), stats.read_bytes()) == before


def test_k_diffusion_is_python_that_samples(folder, monkeypatch):
    """Run with a stand-in of the library, which takes Euler steps as its sample_euler does."""
    import sys
    import types

    def sample_euler(model, x, sigmas):
        for now, after in itertools.pairwise(sigmas):
            denoised = model(x, now.expand(len(x)))
            x = x + (x - denoised) / now * (after - now)
        return x

    library = types.ModuleType("k_diffusion")
    library.sampling = types.SimpleNamespace(sample_euler=sample_euler)
    monkeypatch.setitem(sys.modules, "k_diffusion", library)
    oracle = fs.oracles.Gaussian(0.5, (2, 3))
    scope = {"noise": torch.randn(4, 2, 3), "model": oracle.denoise}
    exec(run("export", folder / "x-4.json", "--to", "k-diffusion").stdout, scope)
    denoiser = fs.Denoiser.from_denoiser(oracle.denoise, 0.002, 80.0)
    expected = fs.sample(denoiser, fs.Schedule.load(folder / "x-4.json"), noise=scope["noise"])
    torch.testing.assert_close(scope["samples"], expected, rtol=1e-4, atol=1e-5)  # float32 against float64 sigmas


def test_flow_matching_runs_from_noise_at_0(flow, folder, tmp_path):
    found = json.loads(run("export", flow, "--to", "flow-matching", "--json").stdout)
    assert found["time_grid"] == pytest.approx([0.0, 0.3, 0.75, 1.0])
    text = run("export", flow, "--to", "flow-matching").stdout
    assert "time_grid = torch.tensor([0.0, 0.3" in text
    compile(text, "flow", "exec")
    assert "flow times" in one_line(run("export", folder / "x-4.json", "--to", "flow-matching"))
    assert "--to flow-matching" in one_line(run("export", flow, "--to", "k-diffusion"))
    heun = tmp_path / "heun.json"
    fs.Schedule(torch.tensor([1.0, 0.5, 0.0]), "heun", "flow").save(heun)
    assert "--solver ddim" in one_line(run("export", heun, "--to", "flow-matching"))


def test_a_flow_that_starts_below_1_starts_from_less_noise(tmp_path):
    fs.Schedule(torch.tensor([0.75, 0.5, 0.0]), "ddim", "flow").save(tmp_path / "flow.json")
    assert ".sample(0.75 * noise, " in run("export", tmp_path / "flow.json", "--to", "flow-matching").stdout


def test_levels_that_are_equal_as_float32_are_refused(tmp_path):
    """k-diffusion's sampler of dpmpp_2m divides by their difference, and flow_matching's asks for rising times."""
    near = torch.tensor([0.9, 0.5, 0.5 - 1e-10, 0.0], dtype=torch.float64)
    for program, solver, noise in (("k-diffusion", "dpmpp_2m", "ve"), ("flow-matching", "ddim", "flow")):
        fs.Schedule(near, solver, noise).save(tmp_path / "near.json")
        assert "differ as float32" in one_line(run("export", tmp_path / "near.json", "--to", program))


def test_sd_cpp_is_options_of_its_command(folder):
    text = run("export", folder / "x-4.json", "--to", "sd.cpp").stdout.strip()
    assert text.startswith('--sampling-method euler --steps 4 --sigmas "')
    sigmas = [float(value) for value in re.search('"(.*)"', text)[1].split(",")]
    assert sigmas == pytest.approx(fs.Schedule.load(folder / "x-4.json").sigmas.tolist(), rel=1e-6)


def test_sd_cpp_takes_only_what_its_samplers_and_models_are(tmp_path):
    """Its dpm++2m takes log sigma for the half log-SNR, and its euler_a renews other noise, for flow times."""
    for solver in ("dpmpp_2m", "ancestral"):
        fs.Schedule(torch.tensor([1.0, 0.7, 0.3, 0.0]), solver, "flow").save(tmp_path / "flow.json")
        message = one_line(run("export", tmp_path / "flow.json", "--to", "sd.cpp"))
        assert f"no sampler that is {solver} for flow times" in message
        assert "ddim, heun, dpm_2" in message
    fs.Schedule(torch.tensor([torch.inf, 3.0, 0.0]), "ddim", "vp").save(tmp_path / "zero.json")
    assert "zero terminal SNR" in one_line(run("export", tmp_path / "zero.json", "--to", "sd.cpp"))


def test_diffusers_with_a_scheduler_is_its_arguments(flow, tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.save_pretrained(tmp_path / "scheduler")
    result = run("export", flow, "--to", "diffusers", "--scheduler", tmp_path, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    expected = fs.diffusers.export(fs.Schedule.load(flow), scheduler)
    assert found["arguments"] == {key: list(value) for key, value in expected.arguments.items()}
    assert found["used"] == pytest.approx([1.0, 0.7, 0.25, 0.0], rel=1e-5)
    plain = run("export", flow, "--to", "diffusers", "--scheduler", tmp_path / "scheduler").stdout
    assert plain.startswith("pipe(prompt=prompt, sigmas=[")


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "EDMEulerScheduler"])
def test_schedulers_that_fail_with_a_list_are_given_what_they_take(name, tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    scheduler = getattr(diffusers, name)(**(flow if name.startswith("UniPC") else {}))
    scheduler.save_pretrained(tmp_path)
    sigmas = [0.95, 0.7, 0.25, 0.0]
    kind = ("unipc", "flow") if name.startswith("UniPC") else ("ddim", "ve")
    fs.Schedule(sigmas, *kind).save(tmp_path / "a.json")
    text = run("export", tmp_path / "a.json", "--to", "diffusers", "--scheduler", tmp_path).stdout
    exec(text, {"prompt": "", "pipe": lambda prompt, **given: scheduler.set_timesteps(**given)})
    assert scheduler.sigmas.tolist() == pytest.approx(sigmas, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "printed", "said"),
    [
        ("StableDiffusionPipeline", "pipe(prompt=prompt, timesteps=[", ""),
        ("CogVideoXVideoToVideoPipeline", "pipe(prompt=prompt, timesteps=[", ""),  # its first argument is the video
        ("DDIMPipeline", "fs.diffusers.apply(schedule, pipe)", "DDIMPipeline takes no timesteps="),
        (["my_module", "MyPipeline"], "pipe(prompt=prompt, timesteps=[", "whose call takes timesteps="),
        (None, "pipe(prompt=prompt, timesteps=[", "whose call takes timesteps="),
    ],
)
def test_diffusers_arguments_are_those_that_the_pipeline_takes(kind, printed, said, tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")
    from fastsched.diffusers import conventions

    diffusers.DPMSolverMultistepScheduler().save_pretrained(tmp_path / "scheduler")
    process = conventions.describe(diffusers.DPMSolverMultistepScheduler()).process
    levels = process.trained_levels[[900, 500, 20]]
    fs.Schedule.from_levels(process, torch.cat([levels, levels.new_zeros(1)]), "dpmpp_2m").save(tmp_path / "a.json")
    if kind is not None:
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    result = run("export", tmp_path / "a.json", "--to", "diffusers", "--scheduler", tmp_path)
    assert printed in result.stdout
    compile(result.stdout, "call", "exec")
    assert said in result.stderr


def test_where_no_arguments_do_the_scheduler_gets_the_schedule(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")
    fs.Schedule([10.0, 1.0, 0.0], "ddim", "vp").save(tmp_path / "a.json")
    diffusers.DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    result = run("export", tmp_path / "a.json", "--to", "diffusers", "--scheduler", tmp_path)
    assert "fs.diffusers.apply(schedule, pipe)" in result.stdout
    assert "DDIMScheduler takes no list of levels" in one_line(result)
    diffusers.PNDMScheduler().save_pretrained(tmp_path / "scheduler")
    refused = run("export", tmp_path / "a.json", "--to", "diffusers", "--scheduler", tmp_path)
    assert refused.exit_code == 2
    assert "change the scheduler: pipe.scheduler = " in one_line(refused)


def test_a_fitted_schedule_is_sent_to_the_node_or_called_with_its_steps(tmp_path):
    stats = fs.measure(
        fs.Denoiser.from_denoiser(fs.oracles.Gaussian(0.5, (3,)).denoise, 0.01, 9.0), (3,), levels=8, samples=1,
        progress=False,
    )  # fmt: skip
    fs.optimal_schedule(stats, 3, "fitted").save(tmp_path / "a.json")
    assert "the node Load Schedule" in one_line(run("export", tmp_path / "a.json", "--to", "comfyui"))
    result = run("export", tmp_path / "a.json", "--to", "diffusers")
    assert result.stdout.endswith("fs.diffusers.apply(schedule, pipe)  # call it with num_inference_steps=3\n")
    assert result.stderr == ""


@pytest.mark.parametrize(("decoupled", "any_number"), [("denoiser", False), ("timestep", True)])
def test_the_number_of_steps_is_that_which_decoupled_levels_need(decoupled, any_number, tmp_path):
    """Only decoupled denoisers are sampled by a scheduler of fastsched's, which takes the schedule's own number."""
    given = {"network_sigmas": [9.0, 2.5, 0.6], "decoupled": decoupled}
    fs.Schedule([9.0, 3.0, 0.5, 0.0], "ddim", "ve", **given).save(tmp_path / "a.json")
    result = run("export", tmp_path / "a.json", "--to", "diffusers")
    assert ("with any num_inference_steps" in result.stdout) == any_number
    assert ("call it with num_inference_steps=3" in result.stdout) != any_number


def test_diffusers_without_a_scheduler_is_python(flow):
    result = run("export", flow, "--to", "diffusers")
    assert "with --scheduler FOLDER" in one_line(result)
    text = result.stdout
    compile(text, "apply", "exec")
    assert "fs.diffusers.apply(schedule, pipe)  # the next call of pipe uses it, with any num_inference_steps" in text


def test_a_file_can_be_written_instead(folder, tmp_path):
    result = run("export", folder / "x-4.json", "--to", "text", "-o", tmp_path / "a.txt")
    assert result.stdout == ""
    sigmas = fs.Schedule.load(folder / "x-4.json").sigmas.tolist()
    assert numbers((tmp_path / "a.txt").read_text()) == sigmas
    run("export", folder / "x-4.json", "--to", "text", "--json", "-o", tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["sigmas"] == sigmas


def test_what_cannot_be_exported_is_refused(folder, flow, tmp_path):
    pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")
    (tmp_path / "scheduler_config.json").write_text('{"_class_name": "NoSuchScheduler"}')
    cases = [
        ((folder / "s.safetensors", "--to", "text"), "holds statistics, and a schedule is needed"),
        ((flow, "--to", "comfy"), "did you mean 'comfyui'?"),
        ((flow, "--to", "text", "--scheduler", tmp_path), "for --to diffusers, vllm-omni and sglang only"),
        ((flow, "--to", "diffusers", "--mu", "1"), "mu needs --scheduler"),
        ((flow, "--to", "diffusers", "--scheduler", folder), "holds no scheduler_config.json"),
        ((flow, "--to", "diffusers", "--scheduler", tmp_path), "names the class 'NoSuchScheduler'"),
    ]
    for arguments, message in cases:
        result = run("export", *arguments)
        assert result.exit_code == 2
        assert message in one_line(result)
