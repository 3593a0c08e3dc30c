"""The code of the guide to diffusers runs, block after block, on a pipeline with an exact denoiser."""

import os
import pathlib
import re
import types

import pytest

import fastsched as fs

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers
import pipelines

GUIDE = pathlib.Path(__file__).parents[2] / "docs" / "diffusers.md"
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class Pipeline(pipelines.OraclePipeline):
    """A pipeline with the arguments and the output of a text-to-image one."""

    def __call__(self, prompt=None, guidance_scale=1.0, num_inference_steps=50, sigmas=None):
        latents = super().__call__(prompt, num_inference_steps, sigmas=sigmas)
        self.steps = len(self.scheduler.timesteps)
        return types.SimpleNamespace(images=list(latents))


def test_the_code_of_the_guide_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scheduler = diffusers.EulerDiscreteScheduler(**SD)
    oracle = fs.oracles.GaussianMixture.random(8, 3, seed=0)
    pipe = Pipeline(pipelines.OracleUNet().answer_for(scheduler, oracle), scheduler)
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    names = {"pipe": pipe}
    for block in blocks:
        exec(compile(block, str(GUIDE), "exec"), names)
        if "image =" in block:
            assert pipe.steps == 8  # of 50 by default
    assert sorted(os.listdir()) == ["my-model-8.json", "my-model.safetensors"]
    assert {steps: schedule.steps for steps, schedule in names["schedules"].items()} == {6: 6, 8: 8, 12: 12}
    assert names["arguments"] == {"sigmas": names["schedule"].sigmas.tolist()}
