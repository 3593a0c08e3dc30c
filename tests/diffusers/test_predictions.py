"""Networks that predict something else than their scheduler's config says."""

import pytest
import torch

import fastsched as fs

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers
from pipelines import OraclePipeline, OracleUNet, oracle_pipeline

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SETTINGS = {"levels": 12, "samples": 2, "progress": False}


def mixture():
    return fs.oracles.GaussianMixture.random(8, 3, seed=0)


class Counted(OracleUNet):
    """Counts its calls, and multiplies its output by ``factor``."""

    calls, factor = 0, 1.0

    def forward(self, sample, timestep, **options):
        self.calls += 1
        return (self.factor * super().forward(sample, timestep, **options)[0],)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_a_prediction_of_noise_under_another_name_is_refused_at_the_second_step(name, kind):
    scheduler = getattr(diffusers, name)(**SD)
    network = Counted().answer_for(scheduler, mixture())
    pipe = OraclePipeline(network, type(scheduler).from_config(scheduler.config, prediction_type=kind))
    with pytest.raises(ValueError, match="set prediction_type='epsilon'"):
        fs.diffusers.measure(pipe, **SETTINGS)
    assert network.calls == 2
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type="epsilon")
    assert fs.diffusers.measure(pipe, **SETTINGS).samples == 2


def test_noise_predicted_under_edm_s_class_needs_another_class():
    scheduler = diffusers.EDMEulerScheduler()
    network = OracleUNet().answer_for(scheduler, mixture())
    network.networks = [lambda x, s: x]  # at 80 times the data this is the noise
    with pytest.raises(ValueError, match="use one for predictions of noise, such as EulerDiscreteScheduler"):
        fs.diffusers.measure(OraclePipeline(network, scheduler), **SETTINGS)


@pytest.mark.parametrize("name", ["DDIMScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_an_output_of_the_wrong_sign_is_refused_at_the_second_step(name):
    network = Counted().answer_for(getattr(diffusers, name)(), mixture())
    network.factor = -1.0
    with pytest.raises(ValueError, match="sign is wrong: negate it in the pipeline"):
        fs.diffusers.measure(OraclePipeline(network, getattr(diffusers, name)()), **SETTINGS)
    assert network.calls == 2


def test_levels_that_begin_within_the_data_tell_nothing_of_the_prediction():
    """There outputs that predict ``v`` follow the noise as well: for zero data by ``alpha / sigma``."""
    scheduler = diffusers.EulerDiscreteScheduler(**SD, prediction_type="v_prediction")
    oracle = fs.oracles.GaussianMixture(torch.ones(1), torch.zeros(1, 8), 1e-3 * torch.eye(8)[None])
    levels = [1.0 / 1.3**k for k in range(12)]
    stats = fs.diffusers.measure(oracle_pipeline(scheduler, oracle), levels=levels, samples=2, progress=False)
    assert stats.samples == 2


class Guided(OracleUNet):
    """Guidance of 7.5 of one mixture away from another."""

    def forward(self, sample, timestep, **_):
        away, towards = (network(sample, self.convention.levels(timestep[:1])) for network in self.networks)
        return (away + 7.5 * (towards - away),)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_guidance_between_right_predictions_is_not_taken_for_a_prediction_of_noise(kind):
    """At 14.6 guidance of 7.5 scales ``D`` of data of deviation 1.5 to about the noise."""
    wide = fs.oracles.GaussianMixture(torch.ones(1), torch.zeros(1, 8), 2.25 * torch.eye(8)[None])
    narrow = fs.oracles.GaussianMixture(torch.ones(1), torch.full((1, 8), 0.3), 0.01 * torch.eye(8)[None])
    scheduler = diffusers.DDIMScheduler(**SD, prediction_type=kind, clip_sample=False)
    network = Guided().answer_for(scheduler, *((wide, narrow) if kind == "v_prediction" else (narrow, wide)))
    assert fs.diffusers.measure(OraclePipeline(network, scheduler), **SETTINGS).samples == 2


def test_a_guided_flow_from_a_level_near_the_data_is_not_taken_for_one_of_the_wrong_sign():
    wide = fs.oracles.GaussianMixture(torch.ones(1), torch.zeros(1, 8), torch.eye(8)[None])
    narrow = fs.oracles.GaussianMixture(torch.ones(1), torch.zeros(1, 8), 0.01 * torch.eye(8)[None])
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    network = Guided().answer_for(scheduler, narrow, wide)
    levels = [4.5 / 1.5**k for k in range(12)]
    stats = fs.diffusers.measure(OraclePipeline(network, scheduler), **SETTINGS | {"levels": levels})
    assert stats.samples == 2
