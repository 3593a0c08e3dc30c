import csv
import dataclasses

import pytest
import torch

import fastsched as fs
from benchmarks.common import read
from benchmarks.quality import baselines, dmn, figure, glossary, limit, models, run, summary
from fastsched.denoisers.noise import FlowMatching, VarianceExploding
from fastsched.denoisers.oracles import GaussianMixture

PEERS = {"paper", "gits", "gits_tuned", "dmn", "dmn_shipped", "oss"}
VE = VarianceExploding(0.002, 80.0)


@pytest.mark.parametrize("d", [6, 64])
@pytest.mark.parametrize("s", [0.002, 0.05, 1.0, 80.0])
def test_the_low_rank_mixture_is_the_oracles(d, s):
    mixture = models.LowRankMixture.random(d, 3, 4, seed=0, spread=0.5, floor=0.05)
    axes = mixture.axes.double()
    covariances = (axes * mixture.variances) @ axes.mT + 0.05**2 * torch.eye(d)
    oracle = GaussianMixture(mixture.log_weights.exp(), mixture.means, 0.5 * (covariances + covariances.mT))
    z = oracle.sample(16, seed=1) + s * torch.randn(16, d, generator=torch.Generator().manual_seed(2))
    # A distance of size s^2 d taken from squares of size max(s, 1)^2 d, in float32, moves the shares of the modes.
    tolerance = 2e-7 * d * max(1.0, s)
    assert float((mixture.denoise(z, torch.full((16,), s)) - oracle.denoise(z.double(), s)).abs().max()) < tolerance


@pytest.mark.parametrize("name", models.MODELS)
def test_models_denoise(name):
    model = models.MODELS[name]()
    ends = fs.sample(model.denoiser, model.denoiser.process.sampler_sigma(_fine(model)), "dpmpp_2m", _noise(model))
    assert ends.shape == (32, *model.shape)
    assert 0.2 < float(ends.std()) < 2
    noisy = ends + 0.02 * torch.randn(ends.shape, generator=torch.Generator().manual_seed(1))
    better = (model.denoiser(noisy, 0.02) - ends).square().mean() / (noisy - ends).square().mean()
    assert float(better) < 1.02  # at little noise a denoiser moves little, and not away


def test_shipped_weights_are_small():
    sizes = [path.stat().st_size for path in models.WEIGHTS.glob("*.safetensors")]
    assert len(sizes) == 3
    assert sum(sizes) < 3e6


@pytest.mark.parametrize("process", [VE, FlowMatching()], ids=["ve", "flow"])
@pytest.mark.parametrize("steps", [2, 5, 20])
def test_curves_start_and_end_where_samplers_do(process, steps):
    found = baselines.curves(process, steps, 0.7) | {"dmn": dmn.schedule(process, steps)}
    start = process.sampler_sigma(torch.tensor(process.s_max, dtype=torch.float64))
    for name, sigmas in found.items():
        assert len(sigmas) == steps + 1, name
        assert float(sigmas[0]) == pytest.approx(float(start)), name
        assert float(sigmas[-1]) == 0, name
        assert bool((sigmas[:-1] > sigmas[1:]).all()), name


def test_descent_finds_a_known_minimum():
    target = torch.tensor([80.0, 5.0, 0.4, 0.0], dtype=torch.float64)

    def error(s):
        return float((s[1:-1].log() - target[1:-1].log()).square().sum()) + 1e-6

    found, value, evaluations = limit.descend(error, torch.tensor([80.0, 20.0, 3.0, 0.0]).double(), 0.002, 80.0)
    assert value < 0.01
    assert evaluations < 60
    assert float(found[0]) == 80


def test_heun_gets_the_steps_it_can_afford():
    assert [run.steps_within("heun", calls) for calls in run.CALLS] == [2, 3, 3, 4, 5, 7, 10]
    assert ("heun", 6) not in run.cells(run.SOLVERS, run.CALLS)
    assert len(run.cells(run.SOLVERS, run.CALLS)) == 48


