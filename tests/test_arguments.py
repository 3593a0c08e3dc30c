"""Every argument of every public function: a wrong type or value gives an error that names the argument."""

import functools
import inspect
import math
import types

import numpy as np
import pytest
import torch
from models import exact_denoiser, mixture, vp_table

import fastsched as fs

COUNT = [0, -1, 2.5, "8", None, True, math.nan, 2**40, [3], torch.tensor(2.5), range(10**30), object()]
OPTIONAL_COUNT = [value for value in COUNT if value is not None]
FLAG = [None, 1, 0, "yes", math.nan, torch.tensor(True)]
POSITIVE = [0, 0.0, -1.0, math.nan, math.inf, "1", None, True, [1.0], 1j, torch.ones(2)]
OPTIONAL_POSITIVE = [value for value in POSITIVE if value is not None]
SEED = [-1, 2**31, 0.5, "0", None, True, np.int64(3), torch.tensor(3), math.nan]
SHAPE = [None, 4, "44", (), (0,), (-1, 2), (2.5,), (True,), [None], iter((2, 2)), {2}, (2**40,), (2**20,) * 5]
DEVICE = ["gpu", "meta", "cuda:one", 1.5, True, object(), b"cpu", ["cpu"]]
DTYPE = ["float32", torch.float8_e4m3fn, torch.int32, torch.bool, torch.complex64, float, np.float32, 1]
SOLVER = ["dmpp", "", None, 3, ["ddim"], b"ddim", object(), torch.ones(2)]
SIGMAS = [None, 3, "ab", [1.0], [1.0, 2.0], [2.0, 2.0, 0.0], [2.0, math.nan], [2.0, -1.0], [[2.0, 1.0]], [2j, 1.0],
          torch.tensor([2.0, 1.0], device="meta"), torch.tensor([1.0, 2.0]), torch.tensor([True]),
          torch.tensor([2j, 1.0]), [None, 1.0], object()]  # fmt: skip
TENSOR = [3, "x", [1.0, 2.0], np.ones((2, 4), np.float32), torch.ones(2, 4, dtype=torch.int64),
          torch.ones(2, 4, dtype=torch.float8_e5m2), torch.ones(2, 4, device="meta"),
          torch.ones(2, 4).to_sparse(), object()]  # fmt: skip
BATCH = [*TENSOR, torch.ones(4), torch.tensor(1.0), torch.full((2, 4), math.nan), torch.full((2, 4), math.inf)]
LEVELS = [2, *COUNT, [3.0, 2.0], [3.0, 1.0, 2.0], ["a"] * 3, np.ones(3),
          torch.tensor([3.0, 2.0]), torch.tensor([3.0, 1.0, 2.0]), torch.tensor([3.0, 2.0, 0.0])]  # fmt: skip
TARGET = [0.0, -1.0, math.nan, math.inf, "x", None, ("karras",), ("x", 3), ("karras", 0), torch.tensor([1.0, 2.0])]
ALPHAS = [None, 3, "ab", [0.5], [0.5, 0.9], [1.0, 0.5], [0.9, -0.1], [0.9, math.nan], [[0.9, 0.5]], [True]]
OTHER = [None, 3, "x", object(), [], {}]
PATH = [3, 2.5, b"x\0", "", "a\0b", object(), ["x"]]
REAL = ["1", None, True, [1.0], 1j, math.nan]
OF_ZERO = [-1, *COUNT[2:]]
FUNCTION = [None, 3, "x", torch.ones(2), []]
RESULTS = [3, "x", [3], None]

