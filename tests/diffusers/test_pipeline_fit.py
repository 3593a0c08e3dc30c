"""From a pipeline to samples with its schedule, for every family of pipelines; weights are random."""

import contextlib
import dataclasses
import itertools
import math
import os

import pytest
import torch

import fastsched as fs

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers
import pipelines
from pipelines import oracle_pipeline

from fastsched.diffusers.pipelines import fit as pipeline_fit
from fastsched.diffusers.pipelines import runner as pipeline_runner
from fastsched.diffusers.pipelines.fit import candidates, own_sigmas
from fastsched.diffusers.pipelines.prompt_calls import PromptCalls
from fastsched.diffusers.pipelines.runner import PipelineRunner
from fastsched.fitting.budget import TOTAL
from fastsched.fitting.loop import CANDIDATES
from fastsched.fitting.rollouts import distances
from fastsched.metrics import power_mean
from fastsched.sampling.solvers import get_solver

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEVELS, STEPS = 10, 4

#: A random network's x0 is not within [-1, 1], so clipping it would change the paths' ends.
UNCLIPPED = {"clip_sample": False}
FAMILIES = {
    "ddim": (pipelines.unconditional, diffusers.DDIMScheduler(**UNCLIPPED), "ddim"),
    "ddpm": (pipelines.unconditional, diffusers.DPMSolverMultistepScheduler(), "dpmpp_2m"),
    "stable-diffusion": (pipelines.stable_diffusion, diffusers.DPMSolverMultistepScheduler(**SD), "dpmpp_2m"),
    "stable-diffusion-unipc": (pipelines.stable_diffusion, diffusers.UniPCMultistepScheduler(**SD), "unipc"),
    "stable-diffusion-dpm-2": (pipelines.stable_diffusion, diffusers.KDPM2DiscreteScheduler(**SD), "dpm_2"),
    "stable-diffusion-deis": (pipelines.stable_diffusion, diffusers.DEISMultistepScheduler(**SD), "deis_2"),
    "stable-diffusion-xl-lms": (pipelines.stable_diffusion_xl, diffusers.LMSDiscreteScheduler(**SD), "lms"),
    "stable-diffusion-xl": (pipelines.stable_diffusion_xl, diffusers.EulerDiscreteScheduler(**SD), "ddim"),
    "stable-diffusion-xl-heun": (pipelines.stable_diffusion_xl, diffusers.HeunDiscreteScheduler(**SD), "heun"),
    "edm": (pipelines.stable_diffusion_xl, diffusers.EDMEulerScheduler(), "ddim"),
    "edm-2m": (pipelines.stable_diffusion_xl, diffusers.EDMDPMSolverMultistepScheduler(), "dpmpp_2m"),
    "stable-diffusion-3": (
        pipelines.stable_diffusion_3,
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        "ddim",
    ),
    "wan": (
        pipelines.wan,
        diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
        "unipc",
    ),
    "controlnet": (pipelines.controlled, diffusers.EulerDiscreteScheduler(**SD), "ddim"),
    "flux": (pipelines.flux, diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "ddim"),
    "stable-diffusion-3-heun": (
        pipelines.stable_diffusion_3,
        diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
        "heun",
    ),
}


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def steps_taken(pipe, call):
    """The timesteps given to the network in a plain call, and the call's output."""
    asked = []
    network = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
    hook = network.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(kwargs["timestep"] if "timestep" in kwargs else args[1]),
        with_kwargs=True,
    )
    try:
        output = pipe(**call)
    finally:
        hook.remove()
    return [float(torch.as_tensor(t).max()) for t in asked], output


@pytest.mark.parametrize("family", FAMILIES)
def test_measured_fitted_applied_and_sampled(family):
    make, scheduler, solver = FAMILIES[family]
    torch.manual_seed(0)
    pipe, call, ending = make(scheduler)
    quiet(pipe)
    stats = fs.diffusers.measure(pipe, levels=LEVELS, samples=2, **call)
    assert stats.samples == 2
    assert stats.model_calls == 2 * LEVELS * 2
    schedule = fs.diffusers.fit(pipe, STEPS, stats=stats, model_calls=80, **call)
    assert (schedule.solver, schedule.steps) == (solver, STEPS)
    assert schedule.measured_error is not None
    assert pipe.scheduler is scheduler
    proof = fs.diffusers.apply(schedule, pipe)
    assert proof.exact
    asked, output = steps_taken(pipe, {**call, **ending})
    calls = get_solver(solver).model_calls(STEPS)
    if family == "wan":
        calls *= 2  # with and without the prompt
    assert len(asked) == calls  # whatever number of steps the pipeline has for a default
    assert torch.isfinite(torch.as_tensor(output[0])).all()


