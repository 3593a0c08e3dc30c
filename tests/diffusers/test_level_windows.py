"""What a noise level starts or ends is measured and fitted; what a step's number does is refused."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch

import fastsched as fs

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers
from pipelines import SHAPE, OraclePipeline, OracleUNet
from test_watching import STEP_NUMBER, euler, measured, mixture, quiet

from fastsched.diffusers.watching.consistency import Consistency
from fastsched.diffusers.watching.step_counts import calibration_steps
from fastsched.diffusers.watching.watch import SeenStep
from fastsched.measurement.deviated_paths import asked_levels, deviated_paths, queries


def refusal(levels, argument):
    """Why a measurement is refused whose network has an argument of ``argument(step, level)``, and its changes."""
    compared = Consistency(levels)
    visited = [0, *queries(levels, deviated_paths(levels)), max(1, levels // 8)]
    for index, level in enumerate(visited):
        facts = {"unet#0.scale": argument(index, level)}
        wrong = compared.check(index, level, SeenStep(Counter(unet=1), facts), None)
        if wrong is not None:
            return wrong, ()
    return None, compared.changes(list(range(levels)))


@pytest.mark.parametrize("levels", [3, 4, 8, 9, 24, 25])
def test_every_window_of_steps_is_refused(levels):
    """But those of all steps."""
    steps = calibration_steps(levels)
    for start, end in itertools.combinations(range(steps + 1), 2):
        wrong, _ = refusal(levels, lambda index, level, a=start, b=end: a <= index < b)
        assert (wrong is None) == (start == 0 and end == steps), (start, end)


@pytest.mark.parametrize("period", range(2, 8))
def test_every_few_steps_are_refused(period):
    for levels, phase in itertools.product((8, 9, 24, 25, 48), range(period)):
        assert refusal(levels, lambda index, level, k=phase: index % period == k)[0] is not None


@pytest.mark.parametrize("levels", [8, 9, 24, 25])
def test_a_window_of_levels_is_known_where_its_levels_are_visited_again(levels):
    again = {*asked_levels(levels)}
    for start, end in itertools.combinations(range(levels + 1), 2):
        wrong, changes = refusal(levels, lambda index, level, a=start, b=end: a <= level < b)
        parts = [{*range(start)}, {*range(start, end)}, {*range(end, levels)}]
        assert (wrong is None) == all(part & again for part in parts if part), (start, end)
        if wrong is None:
            assert changes == tuple((k - 1, k) for k in (start, end) if 0 < k < levels)


class Windowed(OraclePipeline):
    """Gives its network a scale of 1 at timesteps within a window or at step numbers within a part of all steps."""

    @torch.no_grad()
    def __call__(self, num_inference_steps=50, images=2, output_type="latent", times=(0, 1000), part=(0.0, 1.0)):
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(images, *SHAPE) * self.scheduler.init_noise_sigma
        for i, t in enumerate(self.scheduler.timesteps):
            used = times[0] <= t <= times[1] and part[0] <= i / num_inference_steps <= part[1]
            output = self.unet(self.scheduler.scale_model_input(latents, t), t, scale=float(used))[0]
            latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
        return latents


class Scaled(OracleUNet):
    def forward(self, sample, timestep, scale=1.0, **_):
        return ((0.9 + 0.1 * scale) * super().forward(sample, timestep)[0],)


def windowed():
    scheduler = euler()
    return Windowed(Scaled().answer_for(scheduler, mixture()), scheduler)


@pytest.mark.parametrize("times", [(0, 400), (400, 1000), (300, 700)])
def test_what_a_level_starts_or_ends_is_measured_and_fitted(times, tmp_path):
    pipe = windowed()
    stats = fs.diffusers.measure(pipe, levels=12, samples=2, times=times)
    bounds = [float(euler().alphas_cumprod[t]) for t in times if 0 < t < 1000]
    inner = sorted(((1 / a - 1) ** 0.5 for a in bounds), reverse=True)
    assert len(stats.changes) == len(inner)
    assert all(low < bound < high for bound, (high, low) in zip(inner, stats.changes, strict=True))
    stats.save(tmp_path / "stats.safetensors")
    assert fs.PathStatistics.load(tmp_path / "stats.safetensors").changes == stats.changes
    assert stats.merge(fs.diffusers.measure(pipe, levels=12, samples=2, seed=1, times=times)).changes == stats.changes
    for steps in (2, 5):
        schedule = fs.diffusers.fit(pipe, steps, stats=stats, model_calls=60, times=times)
        assert schedule.measured_error is not None
    with pytest.raises(ValueError, match=r"unet\.scale was different.*if a noise level starts or ends.*more levels"):
        fs.diffusers.measure(pipe, levels=4, samples=2, times=times)


@pytest.mark.parametrize("part", [(0.0, 0.5), (0.5, 1.0), (0.2, 0.8), (0.04, 1.0), (0.0, 0.97)])
def test_a_part_of_all_steps_is_refused(part):
    with pytest.raises(ValueError, match=r"unet\.scale was different.*" + STEP_NUMBER):
        measured(windowed(), part=part)


def test_a_window_is_refused_where_the_statistics_know_of_none():
    pipe = windowed()
    stats = replace(fs.diffusers.measure(pipe, levels=12, samples=2), origin=None)
    with pytest.raises(ValueError, match=r"unet\.scale was different.*" + STEP_NUMBER):
        fs.diffusers.fit(pipe, 5, stats=stats, times=(0, 400))


def z_image():
    """It gives its network lists, and at low noise levels no negative prompt (``cfg_truncation``)."""
    sizes = {"in_channels": 4, "dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    axes = {"axes_dims": [4, 6, 6], "axes_lens": [256, 32, 32]}
    transformer = diffusers.ZImageTransformer2DModel(cap_feat_dim=16, **sizes, **axes)
    for pad in (transformer.x_pad_token, transformer.cap_pad_token):  # which are left uninitialised
        torch.nn.init.normal_(pad)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = diffusers.ZImagePipeline(scheduler, None, None, None, transformer)
    embeddings = {name: [torch.randn(4, 16)] for name in ("prompt_embeds", "negative_prompt_embeds")}
    return pipe, {**embeddings, "height": 32, "width": 32, "guidance_scale": 4.0}, {}


def test_guidance_that_z_image_truncates_at_a_level_is_measured_and_fitted():
    torch.manual_seed(0)
    pipe, call = quiet(z_image())
    call["cfg_truncation"] = 0.5
    stats = fs.diffusers.measure(pipe, levels=8, samples=2, keep_increments=True, **call)
    ((high, low),) = stats.changes
    assert low <= 1.0 <= high  # at time 0.5, s = 1
    assert fs.diffusers.fit(pipe, 4, stats=stats, model_calls=40, **call).measured_error is not None
