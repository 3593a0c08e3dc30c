"""Schedulers and pipelines that cannot be fitted: each refusal says why, and names one that works."""

import math
import re

import pytest
import torch

import fastsched as fs

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers
import pipelines
from pipelines import oracle_pipeline

from fastsched.diffusers.conventions import describe

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
UNCLIPPED = {"clip_sample": False}

ADVICE = {
    "PNDMScheduler": (SD, {}),  # Stable Diffusion 1.5's
    "DPMSolverSinglestepScheduler": (SD, {}),
    "KDPM2AncestralDiscreteScheduler": (SD, {}),
    "EulerAncestralDiscreteScheduler": (SD, {}),
    "DDPMScheduler": ({**SD, **UNCLIPPED}, {}),
    "LCMScheduler": (SD, {}),
    "DPMSolverSDEScheduler": (SD, {}),
    "CogVideoXDPMScheduler": ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, {}),
    "FlowMatchLCMScheduler": ({"shift": 3.0}, {}),
    "LTXEulerAncestralRFScheduler": ({}, {}),
    "SASolverScheduler": ({"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}, {}),
}


@pytest.mark.parametrize("name", ADVICE)
def test_a_refusal_names_a_scheduler_that_works_at_the_first_try(name):
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde", reason="this class draws its noise by it")
    config, call = ADVICE[name]
    oracle = fs.oracles.GaussianMixture.random(8, 3, seed=0)
    scheduler = getattr(diffusers, name)(**config)
    pipe = oracle_pipeline(scheduler, oracle)
    with pytest.raises(ValueError, match="from_config") as refusal:
        fs.diffusers.fit(pipe, 4, levels=8, samples=2, **call)
    assert pipe.prompts == []  # before a call of the pipeline is spent
    advice = re.search(r"pipe\.scheduler = \w+\.from_config\(pipe\.scheduler\.config\)", str(refusal.value)).group()
    exec(advice, {**vars(diffusers), "pipe": pipe})
    assert describe(pipe.scheduler).process.kind == describe(scheduler).process.kind
    pipe.unet.answer_for(pipe.scheduler, oracle)
    assert fs.diffusers.fit(pipe, 4, levels=8, samples=2, model_calls=120, **call).measured_error is not None


def test_a_refusal_holds_where_no_other_class_has_the_beta_schedule():
    scheduler = diffusers.DDPMScheduler(beta_schedule="sigmoid", **UNCLIPPED)
    pipe = oracle_pipeline(scheduler, fs.oracles.GaussianMixture.random(8, 3, seed=0))
    with pytest.raises(ValueError, match=r"DDPMScheduler adds noise.*change the scheduler for another one"):
        fs.diffusers.fit(pipe, 4, levels=8, samples=2)


def test_exporting_names_a_scheduler_that_takes_the_arguments():
    for name in ("DDIMScheduler", "UniPCMultistepScheduler", "IPNDMScheduler"):
        scheduler = getattr(diffusers, name)()
        process = describe(scheduler).process
        levels = process.nearest(process.levels(4)) if process.kind == "vp" else process.levels(4)
        schedule = fs.Schedule.from_levels(process, torch.cat([levels, levels.new_zeros(1)]), "ddim")
        with pytest.raises(ValueError, match="takes no list") as refusal:
            fs.diffusers.export(schedule, scheduler)
        found = re.search(r"pipe\.scheduler = (\w+)\.from_config", str(refusal.value))
        if found is None:  # no class has the angles of IPNDM
            assert name == "IPNDMScheduler"
            continue
        other = getattr(diffusers, found[1]).from_config(scheduler.config)
        assert fs.diffusers.export(schedule, other).exact


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_zero_terminal_snr_with_betas_that_cannot_have_it_names_the_settings(name):
    settings = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}  # with linear betas
    scheduler = getattr(diffusers, name)(**settings)
    pipe = oracle_pipeline(diffusers.DDIMScheduler(**settings, clip_sample=False))
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=r"rescale_betas_zero_snr=True.*beta_schedule='linear'") as refusal:
        fs.diffusers.fit(pipe, 4, levels=8, samples=2)
    advice = re.search(r"pipe\.scheduler = \w+\.from_config\(pipe\.scheduler\.config\)", str(refusal.value)).group()
    exec(advice, {**vars(diffusers), "pipe": pipe})
    assert math.isinf(describe(pipe.scheduler).process.s_max)
    assert describe(getattr(diffusers, name)(**settings, **SD)).process.s_max > 1000


def test_fit_says_what_it_cannot_do():
    oracle = fs.oracles.GaussianMixture.random(8, 3, seed=0)
    pipe = oracle_pipeline(diffusers.EulerAncestralDiscreteScheduler(**SD), oracle)
    with pytest.raises(ValueError, match=r"adds noise.*solver='ddim'"):
        fs.diffusers.fit(pipe, 4, levels=8)
    with pytest.raises(ValueError, match="none of fastsched's solvers"):
        fs.diffusers.fit(pipe, 4, levels=8, audition=False)
    with pytest.raises(ValueError, match="adds noise"):
        fs.diffusers.fit(pipe, 4, levels=8, samples=2, solver="ddim")
    assert fs.diffusers.fit(pipe, 4, levels=8, samples=2, solver="ddim", audition=False).steps == 4
    noisy, call, _ = pipelines.unconditional(diffusers.DDIMScheduler(**UNCLIPPED))
    with pytest.raises(ValueError, match="eta must be 0"):
        fs.diffusers.fit(noisy, 4, eta=1.0, **call)
    pndm = oracle_pipeline(diffusers.PNDMScheduler(**SD), oracle)
    with pytest.raises(ValueError, match="cannot be made to use this schedule; change the scheduler"):
        fs.diffusers.fit(pndm, 4, levels=8, samples=2, solver="ipndm")
    with pytest.raises(ValueError, match="solver must be one of"):
        fs.diffusers.fit(pipe, 4, solver="dpm2m")
    for steps, error in ((0, ValueError), (2.5, TypeError)):
        with pytest.raises(error, match="steps must be"):
            fs.diffusers.fit(pipe, steps, solver="ddim")


def test_a_scheduler_that_samples_at_random_is_set_to_do_otherwise():
    """As Stable Audio 3's distilled models have it; Heun's class takes no sigmas, which flow pipelines give."""
    pipe, call, _ = pipelines.flux(diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True))
    with pytest.raises(ValueError, match=r"adds noise.*stochastic_sampling=False\)") as refusal:
        fs.diffusers.fit(pipe, 4, levels=8, **call)
    advice = re.search(r"pipe\.scheduler = [^)]+\)", str(refusal.value)).group()
    exec(advice, {**vars(diffusers), "pipe": pipe})
    assert type(pipe.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
    assert fs.diffusers.fit(pipe, 4, levels=8, samples=2, model_calls=80, **call).measured_error is not None


def test_a_list_that_the_scheduler_does_not_take_is_named_before_the_network_is_called():
    pipe, call, _ = pipelines.flux(diffusers.FlowMatchHeunDiscreteScheduler())
    calls = []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    for fit in (fs.diffusers.measure, lambda pipe, **given: fs.diffusers.fit(pipe, 4, **given)):
        with pytest.raises(ValueError, match=r"FluxPipeline gives.* sigmas, which FlowMatchHeun\w* does not take"):
            fit(pipe, levels=8, samples=2, **call)
    assert not calls