def test_a_cell_is_run_summarised_and_not_run_again(tmp_path, capsys):
    path = tmp_path / "quality.csv"
    chosen = "--models flow --solvers dpmpp_2m fitted --calls 4 --seeds 0 --samples 8 --workers 1"
    arguments = [*chosen.split(), "--output", str(path)]
    run.main(arguments)
    rows = read(path)
    assert PEERS | {"fit", "optimal_schedule_unpolished", "karras_7", "flow_shift_3"} <= {row["method"] for row in rows}
    assert all(float(row["typical_error"]) >= 0 and row["model_calls"] == "4" for row in rows)
    before = path.read_text()
    with path.open("a") as file:
        file.write("flow,dpmpp_2m,4,0,gi")  # what an interruption may leave
    run.main(arguments)
    assert path.read_text() == before
    run.main([*arguments, "--redo", "gits"])
    assert len(list(csv.DictReader(path.read_text().splitlines()))) == len(rows)
    page = summary.report(summary.Results.read(path))
    assert "| GITS |" in page
    assert "## The fitted solver" in page
    assert "For flow alone" not in page  # where there is no other denoiser, all methods are run for all
    summary.plot(summary.Results.read(path), tmp_path / "quality.png")
    assert (tmp_path / "quality.png").stat().st_size < 300_000


def results_of(rows):
    values = {"typical_error": {}, "choosing_calls": {}, "choosing_seconds": {}}
    for cell, method, error in rows:
        values["typical_error"].setdefault(cell, {})[method] = error
    return summary.Results(values, tuple(values["typical_error"]), tuple(dict.fromkeys(row[1] for row in rows)))


def test_methods_of_one_denoiser_stand_apart():
    a, b = ("a", "ddim", 4), ("b", "ddim", 4)
    rows = [(a, "karras_7", [1.0]), (b, "karras_7", [1.0]), (b, "flow_shift_3", [2.0]), (a, "limit", [0.1])]
    assert summary.everywhere(results_of(rows)) == (["karras_7"], {"b": ["flow_shift_3"]})


def test_the_true_limit_stands_beside_the_best_of_ours_over_solvers():
    cells = [("digits", solver, 6) for solver in ("ddim", "unipc")]
    rows = [(cells[0], "fit", [0.4, 9.0]), (cells[1], "fit", [0.03, 9.0]), (cells[1], "gits", [0.01, 0.01])]
    limit = {"denoiser": "digits", "calls": "6", "typical_error": "0.02", "model_calls": "500000"}
    page = summary.true_limit(results_of(rows), [limit, limit | {"calls": "4"}])
    assert page.splitlines()[2:] == ["| digits | 6 | 0.02 | 500,000 | fs.fit, unipc | 0.03 | 1.50 |"]


def test_the_fitted_solver_stands_beside_stock_solvers_of_as_many_calls():
    stock = [("digits", solver, 6) for solver in ("ddim", "dpmpp_2m")] + [("digits", "ddim", 8)]
    rows = [(stock[0], "fit", [0.4]), (stock[1], "fit", [0.8]), (stock[0], "gits", [1.0]), (stock[2], "fit", [0.01])]
    results = results_of(rows)
    for metric in ("mean_error", "frechet"):
        results.values[metric] = results.values["typical_error"]
    fitted = ("digits", "fitted", 6)
    results.values["typical_error"][fitted] = {"fit": [0.1], "optimal_schedule": [0.5]}
    page = summary.fitted_solver(dataclasses.replace(results, fitted=(fitted,)))
    assert page.splitlines()[2] == "| fs.fit | typical | 0.250 | 0.125 | 0.100 | 0.25 | 0 of 1 |"
    assert page.splitlines()[5] == "| fs.optimal_schedule | typical | 1.250 | 0.625 | 0.500 | 1.25 | 1 of 1 |"


def test_every_row_of_the_results_is_explained():
    rows = read(summary.RESULTS / "quality.csv")
    assert {row["method"] for row in rows} <= set(glossary.METHODS)
    assert {row["denoiser"] for row in rows} == set(glossary.DENOISERS) == set(models.MODELS)
    assert len({method.title for method in glossary.METHODS.values()}) == len(glossary.METHODS)


def test_lines_are_told_apart_without_colour():
    for place in range(3):
        assert len({str(line[place]) for line in figure.LINES.values()}) == len(figure.LINES)


def _fine(model):
    return torch.cat([model.denoiser.levels(40), torch.zeros(1, dtype=torch.float64)])


def _noise(model):
    return torch.randn(32, *model.shape, generator=torch.Generator().manual_seed(0))
