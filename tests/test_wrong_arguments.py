"""Statistics where a schedule is needed, the reverse, and names that people know from elsewhere."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import fastsched as fs

DENOISER = fs.Denoiser.from_denoiser(lambda z, s: z / (1 + s[:, None] ** 2), 0.002, 80.0)
STATS = fs.measure(DENOISER, (4,), levels=16, samples=2, progress=False)
SCHEDULE = fs.Schedule([80.0, 1.0, 0.0], "ddim")


@pytest.mark.parametrize(
    "call",
    [
        lambda: fs.optimal_schedule(SCHEDULE, 4),
        lambda: fs.optimal_schedule("stats.safetensors", 4),
        lambda: fs.predict_error(SCHEDULE, SCHEDULE),
        lambda: fs.error_curve(SCHEDULE),
        lambda: fs.steps_needed(SCHEDULE, target=("karras", 5)),
        lambda: fs.standard_errors(SCHEDULE, 4),
        lambda: fs.fit(DENOISER, (4,), 4, stats=SCHEDULE, progress=False),
        lambda: fs.audition(DENOISER, SCHEDULE, 4),
        lambda: fs.tune(DENOISER, SCHEDULE, SCHEDULE),
        lambda: fs.plot.plot_cost_density(SCHEDULE),
        lambda: fs.plot.plot_schedules({"a": SCHEDULE}, stats=SCHEDULE),
    ],
)
def test_what_is_no_measurement_is_named(call):
    with pytest.raises(TypeError, match=r"stats must be of class PathStatistics .* got (Schedule|str)"):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: fs.sample(DENOISER, STATS, noise=torch.zeros(2, 4)),
        lambda: fs.predict_error(STATS, STATS),
        lambda: fs.compare(DENOISER, {"a": STATS}, shape=(4,)),
    ],
)
def test_statistics_are_no_schedule(call):
    with pytest.raises(TypeError, match=r"a Schedule, which fastsched\.optimal_schedule makes of statistics"):
        call()


def test_noise_is_no_shape():
    for noise in (torch.zeros(2, 4), np.zeros((2, 4))):
        with pytest.raises(TypeError, match=r"shape must be a sequence such as \(4, 64, 64\)"):
            fs.measure(DENOISER, noise)


def test_files_of_the_other_kind_are_named(tmp_path):
    SCHEDULE.save(tmp_path / "a.json")
    STATS.save(tmp_path / "s.safetensors")
    with pytest.raises(ValueError, match=r"a\.json is a schedule, and statistics are needed"):
        fs.PathStatistics.load(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"s\.safetensors holds statistics, and a schedule is needed"):
        fs.Schedule.load(tmp_path / "s.safetensors")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("DPM++ 2M Karras", "did you mean 'dpmpp_2m'"),
        ("DPMSolverMultistepScheduler", "did you mean 'dpmpp_2m'"),
        ("UniPC", "did you mean 'unipc'"),
        ("PLMS", "'ipndm' is the nearest"),
        ("dpmpp_2n", "did you mean 'dpmpp_2"),
    ],
)
def test_names_from_menus_suggest_rightly(name, meant):
    for call in (lambda: fs.optimal_schedule(STATS, 4, name), lambda: fs.Schedule([1.0, 0.0], name)):
        with pytest.raises(ValueError, match="solver") as caught:
            call()
        assert meant in str(caught.value)


def test_a_device_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device is 'cuda', but torch .* finds no CUDA GPU; use cpu"):
        fs.measure(DENOISER, (4,), device="cuda", progress=False)
    with pytest.raises(ValueError, match="device must be one that PyTorch knows, such as cpu"):
        fs.measure(DENOISER, (4,), device="gpu", progress=False)
    # Backends that no build of torch for tests has; each fails in another way.
    for device in ("privateuseone", "vulkan"):
        with pytest.raises(ValueError, match=f"device is '{device}', but torch cannot use such a device here"):
            fs.measure(DENOISER, (4,), device=device, progress=False)


def test_misspelt_names_suggest():
    with pytest.raises(AttributeError, match="did you mean 'measure'"):
        _ = fs.mesure


FLOW = fs.Schedule([1.0, 0.5, 0.0], "ddim", "flow")


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("sigmas", lambda: fs.sample(DENOISER, FLOW, noise=torch.zeros(2, 4))),
        ("sigmas", lambda: fs.sample(DENOISER, FLOW, "ancestral", torch.zeros(2, 4))),
        ("sigmas", lambda: fs.predict_error(STATS, FLOW)),
        ("sigmas", lambda: fs.steps_needed(STATS, target=FLOW)),
        ("start", lambda: fs.tune(DENOISER, STATS, FLOW)),
        ("candidates", lambda: fs.audition(DENOISER, STATS, 2, candidates={"a": FLOW})),
    ],
)
def test_flow_times_are_no_sigmas(argument, call):
    """Both are numbers within [0, 1], so nothing else would tell."""
    with pytest.raises(ValueError, match=rf"{argument}.* must be for the noise process of this model, 've', got"):
        call()


def test_sigmas_are_no_flow_times():
    denoiser = fs.Denoiser.from_velocity(lambda x, t: x)
    with pytest.raises(ValueError, match="sigmas must be for the noise process of this model, 'flow', got"):
        fs.sample(denoiser, fs.Schedule([14.6, 0.5, 0.0], "ddim"), noise=torch.zeros(2, 4))
    fs.sample(denoiser, fs.Schedule([1.0, 0.5, 0.0], "ddim"), noise=torch.zeros(2, 4))  # times, if not called so


INFINITE = fs.Schedule([math.inf, 1.0, 0.0], "ddim")


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("sigmas", lambda denoiser: fs.sample(denoiser, [math.inf, 1.0, 0.0], "ddim", torch.zeros(2, 4))),
        ("sigmas", lambda denoiser: fs.sample(denoiser, INFINITE, "ancestral", torch.zeros(2, 4))),
        ("schedules", lambda denoiser: fs.compare(denoiser, {"a": INFINITE}, shape=(4,), samples=2, progress=False)),
        ("candidates", lambda denoiser: fs.audition(denoiser, STATS, 2, "ddim", {"a": INFINITE}, progress=False)),
        ("start", lambda denoiser: fs.tune(denoiser, STATS, INFINITE, progress=False)),
    ],
)
def test_pure_noise_of_a_model_without_it_is_refused_before_a_call(argument, call):
    """The error was about the network's output, after the runs of the reference."""
    with pytest.raises(ValueError, match=rf"{argument}.* must start at a finite sigma, got inf"):
        call(replace(DENOISER, network=lambda z, s: pytest.fail("the network was called")))