#: By name of the argument; `SPECIAL` says otherwise for some functions.
WRONG = {
    **dict.fromkeys(("steps", "samples", "iterations", "n", "order"), COUNT),
    **dict.fromkeys(("batch_size", "max_steps", "columns"), OPTIONAL_COUNT),
    **dict.fromkeys(("trials", "model_calls"), OF_ZERO),
    **dict.fromkeys(
        ("progress", "checks", "decoupled", "responses", "keep_increments", "polish", "weighted", "spare_last"), FLAG
    ),
    **dict.fromkeys(("integer_timesteps", "sub_vp", "vectors"), FLAG),
    **dict.fromkeys(("sigma_min", "sigma_max", "rho", "data_std", "beta_min", "beta_max", "alpha", "beta"), POSITIVE),
    **dict.fromkeys(("shift", "tolerance", "std"), POSITIVE),
    **dict.fromkeys(("denoiser", "stats", "cost", "schedule", "other"), OTHER),
    **dict.fromkeys(("fn", "net", "estimate", "denoise"), FUNCTION),
    **dict.fromkeys(("noise", "data", "ends"), BATCH),
    **dict.fromkeys(("clean", "samples_", "values", "converged", "costs"), TENSOR),
    "levels": LEVELS,
    "reference_steps": [1, *COUNT],
    "projections": COUNT,
    "probes": [1, *COUNT],
    "max_iterations": COUNT,
    "seed": SEED,
    "shape": SHAPE,
    "device": DEVICE,
    "dtype": DTYPE,
    "solver": SOLVER,
    "sigmas": SIGMAS,
    "checkpoint": PATH,
    "path": [None, *PATH],
    "model": OTHER,
    "group": [3, "x", object()],
    "trace": PATH,
    "origin": OTHER[1:],
    "store": ["gpu", 3, []],
    "method": ["best", 3, [], b"arc_length"],
    "pairs": ["some", None, 3],
    "velocity": ["slow", 3, []],
    "candidates": [3, "x", {}, {"a": 3}, {"a": [1.0, 2.0]}, {"a": [2.0, 1.0, 0.5, 0.3, 0.0]}, []],
    "schedules": [None, 3, "x", {}, {"a": 3}, {"a": torch.tensor([1.0, 2.0])}, {"a": [2.0, 1.0]}, []],
    "reference": OTHER[1:],
    "start": OTHER,
    "target": TARGET,
    "alphas_cumprod": ALPHAS,
    "sigma_data": POSITIVE,
    "class_labels": [3, "x", [1.0], torch.tensor(1.0)],
    **dict.fromkeys(("t_min", "t_max"), REAL),
    "data_at": [2, -1, 0.5, None, "0"],
    "sign": [0, 2, "1", None],
    **dict.fromkeys(("tokens", "base_tokens", "max_tokens"), COUNT),
    **dict.fromkeys(("base_shift", "max_shift"), REAL),
    "exponent": REAL,
    "s": SIGMAS,
    "rate": [0, -0.1, 1.5, *REAL],
    "generator": [3, "x", object()],
    "intervals": [3, [0], torch.tensor([0.5]), torch.tensor([-1]), torch.tensor([99])],
    "state": [None, 3, {}, {"s": 1}, []],
    "prediction": ["eps", None, 3],
    "process": OTHER,
    "network": [None, 3, "x"],
    "network_sigmas": ["x", [1.0], [[1.0]], [1.0, 2.0], [2.0, 0.0], 3],
    "timesteps": ["x", [1.0], [[1.0]], [None, 2.0, 3.0], 3],
    "predicted_error": ["x", [1.0], math.nan, True],
    "measured_error": ["x", [1.0], math.nan, True],
    "weights": ["x", [[1.0]], 3],
    **dict.fromkeys(("comparisons", "curves"), RESULTS),
    "names": [3, "x", [3]],
}

TABLE = vp_table(20)
PAIRS = torch.ones(2, 4)
NETWORK = mixture().denoise


@functools.cache
def denoiser():
    return exact_denoiser(mixture(), 0.02, 20.0)


@functools.cache
def stats():
    return fs.measure(denoiser(), (4,), levels=8, samples=2, keep_increments=True, progress=False)


@functools.cache
def schedule():
    return fs.optimal_schedule(stats(), 3, "ddim")


@functools.cache
def decoupled_schedule():
    return fs.Schedule([2.0, 1.0, 0.0], "ddim", network_sigmas=[1.8, 0.9], decoupled="denoiser")


@functools.cache
def cost():
    sigmas = torch.logspace(1, -1, 5, dtype=torch.float64)
    return fs.costs.klub(denoiser(), shape=(4,), sigmas=sigmas, samples=2, progress=False)


@functools.cache
def reference():
    return fs.converged_reference(denoiser(), (4,), samples=2, steps=4, progress=False)


def adaptive():
    return fs.AdaptiveSchedule([3.0, 2.0, 1.0])


SIGMA = {"sigma_min": 0.1, "sigma_max": 10.0}
RUN = {"shape": (4,), "sigmas": [5.0, 2.0, 0.5], "samples": 2}

