"""The scheduler that measures a pipeline, as a scheduler of diffusers."""

import pytest

import fastsched as fs

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers

from fastsched.diffusers.conventions import describe

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def test_a_calibration_scheduler_is_a_scheduler_of_diffusers(tmp_path):
    scheduler = diffusers.EulerDiscreteScheduler(**SD, prediction_type="v_prediction")
    made = fs.diffusers.CalibrationScheduler.from_config(scheduler.config)
    assert isinstance(made, diffusers.SchedulerMixin)
    assert isinstance(made, diffusers.ConfigMixin)
    assert made.config.steps_offset == scheduler.config.steps_offset  # pipelines look for entries of their own
    made.save_pretrained(tmp_path)
    loaded = fs.diffusers.CalibrationScheduler.from_pretrained(tmp_path)
    assert loaded.convention.process == describe(scheduler).process
    assert loaded.convention.denoiser.prediction == "v"
