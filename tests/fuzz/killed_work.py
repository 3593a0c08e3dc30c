"""Work that may be killed: run in a process of its own by `test_kills`."""

import os
import time

import torch
from diffusers import EulerDiscreteScheduler
from pipelines import OracleUNet, oracle_pipeline

import fastsched as fs
from fastsched.fitting import run_log  # noqa: F401 - all that the work imports, before the clock runs

LEVELS, SAMPLES, STEPS = 12, 4, 4
#: Seconds that a call takes at least, so that kills fall between calls too.
CALL = 2e-3


class Counted:
    """A network that notes every call in a file, which a kill does not undo."""

    def __init__(self, path):
        self.oracle = fs.oracles.GaussianMixture.random(4, 3, seed=0)
        self.log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def __call__(self, z, s):
        os.write(self.log, b"." * len(z))
        time.sleep(CALL)
        return self.oracle.denoise(z, s)


def work(kind, folder):
    """One of `KINDS` with a checkpoint in ``folder``; the result is saved there as ``result``."""
    KINDS[kind](folder).save(f"{folder}/result")


def _options(folder):
    open(f"{folder}/started", "wb").close()
    return {"checkpoint": f"{folder}/checkpoint", "progress": False}


def _denoiser(folder):
    return fs.Denoiser.from_denoiser(Counted(f"{folder}/calls"), 0.02, 20.0)


def _measure(folder):
    stats = fs.measure(_denoiser(folder), (4,), levels=LEVELS, samples=SAMPLES, **_options(folder))
    return fs.optimal_schedule(stats, STEPS)


def _fit(folder):
    options = {"levels": LEVELS, "samples": SAMPLES, "model_calls": 250}
    return fs.fit(_denoiser(folder), (4,), STEPS, **options, **_options(folder))


def _tune(folder):
    """Of statistics that are there already."""
    plain = fs.Denoiser.from_denoiser(fs.oracles.GaussianMixture.random(4, 3, seed=0).denoise, 0.02, 20.0)
    options = {"levels": LEVELS, "samples": SAMPLES, "keep_increments": True, "progress": False}
    stats = fs.measure(plain, (4,), **options)
    start = fs.baselines.karras(STEPS, 0.02, 20.0)
    denoiser = _denoiser(folder)
    return fs.tune(denoiser, stats, fs.Schedule(start, "dpmpp_2m", "ve"), trials=4, **_options(folder)).schedule


class CountedUNet(OracleUNet):
    """An exact network whose calls are noted, a sample each."""

    def forward(self, sample, *args, **kwargs):
        os.write(self.log, b"." * len(sample))
        time.sleep(CALL)
        return super().forward(sample, *args, **kwargs)


def _pipeline(folder):
    torch.manual_seed(0)
    pipe = oracle_pipeline(EulerDiscreteScheduler(), fs.oracles.GaussianMixture.random(8, 3, seed=0))
    pipe.unet.__class__ = CountedUNet
    pipe.unet.log = os.open(f"{folder}/calls", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    return pipe


def _pipeline_measure(folder):
    options = {"levels": LEVELS, "samples": SAMPLES, "images": 1}
    return fs.optimal_schedule(fs.diffusers.measure(_pipeline(folder), **options, **_options(folder)), STEPS, "ddim")


def _pipeline_fit(folder):
    options = {"levels": LEVELS, "samples": SAMPLES, "images": 1, "model_calls": 250}
    return fs.diffusers.fit(_pipeline(folder), STEPS, **options, **_options(folder))


KINDS = {
    "measure": _measure,
    "fit": _fit,
    "tune": _tune,
    "pipeline measure": _pipeline_measure,
    "pipeline fit": _pipeline_fit,
}
