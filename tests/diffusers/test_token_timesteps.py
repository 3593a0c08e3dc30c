"""Pipelines that give ``step`` a timestep for each token, as LTX does."""

import itertools

import PIL.Image
import pytest
import torch

import fastsched as fs

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers
import pipelines
from pipelines import OraclePipeline, OracleUNet

from fastsched.denoisers.deferred_checks import DeferredChecks
from fastsched.diffusers.watching.watch import check_times


def conditioned_video():
    """A pipeline that gives ``step`` a timestep for each token, with the exact velocity of N(0, 0.7^2)."""
    torch.manual_seed(0)
    pipe, call, _ = pipelines.ltx_conditioned(diffusers.FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)

    def exact(hidden_states, timestep, **_):
        t = (timestep.double() / 1000).reshape(len(hidden_states), -1, 1).to(hidden_states)
        denoised = (1 - t) * 0.49 / ((1 - t) ** 2 * 0.49 + t**2) * hidden_states
        return ((hidden_states - denoised) / t,)

    pipe.transformer.forward = exact
    return pipe, call


def test_a_timestep_for_each_token_and_the_other_sign_are_measured_run_and_applied():
    pipe, call = conditioned_video()
    stats = fs.diffusers.measure(pipe, levels=24, samples=2, keep_increments=True, progress=False, **call)
    assert stats.data_std == pytest.approx(0.7, rel=0.05)
    found = fs.diffusers.fit(pipe, 6, stats=stats, model_calls=60, progress=False, **call)
    # the closed form of each step's factor, its samples' deviation at the end for those of fs.sample
    times = found.sigmas.tolist()
    factor = 1.0
    for now, then in itertools.pairwise(times):
        kept = (1 - now) * 0.49 / ((1 - now) ** 2 * 0.49 + now**2)
        factor *= 1 + (then - now) * (1 - kept) / now
    assert found.measured_error == pytest.approx(
        float(((0.7 - factor) / 0.7) ** 2 * stats.ends.square().sum() / 2), rel=0.05
    )
    plain = pipe.scheduler
    for schedule, deviation in ((found, factor), (fs.optimal_schedule(stats, 6, "fitted"), 0.7)):
        fs.diffusers.apply(schedule, pipe)
        frames = pipe(**call, num_inference_steps=6, output_type="latent").frames
        pipe.scheduler = plain
        assert float(frames.std()) == pytest.approx(deviation, rel=0.1)


def test_frames_to_be_kept_among_the_tokens_are_refused():
    pipe, call = conditioned_video()
    image = PIL.Image.new("RGB", (64, 64))
    with pytest.raises(ValueError, match="64 of 128 are not the step's own timestep"):
        fs.diffusers.measure(pipe, levels=8, samples=1, image=image, **call)
    levels = torch.tensor([float("inf"), 1.0, 0.1, 0.0], dtype=torch.float64)
    process = fs.diffusers.CalibrationScheduler.from_scheduler(pipe.scheduler).convention.process
    fs.diffusers.apply(fs.Schedule.from_levels(process, levels, "fitted", weights=torch.eye(3)), pipe)
    with pytest.raises(ValueError, match="must be the same for all tokens"):
        pipe(**call, image=image, num_inference_steps=3)


class Conditioned(OraclePipeline):
    """Tells its network a timestep for each frame: that of frame 0 is a fraction of the step's, or at most ``most``."""

    fraction, most = 1.0, 1000.0

    @torch.no_grad()
    def __call__(self, num_inference_steps=50):
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(2, 2, 2, 2)
        for t in self.scheduler.timesteps:
            first = (self.fraction * t).clamp(max=self.most)
            output = self.unet(latents, torch.stack([first, t]).expand(2, 2), return_dict=False)[0]
            latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
        return latents


@pytest.mark.parametrize(("fraction", "most"), [(0.5, 1000.0), (1.0, 600.0)])
def test_frames_at_a_noise_level_of_their_own_are_refused(fraction, most):
    """As in LTX-2 with conditions at a strength below 1, and in LTX before its step gets their timesteps."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    unet = OracleUNet().answer_for(scheduler, fs.oracles.GaussianMixture.random(8, 3, seed=0))
    pipe = Conditioned(unet, scheduler)
    pipe.fraction, pipe.most = fraction, most
    with pytest.raises(ValueError, match=r"another timestep than the step's at 2 of its 4 entries"):
        fs.diffusers.measure(pipe, levels=12, samples=2, progress=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_timesteps_that_differ_by_their_rounding_are_equal(dtype):
    times = [torch.stack([t.to(dtype), (t / 1000).to(dtype) * 1000]) for t in torch.linspace(999.0, 1.0, 50)]
    deferred = DeferredChecks()
    for before, now in itertools.pairwise(times):
        check_times({"unet#0.timestep": before}, {"unet#0.timestep": now}, deferred)
    deferred.run()


def test_no_timesteps_at_all_are_no_reason_to_fail():
    """As of a kind of tokens that a call has none of."""
    none = {"unet#0.timestep": torch.zeros(1, 0)}
    check_times(none, none, DeferredChecks())


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_frames_at_a_constant_timestep_or_at_the_steps_own_are_not_refused_for_it(fraction):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    unet = OracleUNet()
    unet.forward = lambda sample, timestep, return_dict=True: (sample * (1 + timestep[:1, 1:] / 1000),)
    pipe = Conditioned(unet, scheduler)
    pipe.fraction = fraction
    assert fs.diffusers.measure(pipe, levels=12, samples=2, progress=False).samples == 2
