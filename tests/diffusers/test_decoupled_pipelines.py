"""Decoupled levels in pipelines: samples as `fs.sample` makes them, refusals, and fits through a pipeline."""

import copy
import math
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import fastsched as fs

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers
from diffusers import StableDiffusionImg2ImgPipeline
from pipelines import oracle_pipeline
from scheduler_table import exact_denoise, uneven_schedule

from fastsched.denoisers.noise import FlowMatching, VariancePreserving
from fastsched.diffusers.conventions import describe
from fastsched.diffusers.fitted_scheduler import FittedScheduler
from fastsched.diffusers.schedulers.probe import oracle_network, scales, states_of
from fastsched.fitting.rollouts import distances
from fastsched.metrics import power_mean
from fastsched.sampling.random_streams import noise_of as noise_of_paths

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW_UNIPC = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
KINDS = {
    "epsilon, scaled state": ("EulerDiscreteScheduler", SD, "ddim"),
    "v": ("EulerDiscreteScheduler", {**SD, "prediction_type": "v_prediction"}, "ddim"),
    "epsilon": ("DPMSolverMultistepScheduler", SD, "dpmpp_2m"),
    "epsilon, UniPC": ("UniPCMultistepScheduler", SD, "unipc"),
    "velocity": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, "ddim"),
    "velocity, UniPC": ("UniPCMultistepScheduler", FLOW_UNIPC, "unipc"),
    "EDM": ("EDMDPMSolverMultistepScheduler", {}, "dpmpp_2m"),
}
#: Classes hold sigmas in float32, and UniPC for flows starts at time 1 - 1e-6: 0.0026 apart with coupled levels too.
ALLOWED = {"velocity, UniPC": 1e-2}
STEPS = 6
ORACLE = fs.oracles.GaussianMixture.random(8, 3, seed=0)


class Pipe:
    def __init__(self, scheduler):
        self.scheduler = scheduler


def own_scheduler(kind):
    name, config, _ = KINDS[kind]
    return getattr(diffusers, name)(**config)


def decoupled(scheduler, solver, of="timestep"):
    """An uneven schedule whose network is told levels between the states' and the next."""
    process = describe(scheduler).process
    schedule = uneven_schedule(describe(scheduler), STEPS)
    s = process.level(schedule.sigmas)[:-1]
    told = torch.cat([s[:1], s[1:-1] ** 0.8 * s[2:] ** 0.2, s[-1:]])
    weights = None
    if solver == "fitted":
        weights = torch.eye(STEPS, dtype=torch.float64) + 0.3 * (torch.eye(STEPS) - torch.eye(STEPS).roll(-1, 1)).tril()
        weights[0] = torch.eye(STEPS)[0]
        weights = weights / weights.sum(1, keepdim=True)
    sigmas = torch.cat([s, s.new_zeros(1)])
    return fs.Schedule.from_levels(process, sigmas, solver, weights=weights, network_levels=told, decoupled=of)


def denoiser_of(scheduler):
    """The oracle as a denoiser that predicts what the scheduler's network does."""
    convention = describe(scheduler)
    network, process = oracle_network(convention, exact_denoise(ORACLE)), convention.process
    if isinstance(process, VariancePreserving):
        process = replace(process, integer_timesteps=False)

    def answer(x, condition):
        told = condition[:1].double()
        if convention.denoiser.prediction == "edm":
            told = (4 * told).exp()
        elif isinstance(process, FlowMatching):
            told = told / (1 - told)
        else:
            told = convention.levels(told)
        return convention.sign * network(x, told)

    return replace(convention.denoiser, network=answer, process=process)


def by_loop(scheduler, schedule, noise, scaled=True):
    """The last state of diffusers' loop; the oracle is asked at the exact level, not at that of a float32 timestep.

    Unless it is ``scaled``, the loop does not call ``scale_model_input``, as those of flow models do not.
    """
    convention = describe(scheduler)
    network = oracle_network(convention, exact_denoise(ORACLE))
    scheduler.set_timesteps(STEPS)
    told = convention.process.level(schedule.network_sigmas)
    torch.testing.assert_close(scheduler.timesteps.double(), convention.timesteps(told), rtol=1e-5, atol=1e-5)
    told = iter(told)
    first = convention.process.level(schedule.sigmas[:1])
    start = float(scales(convention, first)[1]) * noise
    shown = scheduler if scaled else SimpleNamespace(timesteps=scheduler.timesteps, step=scheduler.step)
    return list(states_of(shown, lambda x, t: network(x, next(told)[None]), start))[-1]


