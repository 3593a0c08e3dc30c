import dataclasses
import datetime
import functools
import json

import pytest
import torch

import fastsched as fs
from fastsched.sampling.origin import LONGEST, Origin, network_name, origin_now

FULL = Origin("sd-turbo", "0123456789ab", "StableDiffusionPipeline", 7.5, 2, "2026-11-26", "0.1.0", 759)


def denoise(z, s):
    return 0.1 * z


@pytest.fixture(scope="module")
def stats() -> fs.PathStatistics:
    denoiser = fs.Denoiser.from_denoiser(denoise, 0.1, 10.0)
    return fs.measure(denoiser, (4,), levels=12, samples=2, progress=False)


def test_entries_come_back():
    assert Origin.from_dict(FULL.to_dict()) == FULL
    assert Origin.from_dict({}) == Origin()
    assert Origin(model="a").to_dict() == {"model": "a"}


@pytest.mark.parametrize(
    "entries",
    [
        None,
        [],
        {"modell": "a"},
        {"model": 3},
        {"model": "x" * (LONGEST + 1)},
        {"model": "a\x1b[31m"},
        {"guidance": "7.5"},
        {"guidance": float("nan")},
        {"prompts": True},
        {"prompts": 2.0},
        {"model_calls": 2**70},
    ],
)
def test_entries_of_a_file_are_checked(entries):
    with pytest.raises(ValueError, match="origin"):
        Origin.from_dict(entries)


def test_a_line_says_what_is_known():
    assert str(FULL) == "sd-turbo, StableDiffusionPipeline, guidance 7.5, 2 prompts, 2026-11-26"
    assert str(Origin(fingerprint="0123456789ab", prompts=1)) == "network 0123456789ab, 1 prompt"
    assert str(Origin()) == ""


def test_networks_are_named_inside_their_containers():
    class UNet(torch.nn.Module):
        pass

    net = UNet()
    named = "test_networks_are_named_inside_their_containers.UNet"
    assert network_name(net) == named
    assert network_name(torch.nn.DataParallel(net)) == named
    assert network_name(functools.partial(denoise, s=1)) == "denoise"
    assert network_name(functools.partial(torch.nn.DataParallel(net))) == named
    assert network_name(lambda x, t: net(x)) == named
    assert network_name(lambda x, t: x).endswith("<lambda>")


def test_a_network_that_has_any_attribute_has_the_name_of_its_class():
    class Proxy:
        def __getattr__(self, name):
            return 5

        def __call__(self, z, s):
            return z / (1 + s.reshape(-1, 1) ** 2)

    stats = fs.measure(fs.Denoiser.from_denoiser(Proxy(), 0.01, 9.0), (3,), levels=8, samples=1, progress=False)
    assert stats.origin.model.endswith("Proxy")


