"""Commands on a saved pipeline folder: a small random one, with the numbers of the library called directly."""

import json
import shutil

import pytest
import torch
from shell_runs import one_line, run

import fastsched as fs
from fastsched.cli import making

diffusers = pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    from pipelines import small_unet

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("pipelines") / "ddim"
    diffusers.DDIMPipeline(small_unet(), diffusers.DDIMScheduler(clip_sample=False)).save_pretrained(path)
    return path


@pytest.fixture
def pipe(saved):
    pipe = diffusers.DDIMPipeline.from_pretrained(saved)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_measure_is_that_of_the_library(saved, pipe, tmp_path):
    output = tmp_path / "s.safetensors"
    result = run("measure", saved, "--levels", "10", "--samples", "2", "-q", "-o", output)
    assert result.exit_code == 0, result.stderr
    assert "model calls (a batch of 4 counts as 4): 40 to measure" in result.stderr
    expected = fs.diffusers.measure(pipe, levels=10, samples=2)
    found = fs.PathStatistics.load(output)
    torch.testing.assert_close(found.gram, expected.gram)
    assert (found.origin.model, found.origin.pipeline) == ("ddim", "DDIMPipeline")  # the folder's name, not its path
    assert ["pipeline", "DDIMPipeline"] in [line.split() for line in run("info", output).stdout.splitlines()]


def test_an_interrupted_measurement_resumes_with_the_finished_calls(saved, tmp_path, monkeypatch):
    output, calls, answer = tmp_path / "s.safetensors", [], diffusers.UNet2DModel.forward

    def interrupted(*given, **options):
        calls.append(len(given[1]))
        if len(calls) == 25:  # each sample takes 20 steps
            raise KeyboardInterrupt
        return answer(*given, **options)

    monkeypatch.setattr(diffusers.UNet2DModel, "forward", interrupted)
    common = ("measure", saved, "--levels", "10", "--samples", "2", "-q")
    stopped = run(*common, "-o", output)
    expected = "interrupted; 'fastsched measure --resume' continues from the last saved batch, if any"
    assert (stopped.exit_code, one_line(stopped)) == (130, expected)
    assert fs.PathStatistics.load(output).samples == 1
    assert run(*common, "-o", output).exit_code == 1  # neither resumed nor replaced unasked
    resumed = run(*common, "-o", output, "--resume")
    assert "20 to measure" in resumed.stderr
    assert len(calls) == 25 + 20
    assert run(*common, "-o", tmp_path / "whole.safetensors").exit_code == 0
    assert fs.PathStatistics.load(output) == fs.PathStatistics.load(tmp_path / "whole.safetensors")
    refused = run(*common, "-o", output, "--seed", "1", "--resume")
    assert "was measured with another seed or other samples; resume it with the same" in one_line(refused)
    other = run(*common, "-o", output, "--seed", "1", "--overwrite")
    assert other.exit_code == 0, other.stderr
    assert fs.PathStatistics.load(output).seeds.tolist() != fs.PathStatistics.load(tmp_path / "whole.safetensors").seeds


def test_fit_is_that_of_the_library(saved, pipe, tmp_path):
    output = tmp_path / "a.json"
    common = ("fit", saved, "--steps", "4", "--levels", "10", "--samples", "1", "--model-calls", "50", "-q")
    result = run(*common, "-o", output)
    assert result.exit_code == 0, result.stderr
    assert "20 to measure, at most 30 to run" in result.stderr
    expected = fs.diffusers.fit(pipe, 4, levels=10, samples=1, model_calls=50)
    found = fs.Schedule.load(output)
    assert found == expected
    assert found.origin == expected.origin
    assert found.origin.model_calls > 20  # of the measurement, and of the runs
    assert found.predicted_error > 0
    assert found.measured_error > 0


def test_a_fit_shows_one_bar_over_all_its_calls(saved, tmp_path, bars):
    making.fit(str(saved), 4, tmp_path / "a.json", levels=10, samples=1, model_calls=50)
    (bar,) = bars  # none of the pipeline's own
    assert bar.total == 50
    assert 20 < bar.n <= 50  # 20 of them measure


