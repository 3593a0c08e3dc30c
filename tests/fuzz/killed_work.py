"""Work that may be killed: run in a process of its own by `test_kills`."""

import os
import time

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
    """Measure or fit with a checkpoint in ``folder``; the result is saved there as ``result``."""
    denoiser = fs.Denoiser.from_denoiser(Counted(f"{folder}/calls"), 0.02, 20.0)
    options = {"levels": LEVELS, "samples": SAMPLES, "checkpoint": f"{folder}/checkpoint", "progress": False}
    open(f"{folder}/started", "wb").close()
    if kind == "measure":
        found = fs.optimal_schedule(fs.measure(denoiser, (4,), **options), STEPS)
    else:
        found = fs.fit(denoiser, (4,), STEPS, model_calls=250, **options)
    found.save(f"{folder}/result")
