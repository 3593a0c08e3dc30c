import math

import pytest
import torch

import fastsched as fs
from fastsched.cli.demo import OURS, run_demo, table
from fastsched.denoisers.digits import digits_denoiser


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A small run of the demonstration: one solver, two numbers of steps."""
    folder, lines = tmp_path_factory.mktemp("demo") / "new", []
    demo = run_demo(folder, samples=96, solvers=("dpmpp_2m",), steps=(6, 8), progress=False, say=lines.append)
    return demo, folder, "\n".join(lines)


def test_it_spends_at_most_400_model_calls(found):
    demo, _, text = found
    assert demo.stats.model_calls <= 400
    assert f"{demo.stats.model_calls} model calls" in text


@pytest.mark.parametrize("steps", [6, 8])
def test_ours_has_the_least_typical_error_of_all(found, steps):
    comparison = found[0].comparisons["dpmpp_2m"][steps]
    others = [row.typical_error for row in comparison.rows if row.name != OURS]
    assert len(others) == 5
    # Measured: 0.2 of the best that is not the paper's, 0.4 of the paper's; the 96 noises move the ratio by a tenth.
    assert comparison[OURS].typical_error < 0.7 * min(others)


def test_the_reference_is_converged_on_the_digits(found):
    demo = found[0]
    denoiser = digits_denoiser()
    noise = demo.reference.noise[:16]
    fine = torch.cat([denoiser.levels(1200), torch.zeros(1, dtype=torch.float64)])
    left = fs.metrics.squared_distances(demo.reference.ends[:16], fs.sample(denoiser, fine, "dpmpp_2m", noise))
    best = demo.comparisons["dpmpp_2m"][8][OURS].typical_error
    assert fs.metrics.geometric_mean(left) < 1e-3 * best


def test_the_files_hold_the_schedules_and_a_figure(found):
    demo, folder, _ = found
    assert sorted(path.name for path in folder.iterdir()) == ["demo.png", "dpmpp_2m-6.json", "dpmpp_2m-8.json"]
    for steps in (6, 8):
        schedule = fs.Schedule.load(folder / f"dpmpp_2m-{steps}.json")
        assert schedule.steps == steps
        assert torch.equal(schedule.sigmas, demo.schedules["dpmpp_2m"][steps][OURS].sigmas)
    picture = (folder / "demo.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 300_000


def test_the_table_holds_every_error(found):
    comparisons = found[0].comparisons["dpmpp_2m"]
    lines = table("dpmpp_2m", comparisons).splitlines()
    assert lines[0].split() == ["dpmpp_2m", "6", "calls", "8", "calls"]
    assert lines[1].startswith(OURS)
    for row in comparisons[8].rows:
        line = next(line for line in lines if line.startswith(f"{row.name}  "))
        assert f"{row.typical_error:.3f} ({row.mean_error:.3f} ± {row.standard_error:.3f})" in line
        assert math.isfinite(row.frechet)


def test_too_few_samples_are_refused_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match="samples must be at least 2"):
        run_demo(tmp_path / "x", samples=1)
    assert not (tmp_path / "x").exists()
