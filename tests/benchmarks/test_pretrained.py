import dataclasses
import time

import pytest
import torch

import fastsched as fs
from benchmarks.common import read
from benchmarks.pretrained import networks, pictures, run, summary
from benchmarks.quality.summary import Results

ZOO = """
from __future__ import annotations
from dataclasses import dataclass
import torch
import fastsched as fs
from fastsched.denoisers.oracles import GaussianMixture

@dataclass
class Entry:
    denoiser: fs.Denoiser
    shape: tuple[int, ...]
    native: object

def mixture():
    means, covariances = torch.tensor([[1.0, 0.5], [-1.0, 0.0]]), 0.04 * torch.eye(2).expand(2, 2, 2)
    oracle = GaussianMixture(torch.tensor([0.4, 0.6]), means, covariances)
    denoiser = fs.Denoiser.from_denoiser(oracle.denoise, 0.01, 20.0)
    return Entry(denoiser, (2,), lambda steps: fs.baselines.linear(steps, 0.01, 20.0))

def broken():
    entry = mixture()
    return Entry(entry.denoiser, (2,), lambda steps: torch.ones(steps))

ZOO = {"mixture": mixture, "broken": broken}
"""


@pytest.fixture
def weights(tmp_path):
    (tmp_path / "zoo.py").write_text(ZOO)
    (tmp_path / "weights").mkdir()
    return tmp_path / "weights"


def test_a_zoo_is_found_in_the_folder_or_beside_it(weights):
    assert networks.find_zoo(weights) == networks.find_zoo(weights.parent) == weights.parent / "zoo.py"
    with pytest.raises(FileNotFoundError, match=r"zoo\.py in it or beside it"):
        networks.find_zoo(weights / "further" / "down")


def test_networks_are_built_and_their_own_schedules_checked(weights):
    found = networks.builders(networks.find_zoo(weights))
    network = found["mixture"]()
    assert network.shape == (2,)
    assert network.image is None
    assert len(network.native(4)) == 5
    with pytest.raises(ValueError, match=r"native\(4\) must be 5 sigmas"):
        found["broken"]().native(4)
    assert not list(weights.parent.glob("__pycache__"))


def test_a_zoo_must_define_its_networks(tmp_path):
    (tmp_path / "zoo.py").write_text("networks = {}")
    with pytest.raises(ValueError, match="must define ZOO"):
        networks.builders(tmp_path / "zoo.py")


def test_a_network_is_judged_summarised_and_not_run_again(weights, tmp_path, monkeypatch):
    path = tmp_path / "pretrained.csv"
    small = run.Effort(paper=2, gits=4, tuning=4, optimal_steps=2, most_steps=5)
    monkeypatch.setattr(run, "LARGE", run.Plan(calls=(4,), samples=8, effort=small, left_out=("gits_tuned",)))
    arguments = ["--weights", str(weights), "--large", "mixture", "--output", str(path)]
    run.main(arguments)
    rows = read(path)
    for_stock = len(run.METHODS) - 1 - len(run.FITTED_ONLY)
    assert len(rows) == len(run.SOLVERS) * for_stock + len(run.FITTED_METHODS)
    assert {row["method"] for row in rows} == set(run.METHODS) - {"gits_tuned"}
    before = path.read_text()
    run.main(arguments)
    assert path.read_text() == before
    native = [row for row in rows if row["method"] == "native"]
    assert all(float(row["choosing_calls"]) == 0 for row in native)
    run.main([*arguments, "--redo", "native", "--methods", "native"])
    assert len(read(path)) == len(rows)
    summary.main(["--results", str(path), "--output", str(tmp_path / "pretrained.md")])
    page = (tmp_path / "pretrained.md").read_text()
    assert "| native |" in page
    assert "## mixture" in page
    assert "| fitted solver | calls |" in page


