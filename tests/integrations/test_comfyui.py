"""Schedules in ComfyUI's terms and k-diffusion's."""

import importlib.util
import inspect
import math
import pathlib
import re

import pytest
import torch

import fastsched as fs

ROOT = pathlib.Path(__file__).parents[2]


def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def node():
    return module(ROOT / "integrations" / "comfyui" / "fastsched_schedule.py")


def schedule():
    return fs.Schedule(torch.tensor([14.6, 1.5, 2e-3, 1.25e-5, 0.0], dtype=torch.float64), "dpmpp_2m", "ve")


def read_by_manual_sigmas(text):
    """What ComfyUI's node ManualSigmas makes of a text: every run of digits and points."""
    return torch.FloatTensor([float(value) for value in re.findall(r"[-+]?(?:\d*\.*\d+)", text)])


def test_comfyui_text_has_no_exponents_and_reads_back_the_same():
    text, sigmas = schedule().to_comfyui()
    assert "e" not in text
    assert text == "14.6, 1.5, 0.002, 0.0000125, 0.0"
    assert torch.equal(read_by_manual_sigmas(text), sigmas)
    assert len(read_by_manual_sigmas("14.6, 2e-3, 0.0")) == 4  # the trap
    assert (sigmas.ndim, sigmas.dtype, float(sigmas[-1])) == (1, torch.float32, 0.0)
    assert len(sigmas) == schedule().steps + 1
    assert (sigmas[1:] < sigmas[:-1]).all()


def test_comfyui_cannot_start_at_infinity():
    with pytest.raises(ValueError, match="zero terminal SNR"):
        fs.Schedule(torch.tensor([torch.inf, 1.0, 0.0]), "ddim", "vp").to_comfyui()


def test_the_node_follows_comfyui_s_contract(node, tmp_path):
    loader = node.NODE_CLASS_MAPPINGS["FastschedScheduleLoader"]
    assert set(node.NODE_DISPLAY_NAME_MAPPINGS) == set(node.NODE_CLASS_MAPPINGS)
    assert loader.RETURN_TYPES == ("SIGMAS", "STRING")
    assert len(loader.RETURN_NAMES) == len(loader.RETURN_TYPES)
    assert isinstance(loader.CATEGORY, str)
    (name, (kind, options)) = next(iter(loader.INPUT_TYPES()["required"].items()))
    assert kind == "STRING"
    assert "default" in options
    path = str(tmp_path / "schedule.json")
    schedule().save(path)
    assert loader.VALIDATE_INPUTS(**{name: path}) is True
    sigmas, solver = getattr(loader(), loader.FUNCTION)(**{name: path})
    assert torch.equal(sigmas, schedule().to_comfyui().sigmas)
    assert solver == "dpmpp_2m"
    before = loader.IS_CHANGED(path)
    assert before == loader.IS_CHANGED(path)
    # ComfyUI calls all three by the inputs' names, and the class methods with None for an input that is connected.
    for method in (loader.VALIDATE_INPUTS, loader.IS_CHANGED, getattr(loader(), loader.FUNCTION)):
        assert list(inspect.signature(method).parameters) == [name]
    assert loader.VALIDATE_INPUTS(**{name: None}) is True
    assert math.isnan(loader.IS_CHANGED(**{name: None}))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not a whole JSON file"),
        ('{"format": "other"}', "does not hold a schedule"),
        ('{"format": "fastsched.schedule", "version": 99}', "newest known here"),
        ('{"format": "fastsched.schedule", "version": 1, "sigmas": [1.0, 2.0, 0.0]}', "strictly descend"),
        ('{"format": "fastsched.schedule", "version": 1, "sigmas": [1.0, 0.5]}', "end in 0"),
        ('{"format": "fastsched.schedule", "version": 1, "sigmas": [Infinity, 0.0]}', "finite"),
    ],
    ids=["truncated", "foreign", "newer", "rising", "not to 0", "infinite"],
)
def test_the_node_says_what_is_wrong_with_a_file(node, tmp_path, text, reason):
    path = tmp_path / "schedule.json"
    path.write_text(text)
    assert reason in node.FastschedScheduleLoader.VALIDATE_INPUTS(str(path))


def test_the_node_names_a_missing_file(node):
    assert "nowhere.json" in node.FastschedScheduleLoader.VALIDATE_INPUTS("nowhere.json")


def test_the_node_reads_what_this_version_saves(node):
    from fastsched.sampling.schedule import FORMAT, VERSION

    assert (node.FORMAT, node.VERSION) == (FORMAT, VERSION)


def test_a_k_diffusion_sampler_takes_the_sigmas_as_they_are(capsys):
    example = module(ROOT / "examples" / "k_diffusion.py")
    oracle = fs.oracles.GaussianMixture.random(4, 3, seed=0)
    denoiser = fs.Denoiser.from_denoiser(oracle.denoise, 0.002, 80.0)
    sigmas = fs.optimal_schedule(fs.measure(denoiser, (4,), samples=4, progress=False), 8).sigmas
    noise = torch.randn(16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = fs.sample(denoiser, sigmas, "dpmpp_2m", noise)
    theirs = example.sample_dpmpp_2m(oracle.denoise, noise * sigmas[0], sigmas)
    torch.testing.assert_close(theirs, ours, rtol=1e-9, atol=1e-9)
    example.main()
    errors = [float(line.rsplit(" ", 1)[1]) for line in capsys.readouterr().out.splitlines()]
    assert errors[0] < errors[1]
