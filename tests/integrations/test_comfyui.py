"""Schedules in ComfyUI's terms and k-diffusion's."""

import inspect
import json
import math
import os
import pathlib
import re
import sys
import types

import pytest
import torch

import fastsched as fs

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def node(module_of):
    return module_of(ROOT / "integrations" / "comfyui" / "fastsched_schedule.py")


def schedule():
    return fs.Schedule(torch.tensor([14.6, 1.5, 2e-3, 1.25e-5, 0.0], dtype=torch.float64), "dpmpp_2m", "ve")


def read_by_manual_sigmas(text):
    """How ComfyUI's node ManualSigmas reads a text: every run of digits and points is a number."""
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


def test_zero_terminal_snr_starts_at_comfyui_s_own_first_sigma():
    text, sigmas = fs.Schedule(torch.tensor([torch.inf, 1.0, 0.0]), "ddim", "vp").to_comfyui()
    assert sigmas.tolist() == pytest.approx([4518.76, 1.0, 0.0], rel=1e-6)
    assert torch.equal(read_by_manual_sigmas(text), sigmas)
    with pytest.raises(ValueError, match="'ve' schedule must be finite"):
        fs.Schedule(torch.tensor([torch.inf, 1.0, 0.0]), "ddim", "ve").to_comfyui()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """ComfyUI's input folder, given as ComfyUI does; the current folder is another one."""
    inputs, elsewhere = tmp_path / "input", tmp_path / "elsewhere"
    inputs.mkdir()
    elsewhere.mkdir()
    monkeypatch.setitem(sys.modules, "folder_paths", types.SimpleNamespace(get_input_directory=lambda: str(inputs)))
    monkeypatch.chdir(elsewhere)
    return inputs


def test_the_node_follows_comfyui_s_contract(node, folder):
    loader = node.NODE_CLASS_MAPPINGS["FastschedScheduleLoader"]
    assert set(node.NODE_DISPLAY_NAME_MAPPINGS) == set(node.NODE_CLASS_MAPPINGS)
    assert loader.RETURN_TYPES == ("SIGMAS", "STRING")
    assert len(loader.RETURN_NAMES) == len(loader.RETURN_TYPES)
    assert isinstance(loader.CATEGORY, str)
    (name, (kind, options)) = next(iter(loader.INPUT_TYPES()["required"].items()))
    assert kind == "STRING"
    assert "default" in options
    schedule().save(folder / "schedule.json")
    for path in ("schedule.json", str(folder / "schedule.json")):
        assert loader.VALIDATE_INPUTS(**{name: path}) is True
        sigmas, solver = getattr(loader(), loader.FUNCTION)(**{name: path})
        assert torch.equal(sigmas, schedule().to_comfyui().sigmas)
        assert solver == "dpmpp_2m"
    before = loader.IS_CHANGED("schedule.json")
    assert before == loader.IS_CHANGED("schedule.json")
    fs.Schedule(torch.tensor([14.6, 1.5, 0.0]), "dpmpp_2m", "ve").save(folder / "schedule.json")
    assert before != loader.IS_CHANGED("schedule.json")
    # ComfyUI calls all three by the inputs' names, and the class methods with None for an input that is connected.
    for method in (loader.VALIDATE_INPUTS, loader.IS_CHANGED, getattr(loader(), loader.FUNCTION)):
        assert list(inspect.signature(method).parameters) == [name]
    assert loader.VALIDATE_INPUTS(**{name: None}) is True
    assert math.isnan(loader.IS_CHANGED(**{name: None}))


def file_with(**changes):
    entries = {"format": "fastsched.schedule", "version": 1, "solver": "ddim", "noise": "ve", "sigmas": [3, 1, 0]}
    return json.dumps({**entries, **changes})