def test_a_scheduler_that_adds_noise_is_measured_fitted_without_an_audition_and_applied():
    pipe, call, ending = pipelines.unconditional(diffusers.DDPMScheduler(**UNCLIPPED))
    quiet(pipe)
    schedule = fs.diffusers.fit(pipe, STEPS, levels=LEVELS, samples=2, solver="ddim", audition=False, **call)
    assert fs.diffusers.apply(schedule, pipe).exact
    asked, output = steps_taken(pipe, {**call, **ending})
    assert asked == schedule.timesteps.tolist()
    assert torch.isfinite(torch.as_tensor(output[0])).all()


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_arguments_given_by_hand_are_used_by_the_pipeline(name):
    flow = name.startswith("Flow")
    make = pipelines.stable_diffusion_3 if flow else pipelines.stable_diffusion
    pipe, call, ending = make(getattr(diffusers, name)(**({"shift": 3.0} if flow else SD)))
    quiet(pipe)
    stats = fs.diffusers.measure(pipe, levels=LEVELS, samples=2, **call)
    schedule = fs.optimal_schedule(stats, STEPS, "ddim")
    asked, _ = steps_taken(pipe, {**call, **ending, **fs.diffusers.export(schedule, pipe.scheduler).arguments})
    expected = schedule.timesteps * (1000 if flow else 1)
    assert asked == pytest.approx(expected.tolist(), rel=1e-4)


KINDS = {
    "vp": ("EulerDiscreteScheduler", SD, "ddim"),
    "vp-integer": ("DPMSolverMultistepScheduler", SD, "dpmpp_2m"),
    "vp-ddim": ("DDIMScheduler", {**SD, **UNCLIPPED}, "ddim"),
    "edm": ("EDMDPMSolverMultistepScheduler", {}, "dpmpp_2m"),
    "flow": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, "ddim"),
    "vp-dpm-2": ("KDPM2DiscreteScheduler", SD, "dpm_2"),
    "vp-lms": ("LMSDiscreteScheduler", SD, "lms"),
    "vp-deis": ("DEISMultistepScheduler", SD, "deis_2"),
    "angles": ("IPNDMScheduler", {}, "ipndm"),
}


def first_candidates(stats, steps, solver, scheduler):
    return [schedule for _, schedule in itertools.islice(candidates(stats, steps, solver, scheduler), CANDIDATES)]


def rollout(pipe, stats, schedule):
    return PipelineRunner(pipe, stats, PromptCalls((), 0, 1), {})(schedule, 0, stats.samples)


