"""The code of the guide to the fitted solver runs, and gives the samples of `fs.sample`."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import fastsched as fs
from fastsched.sampling.k_diffusion import sample_fitted
from fastsched.sampling.origin import Origin

GUIDE = Path(__file__).parents[2] / "docs" / "fitted.md"
WEIGHTS = [[1.0, 0.0, 0.0], [-0.5, 1.5, 0.0], [0.25, -0.5, 1.25]]
STD = 0.5
SIGMAS = {
    "ve": [80.0, 1.5, 0.2, 0.0],
    "vp": [14.0, 1.5, 0.2, 0.0],
    "vp from pure noise": [math.inf, 1.5, 0.2, 0.0],
    "flow": [0.9, 0.7, 0.2, 0.0],
    "flow from pure noise": [1.0, 0.7, 0.2, 0.0],
}


def blocks():
    return re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def pasted():
    names = {}
    (block,) = [block for block in blocks() if "def sample" in block]
    exec(compile(block, str(GUIDE), "exec"), names)
    return names


def denoised(noise, x, value):
    """``E[x0 | x]`` of Gaussian data of standard deviation `STD`: ``alpha c^2 x / (alpha^2 c^2 + sigma^2)``."""
    if noise == "flow":
        alpha, sigma = 1 - value, value
    elif noise == "vp":
        alpha, sigma = math.cos(math.atan(value)), math.sin(math.atan(value))
    else:
        alpha, sigma = 1.0, value
    return alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * x


def denoiser_of(noise, sigmas=SIGMAS["vp"]):
    """The same denoiser for `fs.sample`, which asks by its process's own condition."""
    if noise == "ve":
        return fs.Denoiser.from_denoiser(lambda z, s: denoised("ve", z, float(s[0])), 0.002, 80.0)
    if noise == "flow":
        return fs.Denoiser.from_velocity(lambda x, t: (x - denoised("flow", x, float(t[0]))) / float(t[0]))
    levels = [0.01, *sigmas[2::-1], math.inf]  # at timesteps 1, 2 and 3, and 4 of pure noise
    process = fs.denoisers.noise.VariancePreserving(tuple(1 / (1 + s * s) for s in levels))
    return fs.Denoiser(lambda x, t: denoised("vp", x, levels[round(float(t[0]))]), process, "x0")


@pytest.mark.parametrize("kind", SIGMAS)
@pytest.mark.parametrize("as_array", [False, True], ids=["torch", "numpy"])
def test_the_pasted_lines_give_the_samples_of_fs_sample(kind, as_array, tmp_path):
    process = kind.split()[0]
    sigmas = torch.tensor(SIGMAS[kind], dtype=torch.float64)
    schedule = fs.Schedule(sigmas, "fitted", process, weights=torch.tensor(WEIGHTS, dtype=torch.float64))
    path = tmp_path / "schedule.json"
    schedule.save(path)
    noise = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = pasted()["sample"](
        lambda x, n: denoised(process, x, SIGMAS[kind][n]), path, noise.numpy() if as_array else noise
    )
    expected = fs.sample(denoiser_of(process), schedule, noise=noise)
    assert isinstance(found, np.ndarray if as_array else torch.Tensor)
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", SIGMAS)
def test_the_pasted_lines_use_decoupled_levels(kind, tmp_path):
    process, path = kind.split()[0], tmp_path / "schedule.json"
    asked = [SIGMAS[kind][0], 0.8 * SIGMAS[kind][1], 1.3 * SIGMAS[kind][2]]
    given = {"weights": WEIGHTS, "network_sigmas": asked, "decoupled": "denoiser"}
    schedule = fs.Schedule(SIGMAS[kind], "fitted", process, **given)
    schedule.save(path)
    noise = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = pasted()["sample"](lambda x, n: denoised(process, x, asked[n]), path, noise)
    expected = fs.sample(denoiser_of(process, [14.0, *asked[1:]]), schedule, noise=noise)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_first_block_runs_and_the_file_holds_what_the_guide_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    oracle = fs.oracles.GaussianMixture.random(4, 3, seed=0)
    names = {
        "fs": fs,
        "denoiser": fs.Denoiser.from_denoiser(oracle.denoise, 0.002, 80.0),
        "shape": (4,),
        "noise": torch.randn(2, 4),
    }
    exec(compile(blocks()[0], str(GUIDE), "exec"), names)
    entries = json.loads(Path("schedule.json").read_text())
    table = GUIDE.read_text(encoding="utf-8").split("## What the file holds")[1].split("##")[0]
    named = set(
        re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `")))
    )
    assert named >= set(entries)
    assert (entries["version"], entries["solver"]) == (2, "fitted")
    (row,) = (line for line in table.splitlines() if line.startswith("| `origin`"))
    assert re.findall(r"`(\w+)`", row)[1:] == [field.name for field in dataclasses.fields(Origin)]


def test_the_block_for_diffusers_runs():
    diffusers = pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")
    import pipelines

    (block,) = [block for block in blocks() if "FittedScheduler" in block]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = pipelines.oracle_pipeline(scheduler, fs.oracles.GaussianMixture.random(8, 3, seed=0))
    names = {"fs": fs, "pipe": pipe}
    exec(compile(block, str(GUIDE), "exec"), names)
    assert type(pipe.scheduler).__name__ == "FittedScheduler"
    assert torch.isfinite(names["image"]).all()


def test_sigmas_of_any_form_are_given_in_the_precision_of_the_states():
    given, x = [], torch.ones(2, 3, dtype=torch.float64)

    def model(x, sigma):
        given.append(float(sigma[0]))
        return 0.1 * x

    samples = [
        sample_fitted(model, x, sigmas, disable=True, weights=WEIGHTS)
        for sigmas in (SIGMAS["ve"], np.array(SIGMAS["ve"][::-1])[::-1], torch.tensor(SIGMAS["ve"], dtype=x.dtype))
    ]
    assert given == 3 * SIGMAS["ve"][:-1]
    assert torch.equal(samples[0], samples[1])
    assert torch.equal(samples[0], samples[2])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x", torch.ones(0, 3)),
        ("x", torch.tensor(1.0)),
        ("x", torch.full((2, 3), torch.nan)),
        ("x", None),
        ("model", None),
        ("extra_args", "cat"),
        ("extra_args", {1: 1}),
        ("callback", "print"),
    ],
)
def test_arguments_are_checked_before_a_call(name, value):
    given = {"model": lambda x, sigma: pytest.fail("called"), "x": torch.ones(2, 3), "sigmas": SIGMAS["ve"]}
    with pytest.raises((TypeError, ValueError), match=f"^{name} must "):
        sample_fitted(**{**given, name: value}, disable=True, weights=WEIGHTS)