MALFORMED = {
    "truncated": ("{", "not a complete JSON file"),
    "empty": ("", "not a complete JSON file"),
    "byte order mark": ("\ufeff" + file_with(), "not a complete JSON file"),
    "not UTF-8": (b"\xff\xfe", "not UTF-8"),
    "nested deeply": ("[" * 100_000, "nested too deeply"),
    "too large": (file_with() + " " * 2**20, "larger than"),
    "entry twice": (file_with()[:-1] + ', "sigmas": [2, 0]}', "an entry occurs twice"),
    "another format": ('{"format": "other"}', "does not hold a schedule"),
    "a list": ("[1, 0]", "does not hold a schedule"),
    "newer": (file_with(version=99), "version 99"),
    "decoupled": (file_with(version=3, network_sigmas=[0.9, 0.5]), "decoupled levels"),
    "half decoupled": (file_with(version=4, decoupled="denoiser"), "network_sigmas"),
    "negative version": (file_with(version=-3), "version -3"),
    "true version": (file_with(version=True), "version True"),
    "no version": ('{"format": "fastsched.schedule", "sigmas": [1, 0]}', "version None"),
    "fitted": (file_with(version=2, solver="fitted", weights=[[1, 0], [0.5, 0.5]]), "weights of a fitted solver"),
    "solver a list": (file_with(solver=["ddim"]), "solver must be text"),
    "unknown noise": (file_with(noise=["ve"]), "noise must be one of"),
    "rising": (file_with(sigmas=[1.0, 2.0, 0.0]), "strictly descend"),
    "not to 0": (file_with(sigmas=[1.0, 0.5]), "end in 0"),
    "one": (file_with(sigmas=[0.0]), "strictly descend"),
    "none": (file_with(sigmas=[]), "strictly descend"),
    "infinite": (file_with(sigmas=["inf", 0.0]), "finite"),
    "Infinity": (file_with(sigmas=[math.inf, 0.0]), "finite"),
    "too large a number": (file_with(sigmas=[5, 1, 0], noise="vp").replace("5", "1e400"), "finite"),
    "infinite later": (file_with(sigmas=["inf", "inf", 0.0], noise="vp"), "finite"),
    "not a number": (file_with(sigmas=[3, math.nan, 0]), "strictly descend"),
    "null": (file_with(sigmas=None), "list of numbers"),
    "number": (file_with(sigmas=5), "list of numbers"),
    "text": (file_with(sigmas="210"), "list of numbers"),
    "texts": (file_with(sigmas=["2", "1", "0"]), "list of numbers"),
    "nested": (file_with(sigmas=[[3], 0]), "list of numbers"),
    "booleans": (file_with(sigmas=[True, False]), "list of numbers"),
    "beyond float64": (file_with(sigmas=[10**400, 0]), "finite"),
    "beyond float32": (file_with(sigmas=[1e300, 0]), "finite"),
    "beyond Python's digits": (file_with(sigmas=[1, 0]).replace("1, 0]", "9" * 5000 + ", 0]"), "digits"),
    "equal in float32": (file_with(sigmas=[1.00000001, 1.0, 0]), "as float32"),
    "0 in float32": (file_with(sigmas=[1, 1e-60, 0]), "as float32"),
    "flow time above 1": (file_with(sigmas=[1.5, 0], noise="flow"), "at most 1"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_the_node_says_what_is_wrong_with_a_file(node, folder, kind):
    content, reason = MALFORMED[kind]
    path = folder / "schedule.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = node.FastschedScheduleLoader.VALIDATE_INPUTS("schedule.json")
    assert reason in message
    assert "schedule.json" in message
    assert len(message) < 500
    with pytest.raises(ValueError, match=re.escape(reason)):  # a connected input is not validated before
        node.FastschedScheduleLoader().load("schedule.json")


@pytest.mark.parametrize("kind", [kind for kind in MALFORMED if kind not in ("fitted", "decoupled", "half decoupled")])
def test_the_newer_node_says_the_same(node, comfy, package, kind):
    content, _ = MALFORMED[kind]
    path = comfy.home / "input" / "schedule.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = package.NODE_CLASS_MAPPINGS["FastschedLoad"].VALIDATE_INPUTS("schedule.json")
    assert message == node.FastschedScheduleLoader.VALIDATE_INPUTS("schedule.json")
    assert isinstance(message, str)


def test_the_newer_node_refuses_only_decoupled_timesteps(comfy, package):
    path = comfy.home / "input" / "schedule.json"
    check = package.NODE_CLASS_MAPPINGS["FastschedLoad"].VALIDATE_INPUTS
    for decoupled, message in (("timestep", "decoupled timesteps"), ("denoiser", None)):
        told = fs.Schedule([2.0, 1.0, 0.0], "ddim", network_sigmas=[1.8, 0.9], decoupled=decoupled)
        told.save(path)
        assert check("schedule.json") is True if message is None else message in check("schedule.json")


def test_the_node_gives_a_zero_terminal_snr_model_comfyui_s_own_first_sigma(node, folder):
    fs.Schedule(torch.tensor([torch.inf, 3.0, 1.0, 0.0]), "ddim", "vp").save(folder / "schedule.json")
    assert node.FastschedScheduleLoader.VALIDATE_INPUTS("schedule.json") is True
    sigmas, _ = node.FastschedScheduleLoader().load("schedule.json")
    assert torch.equal(sigmas, fs.Schedule.load(folder / "schedule.json").to_comfyui().sigmas)


def test_the_node_reads_only_regular_files_of_the_input_folder(node, folder, tmp_path):
    """Whatever it is asked for: no exception, no wait, no word on what exists elsewhere, no digest of it."""
    outside = tmp_path / "outside.json"
    schedule().save(outside)
    (folder / "link.json").symlink_to(outside)
    (folder / "linked").symlink_to(tmp_path, target_is_directory=True)
    (folder / "inner").mkdir()
    os.mkfifo(folder / "pipe.json")
    (folder / "device.json").symlink_to("/dev/zero")
    refused = {
        "must be inside": [
            *(str(outside), "../outside.json", "../missing.json", "inner/../../outside.json", "link.json"),
            *("linked/outside.json", "/etc/passwd", "/", ".", "inner/..", "device.json", "/dev/zero"),
        ],
        "must be the name": ["", "  ", "\0", "a\0b", 3, ["schedule.json"], True],
        "regular file": ["pipe.json", "inner"],
        "No such file": ["missing.json", "~/schedule.json"],
        "": ["x" * 5000, "\ud800", "\udcff"],
    }
    for reason, files in refused.items():
        for file in files:
            message = node.FastschedScheduleLoader.VALIDATE_INPUTS(file)
            assert isinstance(message, str), file
            assert reason in message
            assert math.isnan(node.FastschedScheduleLoader.IS_CHANGED(file))
    validate = node.FastschedScheduleLoader.VALIDATE_INPUTS
    assert validate("missing.json").startswith("No such file: 'missing.json' was looked for at ")
    assert str(folder / "missing.json") in validate("missing.json")
    assert validate("../outside.json").replace("outside", "missing") == validate("../missing.json")


def test_a_link_within_the_input_folder_is_followed(node, folder):
    schedule().save(folder / "schedule.json")
    (folder / "link.json").symlink_to(folder / "schedule.json")
    assert node.FastschedScheduleLoader.VALIDATE_INPUTS("link.json") is True


def test_outside_comfyui_the_current_folder_is_the_input_folder(node, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "folder_paths", None)  # import raises ImportError
    monkeypatch.chdir(tmp_path)
    schedule().save("schedule.json")
    assert node.FastschedScheduleLoader.VALIDATE_INPUTS("schedule.json") is True


def test_the_node_reads_what_this_version_saves(node):
    from fastsched.sampling.schedule import FORMAT, VERSION

    assert (node.FORMAT, node.VERSION) == (FORMAT, VERSION)


def test_a_k_diffusion_sampler_takes_the_sigmas_as_they_are(module_of, capsys):
    example = module_of(ROOT / "examples" / "k_diffusion.py")
    oracle = fs.oracles.GaussianMixture.random(4, 3, seed=0)
    denoiser = fs.Denoiser.from_denoiser(oracle.denoise, 0.002, 80.0)
    sigmas = fs.optimal_schedule(fs.measure(denoiser, (4,), samples=4, progress=False), 8).sigmas
    noise = torch.randn(16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = fs.sample(denoiser, sigmas, "dpmpp_2m", noise)
    theirs = example.sample_dpmpp_2m(oracle.denoise, noise * sigmas[0], sigmas)
    torch.testing.assert_close(theirs, ours, rtol=1e-9, atol=1e-9)
    example.main()
    errors = [float(line.rsplit(" ", 1)[1]) for line in capsys.readouterr().out.splitlines()]
    assert errors[2] < errors[0] < errors[1]  # fitted, dpmpp_2m's schedule, karras
