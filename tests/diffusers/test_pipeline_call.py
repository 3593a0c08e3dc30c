"""One call of a pipeline: how it ends, which arguments it may have, and what it makes of its latents."""

import pytest
import torch

import fastsched as fs

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers
import pipelines
from pipelines import OraclePipeline, OracleUNet, oracle_pipeline

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def mixture(seed=0):
    return fs.oracles.GaussianMixture.random(8, 3, seed=seed)


def with_output_types(which, early):
    """A pipeline with these output types alone, which it checks before or after its steps."""

    class Particular(OraclePipeline):
        @torch.no_grad()
        def __call__(self, num_inference_steps=50, output_type="np", prompt=None):
            self.types.append(output_type)
            if early and output_type not in which:
                raise ValueError(f"output_type must be one of {which}")
            latents = super().__call__(prompt, num_inference_steps)
            if output_type not in which:
                raise ValueError(f"output_type must be one of {which}")
            return latents

    scheduler = diffusers.EulerDiscreteScheduler(**SD)
    pipe = Particular(OracleUNet().answer_for(scheduler, mixture()), scheduler)
    pipe.types = []
    return pipe


@pytest.mark.parametrize("early", [True, False])
def test_a_pipeline_that_cannot_leave_its_latents_is_measured_and_fitted(early):
    pipe = with_output_types(("np", "pt"), early)
    settings = {"levels": 8, "samples": 2, "progress": False}
    stats = fs.diffusers.measure(pipe, **settings)
    assert pipe.types == (["latent", "np"] if early else ["latent"])
    plain = oracle_pipeline(diffusers.EulerDiscreteScheduler(**SD), mixture())
    assert torch.equal(stats.gram, fs.diffusers.measure(plain, **settings).gram)
    found, expected = (fs.diffusers.fit(each, 4, model_calls=100, **settings) for each in (pipe, plain))
    assert torch.equal(found.sigmas, expected.sigmas)
    assert found.measured_error == expected.measured_error


def test_an_output_type_that_was_asked_for_is_not_changed():
    pipe = with_output_types(("np", "pt"), early=True)
    with pytest.raises(ValueError, match="output_type must be one of"):
        fs.diffusers.measure(pipe, levels=8, samples=2, output_type="pil")
    assert pipe.types == ["pil"]


def test_an_error_before_the_last_step_is_raised():
    def fail(i, output):
        if i == 15:
            raise ValueError("no more")
        return output

    pipe = oracle_pipeline(diffusers.EulerDiscreteScheduler(**SD), mixture())
    with pytest.raises(ValueError, match="no more"):
        fs.diffusers.measure(pipe, levels=8, samples=2, on_step=fail)


def test_an_empty_prompt_is_a_prompt():
    pipe = oracle_pipeline(diffusers.EulerDiscreteScheduler(**SD), mixture())
    assert fs.diffusers.measure(pipe, levels=8, samples=2, prompts="").samples == 2
    assert set(pipe.prompts) == {""}
    with pytest.raises(ValueError, match="prompts must hold at least one prompt"):
        fs.diffusers.measure(pipe, levels=8, samples=2, prompts=[])


def test_a_misspelt_argument_of_a_call_that_takes_any_is_refused():
    torch.manual_seed(0)
    pipe, call, _ = pipelines.stable_diffusion(diffusers.EulerDiscreteScheduler(**SD))
    calls = []
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(TypeError, match="has no argument 'guidance'; did you mean 'guidance_scale'"):
        fs.diffusers.measure(pipe, levels=8, samples=2, guidance=3, **call)
    assert not calls
    settings = {"levels": 8, "samples": 2, "progress": False}
    with pytest.warns(UserWarning, match="has no argument 'colour' and may ignore it; it has prompt"):
        fs.diffusers.measure(pipe, colour="red", **settings, **call)
    with pytest.warns(FutureWarning, match="callback_steps"):  # of diffusers, which knows it, and none of fastsched
        fs.diffusers.measure(pipe, callback_steps=1, **settings, **call)