#: Functions, and arguments that are right.
RIGHT = {
    "measure": (fs.measure, lambda: {"denoiser": denoiser(), "shape": (4,), "levels": 8, "samples": 2}),
    "fit": (fs.fit, lambda: {"denoiser": denoiser(), "shape": (4,), "steps": 3, "levels": 8}),
    "fit with stats": (fs.fit, lambda: {"denoiser": denoiser(), "shape": (4,), "steps": 3, "stats": stats()}),
    "audition": (fs.audition, lambda: {"denoiser": denoiser(), "stats": stats(), "steps": 3}),
    "tune": (fs.tune, lambda: {"denoiser": denoiser(), "stats": stats(), "start": schedule()}),
    "sample": (fs.sample, lambda: {"denoiser": denoiser(), "sigmas": schedule(), "noise": torch.zeros(2, 4)}),
    "optimal_schedule": (fs.optimal_schedule, lambda: {"stats": stats(), "steps": 3}),
    "decoupled_model": (fs.decoupled_model, lambda: {"model": NETWORK, "schedule": decoupled_schedule()}),
    "error_curve": (fs.error_curve, lambda: {"stats": stats(), "max_steps": 2}),
    "steps_needed": (fs.steps_needed, lambda: {"stats": stats(), "target": 1.0}),
    "predict_error": (fs.predict_error, lambda: {"stats": stats(), "sigmas": schedule()}),
    "standard_errors": (fs.standard_errors, lambda: {"stats": stats(), "steps": 2}),
    "refine_schedule": (fs.refine_schedule, lambda: {"estimate": lambda sigmas: cost(), "sigmas": [3.0, 2.0, 1.0]}),
    "select": (fs.select, lambda: {"cost": cost(), "steps": 3}),
    "score_optimal_schedule": (
        fs.score_optimal_schedule,
        lambda: {"denoiser": denoiser(), "shape": (4,), "steps": 3, "samples": 2},
    ),
    "compare": (
        fs.compare,
        lambda: {"denoiser": denoiser(), "schedules": {"a": schedule()}, "reference": reference()},
    ),
    "profile": (fs.profile, lambda: {"model": denoiser(), "shape": (4,), "steps": 3}),
    "converged_reference": (fs.converged_reference, lambda: {"denoiser": denoiser(), "shape": (4,), "samples": 2}),
    "Denoiser": (fs.Denoiser, lambda: {"network": NETWORK, "process": denoiser().process, "prediction": "x0"}),
    "Denoiser.from_denoiser": (fs.Denoiser.from_denoiser, lambda: {"fn": NETWORK, **SIGMA}),
    "Denoiser.from_score": (fs.Denoiser.from_score, lambda: {"fn": NETWORK, **SIGMA}),
    "Denoiser.from_edm": (fs.Denoiser.from_edm, lambda: {"net": NETWORK}),
    "Denoiser.from_epsilon": (fs.Denoiser.from_epsilon, lambda: {"fn": NETWORK, "alphas_cumprod": TABLE}),
    "Denoiser.from_v": (fs.Denoiser.from_v, lambda: {"fn": NETWORK, "alphas_cumprod": TABLE}),
    "Denoiser.from_velocity": (fs.Denoiser.from_velocity, lambda: {"fn": NETWORK}),
    "Denoiser.from_vp_score": (fs.Denoiser.from_vp_score, lambda: {"fn": NETWORK}),
    "PathStatistics.save": (lambda path="x", vectors=False: stats().save(path, vectors=vectors), dict),
    "PathStatistics.load": (fs.PathStatistics.load, dict),
    "PathStatistics.merge": (lambda other: stats().merge(other), dict),
    "PathStatistics.select": (lambda samples: stats().select(samples), dict),
    "Schedule": (fs.Schedule, lambda: {"sigmas": [3.0, 1.0, 0.0], "solver": "ddim"}),
    "Schedule.save": (lambda path: schedule().save(path), dict),
    "Schedule.load": (fs.Schedule.load, dict),
    "AdaptiveSchedule": (fs.AdaptiveSchedule, lambda: {"s": [3.0, 2.0, 1.0]}),
    "AdaptiveSchedule.draw": (
        lambda n, generator=None, device="cpu": adaptive().draw(n, generator=generator, device=device),
        lambda: {"n": 3},
    ),
    "AdaptiveSchedule.density": (lambda s: adaptive().density(s), dict),
    "AdaptiveSchedule.observe": (
        lambda costs, intervals=None: adaptive().observe(costs, intervals),
        lambda: {"costs": torch.ones(2)},
    ),
    "AdaptiveSchedule.observe_denoiser": (
        lambda denoise, clean, generator=None: adaptive().observe_denoiser(denoise, clean, generator=generator),
        lambda: {"denoise": denoiser(), "clean": torch.zeros(2, 4)},
    ),
    "AdaptiveSchedule.load_state_dict": (lambda state: adaptive().load_state_dict(state), dict),
    "costs.klub": (fs.costs.klub, lambda: {"denoiser": denoiser(), **RUN}),
    "costs.fisher_rao": (fs.costs.fisher_rao, lambda: {"denoiser": denoiser(), **RUN}),
    "costs.stein_corrector": (fs.costs.stein_corrector, lambda: {"denoiser": denoiser(), **RUN}),
    "costs.stein_predictor": (fs.costs.stein_predictor, lambda: {"denoiser": denoiser(), **RUN}),
    "costs.path_cost": (fs.costs.path_cost, lambda: {"stats": stats()}),
    **{
        f"baselines.{name}": (getattr(fs.baselines, name), lambda: {"steps": 4, **SIGMA})
        for name in ("karras", "exponential", "linear", "kl_optimal", "vp_uniform", "cosine", "beta")
    },
    "baselines.flow_shift": (fs.baselines.flow_shift, lambda: {"steps": 4}),
    "baselines.flow_shift_mu": (fs.baselines.flow_shift_mu, lambda: {"tokens": 300}),
    "baselines.ays": (fs.baselines.ays, lambda: {"steps": 4}),
    **{
        f"metrics.{name}": (getattr(fs.metrics, name), lambda: {"samples": PAIRS, "reference": PAIRS})
        for name in ("squared_distances", "frechet_distance", "sliced_wasserstein")
    },
    "metrics.geometric_mean": (fs.metrics.geometric_mean, dict),
    "metrics.mean_and_standard_error": (fs.metrics.mean_and_standard_error, dict),
    "metrics.rounding_floor": (fs.metrics.rounding_floor, dict),
    "plot.cost_density": (fs.plot.cost_density, lambda: {"stats": stats()}),
    "plot.plot_schedules": (fs.plot.plot_schedules, lambda: {"schedules": {"a": schedule()}}),
    "plot.plot_weights": (fs.plot.plot_weights, dict),
    "plot.plot_cost_density": (fs.plot.plot_cost_density, dict),
    "plot.plot_sample_grid": (fs.plot.plot_sample_grid, lambda: {"samples": {"a": torch.zeros(2, 8, 8)}}),
    "plot.plot_errors": (fs.plot.plot_errors, lambda: {"comparisons": []}),
    "plot.plot_error_curves": (fs.plot.plot_error_curves, dict),
    "oracles.GaussianMixture.random": (fs.oracles.GaussianMixture.random, lambda: {"d": 2, "components": 2, "seed": 0}),
    "oracles.Gaussian": (fs.oracles.Gaussian, lambda: {"std": 1.0, "shape": (4,)}),
    "oracles.Empirical": (fs.oracles.Empirical, dict),
}  # fmt: skip

