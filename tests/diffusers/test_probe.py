"""The probe: what a scheduler does, found by running it, whatever its network predicts and torch's default dtype is."""

import pytest
import torch

import fastsched as fs

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers
from pipelines import oracle_pipeline

from fastsched.diffusers.applier import applied
from fastsched.diffusers.conventions import describe
from fastsched.diffusers.schedulers.probe import Trace, amplified_rounding
from fastsched.selection.starts import even_schedule

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def schedule_for(scheduler):
    convention = describe(scheduler)
    levels = convention.levels(convention.timesteps(convention.process.levels(5)).round())
    return fs.Schedule.from_levels(convention.process, torch.cat([levels, levels.new_zeros(1)]), "ddim")


@pytest.mark.parametrize("variance", ["fixed_small", "learned", "learned_range"])
@pytest.mark.parametrize("name", ["DDPMScheduler", "DDPMParallelScheduler"])
def test_a_network_may_predict_the_variance_of_a_stochastic_scheduler(name, variance):
    scheduler = getattr(diffusers, name)(**SD, variance_type=variance, clip_sample=False)
    schedule = schedule_for(scheduler)
    assert fs.diffusers.export(schedule, scheduler).exact
    proof = fs.diffusers.apply(schedule, oracle_pipeline(scheduler, fs.oracles.GaussianMixture.random(8, 3, seed=0)))
    assert proof.exact
    assert not proof.deterministic


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_a_class_that_drops_the_variance_is_exact(variance):
    scheduler = diffusers.DPMSolverMultistepScheduler(**SD, variance_type=variance)
    assert fs.diffusers.export(schedule_for(scheduler), scheduler).exact


@pytest.fixture
def default_dtype(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("default_dtype", [torch.bfloat16, torch.float16, torch.float64], indirect=True)
@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "DDIMScheduler"])
def test_the_default_dtype_does_not_matter(name, default_dtype):
    scheduler = getattr(diffusers, name)(**SD, **({"clip_sample": False} if name == "DDIMScheduler" else {}))
    proof = fs.diffusers.apply(schedule_for(scheduler), oracle_pipeline(scheduler))
    assert proof.deterministic
    assert proof.error <= 1e-3


class OffLevels(diffusers.DPMSolverMultistepScheduler):
    """A scheduler that reaches other levels than it lists: by 2% between the ends."""

    def step(self, model_output, timestep, sample, **others):
        listed = self.sigmas
        self.sigmas = listed.clone()
        self.sigmas[2:-1] *= 1.02
        try:
            return super().step(model_output, timestep, sample, **others)
        finally:
            self.sigmas = listed


def test_rounding_that_a_long_step_after_a_short_one_multiplies_is_allowed():
    schedule = fs.Schedule([36.912, 23.855, 0.010001, 0.0], "dpmpp_2m", "vp")
    for name in ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"):
        proof = fs.diffusers.apply(schedule, oracle_pipeline(getattr(diffusers, name)()))
        assert proof.exact
    with pytest.raises(ValueError, match=r"does not step through its sigmas"):
        fs.diffusers.apply(schedule, oracle_pipeline(OffLevels()))


@pytest.mark.parametrize("left", [(0.0, 0.0), (1e-9, 2e-9)])
def test_levels_of_a_state_without_noise_do_not_count_as_amplified_rounding(left):
    """A scheduler that ends in two such states, at levels 5% off, was allowed 10%."""
    one = torch.ones(3, dtype=torch.float64)
    run, nudged = (Trace(one, torch.tensor([0.525, end, 0.0]).double(), one, True) for end in left)
    assert amplified_rounding(run, nudged) == 0.0
    assert not run.follows(one[:2], torch.tensor([0.5, 0.0]).double(), rounding=amplified_rounding(run, nudged))


def proof_from_very_high_noise(name, steps, **settings):
    """Of even levels from the first of cosine betas, where alpha is 5e-5, and some classes divide the state by it."""
    scheduler = getattr(diffusers, name)(beta_schedule="squaredcos_cap_v2", **settings)
    return applied(even_schedule(describe(scheduler).process, steps, "ddim"), scheduler)[1]


@pytest.mark.parametrize("steps", [2, 3, 4])
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"])
def test_rounding_from_very_high_noise_is_no_added_noise(name, steps):
    assert proof_from_very_high_noise(name, steps).deterministic


@pytest.mark.parametrize("steps", [2, 3, 6])
def test_noise_added_to_very_high_noise_is_seen(steps):
    settings = {"algorithm_type": "sde-dpmsolver++"}
    assert not proof_from_very_high_noise("DPMSolverMultistepScheduler", steps, **settings).deterministic
