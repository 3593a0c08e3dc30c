"""Two processes give what one gives, each with half of the calls; what fails in one is an error in both."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import counted_denoiser, mixture

import fastsched as fs
from fastsched.measurement.devices import share

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without distributed")

WORKER = Path(__file__).with_name("distributed_worker.py")
PATH, CHECKS = 22, 6  # calls of a path over 12 levels; of four elements, too few for one of the checks


#: Tasks of one launch. A process that was interrupted leaves the other waiting, so that task comes last; those in
#: which a process dies have a launch each.
TOGETHER = ("measure", "fit", "fails", "fit fails", "other measurements", "other fits", "refused", "networks")
TOGETHER += ("pipeline", "other pipelines") if importlib.util.find_spec("diffusers") else ()
TOGETHER += ("interrupted",)


def launch(folder, *tasks):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = [str(WORKER.parents[1]), str(WORKER.parents[2]), os.environ.get("PYTHONPATH", "")]
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    for task in tasks:
        (folder / task).mkdir()
    command += [str(WORKER), str(folder), *tasks]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=settings)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    return folder, launch(folder, *TOGETHER)


@pytest.fixture
def run(request):
    """Both processes' reports of a task, the folder that they wrote to, and what the launch printed."""

    def reports(task):
        if task in TOGETHER:
            folder, done = request.getfixturevalue("launched")
        else:
            folder = request.getfixturevalue("tmp_path")
            done = launch(folder, task)
        files = [folder / task / f"{task}-{rank}.json" for rank in range(2)]
        found = [json.loads(file.read_text()) if file.exists() else None for file in files]
        return found, folder / task, done.stderr

    return reports


def denoiser():
    return fs.Denoiser.from_denoiser(mixture().denoise, 0.02, 20.0)


