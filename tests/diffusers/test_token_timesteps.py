"""Pipelines that give ``step`` a timestep for each token, as LTX does."""

import itertools

import PIL.Image
import pytest
import torch

import fastsched as fs

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers
import pipelines


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