def test_compare_holds_the_pipeline_to_its_converged_samples(saved, pipe, tmp_path):
    from fastsched.diffusers.conventions import describe
    from fastsched.diffusers.pipelines.fit import own_sigmas
    from fastsched.selection.starts import even_schedule

    own = own_sigmas(pipe.scheduler, 4)
    fs.Schedule(own, "ddim", "vp").save(tmp_path / "own.json")
    even_schedule(describe(pipe.scheduler).process, 12, "ddim").save(tmp_path / "fine.json")
    files = (tmp_path / "own.json", tmp_path / "fine.json")
    common = ("--samples", "2", "--reference-steps", "12", "--baselines", "karras", "-q", "--json")
    result = run("compare", saved, *files, *common)
    assert result.exit_code == 0, result.stderr
    rows = {row["name"]: row for row in json.loads(result.stdout)["rows"]}
    assert rows["fine"]["mean_error"] == 0  # it is the reference
    assert rows["own"]["mean_error"] == pytest.approx(rows["the pipeline's own, 4 steps"]["mean_error"], rel=1e-4)
    assert rows["own"]["mean_error"] > 0
    assert rows["own"]["standard_error"] > 0  # of samples from different noise
    other = json.loads(run("compare", saved, *files, *common, "--seed", "7").stdout)["rows"]
    assert rows["own"]["mean_error"] not in [row["mean_error"] for row in other]
    assert {"karras-ddim-4", "karras-ddim-12"} < set(rows)
    calls = 2 * (12 + 4 + 12 + 4 + 12 + 4 + 12)  # reference; files; karras at both; the pipeline's own at both
    assert f"model calls (a batch of 4 counts as 4): {calls}, of which 24" in result.stderr


def test_compare_names_a_schedule_that_cannot_be_given_before_any_run(saved, pipe, tmp_path, monkeypatch):
    from fastsched.diffusers.conventions import describe
    from fastsched.selection.starts import even_schedule

    even_schedule(describe(pipe.scheduler).process, 100, "ddim").save(tmp_path / "even.json")
    monkeypatch.setattr("fastsched.cli.pipelines.call", None)
    for baselines, named in (("beta,karras", "beta"), ("karras", "karras")):
        refused = one_line(run("compare", saved, tmp_path / "even.json", "--baselines", baselines, "-q"))
        assert refused.startswith(f"error: {named}: DDIMScheduler cannot be made to use this schedule")


def test_compare_names_the_solver_that_ran_and_counts_its_calls(pipe):
    from pipelines import oracle_pipeline

    from fastsched.cli.pipelines import compare_pipeline

    stats = fs.diffusers.measure(pipe, levels=10, samples=1, progress=False)
    fitted = fs.optimal_schedule(stats, 3, "fitted")
    heun = fs.optimal_schedule(stats, 3, "heun")
    common = {"prompts": None, "samples": 1, "seed": 0, "reference_steps": 6, "arguments": {}, "progress": False}
    rows = compare_pipeline(pipe, {"fitted": fitted}, [3], **common).rows
    assert [(row.solver, row.model_calls) for row in rows] == [("fitted", 3), ("ddim", 3)]
    with pytest.warns(UserWarning, match="chosen for heun, and DDIMScheduler samples as ddim"):
        (row,) = compare_pipeline(pipe, {"heun": heun}, [], **common).rows
    assert row.solver == "ddim"
    two_stages = oracle_pipeline(diffusers.HeunDiscreteScheduler(), fs.oracles.GaussianMixture.random(8, 3, seed=0))
    by_hand = fs.Schedule([14.0, 4.0, 1.0, 0.0], "heun", "vp")
    (row,) = compare_pipeline(two_stages, {"heun": by_hand}, [], **common).rows
    assert (row.solver, row.steps, row.model_calls) == ("heun", 3, 5)


@pytest.mark.parametrize("folder", ["saved", "noisy"])  # DDIMPipeline passes eta and others, DDPMPipeline a generator
def test_compare_runs_schedulers_that_do_not_take_what_the_pipeline_passes_to_step(request, tmp_path, folder):
    fs.Schedule([14.0, 3.0, 1.0, 0.0], "ddim", "vp").save(tmp_path / "a.json")
    few = ("--samples", "2", "--reference-steps", "6", "--baselines", "none", "-q", "--json", "--scheduler")
    named = ("compare", request.getfixturevalue(folder), tmp_path / "a.json", *few)
    rows = json.loads(run(*named, "UniPCMultistepScheduler").stdout)["rows"]
    assert [row["name"] for row in rows] == ["a", "the pipeline's own, 3 steps"]
    assert "does not call scheduler.scale_model_input" in one_line(run(*named, "EulerDiscreteScheduler"))


