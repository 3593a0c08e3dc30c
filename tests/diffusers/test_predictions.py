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