PICTURES = [None, 3, "x", {}, {"a": 3}, {"a": torch.zeros(2, 8)}]
#: What is wrong for an argument of one function alone.
SPECIAL = {
    **{(f"costs.{name}", "probes"): [1, *COUNT] for name in ("fisher_rao",)},
    ("costs.stein_predictor", "probes"): [1, *OPTIONAL_COUNT],
    ("baselines.ays", "model"): ["sd3", None, 3, []],
    ("profile", "shape"): SHAPE,
    ("profile", "steps"): [2, *COUNT],
    ("profile", "call_kwargs"): [{}],  # an argument of a pipeline
    ("audition", "samples"): [3, *OPTIONAL_COUNT],
    ("Schedule", "decoupled"): [value for value in FLAG if value is not None],
    ("decoupled_model", "model"): FUNCTION,
    **{(fit, "samples"): OPTIONAL_COUNT for fit in ("fit", "fit with stats")},
    **{(fit, "levels"): [2, *OPTIONAL_COUNT, torch.tensor([3.0, 2.0])] for fit in ("fit", "fit with stats")},
    **{(fit, "model_calls"): [-1, *OPTIONAL_COUNT[1:]] for fit in ("fit", "fit with stats")},
    ("sample", "seed"): [1, *(value for value in SEED if value is not None)],  # for a deterministic solver, any
    ("sample", "sigmas"): SIGMAS,
    ("sample", "noise"): [None, *BATCH],
    ("fit with stats", "stats"): OTHER[1:],
    ("fit", "stats"): OTHER[1:],
    ("plot.plot_schedules", "stats"): OTHER[1:],
    ("plot.plot_schedules", "schedules"): [None, 3, "x", {}, {"a": 3}, {"a": torch.tensor([1.0, 2.0])}],
    ("predict_error", "solver"): [value for value in SOLVER if value is not None],
    ("compare", "solver"): [value for value in SOLVER if value is not None],
    ("sample", "solver"): [value for value in SOLVER if value is not None],
    ("compare", "shape"): [value for value in SHAPE if value is not None],
    ("score_optimal_schedule", "levels"): [1, *COUNT, torch.tensor([2.0, 3.0])],
    ("converged_reference", "steps"): [1, *COUNT],
    ("PathStatistics.select", "samples"): [None, 3, "x", [], [0.5], [9], [True], [10**400, 0.5], torch.ones(2)],
    ("AdaptiveSchedule.density", "s"): TENSOR,
    ("oracles.Gaussian", "shape"): [value for value in SHAPE if value != 4],
    ("Schedule", "noise"): ["x", None, 3, []],
    ("Schedule", "solver"): [*SOLVER, "fitted"],
    ("oracles.Gaussian", "mean"): ["x", None, [1.0], math.nan, torch.zeros(3)],
    ("oracles.GaussianMixture.random", "spread"): POSITIVE,
    **{("oracles.GaussianMixture.random", name): COUNT for name in ("d", "components")},
    **{("Denoiser.from_edm", name): OPTIONAL_POSITIVE for name in ("sigma_data", "sigma_min", "sigma_max")},
    **{
        (f"metrics.{name}", argument): [None, *TENSOR]
        for name in ("squared_distances", "frechet_distance", "sliced_wasserstein")
        for argument in ("samples", "reference")
    },
    ("plot.plot_sample_grid", "samples"): PICTURES,
}