def test_compare_announces_two_calls_for_a_step_of_two_stages(saved, tmp_path):
    fs.Schedule([14.0, 4.0, 1.0, 0.0], "heun", "vp").save(tmp_path / "heun.json")
    files = ("compare", saved, tmp_path / "heun.json", "--scheduler", "HeunDiscreteScheduler", "--baselines", "none")
    result = run(*files, "--samples", "2", "--reference-steps", "12", "--dry-run")
    assert result.exit_code == 0, result.stderr
    calls = 2 * (23 + 5 + 5)  # the last step of each run is of first order
    assert f"model calls (a batch of 4 counts as 4): {calls}, of which 46" in result.stderr


def test_compare_uses_every_prompt_and_counts_every_image(text_folder, tmp_path):
    fs.Schedule([14.0, 4.0, 0.0], "ddim", "vp").save(tmp_path / "a.json")
    asked = ("compare", text_folder, tmp_path / "a.json", *(part for prompt in "abc" for part in ("--prompt", prompt)))
    few = ("--samples", "2", "--reference-steps", "5", "--baselines", "none", "--call", "num_images_per_prompt=2", "-q")
    result = run(*asked, *few, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["samples"] == 3 * 2
    assert f"{3 * 2 * (5 + 2 + 2)}, of which {3 * 2 * 5}" in result.stderr


def test_info_describes_a_pipeline(saved):
    found = json.loads(run("info", saved, "--json").stdout)
    assert (found["class"], found["scheduler"], found["solver"], found["noise"]) == (
        "DDIMPipeline",
        "DDIMScheduler",
        "ddim",
        "vp",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shape", "3,8,8"), "shape is not for pipelines"),
        (("--batch-size", "2"), "batch-size is not for pipelines"),
        (("--call", "guidance_scale"), "call must be NAME=VALUE"),
        (("--call", "num_inference_steps=4"), "num_inference_steps must be left out"),
        (("--prompt", "a cat"), "the call of DDIMPipeline has no argument 'prompt'; it has batch_size"),
        (("--call", "batch_size=two"), "call: batch_size must be a value such as 1, got 'two'"),
        (("--call", "eta=0,1"), "call: eta must be a value such as 0.0, got '0,1'"),
        (("--call", "eta=1e999"), "call: eta must be a value such as 0.0, got '1e999'"),
        (("--call", "return_dict=False"), "call: return_dict must be a value such as true, got 'False'"),
        (("--call", "batch_sise=2"), "has no argument 'batch_sise'; did you mean 'batch_size'?"),
    ],
)
def test_options_that_do_not_fit_are_refused(saved, tmp_path, arguments, message):
    result = run("fit", saved, "--steps", "4", "-q", "-o", tmp_path / "a.json", *arguments)
    assert result.exit_code == 2
    assert message in one_line(result)