def noise_of(count=4):
    return torch.randn(count, 2, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("stock", [True, False], ids=["stock", "fitted"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_of_diffusers_gives_the_samples_of_fs_sample(kind, stock):
    pipe, solver = Pipe(own_scheduler(kind)), KINDS[kind][2] if stock else "fitted"
    schedule = decoupled(pipe.scheduler, solver)
    proof = fs.diffusers.apply(schedule, pipe)
    assert proof.way == ("assigned" if stock else "fitted")
    assert proof.exact
    assert isinstance(pipe.scheduler, FittedScheduler) == (not stock)
    denoiser = denoiser_of(own_scheduler(kind))
    expected = fs.sample(denoiser, schedule, noise=noise_of())
    coupled = fs.sample(denoiser, replace(schedule, network_sigmas=None), noise=noise_of())
    scale = float(expected.norm())
    assert float((coupled - expected).norm()) > 1e-2 * scale  # what the network is told matters
    for scheduler in (pipe.scheduler, copy.deepcopy(pipe.scheduler)):
        found = by_loop(scheduler, schedule, noise_of())
        assert float((found - expected).norm()) < (ALLOWED.get(kind, 2e-3) if stock else 1e-9) * scale


@pytest.mark.parametrize("stock", [True, False], ids=["stock", "fitted"])
@pytest.mark.parametrize("kind", KINDS)
def test_denoised_samples_of_other_levels(kind, stock):
    """The loop of diffusers with a scheduler of fastsched, also for stock solvers, gives the samples of `fs.sample`."""
    pipe, solver = Pipe(own_scheduler(kind)), KINDS[kind][2] if stock else "fitted"
    schedule = decoupled(pipe.scheduler, solver, "denoiser")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        proof = fs.diffusers.apply(schedule, pipe)
    assert (proof.way, proof.exact) == ("fitted", True)
    denoiser = denoiser_of(own_scheduler(kind))
    expected = fs.sample(denoiser, schedule, noise=noise_of())
    of_timesteps = fs.sample(denoiser, replace(schedule, decoupled="timestep"), noise=noise_of())
    scale = float(expected.norm())
    assert float((of_timesteps - expected).norm()) > 1e-2 * scale
    for scheduler in (pipe.scheduler, copy.deepcopy(pipe.scheduler)):
        assert float((by_loop(scheduler, schedule, noise_of()) - expected).norm()) < 1e-9 * scale
        if kind == "epsilon":
            scheduler.set_timesteps(STEPS)
            first, second = scheduler.timesteps[:2]
            scheduler.step(noise_of(), first, noise_of())  # the first level is that of the state
            with pytest.raises(ValueError, match=r"does not call scheduler\.scale_model_input"):
                scheduler.step(noise_of(), second, noise_of())
        if kind.startswith("velocity"):
            assert float((by_loop(scheduler, schedule, noise_of(), scaled=False) - expected).norm()) < 1e-9 * scale
    with pytest.raises(ValueError, match="pipelines take sigmas or timesteps"):
        fs.diffusers.export(replace(schedule, solver="ddim", weights=None), own_scheduler(kind))


def test_solvers_without_weights_have_no_scheduler_for_other_levels():
    scheduler = own_scheduler("epsilon")
    with pytest.raises(ValueError, match=r"multistep solver over rho.*decoupled=.timestep"):
        fs.diffusers.apply(decoupled(scheduler, "ipndm", "denoiser"), Pipe(scheduler))


@pytest.mark.parametrize("of", ["timestep", "denoiser"])
def test_a_fitted_scheduler_keeps_what_the_network_is_told(tmp_path, of):
    pipe = Pipe(own_scheduler("velocity"))
    schedule = decoupled(pipe.scheduler, "fitted", of)
    fs.diffusers.apply(schedule, pipe)
    pipe.scheduler.save_pretrained(tmp_path)
    read = FittedScheduler.from_pretrained(tmp_path)
    assert torch.equal(read.schedule.network_sigmas, schedule.network_sigmas)
    assert read.schedule.decoupled == of
    assert torch.equal(read.timesteps, pipe.scheduler.timesteps)


def test_what_cannot_tell_the_network_another_level_is_refused():
    ddim = diffusers.DDIMScheduler(**SD, clip_sample=False)
    schedule = decoupled(ddim, "ddim")
    with pytest.raises(ValueError, match="the network cannot be told another"):
        fs.diffusers.apply(schedule, Pipe(ddim))
    with pytest.raises(ValueError, match=r"fastsched\.diffusers\.apply"):
        fs.diffusers.export(schedule, diffusers.EulerDiscreteScheduler(**SD))
    pipe = oracle_pipeline(ddim, ORACLE)
    with pytest.raises(ValueError, match="another"):
        fs.diffusers.fit(pipe, 4, levels=12, samples=2, decoupled="timestep")
    pipe = oracle_pipeline(diffusers.HeunDiscreteScheduler(**SD), ORACLE)
    with pytest.raises(ValueError, match="one call a step"):
        fs.diffusers.fit(pipe, 4, levels=12, samples=2, decoupled=True)


def test_a_start_midway_is_refused():
    from pipelines import stable_diffusion

    pipe, call, _ = stable_diffusion(diffusers.EulerDiscreteScheduler(**SD))
    fs.diffusers.apply(decoupled(pipe.scheduler, "ddim"), pipe)
    midway = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    midway.set_progress_bar_config(disable=True)
    prompts = {name: value for name, value in call.items() if "embeds" in name}
    with pytest.raises(ValueError, match="decoupled levels"):
        midway(image=torch.zeros(2, 3, 16, 16), strength=0.5, num_inference_steps=STEPS, **prompts)


@pytest.mark.parametrize("of", ["timestep", "denoiser"])
@pytest.mark.parametrize("kind", ["epsilon", "velocity", "velocity, UniPC"])
def test_a_pipeline_is_fitted_with_decoupled_levels(kind, of):
    from test_pipeline_fit import rollout

    name, config, solver = KINDS[kind]
    pipe = oracle_pipeline(getattr(diffusers, name)(**config), ORACLE)
    stats = fs.diffusers.measure(pipe, levels=24, samples=4, keep_increments=True, progress=False)
    options = {"stats": stats, "model_calls": 14 * 4 * 6, "progress": False}
    coupled = fs.diffusers.fit(pipe, 5, **options)
    schedule = fs.diffusers.fit(pipe, 5, decoupled=of, **options)
    assert schedule.solver == solver
    assert schedule.decoupled == of
    assert schedule.predicted_error is None  # the measurement does not know what told levels change
    assert schedule.measured_error < 0.95 * coupled.measured_error
    fs.diffusers.apply(schedule, pipe)
    error = float(power_mean(distances(stats, rollout(pipe, stats, schedule).ends)))
    assert schedule.measured_error == pytest.approx(error, rel=1e-3)
    assert math.isfinite(error)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_pipeline_that_steps_its_scaled_latents_is_fitted_with_decoupled_levels(scale):
    """DiT, whose first state would be taken for the state before it was scaled."""
    from pipelines import dit

    torch.manual_seed(0)
    pipe, call, _ = dit(diffusers.DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    options = {"levels": 12, "samples": 2, "model_calls": 200, "progress": False}
    schedule = fs.diffusers.fit(pipe, 4, decoupled=True, guidance_scale=scale, **options, **call)
    assert schedule.decoupled == "denoiser"


def test_a_state_that_the_scheduler_scaled_is_known_again():
    pipe = Pipe(own_scheduler("epsilon"))
    schedule = decoupled(pipe.scheduler, "dpmpp_2m", "denoiser")
    told = schedule.network_sigmas
    told[0] *= 0.9
    fs.diffusers.apply(replace(schedule, network_sigmas=told), pipe)
    output, x, ends = noise_of(), noise_of() + 1, []
    for steps_scaled in (False, True):
        pipe.scheduler.set_timesteps(STEPS)
        given = pipe.scheduler.scale_model_input(x, pipe.scheduler.timesteps[0])
        assert float((given - x).norm()) > 1e-2 * float(x.norm())
        ends.append(pipe.scheduler.step(output, pipe.scheduler.timesteps[0], given if steps_scaled else x)[0])
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("name", ["DDIMScheduler", "UniPCMultistepScheduler"])
def test_a_pipeline_that_lets_nothing_scale_its_latents_is_refused_in_its_first_call(name, measured):
    from pipelines import unconditional

    torch.manual_seed(0)
    pipe, call, _ = unconditional(getattr(diffusers, name)())
    pipe.scheduler.register_to_config(clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    options = {"levels": 12, "samples": 2, "progress": False, **call}
    stats = fs.diffusers.measure(pipe, **options) if measured else None
    calls = []
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match="leave decoupled out, or pass decoupled='timestep'"):
        fs.diffusers.fit(pipe, 4, decoupled=True, stats=stats, model_calls=120, **options)
    assert len(calls) <= 2  # a call that fails at its first step is tried again with the pipeline's own defaults
    if name != "DDIMScheduler":
        schedule = fs.diffusers.fit(pipe, 4, decoupled="timestep", model_calls=120, **options)
        assert schedule.decoupled == "timestep"


def test_a_pipeline_that_never_scales_its_latents_is_fitted_with_decoupled_levels():
    """FLUX, as all pipelines of flow models."""
    from pipelines import flux

    torch.manual_seed(0)
    pipe, call, ending = flux(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipe.set_progress_bar_config(disable=True)
    options = {"levels": 12, "samples": 2, "model_calls": 200, "progress": False}
    schedule = fs.diffusers.fit(pipe, 4, decoupled=True, **options, **call)
    assert schedule.decoupled == "denoiser"
    assert float((schedule.network_sigmas / schedule.sigmas[:-1] - 1).abs().max()) > 1e-3
    stats = fs.diffusers.measure(pipe, levels=12, samples=2, progress=False, **call)
    fs.diffusers.apply(schedule, pipe)
    noise = noise_of_paths(stats.seeds, stats.shape)
    ends = pipe(**call, **ending, latents=noise, num_inference_steps=4).images
    error = float(power_mean((ends - stats.ends).flatten(1).square().sum(1)))
    assert schedule.measured_error == pytest.approx(error, rel=1e-3)
