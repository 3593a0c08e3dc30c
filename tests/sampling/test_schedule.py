import copy
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastsched as fs
from fastsched.denoisers.noise import FlowMatching, VariancePreserving

FULL = fs.Schedule(
    torch.tensor([14.6, 1.5, 2e-5, 0.0], dtype=torch.float64),
    "dpmpp_2m",
    "vp",
    torch.tensor([999.0, 500.25, 0.0]),
    3e-7,
)


def test_properties():
    assert FULL.steps == 3
    assert FULL.model_calls == 3
    assert FULL.end_sigma == 2e-5
    assert FULL.sigmas.dtype == FULL.timesteps.dtype == torch.float64
    assert fs.Schedule([3.0, 1.0, 0.0], "heun").model_calls == 3
    assert "dpmpp_2m, 3 steps, vp: [14.6, 1.5, 2e-05, 0]" in repr(FULL)


@pytest.mark.parametrize("kind", [">f8", "<f8", np.longdouble, np.float16, np.int32])
def test_sigmas_from_any_array_of_numbers(kind):
    rising = np.array([0, 1, 3], dtype=kind)
    assert fs.Schedule(rising[::-1], "ddim") == fs.Schedule([3.0, 1.0, 0.0], "ddim")
    assert rising.tolist() == [0, 1, 3]


def test_what_is_done_to_its_tensors_does_not_change_a_schedule():
    weights = torch.tensor([[1.0, 0.0], [-0.5, 1.5]])
    own = torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64)
    schedule = fs.Schedule(own, "fitted", "vp", [900.0, 100.0], weights=weights, network_sigmas=[3.0, 0.9])
    before, copies = hash(schedule), [copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))]
    for tensor in (own, weights, schedule.timesteps, schedule.network_sigmas, schedule.weights):
        tensor.fill_(0.5)
    sigmas = schedule.sigmas
    sigmas *= 2
    assert hash(schedule) == before
    assert [schedule == each for each in copies] == [True, True]
    assert schedule.sigmas.tolist() == [3.0, 1.0, 0.0]
    assert schedule.network_sigmas.tolist() == [3.0, 0.9]


def test_masked_numbers_are_refused():
    masked = np.ma.masked_equal([3.0, 2.0, 1.0, 0.0], 2.0)
    with pytest.raises(TypeError, match="sigmas must be a tensor or a list of numbers"):
        fs.Schedule(masked, "ddim")


def test_weights_are_printed_briefly():
    weights = torch.tensor([[1.0, 0.0], [-0.5, 1.5]])
    fitted = fs.Schedule([3.0, 1.0, 0.0], "fitted", weights=weights)
    assert repr(fitted) == "Schedule(fitted, 2 steps, ve: [3, 1, 0], weights=[1 | -0.5 1.5])"
    long = torch.eye(9)
    long[8, 0], long[8, 8] = -0.5, 1.5
    assert "weights=[9, 9] from -0.5 to 1.5" in repr(fs.Schedule([*range(9, -1, -1)], "fitted", weights=long))


def test_save_and_load(tmp_path):
    FULL.save(tmp_path / "schedule.json")
    read = fs.Schedule.load(tmp_path / "schedule.json")
    assert torch.equal(read.sigmas, FULL.sigmas)
    assert torch.equal(read.timesteps, FULL.timesteps)
    assert (read.solver, read.noise, read.predicted_error) == ("dpmpp_2m", "vp", 3e-7)
    assert [file.name for file in tmp_path.iterdir()] == ["schedule.json"]


def test_file_holds_plain_decimals(tmp_path):
    FULL.save(tmp_path / "schedule.json")
    text = (tmp_path / "schedule.json").read_text()
    assert "0.00002," in text
    numbers = text[text.index("sigmas") :].replace("predicted_error", "").replace("timesteps", "")
    assert "e-" not in numbers
    assert json.loads(text)["version"] == 1