def typical_error(pipe, stats, schedule):
    return float(power_mean(distances(stats, rollout(pipe, stats, schedule).ends)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_audition_samples_through_the_pipeline_as_fastsched_does(kind):
    """It ends where `fs.sample` ends from the same noises: to 1e-3, as the solvers' parity."""
    from test_pipeline_measurement import denoiser_of

    from fastsched.sampling.random_streams import noise_of

    name, config, solver = KINDS[kind]
    scheduler = getattr(diffusers, name)(**config)
    oracle = fs.oracles.GaussianMixture.random(8, 3, seed=0)
    pipe = oracle_pipeline(scheduler, oracle)
    stats = fs.diffusers.measure(pipe, levels=24, samples=4)
    schedule = fs.optimal_schedule(stats, 6, solver)
    measured = typical_error(pipe, stats, schedule)
    denoiser = denoiser_of(scheduler, (oracle, 1.0))
    ends = fs.sample(denoiser, schedule, noise=noise_of(stats.seeds, stats.shape).double())
    squared = (ends - stats.ends.double()).square().flatten(1).sum(1)
    assert measured == pytest.approx(float(power_mean(squared)), rel=5e-3)


@pytest.mark.parametrize("kind", [*KINDS, "vp-heun", "unipc"])
def test_the_network_outputs_of_a_run_are_kept(kind):
    """Every network call of the solver, at its level: the exact denoiser's output at the state given to it."""
    more = {"vp-heun": ("HeunDiscreteScheduler", SD, "heun"), "unipc": ("UniPCMultistepScheduler", SD, "unipc")}
    name, config, solver = {**KINDS, **more}[kind]
    oracle = fs.oracles.GaussianMixture.random(8, 3, seed=0)
    pipe = oracle_pipeline(getattr(diffusers, name)(**config), oracle)
    stats = fs.diffusers.measure(pipe, levels=24, samples=4)
    schedule = fs.optimal_schedule(stats, 6, solver)
    run = rollout(pipe, stats, schedule)
    found = run.evaluations
    assert len(found.s) == get_solver(solver).model_calls(6)
    levels = stats.process.level(schedule.sigmas)[:-1].tolist()
    assert found.s[:: 1 if len(found.s) == 6 else 2] == pytest.approx(levels, rel=1e-4)  # float32 timesteps
    for s, state, denoised in zip(found.s, found.states, found.denoised, strict=True):
        assert state.shape == denoised.shape == (4, *stats.shape)
        if s < math.inf:
            exact = oracle.denoise(s * state.double().flatten(1), torch.full((4,), s, dtype=torch.float64))
            torch.testing.assert_close(denoised.double().flatten(1), exact, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(found.denoised[-1], run.ends, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["vp-integer", "vp-ddim", "edm", "flow", "vp-dpm-2", "vp-lms"])
def test_the_fitted_schedule_is_the_best_of_its_audition_and_tuned_where_increments_were_kept(kind):
    name, config, solver = KINDS[kind]
    scheduler = getattr(diffusers, name)(**config)
    pipe = oracle_pipeline(scheduler, fs.oracles.GaussianMixture.random(8, 3, seed=0))
    stats = fs.diffusers.measure(pipe, levels=16, samples=4, keep_increments=True)
    without = dataclasses.replace(stats, increments=None)
    run = get_solver(solver).model_calls(5) + 1
    ranked = fs.diffusers.fit(pipe, 5, stats=without, model_calls=14 * 4 * run)
    tried = first_candidates(stats, 5, ranked.solver, scheduler)
    assert len(tried) >= 3
    errors = [typical_error(pipe, stats, candidate) for candidate in tried]
    chosen = next(n for n, candidate in enumerate(tried) if torch.equal(ranked.sigmas, candidate.sigmas))
    assert ranked.measured_error == pytest.approx(errors[chosen])
    assert ranked.measured_error <= sorted(errors)[len(errors) // 2]  # some are dropped after the first samples
    own = own_sigmas(scheduler, 5)
    if own is not None:
        assert any(torch.allclose(candidate.sigmas, own, rtol=1e-5) for candidate in tried[:2])
    tuned = fs.diffusers.fit(pipe, 5, stats=stats, model_calls=14 * 4 * run)
    assert tuned.measured_error == pytest.approx(typical_error(pipe, stats, tuned))
    assert tuned.measured_error <= ranked.measured_error
    if solver == "dpmpp_2m":  # first-order schedules leave next to nothing to tune here
        assert tuned.measured_error < 0.9 * ranked.measured_error


@pytest.mark.parametrize(
    ("name", "setting"),
    [("DPMSolverMultistepScheduler", "use_karras_sigmas"), ("UniPCMultistepScheduler", "use_beta_sigmas")],
)
def test_a_flow_scheduler_with_sigmas_of_another_formula_has_no_schedule_of_its_own(name, setting):
    """Which diffusers computes as for other models, far above 1."""
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", setting: True}
    scheduler = getattr(diffusers, name)(**flow)
    pipe = oracle_pipeline(scheduler, fs.oracles.GaussianMixture.random(8, 3, seed=0))
    assert own_sigmas(scheduler, 4) is None
    found = fs.diffusers.fit(pipe, 4, levels=12, samples=2, model_calls=80)
    assert fs.diffusers.apply(found, pipe).exact


@contextlib.contextmanager
def calls_counted(pipe):
    """A list of the network's calls: the batch size of each."""
    calls = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    try:
        yield calls
    finally:
        hook.remove()


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "HeunDiscreteScheduler", "EulerDiscreteScheduler"])
def test_the_budget_is_kept(name):
    """Runs of ``steps + 1`` calls a sample (``2 steps`` with heun), as many as fit; measuring is not included."""
    pipe = oracle_pipeline(getattr(diffusers, name)(**SD), fs.oracles.GaussianMixture.random(8, 3, seed=0))
    stats = fs.diffusers.measure(pipe, levels=12, samples=2, keep_increments=True)
    run = 2 * (8 if name.startswith("Heun") else 5)  # 4 steps of 2 samples
    errors = []
    for budget, most in ((run - 1, 0), (run, 1), (3 * run - 1, 2), (10 * run, 10)):
        with calls_counted(pipe) as calls:
            schedule = fs.diffusers.fit(pipe, 4, stats=stats, model_calls=budget)
        assert sum(calls) <= budget
        assert sum(calls) <= most * run
        assert sum(calls) % run == 0
        assert (sum(calls) >= min(most, 2) * run) or most > 2
        assert (schedule.measured_error is None) == (most == 0)
        errors += [schedule.measured_error] if most else []
    assert sum(calls) > 4 * run  # four candidates, then tuning
    with calls_counted(pipe) as calls, pytest.raises(ValueError, match="measuring takes 64 model calls"):
        fs.diffusers.fit(pipe, 4, levels=16, samples=2, model_calls=63)
    assert not calls
    assert errors[0] >= errors[1] >= errors[2]


def test_a_whole_fit_costs_what_it_says():
    pipe = oracle_pipeline(diffusers.EulerDiscreteScheduler(**SD), fs.oracles.GaussianMixture.random(8, 3, seed=0))
    with calls_counted(pipe) as calls:
        fs.diffusers.fit(pipe, 8)
    assert 384 < sum(calls) <= TOTAL


def test_schedules_that_the_scheduler_refuses_are_not_tried(monkeypatch):
    pipe = oracle_pipeline(diffusers.EulerDiscreteScheduler(**SD), fs.oracles.GaussianMixture.random(8, 3, seed=0))
    stats = fs.diffusers.measure(pipe, levels=12, samples=2, keep_increments=True)
    tried = first_candidates(stats, 4, "ddim", pipe.scheduler)
    allowed = [*(candidate.sigmas for candidate in tried)]
    asked = []

    def applied(schedule, scheduler):
        asked.append(schedule.sigmas)
        if not any(torch.equal(schedule.sigmas, sigmas) for sigmas in allowed):
            raise ValueError("refused")
        return original(schedule, scheduler)

    original = pipeline_fit.applied
    for module in (pipeline_fit, pipeline_runner):
        monkeypatch.setattr(module, "applied", applied)
    monkeypatch.setattr(pipeline_fit, "checked_solver", lambda *_, **__: "ddim")
    schedule = fs.diffusers.fit(pipe, 4, stats=stats)
    assert any(not any(torch.equal(sigmas, known) for known in allowed) for sigmas in asked)  # tuning proposed some
    errors = [typical_error(pipe, stats, candidate) for candidate in tried]
    assert torch.equal(schedule.sigmas, tried[errors.index(min(errors))].sigmas)


def test_samples_that_are_not_finite_win_nothing():
    pipe = oracle_pipeline(diffusers.EulerDiscreteScheduler(**SD), fs.oracles.GaussianMixture.random(8, 3, seed=0))
    stats = fs.diffusers.measure(pipe, levels=12, samples=2, keep_increments=True)
    runs = []

    def overflow(i, output):  # in the first run, that of the best guess
        runs.append(i)
        return output * float("inf") if runs.count(0) == 1 else output

    schedule = fs.diffusers.fit(pipe, 4, stats=stats, on_step=overflow)
    assert 0 < schedule.measured_error < float("inf")
    with pytest.raises(ValueError, match="gave NaN or inf, or could not be run, under every one"):
        fs.diffusers.fit(pipe, 4, stats=stats, on_step=lambda i, output: output * float("nan"))


def test_fit_measures_for_itself_and_saves_with_its_error(tmp_path):
    pipe = oracle_pipeline(diffusers.EulerDiscreteScheduler(**SD), fs.oracles.GaussianMixture.random(8, 3, seed=0))
    schedule = fs.diffusers.fit(pipe, 5, levels=16, samples=2, prompts=["a", "b"])
    schedule.save(tmp_path / "schedule.json")
    loaded = fs.Schedule.load(tmp_path / "schedule.json")
    assert loaded.measured_error == schedule.measured_error
    assert torch.equal(loaded.sigmas, schedule.sigmas)
    plain = fs.diffusers.fit(pipe, 5, levels=16, samples=2, audition=False)
    assert plain.measured_error is None
    assert schedule.measured_error is not None
    assert plain.predicted_error is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_pipeline_is_measured_fitted_applied_and_sampled(dtype):
    pipe, call, ending = pipelines.stable_diffusion(diffusers.DPMSolverMultistepScheduler(**SD))
    quiet(pipe).to(dtype)
    call = {name: value.to(dtype) if torch.is_tensor(value) else value for name, value in call.items()}
    schedule = fs.diffusers.fit(pipe, STEPS, levels=LEVELS, samples=2, model_calls=60, **call)
    assert fs.diffusers.apply(schedule, pipe).exact
    assert (pipe.dtype, pipe.unet.dtype) == (dtype, dtype)
    asked, output = steps_taken(pipe, {**call, **ending})
    assert asked == pytest.approx(schedule.timesteps.tolist())
    assert torch.isfinite(torch.as_tensor(output[0])).all()


@pytest.mark.parametrize(
    "name",
    [
        *("EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"),
        *("LMSDiscreteScheduler", "KDPM2DiscreteScheduler", "DEISMultistepScheduler"),
    ],
)
def test_any_number_of_steps_that_the_levels_allow(name):
    pipe = oracle_pipeline(getattr(diffusers, name)(**SD), fs.oracles.GaussianMixture.random(8, 3, seed=0))
    stats = fs.diffusers.measure(pipe, levels=8, samples=2)
    one, some, most = (fs.diffusers.fit(pipe, steps, stats=stats, model_calls=60) for steps in (1, 3, 7))
    assert [schedule.steps for schedule in (one, some, most)] == [1, 3, 7]
    assert one.measured_error > some.measured_error > most.measured_error
    with pytest.raises(ValueError, match="steps must be at most 7 on 8 levels"):
        fs.diffusers.fit(pipe, 8, stats=stats)


@pytest.mark.parametrize(
    ("levels", "error", "message"),
    [(8, ValueError, "steps must be at most 7 on 8 levels"), (40_000, MemoryError, "lower levels")],
)
def test_levels_that_a_fit_cannot_search_are_refused_before_the_first_call(levels, error, message):
    pipe = oracle_pipeline(diffusers.DPMSolverMultistepScheduler(**SD))
    calls = []
    pipe.unet.register_forward_hook(lambda *args: calls.append(args))
    with pytest.raises(error, match=message):
        fs.diffusers.fit(pipe, 8, levels=levels, samples=1, model_calls=200_000)
    assert not calls


def test_fit_names_what_is_wrong_with_its_statistics():
    oracle = fs.oracles.GaussianMixture.random(8, 3, seed=0)
    pipe = oracle_pipeline(diffusers.EulerDiscreteScheduler(**SD), oracle)
    stats = fs.diffusers.measure(pipe, levels=8, samples=2)
    with pytest.raises(TypeError, match=r"stats must be of class PathStatistics"):
        fs.diffusers.fit(pipe, 3, stats="model.safetensors")
    other, call, _ = pipelines.stable_diffusion(diffusers.EulerDiscreteScheduler(**SD))
    with pytest.raises(ValueError, match="stats must be of this pipeline called with the same prompts"):
        fs.diffusers.fit(quiet(other), 3, stats=stats, **call)
    unknown = dataclasses.replace(stats, origin=None)
    with pytest.raises(ValueError, match=r"stats are of samples \[2, 2, 2\] and the pipeline's are \[4, 8, 8\]"):
        fs.diffusers.fit(quiet(other), 3, stats=unknown, **call)
    flow = oracle_pipeline(diffusers.FlowMatchEulerDiscreteScheduler(), oracle)
    with pytest.raises(ValueError, match="noise process than this model's: 'vp', not 'flow'"):
        fs.diffusers.fit(flow, 3, stats=stats)


def test_a_pipeline_with_a_schedule_applied_is_fitted_again_alike():
    pipe = oracle_pipeline(diffusers.EulerDiscreteScheduler(**SD), fs.oracles.GaussianMixture.random(8, 3, seed=0))
    first = fs.diffusers.fit(pipe, 3, levels=8, samples=2)
    fs.diffusers.apply(first, pipe)
    assert torch.equal(fs.diffusers.fit(pipe, 3, levels=8, samples=2).sigmas, first.sigmas)
    pipe.scheduler.set_timesteps(50)
    assert torch.allclose(pipe.scheduler.sigmas.double(), first.sigmas)


def test_a_schedule_keeps_its_fields_when_its_error_is_measured():
    schedule = fs.Schedule(torch.tensor([2.0, 1.0, 0.0]), "ddim", "ve", predicted_error=1.0)
    assert dataclasses.replace(schedule, measured_error=0.5).predicted_error == 1.0


def test_a_relative_checkpoint_stays_in_the_folder_of_the_call(tmp_path, monkeypatch):
    pipe, call, _ = pipelines.unconditional(diffusers.DDIMScheduler(**UNCLIPPED))
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    monkeypatch.chdir(first)
    pipe.unet.register_forward_pre_hook(lambda *_: os.chdir(second))
    fs.diffusers.measure(quiet(pipe), levels=LEVELS, samples=2, checkpoint="measured", progress=False, **call)
    os.chdir(first)
    fs.diffusers.fit(pipe, STEPS, levels=LEVELS, samples=2, model_calls=80, checkpoint="fit", progress=False, **call)
    assert not list(second.iterdir())
    assert {file.name for file in first.iterdir()} == {"measured", "fit", "fit.runs"}