def test_slow_networks_are_judged_on_fewer_noises(weights):
    network = networks.builders(networks.find_zoo(weights))["mixture"]()
    assert run.plan_of(network) == run.Plan()

    def slow(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        time.sleep(2 * run.SLOW)
        return x

    waiting = networks.Network(fs.Denoiser.from_denoiser(slow, 0.01, 10.0), (2,), network.native)
    assert run.plan_of(waiting) is run.LARGE


def test_unknown_networks_are_named(weights):
    with pytest.raises(ValueError, match="among mixture, broken, got other"):
        run.asked_for(run.arguments(["--weights", str(weights), "--networks", "other"]), ["mixture", "broken"])


def results_of(errors):
    values = {cell: {name: [error] for name, error in found.items()} for cell, found in errors.items()}
    stock, fitted = (tuple(cell for cell in errors if (cell[1] == "fitted") == own) for own in (False, True))
    methods = tuple(dict.fromkeys(name for found in errors.values() for name in found))
    return Results(dict.fromkeys(summary.ERRORS, values), stock, methods, fitted)


def test_ratios_are_to_the_best_other_way_of_each_cell():
    cell, other = ("a", "ddim", 5), ("a", "ddim", 8)
    errors = {cell: {"karras_7": 2.0, "native": 4.0, "fit": 1.0}, other: {"karras_7": 3.0, "native": 1.0, "fit": 1.5}}
    results = results_of(errors)
    assert results.best("typical_error", cell) == ("karras_7", pytest.approx(2.0))
    assert results.ratios("typical_error", "fit", [cell, other]) == pytest.approx([0.5, 1.5])
    assert summary.geometric([0.5, 2.0]) == pytest.approx(1.0)
    assert "| fs.fit | 0.866 | 1.500 |" in summary.standings(results, [cell, other])


def test_the_fitted_solver_is_set_against_the_best_of_several_solvers_and_methods():
    ours = {"optimal_schedule": 4.0, "fit": 1.0, "fit_100": 2.0}
    errors = {
        ("a", "fitted", 5): ours,
        ("a", "ddim", 5): {"karras_7": 8.0, "native": 16.0, "fit": 5.0},
        ("a", "unipc", 5): {"karras_7": 9.0, "exponential": 4.0, "fit": 10.0},
    }
    results = results_of(errors)
    against_fit = summary.fitted_solver(results, list(errors), "best stock fs.fit", ["fit"])
    assert "| a | 5 | ddim | 5 | 0.80 | 0.20 | 0.40 |" in against_fit
    against_common = summary.fitted_solver(results, list(errors), "best common schedule", summary.COMMON)
    assert "| a | 5 | exponential, unipc | 4 | 1.00 | 0.25 | 0.50 |" in against_common


def test_weights_are_untouched(weights):
    before = sorted(weights.parent.rglob("*"))
    networks.builders(networks.find_zoo(weights))["mixture"]()
    assert sorted(weights.parent.rglob("*")) == before
    assert torch.is_grad_enabled()


def test_pictures_show_every_method_and_the_converged_samples(weights, tmp_path):
    (weights.parent / "zoo.py").write_text(
        ZOO.replace("native: object", "native: object\n    image: object = staticmethod(lambda x: x[:, None, None])")
    )
    network = networks.builders(weights.parent / "zoo.py")["mixture"]()
    shown = [("ddim", "native"), ("ddim", "optimal_schedule"), ("fitted", "fit_100")]
    rows = pictures.rows_of(network, shown, 4, 3, run.Plan())
    assert [row.label.split("\n")[0] for row in rows] == [
        "native",
        "fs.optimal_schedule",
        "fs.fit in 100 calls, fitted",
        "converged",
    ]
    assert "\n0 calls\n" in rows[0].label
    assert all(row.samples.shape == (3, 2) for row in rows)
    pictures.plot(rows, network, "mixture", tmp_path / "rows.png")
    assert (tmp_path / "rows.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="must have an image function"):
        pictures.plot(rows, dataclasses.replace(network, image=None), "", tmp_path / "none.png")