def test_infinite_sigmas_of_a_flow_are_refused_as_no_times():
    velocity = fs.Denoiser.from_velocity(lambda x, t: pytest.fail("the network was called"))
    with pytest.raises(ValueError, match=r"^schedules\['a'\]: sigmas of a flow model are times within"):
        fs.compare(velocity, {"a": [math.inf, 1.0, 0.0]}, "ddim", shape=(4,), samples=2, progress=False)


def test_pure_noise_is_refused_by_prediction():
    """A prediction of v or x0 has a clean sample at alpha = 0, one of the noise has none."""
    table, noise = torch.linspace(0.999, 0.01, 100, dtype=torch.float64), torch.zeros(2, 4)
    run = ([math.inf, 1.0, 0.0], "ddim", noise)
    assert bool(fs.sample(fs.Denoiser.from_v(lambda x, t: x, table), *run).isfinite().all())
    for denoiser in (fs.Denoiser.from_epsilon(lambda x, t: x, table), fs.Denoiser.from_vp_score(lambda x, t: -x)):
        with pytest.raises(ValueError, match="sigmas must start at a finite sigma, got inf"):
            fs.sample(denoiser, *run)


@pytest.mark.parametrize("samples", [2**30, range(5, 2**30)])
def test_more_samples_than_memory_has_seeds_for_are_refused(samples):
    """The system ended the program."""
    with pytest.raises(ValueError, match="samples must be at most 16,777,216 in one call, got 1,073,741,8"):
        fs.measure(DENOISER, (4,), samples=samples, progress=False)


@pytest.mark.parametrize("value", [torch.tensor(5, device="meta"), torch.tensor([5])])
def test_numbers_in_tensors_without_one_number_are_named(value):
    """The first gave an error of torch without a name, the second was taken, or one of torch.linspace."""
    with pytest.raises(TypeError, match="steps must be a whole number of at least 1, got"):
        fs.baselines.karras(value, 0.002, 80.0)
    with pytest.raises(TypeError, match="sigma_min must be a number, got"):
        fs.baselines.karras(5, value, 80.0)