@given(st.lists(st.floats(1e-9, 1e6), min_size=1, max_size=20, unique=True))
def test_every_digit_survives(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("schedules") / "s.json"
    schedule = fs.Schedule([*sorted(values, reverse=True), 0.0], "ddim")
    schedule.save(path)
    assert torch.equal(fs.Schedule.load(path).sigmas, schedule.sigmas)


def test_from_levels_of_a_discrete_process_has_timesteps():
    process = VariancePreserving(torch.linspace(0.999, 0.01, 100))
    s = torch.tensor([float(process.trained_levels[99]), float(process.trained_levels[40]), 0.0], dtype=torch.float64)
    schedule = fs.Schedule.from_levels(process, s, "ddim")
    torch.testing.assert_close(schedule.timesteps, torch.tensor([99.0, 40.0], dtype=torch.float64))


def test_from_levels_of_a_flow_has_times():
    s = torch.tensor([float("inf"), 1.0, 0.0], dtype=torch.float64)
    schedule = fs.Schedule.from_levels(FlowMatching(), s, "euler")
    assert schedule.sigmas.tolist() == [1.0, 0.5, 0.0]
    assert schedule.timesteps.tolist() == [1.0, 0.5]
    assert schedule.solver == "ddim"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(([3.0, 1.0], "ddim"), "sigmas must end in 0, got 1"), (([1.0, 3.0, 0.0], "ddim"), "strictly descend"),
     (([1.0, 0.0], "dpmpp2m"), "did you mean 'dpmpp_2m'"), (([1.0, 0.0], "ddim", "vpp"), "noise must be one of"),
     (([1.0, 0.0], "ddim", "vp", [3.0, 1.0]), "timesteps must have one value"),
     (([3.0, 1.0, 0.0], "ddim", "vp", [1.0, 3.0]), "timesteps must descend"),
     (([1.0, 0.5, 0.0], "ddim", "flow", [3.0, 3.0]), "timesteps must descend"),
     (([3.0, 1.0, 0.0], "ddim", "vp", [float("nan"), 3.0]), "timesteps must be within"),
     (([3.0, 1.0, 0.0], "ddim", "vp", None, -1.0), "predicted_error must be finite and not negative"),
     (([3.0, 1.0, 0.0], "ddim", "vp", None, None, float("inf")), "measured_error must be finite")],
)  # fmt: skip
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        fs.Schedule(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"version": 5}, "version 5, and the newest known here is 4; update"),
     ({"format": "x"}, "does not hold a schedule"),
     ({"predicted_error": "abc"}, "predicted_error must be numbers"), ({"version": "1"}, "version '1'"),
     ({"predicted_error": -1.0}, "must be finite and not negative"), ({"version": True}, "version True"),
     ({"version": -5}, "version -5"), ({"sigmas": [10**400, 1, 0]}, "too large"), ({"spare": 1}, "not known: spare"),
     ({"sigmas": [1.0, 2.0], "timesteps": None}, "sigmas must strictly descend"), ({"sigmas": "321"}, "valid schedule"),
     ({"sigmas": [True, False]}, "sigmas must be numbers"), ({"sigmas": {"3": 1}}, "sigmas must be a list"),
     ({"timesteps": [1.0, 2.0, 3.0]}, "timesteps must descend"), ({"solver": 3}, "solver must be text"),
     ({"timesteps": [1e300, 2.0, 1.0]}, "timesteps must be within"), ({"weights": 3}, "weights must be a list"),
     ({"solver": "magic"}, "valid schedule: solver must be one of"), ({"sigmas": None}, "valid schedule")],
)  # fmt: skip
def test_changed_file(tmp_path, change, message):
    path = tmp_path / "schedule.json"
    FULL.save(path)
    entries = json.loads(path.read_text()) | change
    path.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=f"changed or damaged|{message}"):
        fs.Schedule.load(path)
    del entries["sha256"]  # as in a file made by hand
    path.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=message):
        fs.Schedule.load(path)


def test_levels_that_share_a_timestep_are_read_back(tmp_path):
    """Between the last trained level and pure noise the network knows no timestep."""
    process = VariancePreserving(torch.cat([torch.linspace(0.999, 0.01, 99), torch.zeros(1)]))
    top = float(process.trained_levels[98])
    s = torch.tensor([float("inf"), 2 * top, top, 1.0, 0.0], dtype=torch.float64)
    schedule = fs.Schedule.from_levels(process, s, "ddim")
    assert schedule.timesteps[:3].tolist() == [99.0, 98.0, 98.0]
    schedule.save(tmp_path / "a.json")
    assert fs.Schedule.load(tmp_path / "a.json") == schedule


def test_files_without_a_checksum_load(tmp_path):
    path = tmp_path / "schedule.json"
    FULL.save(path)
    entries = json.loads(path.read_text())
    del entries["sha256"]
    path.write_text("\ufeff" + json.dumps(entries))  # editors on Windows put a byte order mark in front
    assert torch.equal(fs.Schedule.load(path).sigmas, FULL.sigmas)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"format": "fastsched.schedule", "version": 1, "version": 2}',
        '{"a": NaN}',
        '{"sigmas": Infinity}',
        '{"sigmas": [1e400, 1, 0]}',
    ],
    ids=["deep", "twice", "NaN", "Infinity", "too large"],
)
def test_odd_json_is_refused(tmp_path, text):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(ValueError, match="not a whole JSON file"):
        fs.Schedule.load(tmp_path / "s.json")


def test_a_flipped_bit_of_any_byte_is_found(tmp_path):
    path = tmp_path / "schedule.json"
    FULL.save(path)
    whole = path.read_bytes()
    for n in range(0, 8 * len(whole), 3):  # two or three bits of every byte
        damaged = bytearray(whole)
        damaged[n // 8] ^= 1 << n % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="schedule"):
            fs.Schedule.load(path)


def test_sigmas_equal_as_float32_are_refused_for_comfyui():
    with pytest.raises(ValueError, match="must differ as float32"):
        fs.Schedule([1.0 + 1e-9, 1.0, 0.0], "ddim").to_comfyui()


def test_truncated_missing_and_foreign_file(tmp_path):
    path = tmp_path / "schedule.json"
    FULL.save(path)
    whole = path.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a whole JSON file"):
            fs.Schedule.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a whole JSON file"):
        fs.Schedule.load(path)
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match="does not hold a schedule"):
        fs.Schedule.load(path)
    with pytest.raises(FileNotFoundError, match="no such schedule file"):
        fs.Schedule.load(tmp_path / "none.json")
    path.write_text('{"format": "fastsched.schedule", "version": 1, "solver": "ddim"}')
    with pytest.raises(ValueError, match="lacks the entry 'sigmas'"):
        fs.Schedule.load(path)


def test_pure_noise_survives_a_file(tmp_path):
    schedule = fs.Schedule([float("inf"), 1.0, 0.0], "ddim", "vp", [999.0, 400.0])
    schedule.save(tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text())["sigmas"] == ["inf", 1.0, 0.0]
    assert torch.equal(fs.Schedule.load(tmp_path / "s.json").sigmas, schedule.sigmas)


def test_flow_sigmas_are_times():
    with pytest.raises(ValueError, match="times within"):
        fs.Schedule([2.0, 1.0, 0.0], "ddim", "flow")
