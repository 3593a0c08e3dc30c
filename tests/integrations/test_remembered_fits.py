"""Fits in ComfyUI that are remembered: what another run is spared, and what is not taken for the same fit."""

import math
import re
import sys
import threading

import pytest
import torch
from test_nodes import fit, node


def test_an_interrupt_while_tuning_keeps_the_measurement(package, comfy, given):
    fit(package, given(seed=1, tuning_calls=60))
    measured = comfy.bars[-1].total - 60
    comfy.interrupt_at = measured + 8  # within the first runs
    first = given(tuning_calls=60)
    with pytest.raises(comfy.interrupted):
        fit(package, first)
    comfy.interrupt_at = math.inf
    second = given(tuning_calls=60)
    found = fit(package, second)[3]
    assert found.schedule.measured_error > 0
    assert second["model"].calls <= first["model"].calls / 2


def test_the_second_run_is_free(package, given):
    sigmas, _, text, _ = fit(package, given())
    again = given()  # other objects of the same content
    more, _, words, found = fit(package, again)
    assert torch.equal(sigmas, more)
    assert again["model"].calls == 0
    assert "remembered, no model calls" in words
    assert "remembered" not in text
    sys.modules[f"{package.__name__}.cache"]._last.clear()  # as after a restart
    assert "remembered" in fit(package, again)[2]
    assert found.stats is not None
    calls = given(steps=5)
    assert "remembered" not in fit(package, calls)[2]


def test_a_guider_fits_as_its_model_and_conditions_do(package, given, guider):
    arguments = given()
    sigmas, _, text, _ = fit(package, arguments)
    more = {key: arguments[key] for key in ("latent", "steps", "sampler", "seed", "samples", "tuning_calls")}
    own, _, words, _ = node(package, "FitGuider")().fit(guider(arguments), **more)
    assert torch.equal(own, sigmas)
    assert "remembered" in words
    assert "remembered" not in text


def test_another_number_of_steps_needs_no_new_measurement(package, given):
    first, second = given(tuning_calls=40), given(steps=5, tuning_calls=40)
    whole = fit(package, first)[2]
    words = fit(package, second)[2]
    assert 0 < second["model"].calls < first["model"].calls / 2
    said, before = (int(re.search(r"; (\d+) model calls", text)[1]) for text in (words, whole))
    assert said <= 40 < before
    assert "measured before" in words
    assert "measured before" not in whole


@pytest.mark.parametrize(
    "change",
    [
        *("weights", "patch", "option", "cfg", "positive", "negative", "seed", "samples", "sampler", "tuning_calls"),
        *("size", "latent", "model sampling", "wrapper"),
    ],
)
def test_what_changes_the_result_is_not_remembered(package, given, kinds, change):
    fit(package, given(tuning_calls=0, steps=3))
    other = given(tuning_calls=0, steps=3)
    model = other["model"]
    if change == "weights":
        model.model.diffusion_model.scale.data += 1e-3
    elif change == "patch":
        model.patches["diffusion_model.layer.weight"] = [(0.7, ("diff", (torch.ones(2),)), 1.0, None, None)]
    elif change == "option":
        model.model_options["sampler_post_cfg_function"] = [lambda told: told["denoised"]]
    elif change == "wrapper":
        model.wrappers["sampler_sample"] = {"mine": [lambda run, *a: run(*a)]}
    elif change == "model sampling":
        model.model.model_sampling = kinds["zero SNR"]()
    elif change == "size":
        other["latent"] = {"samples": torch.zeros(2, 1, 6, 1)}
    elif change == "latent":
        other["latent"] = {"samples": torch.full((2, 1, 2, 3), 0.5)}
    elif change in ("positive", "negative"):
        other[change] = [[other[change][0][0] + 0.1, other[change][0][1]]]
    else:
        other[change] = {"cfg": 2.0, "seed": 1, "samples": 3, "sampler": "heun", "tuning_calls": 60}[change]
    assert "remembered" not in fit(package, other)[2]


def test_a_model_that_cannot_be_read_is_not_remembered(package, given):
    arguments = given()
    arguments["model"].model_options["opaque"] = threading.Lock()
    words = [fit(package, arguments)[2] for _ in range(2)]
    assert all("nothing is remembered" in each for each in words)


def test_a_damaged_file_of_the_cache_is_ignored(package, comfy, given):
    fit(package, given())
    sys.modules[f"{package.__name__}.cache"]._last.clear()
    for path in (comfy.home / "user" / "fastsched").iterdir():
        path.write_bytes(b"{")
    assert "remembered" not in fit(package, given())[2]


def test_only_the_cache_s_own_files_are_removed(package, comfy, given, monkeypatch):
    monkeypatch.setattr(sys.modules[f"{package.__name__}.cache"], "MOST_FILES", 2)
    home = comfy.home / "user" / "fastsched"
    home.mkdir()
    (home / "mine.json").write_text("{}")
    for steps in (3, 4, 5):
        fit(package, given(steps=steps))
    assert len(list(home.iterdir())) == 3
    assert (home / "mine.json").exists()


def test_a_fit_that_cannot_be_kept_says_so(package, comfy, given):
    (comfy.home / "user" / "fastsched").write_text("in the way")
    text = fit(package, given())[2]
    assert "model calls (warning: not remembered: " in text
    assert "fastsched" in text.split("not remembered")[1]
