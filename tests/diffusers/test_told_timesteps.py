"""Pipelines that give their scheduler timesteps for the network apart from the sigmas, as CogView4 and GLM-Image do."""

import numpy as np
import pytest
import torch

import fastsched as fs

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers
import pipelines
from pipelines import SHAPE, OraclePipeline, OracleUNet

SHIFT = 3.25
SCHEDULERS = {
    "by resolution": lambda: diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, time_shift_type="linear", base_shift=SHIFT
    ),
    "static": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT),
}


class BothLists(OraclePipeline):
    """Has a network that was trained at timesteps that are not shifted, as sigmas are; both are given if ``apart``."""

    @torch.no_grad()
    def __call__(self, num_inference_steps=50, images=2, output_type="latent", apart=True, seed=None):
        sigmas = np.linspace(1, 1 / num_inference_steps, num_inference_steps)
        lists = {"sigmas": sigmas, "timesteps": 1000 * sigmas} if apart else {"sigmas": sigmas}
        self.scheduler.set_timesteps(**lists, mu=SHIFT)
        latents = torch.randn(images, *SHAPE, generator=None if seed is None else torch.Generator().manual_seed(seed))
        for t in self.scheduler.timesteps:
            known = SHIFT * t / (1 + (SHIFT - 1) * t / 1000) if apart else t
            latents = self.scheduler.step(self.unet(latents, known)[0], t, latents, return_dict=False)[0]
        return latents


def shifted(scheduler):
    return BothLists(OracleUNet().answer_for(scheduler, fs.oracles.GaussianMixture.random(8, 3, seed=0)), scheduler)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_network_is_given_the_timesteps_that_belong_to_the_sigmas(name):
    """With the right timesteps the pipeline is the one that tells its network the flow times themselves."""
    found, expected = (
        fs.diffusers.measure(shifted(SCHEDULERS[name]()), levels=12, samples=2, apart=apart) for apart in (True, False)
    )
    torch.testing.assert_close(found.gram, expected.gram, rtol=1e-3, atol=1e-5)  # float32 in other places
    torch.testing.assert_close(found.ends, expected.ends, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("solver", "decoupled"), [("ddim", True), ("fitted", False)])
def test_a_schedule_is_fitted_and_sampled_at_these_timesteps(solver, decoupled):
    pipe = shifted(SCHEDULERS["by resolution"]())
    fit = {"solver": solver, "levels": 12, "samples": 2, "model_calls": 80, "decoupled": decoupled}
    found, expected = (fs.diffusers.fit(pipe, 4, apart=apart, **fit) for apart in (True, False))
    torch.testing.assert_close(found.sigmas, expected.sigmas, rtol=5e-3, atol=0.0)  # float32 in other places
    fs.diffusers.apply(expected, pipe)
    images = [pipe(4, apart=apart, seed=1) for apart in (True, False)]
    torch.testing.assert_close(images[0], images[1], rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(
    diffusers.__version__.startswith("0.41."),
    reason="diffusers 0.41 ignores the timesteps that CogView4 gives beside its sigmas",
)
def test_cogview4_samples_as_by_itself_where_its_own_sigmas_are_applied():
    torch.manual_seed(0)
    pipe, call, ending = pipelines.cogview4(SCHEDULERS["by resolution"]())
    pipe.set_progress_bar_config(disable=True)
    call |= {"latents": torch.randn(1, 4, 8, 8), **ending}
    by_itself = pipe(num_inference_steps=6, **call).images
    sigmas, timesteps = pipe.scheduler.sigmas, pipe.scheduler.timesteps
    fs.diffusers.apply(fs.Schedule(sigmas.double(), "ddim", noise="flow"), pipe)
    torch.testing.assert_close(pipe(num_inference_steps=6, **call).images, by_itself)
    torch.testing.assert_close(pipe.scheduler.timesteps.as_subclass(torch.Tensor), timesteps)
    assert abs(float(timesteps[3]) - 1000 * float(sigmas[3])) > 30