@pytest.mark.parametrize("value", ["generator=1", "callback_on_step_end=f", "latents=[1]", "ip_adapter_image=a.png"])
def test_arguments_that_are_objects_are_refused_before_the_pipeline_loads(value, text_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_pretrained", None)
    run_it = ("fit", text_folder, "--steps", "3", "--prompt", "a", "-q", "-o", tmp_path / "a.json")
    result = run(*run_it, "--call", value)
    assert result.exit_code == 2
    assert f"call: {value.split('=')[0]} takes an object of Python, which cannot be given here" in one_line(result)


def test_a_prompt_and_guidance_reach_the_pipeline(text_folder, tmp_path):
    run_it = ("fit", text_folder, "--steps", "3", "--levels", "8", "--samples", "1", "--model-calls", "30", "-q")
    found = []
    for call in ("guidance_scale=7.5", "guidance_scale=1"):
        output = tmp_path / f"{call}.json"
        result = run(*run_it, "--prompt", "a cat", "--call", call, "-o", output)
        assert result.exit_code == 0, result.stderr
        assert "it/s" not in result.stderr  # no bars of the libraries that load it
        found.append(fs.Schedule.load(output))
    assert found[0].measured_error != found[1].measured_error  # their levels, of 8, may be the same
    result = run(*run_it, "--prompt", "a cat", "--call", "guidance_scal=1", "-o", tmp_path / "none.json")
    assert result.exit_code == 2  # diffusers would ignore it
    assert "did you mean 'guidance_scale'?" in result.stderr


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """A folder whose scheduler adds noise, as that of diffusers' own DDPM pipelines."""
    from pipelines import small_unet

    path = tmp_path_factory.mktemp("pipelines") / "ddpm"
    diffusers.DDPMPipeline(small_unet(), diffusers.DDPMScheduler(clip_sample=False)).save_pretrained(path)
    return path


def test_a_scheduler_that_cannot_be_fitted_is_refused_before_any_cost_is_said(noisy, tmp_path):
    for dry in ((), ("--dry-run",)):
        result = run("fit", noisy, "--steps", "4", "-q", "-o", tmp_path / "a.json", *dry)
        assert result.exit_code == 2
        assert len(result.stderr.splitlines()) == 1
        assert one_line(result).endswith("change the scheduler: --scheduler DPMSolverMultistepScheduler")


def test_another_scheduler_takes_the_place_of_the_folders(noisy, saved, tmp_path):
    few = ("--levels", "10", "--samples", "1", "-q", "--scheduler", "DPMSolverMultistepScheduler")
    pipe = diffusers.DDPMPipeline.from_pretrained(noisy)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    result = run("measure", noisy, *few, "-o", tmp_path / "s.safetensors")
    assert result.exit_code == 0, result.stderr
    expected = fs.diffusers.measure(pipe, levels=10, samples=1)
    torch.testing.assert_close(fs.PathStatistics.load(tmp_path / "s.safetensors").gram, expected.gram)
    result = run("fit", noisy, "--steps", "4", "--model-calls", "50", *few, "-o", tmp_path / "a.json")
    assert result.exit_code == 0, result.stderr
    assert fs.Schedule.load(tmp_path / "a.json") == fs.diffusers.fit(pipe, 4, levels=10, samples=1, model_calls=50)
    result = run("compare", noisy, tmp_path / "a.json", "--samples", "2", "--reference-steps", "9", "-q", *few[-2:])
    assert result.exit_code == 0, result.stderr


def test_a_pipeline_is_profiled_with_another_scheduler(noisy):
    named = ("profile", noisy, "--steps", "3", "-q", "--scheduler")
    result = run(*named, "DPMSolverMultistepScheduler")
    assert result.exit_code == 0, result.stderr
    refused = run(*named, "EDMDPMSolverMultistepScheduler")
    assert "another noise process" in one_line(refused)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--prompt", "b"), "prompt must be given once here, because one call is timed, got 2"),
        (("--call", "prompt=b"), "prompt must be left out if prompts are given"),
    ],
)
def test_one_prompt_is_profiled(text_folder, more, message):
    asked = ("profile", text_folder, "--prompt", "a", "--steps", "3", "--dry-run")
    assert run(*asked).exit_code == 0
    assert message in one_line(run(*asked, *more))


def test_a_prompt_given_twice_is_refused_before_the_pipeline_loads(text_folder, folder, monkeypatch):
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_pretrained", None)
    for command in (("measure",), ("fit", "--steps", "3"), ("compare", folder / "x-4.json"), ("profile",)):
        name, *rest = command
        refused = run(name, text_folder, *rest, "--prompt", "a", "--call", "prompt=b", "--dry-run")
        assert one_line(refused) == "error: prompt must be left out if prompts are given"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("DPMSolverMultistepSchedule", "did you mean 'DPMSolverMultistepScheduler'?"),
        ("no", "name one such as DPMSolverMultistepScheduler"),
        ("UNet2DModel", "scheduler must be a class of"),
        ("FlowMatchEulerDiscreteScheduler", "is for another noise process or prediction than the network"),
    ],
)
def test_a_scheduler_that_does_not_fit_the_folder_is_refused(noisy, tmp_path, name, message):
    result = run("fit", noisy, "--steps", "4", "-q", "-o", tmp_path / "a.json", "--scheduler", name)
    assert result.exit_code == 2
    assert message in one_line(result)