CASES = [
    (name, argument, wrong)
    for name, (function, _) in RIGHT.items()
    for argument in inspect.signature(function).parameters
    for wrong in SPECIAL.get((name, argument), WRONG.get(argument, [KeyError(f"no wrong values of {argument}")]))
]


@pytest.fixture(autouse=True)
def no_calls(monkeypatch):
    """The error comes before the network is called."""
    denoiser(), stats(), schedule(), cost(), reference()

    def called(*_, **__):
        raise AssertionError("the network was called")

    monkeypatch.setattr(fs.Denoiser, "raw_output", called)


@pytest.mark.parametrize("name", RIGHT)
def test_a_wrong_argument_is_named(name):
    function, right = RIGHT[name]
    failures = []
    for _, argument, wrong in (case for case in CASES if case[0] == name):
        if isinstance(wrong, KeyError):
            failures.append(str(wrong))
            continue
        call = {**right(), argument: wrong}
        try:
            function(**call)
            failures.append(f"{argument}={wrong!r}: no error")
        except (TypeError, ValueError) as error:
            if argument not in str(error) or len(str(error)) > 500:
                failures.append(f"{argument}={wrong!r}: {type(error).__name__}: {error}")
        except Exception as error:
            failures.append(f"{argument}={wrong!r}: {type(error).__name__}: {error}")
    assert not failures, "\n".join(failures)


def public_functions():
    """Names of what can be called under `fastsched.__all__`; classes of results are left out."""
    for name in fs.__all__:
        value = getattr(fs, name)
        if not isinstance(value, types.ModuleType):
            yield name
            continue
        for inner in getattr(value, "__all__", dir(value)):
            found = getattr(value, inner)
            if inspect.isfunction(found) and not inner.startswith(("_", "draw_", "check_", "is_")):
                yield f"{name}.{inner}"


#: Tested elsewhere: results, drawing, and pipelines, which need one.
ELSEWHERE = {
    "Comparison", "PathStatistics", "Profile", "diffusers.apply", "diffusers.export", "diffusers.fit",
    "diffusers.measure", "diffusers.serving_parameters", "metrics.power_mean", "plot.plot_overview",
    "plot.error_weight",
}  # fmt: skip


def test_every_public_function_is_in_the_table():
    assert set(public_functions()) - ELSEWHERE - set(RIGHT) == set()