def test_measuring_in_two_processes(run):
    reports, folder, printed = run("measure")
    assert None not in reports, printed
    whole = fs.measure(denoiser(), (4,), levels=12, samples=5, batch_size=1, keep_increments=True, progress=False)
    for rank in range(2):
        found = fs.PathStatistics.load(folder / f"{rank}.safetensors")
        assert torch.equal(found.seeds, whole.seeds)
        torch.testing.assert_close(found.vector_gram, whole.vector_gram, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(found.increments, whole.increments, rtol=1e-5, atol=1e-6)
        sigmas = [fs.optimal_schedule(stats, 5, "dpmpp_2m").sigmas for stats in (found, whole)]
        torch.testing.assert_close(*sigmas, rtol=1e-5, atol=0)
    assert [report["calls"] for report in reports] == [3 * PATH + CHECKS, 2 * PATH + 1]  # by which it is known
    assert {report["model_calls"] for report in reports} == {whole.model_calls} == {5 * PATH + CHECKS}
    assert fs.PathStatistics.load(folder / "whole.safetensors").samples == 5
    assert not [*folder.glob("*part*")]


def test_fitting_in_two_processes(run):
    reports, _, printed = run("fit")
    assert None not in reports, printed
    own, calls = counted_denoiser(mixture(), 0.02, 20.0)
    single = fs.fit(own, (4,), 4, levels=12, samples=5, model_calls=400, batch_size=1, progress=False)
    for report in reports:
        torch.testing.assert_close(torch.tensor(report["sigmas"]).double(), single.sigmas, rtol=1e-5, atol=0)
        assert report["error"] == pytest.approx(single.measured_error, rel=1e-4)
    assert sum(report["calls"] for report in reports) == sum(calls) + 1  # the fingerprint of the second network
    assert 0.35 < reports[1]["calls"] / sum(calls) < 0.5  # of five samples, two


def test_a_pipeline_in_two_processes(run):
    pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")
    reports, folder, printed = run("pipeline")
    assert None not in reports, printed
    sys.path.insert(0, str(WORKER.parents[1] / "diffusers"))
    from test_prompt_calls import PROMPTS, measure, text_pipeline

    pipe = text_pipeline()
    whole = measure(pipe)
    single = fs.diffusers.fit(pipe, 4, levels=12, prompts=PROMPTS, model_calls=100, progress=False)
    for rank, report in enumerate(reports):
        found = fs.PathStatistics.load(folder / f"pipe-{rank}.safetensors")
        torch.testing.assert_close(found.vector_gram, whole.vector_gram, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.tensor(report["sigmas"]).double(), single.sigmas, rtol=1e-5, atol=0)
    assert [report["measured"] for report in reports] == [2, 2]
    assert [report["repeated"] for report in reports] == [0, 0]  # from the file of both
    assert not [*folder.glob("*part*")]
    assert sum(report["images"] for report in reports) <= sum(pipe.batches)


@pytest.mark.parametrize("task", ["fails", "dies"])
def test_an_error_in_one_process_is_an_error_in_all(run, task):
    reports, _, printed = run(task)
    assert reports[0] is not None, printed
    assert reports[0]["failed"]
    assert reports[0]["finished"] == (3 if task == "dies" else 4)  # its own three, and one of the other
    assert (reports[1] is None) == (task == "dies")
    if task == "fails":
        assert "process 1 of the group failed: RuntimeError: broken" in reports[0]["failed"]
        assert reports[1]["failed"] == "broken"


def test_a_run_that_fails_in_one_process_is_its_own_error_there(run):
    reports, _, printed = run("fit fails")
    assert None not in reports, printed
    assert [report["failed"] for report in reports] == ["process 1 of the group failed: RuntimeError: broken", "broken"]


def test_a_process_that_dies_in_a_run_costs_the_others_no_measurement(run):
    reports, _, printed = run("fit dies")
    assert reports[0] is not None, printed
    assert reports[0]["finished"] == 5


def test_an_interrupt_in_a_group_hands_no_process_less_than_the_others(run):
    """Not even with a warning, as without a group: the processes would go on with different statistics."""
    reports, _, printed = run("interrupted")
    assert None not in reports, printed
    assert (reports[1]["kind"], reports[1]["finished"]) == ("KeyboardInterrupt", 1)
    assert (reports[0]["kind"], reports[0]["finished"]) == ("RuntimeError", 3)


@pytest.mark.parametrize("task", ["other measurements", "other fits"])
def test_processes_of_a_group_that_were_given_different_arguments_are_told_which(run, task):
    reports, _, printed = run(task)
    assert None not in reports, printed
    names = ["samples and seed"] * 2 + ["levels", "shape", "responses", "keep_increments", "dtype", "noise process"]
    if task == "other fits":
        names = ["steps", "solver", "decoupled", "model_calls", "stats", "increments of stats"]
    for report in reports:
        assert report["failed"] == [
            f"{name} must be the same in all processes of the group, but those of process 1 are not those of process 0"
            for name in names
        ]


def test_a_refusal_in_one_process_reaches_the_others(run):
    """They would wait for it, until the timeout of the group."""
    reports, _, printed = run("refused")
    assert None not in reports, printed
    for other, own in zip(*(report["failed"] for report in reports), strict=True):
        assert re.fullmatch(f"process 1 of the group failed: (Value|Type)Error: {re.escape(own)}", other)
    assert len(reports[1]["failed"]) == 8


def test_different_calls_of_pipelines_in_a_group_are_refused(run):
    """Before, each measured what it was told, and the parts were merged."""
    pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")
    reports, _, printed = run("other pipelines")
    assert None not in reports, printed
    names = ["seed", "samples", "samples", "keep_increments", None, "steps", "solver", "audition"]
    for rank, report in enumerate(reports):
        *report, other_stats, other_call, measuring, one, two, fitting, few = report
        failed = "" if rank == 1 else "process 1 of the group failed: ValueError: "
        assert other_stats.startswith(f"{failed}stats must be of this pipeline called with the same prompts")
        assert other_call.startswith(
            "all processes of the group must measure this pipeline called with the same prompts"
        )
        wrong = failed.replace("Value", "Type") + "seed must be a whole number within [0, 2^31)"
        assert one.startswith(wrong)
        assert two.startswith(wrong)
        assert measuring == fitting == f"{failed}prompts must hold at least one prompt, or be None"
        assert few.startswith(f"{failed}steps must be at most 3 on 4 levels, got 4")
        for name, text in zip(names, report, strict=True):
            start = (
                f"{name} must be the same in all" if name else "all processes of the group must measure this pipeline"
            )
            assert text.startswith(start)


def test_different_networks_in_the_processes_of_a_group_are_refused(run):
    reports, _, printed = run("networks")
    assert None not in reports, printed
    for report in reports:
        assert "the network must be the same in all processes of the group" in report["failed"]


def test_a_group_needs_processes():
    with pytest.raises(ValueError, match="group needs torch"):
        fs.measure(denoiser(), (4,), samples=2, group=object(), progress=False)
    assert share(range(3, 8), None).tolist() == [3, 4, 5, 6, 7]


def test_ranges_of_samples_merge_to_the_whole(tmp_path):
    options = {"levels": 12, "batch_size": 1, "progress": False}
    parts = [fs.measure(denoiser(), (4,), samples=which, **options) for which in (range(2), range(2, 5))]
    whole = fs.measure(denoiser(), (4,), samples=5, **options)
    merged = parts[0].merge(parts[1])
    assert torch.equal(merged.seeds, whole.seeds)
    assert torch.equal(merged.vector_gram, whole.vector_gram)
    assert merged.data_std == whole.data_std
    for bad in (range(0), range(-1, 3), range(0, 6, 2)):
        with pytest.raises(ValueError, match="samples must be a number, or range"):
            fs.measure(denoiser(), (4,), samples=bad, **options)