def test_a_missing_prompt_is_asked_for(text_folder, tmp_path):
    few = ("--levels", "8", "--samples", "1", "-q", "-o")
    for arguments in (
        ("measure", *few, tmp_path / "s.safetensors"),
        ("fit", "--steps", "3", *few, tmp_path / "a.json"),
    ):
        result = run(arguments[0], text_folder, *arguments[1:])
        assert result.exit_code == 2
        assert "Give --prompt TEXT." in one_line(result)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, "without model_index.json"),
        ('{"_class_name": "NoPipeline"}', "model_index.json names the class 'NoPipeline', which diffusers"),
        ('{"_class_name": ["code", "Own"]}', "names the class ['code', 'Own'], which diffusers"),
        ('{"_class_na', "model_index.json is not as diffusers writes it"),
        ("[]", "model_index.json is not as diffusers writes it"),
    ],
)
def test_a_folder_that_is_no_pipeline_of_diffusers_is_explained(tmp_path, index, message):
    if index is not None:
        (tmp_path / "model_index.json").write_text(index)
    result = run("measure", tmp_path, "-o", tmp_path / "s.safetensors")
    assert result.exit_code == 2
    assert message in one_line(result)


def test_a_folder_whose_class_is_no_pipeline_is_refused(saved, tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "UNet2DModel"}')
    assert "names the class 'UNet2DModel', which is no pipeline" in one_line(
        run("measure", tmp_path, "-o", tmp_path / "s.safetensors")
    )


def test_a_folder_that_lacks_a_part_is_told(saved, tmp_path):
    folder = tmp_path / "half"
    shutil.copytree(saved, folder)
    shutil.rmtree(folder / "unet")
    result = run("measure", folder, "-o", tmp_path / "s.safetensors")
    assert result.exit_code == 2
    assert "half has no folder unet, which its model_index.json names" in one_line(result)


def test_code_in_a_folder_is_not_run(saved, tmp_path):
    folder = tmp_path / "coded"
    shutil.copytree(saved, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"unet": ["own", "UNet"]}))
    (folder / "unet" / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    result = run("measure", folder, "-o", tmp_path / "s.safetensors")
    assert result.exit_code == 2
    assert "own.py, which the shell does not run" in one_line(result)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--call", "eta=NaN"), "call: eta must be a value such as 0.0, got 'NaN'"),
        (("--call", "eta=0.5", "--call", "eta=0.0"), "call: eta must be given once"),
    ],
)
def test_an_argument_of_a_call_has_one_value(saved, tmp_path, options, message):
    result = run("measure", saved, *options, "-o", tmp_path / "s.safetensors")
    assert result.exit_code == 2
    assert message in one_line(result)


def test_weights_that_would_be_unpickled_are_not_read(saved, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(saved, folder)
    weights = next((folder / "unet").glob("*.safetensors"))
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()
    result = run("measure", folder, "-o", tmp_path / "s.safetensors")
    assert result.exit_code != 0
    assert "safetensors" in result.stderr


def test_the_cost_counts_a_sample_for_each_prompt(text_folder, tmp_path):
    prompts = [part for prompt in "abc" for part in ("--prompt", prompt)]
    common = (
        text_folder,
        *prompts,
        "--levels",
        "10",
        "--samples",
        "2",
        "-q",
        "--call",
        "height=16",
        "--call",
        "width=16",
    )
    for asked, cost in ((common, "60"), ((*common[:-7], "--samples", "1:3", *common[-5:]), "40")):
        assert f"{cost} to measure" in run("measure", *asked, "--dry-run").stderr
    measured = run("measure", *common, "-o", tmp_path / "s.safetensors")
    assert "3 paths over 10 levels, 60 model calls" in measured.stderr, measured.stderr
    fitting = ("fit", *common, "--steps", "3", "-o", tmp_path / "a.json", "--model-calls")
    assert "60 to measure, at most 40" in run(*fitting, "100", "--dry-run").stderr
    refused = run(*fitting, "59")
    assert refused.exit_code == 2
    assert "measuring takes 60 model calls and model_calls allows 59 in all" in one_line(refused)


def test_a_folder_that_is_no_pipeline_is_called_so(tmp_path):
    refused = run("measure", tmp_path, "--shape", "2", "-o", tmp_path / "s.safetensors")
    assert "is a folder without model_index.json" in one_line(refused)


def test_a_folder_that_diffusers_cannot_load_is_named(saved, tmp_path):
    broken = shutil.copytree(saved, tmp_path / "broken")
    config = broken / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"block_out_channels": 8}))
    result = run("measure", broken, "-q", "-o", tmp_path / "s.safetensors")
    assert f"diffusers cannot load {broken} as a DDIMPipeline: TypeError: " in one_line(result)