def test_a_wrapped_edm_network_has_the_name_of_its_own_class():
    class EDMPrecond(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.Identity()

    denoiser = fs.Denoiser.from_edm(torch.nn.DataParallel(EDMPrecond()))
    assert network_name(denoiser.network).endswith("EDMPrecond")


def test_names_from_elsewhere_are_cut_and_printable():
    found = origin_now("a\x00b" + "c" * 500)
    assert found.model == "ab" + "c" * (LONGEST - 2)
    assert Origin.from_dict(found.to_dict()) == found


def test_a_measurement_knows_its_origin_and_hands_it_on(stats, tmp_path):
    origin = stats.origin
    assert origin.model == "denoise"
    assert len(origin.fingerprint) == 12
    assert origin.version == fs.__version__
    assert abs((datetime.date.fromisoformat(origin.date) - datetime.date.today()).days) <= 1
    stats.save(tmp_path / "s.safetensors")
    assert fs.PathStatistics.load(tmp_path / "s.safetensors").origin == origin
    schedule = fs.optimal_schedule(stats, 4)
    assert schedule.origin.model_calls == stats.model_calls
    schedule.save(tmp_path / "x.json")
    assert fs.Schedule.load(tmp_path / "x.json").origin == schedule.origin
    assert "of denoise, 20" in repr(stats)
    assert "of denoise, 20" in repr(schedule)


def test_a_fit_knows_both_errors_and_all_calls(stats):
    denoiser = fs.Denoiser.from_denoiser(denoise, 0.1, 10.0)
    spent = []
    counted = fs.Denoiser.from_denoiser(lambda z, s: (spent.append(len(z)), denoise(z, s))[1], 0.1, 10.0)
    schedule = fs.fit(counted, (4,), 4, levels=12, samples=2, model_calls=60, progress=False)
    assert schedule.origin.model_calls == sum(spent)
    assert schedule.measured_error is not None
    own = fs.measure(denoiser, (4,), levels=12, samples=2, responses=False, progress=False)
    assert schedule.predicted_error == pytest.approx(fs.predict_error(own, schedule))


def test_old_files_have_no_origin(stats, tmp_path):
    old = {"format": "fastsched.schedule", "version": 1, "solver": "ddim", "noise": "ve", "sigmas": [1.0, 0.5, 0.0]}
    (tmp_path / "old.json").write_text(json.dumps(old))
    schedule = fs.Schedule.load(tmp_path / "old.json")
    assert schedule.origin is None
    assert "of" not in repr(schedule).split("]")[1]
    (tmp_path / "wrong.json").write_text(json.dumps({**old, "origin": {"model": ["a"]}}))
    with pytest.raises(ValueError, match=r"wrong\.json does not hold a valid schedule: origin: model must be text"):
        fs.Schedule.load(tmp_path / "wrong.json")


def test_entries_of_a_newer_version_are_named(tmp_path):
    new = {"format": "fastsched.schedule", "version": 1, "solver": "ddim", "noise": "ve", "sigmas": [1.0, 0.5, 0.0]}
    for what in ({"seed_of_tomorrow": 1}, {"origin": {"model": "x" * 90, "seed_of_tomorrow": 1}}):
        (tmp_path / "new.json").write_text(json.dumps(new | what))
        with pytest.raises(ValueError, match=r"not known: seed_of_tomorrow \(if a newer fastsched wrote them, update"):
            fs.Schedule.load(tmp_path / "new.json")


def test_schedules_are_equal_if_a_sampler_does_the_same(stats):
    one = fs.optimal_schedule(stats, 4, "fitted")
    again = fs.optimal_schedule(stats, 4, "fitted")
    assert one == again
    assert hash(one) == hash(again)
    assert one == dataclasses.replace(one, origin=None, predicted_error=None)
    assert one != fs.optimal_schedule(stats, 5, "fitted")
    assert one != dataclasses.replace(one, weights=torch.eye(4))
    assert one != "schedule"
    moved = fs.Schedule([1.0, 0.5, 0.0], "ddim", timesteps=[2.0, 1.0])
    assert moved != fs.Schedule([1.0, 0.5, 0.0], "ddim")
    assert moved != fs.Schedule([1.0, 0.5, 0.0], "heun", timesteps=[2.0, 1.0])
    zero, negative = (fs.Schedule([2.0, 1.0, 0.0], "fitted", weights=[[1.0, x], [0.5, 0.5]]) for x in (0.0, -0.0))
    assert zero == negative
    assert hash(zero) == hash(negative)


def test_statistics_are_equal_if_they_hold_the_same_paths(stats, tmp_path):
    stats.save(tmp_path / "s.safetensors")
    loaded = fs.PathStatistics.load(tmp_path / "s.safetensors")
    assert loaded == stats
    assert hash(loaded) == hash(stats)
    assert stats.select([0]) != stats
    assert stats != 3
    denoiser = fs.Denoiser.from_denoiser(denoise, 0.1, 10.0)
    bare = fs.measure(denoiser, (4,), levels=12, samples=2, responses=False, progress=False)
    assert bare != stats


def test_notebooks_show_a_table(stats):
    shown = fs.optimal_schedule(stats, 4)._repr_html_()
    assert "<table>" in shown
    assert shown.count("<circle") == 4
    assert "denoise" in shown
    flow = fs.Schedule([1.0, 0.5, 0.25, 0.0], "ddim", "flow", measured_error=0.5, origin=Origin("<b>"))
    assert "&lt;b&gt;" in flow._repr_html_()
    assert "<b>" not in flow._repr_html_()
    places = [float(part.split('"')[0]) for part in flow._repr_html_().split('cx="')[1:]]
    assert places == [10.0, pytest.approx(10 + 380 * 2 / 3, abs=0.1), 390.0]
    assert "<table>" in stats._repr_html_()
    assert "not measured" not in stats._repr_html_()


def test_plot_gives_a_figure(stats):
    pytest.importorskip("matplotlib", reason="needs the extra fastsched[plot]")
    assert len(fs.optimal_schedule(stats, 4).plot().axes) == 1
    assert len(fs.optimal_schedule(stats, 4).plot(stats).axes) == 2
    assert len(stats.plot().axes) == 1
