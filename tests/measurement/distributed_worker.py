"""One of the processes of `test_distributed`, which writes into a folder what came of each task that it is given."""

import json
import os
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[2]))  # torchrun starts it without what pytest adds
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from models import mixture

import fastsched as fs
from fastsched.measurement import devices
from fastsched.sampling.files import runs_beside


def of_pipelines(folder, group):
    """Measure and fit a pipeline; the calls of each are counted."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "diffusers"))
    from test_prompt_calls import PROMPTS, measure, text_pipeline

    rank = torch.distributed.get_rank()
    pipe = text_pipeline()
    stats = measure(pipe, group=group, checkpoint=folder / "whole.safetensors")
    measured = sum(pipe.batches)
    torch.distributed.barrier()  # the first process has written the whole
    again = measure(pipe, group=group, checkpoint=folder / "whole.safetensors")
    repeated = sum(pipe.batches) - measured
    assert again == stats
    options = {"levels": 12, "prompts": PROMPTS, "group": group, "progress": False}
    schedule = fs.diffusers.fit(pipe, 4, model_calls=100, **options)
    stats.save(folder / f"pipe-{rank}.safetensors")
    report = {
        "measured": measured,
        "repeated": repeated,
        "images": sum(pipe.batches),
        "sigmas": schedule.sigmas.tolist(),
    }
    (folder / f"pipeline-{rank}.json").write_text(json.dumps(report))


#: Arguments of each call that differ between the processes.
OTHER = {
    "other measurements": ("seed", "samples", "levels", "shape", "responses", "keep_increments", "dtype", "denoiser"),
    "other fits": ("steps", "solver", "decoupled", "model_calls", "stats", "increments of stats"),
}


def failed(denoiser, options, rank, name):
    """What a call says if an argument of that name is another one in each process."""
    given = {"denoiser": denoiser, "shape": (4,), **options}
    if name not in OTHER["other measurements"]:
        given["steps"] = 4
    measured = partial(fs.measure, denoiser, (4,), levels=12, progress=False)
    if name == "denoiser":  # of another noise process, which the levels given here and no check show
        given |= {"levels": torch.logspace(1, -1, 12), "checks": False}
    given["stats" if "stats" in name else name] = {
        "seed": rank,
        "samples": range(4 * rank, 4 * rank + 4),
        "levels": 12 + rank,
        "shape": (4 + rank,),
        "responses": rank == 1,
        "keep_increments": rank == 1,
        "steps": 4 + rank,
        "solver": ("dpmpp_2m", "unipc")[rank],
        "decoupled": rank == 1,
        "model_calls": 400 + rank,
        "dtype": (torch.float32, torch.bfloat16)[rank],
        "denoiser": fs.Denoiser.from_denoiser(mixture().denoise, 0.02, 20.0 + rank),
        "stats": measured(samples=range(4 * rank, 4 * rank + 4)),
        "increments of stats": measured(samples=4, keep_increments=rank == 1),
    }[name]
    return text_of_error(fs.fit if "steps" in given else fs.measure, **given)


def refused(denoiser, options, rank, folder):
    """What calls say if process 1 alone has wrong arguments, a damaged file of runs, or another network."""
    wrong = {**options, "seed": (0, "one")[rank]}
    said = [text_of_error(fs.measure, denoiser, (4,), **wrong), text_of_error(fs.fit, denoiser, (4,), 4, **wrong)]
    said.append(text_of_error(fs.fit, denoiser, (4,), 4, ("unipc", "none")[rank], **options))
    Path(runs_beside(folder / "runs.safetensors", 1, 2)).write_bytes(b"no runs")
    said.append(text_of_error(fs.fit, denoiser, (4,), 4, checkpoint=folder / "runs.safetensors", **options))
    own = fs.Denoiser.from_denoiser(mixture(seed=rank).denoise, 0.02, 20.0)
    for keep in (False, True):
        stats = fs.measure(denoiser, (4,), levels=12, samples=2, keep_increments=keep, progress=False)
        given = {**options, "levels": None, "samples": None, "stats": stats}
        said.append(text_of_error(fs.fit, own, (4,), 4, **given))
    return said


def of_other_pipelines(folder, group):
    """What measuring and fitting a pipeline says if each process gives another argument of a name."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "diffusers"))
    from test_prompt_calls import PROMPTS, text_pipeline

    rank = torch.distributed.get_rank()
    usual = {"levels": 12, "prompts": PROMPTS, "progress": False, "group": group}
    kept, said = {"samples": 4, "keep_increments": rank == 1}, []
    for other in ({"seed": rank}, {"samples": 4 + rank}, {"samples": range(4 * rank, 4 * rank + 4)}, kept):
        said.append(text_of_error(fs.diffusers.measure, text_pipeline(), **{**usual, **other}))
    said.append(text_of_error(fs.diffusers.measure, text_pipeline(), **{**usual, "prompts": PROMPTS[rank:]}))
    for other in ({"steps": 4 + rank}, {"solver": ("ddim", "dpmpp_2m")[rank]}, {"audition": rank == 1}):
        said.append(text_of_error(fs.diffusers.fit, text_pipeline(), **{"steps": 4, **usual, **other}))
    stats = fs.diffusers.measure(text_pipeline(), levels=12, prompts=PROMPTS, keep_increments=True, progress=False)
    for known in (stats, replace(stats, origin=None)):
        given = {**usual, "levels": None, "steps": 4, "stats": known, "prompts": PROMPTS[rank:]}
        said.append(text_of_error(fs.diffusers.fit, text_pipeline(), **given))
    wrong = {**usual, "prompts": [] if rank == 1 else PROMPTS}
    said.append(text_of_error(fs.diffusers.measure, text_pipeline(), **wrong))
    for call in (fs.diffusers.measure, partial(fs.diffusers.fit, steps=4)):
        said.append(text_of_error(call, text_pipeline(), **{**usual, "seed": (0, "one")[rank]}))
    said.append(text_of_error(fs.diffusers.fit, text_pipeline(), steps=4, **wrong))
    said.append(text_of_error(fs.diffusers.fit, text_pipeline(), steps=4, **{**usual, "levels": 12 - 8 * rank}))
    (folder / f"other pipelines-{rank}.json").write_text(json.dumps(said))


def text_of_error(function, *given, **options):
    try:
        function(*given, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        return str(error)
    return None


def run(task, folder, group):
    if task == "pipeline":
        of_pipelines(folder, group)
        return
    if task == "other pipelines":
        of_other_pipelines(folder, group)
        return
    rank, calls = torch.distributed.get_rank(), 0
    oracle = mixture()

    def network(z, s):
        nonlocal calls
        calls += len(z)
        if task == "dies" and rank == 1 and calls > 30:
            os._exit(3)
        if task == "fails" and rank == 1 and calls > 30:
            raise RuntimeError("broken")
        if task == "fit fails" and rank == 1 and calls > 60:  # two paths are measured by then
            raise RuntimeError("broken")
        if task == "fit dies" and rank == 1 and calls > 60:
            os._exit(3)
        if task == "interrupted" and rank == 1 and calls > 30:
            raise KeyboardInterrupt
        return (mixture(seed=rank) if task == "networks" else oracle).denoise(z, s)

    denoiser = fs.Denoiser.from_denoiser(network, 0.02, 20.0)
    options = {"levels": 12, "samples": 5, "progress": False, "group": group, "batch_size": 1}
    try:
        if task == "measure":
            with patch.object(devices, "PIECE", 8):  # two vectors of four elements
                file = folder / "whole.safetensors"
                stats = fs.measure(denoiser, (4,), keep_increments=True, checkpoint=file, **options)
            stats.save(folder / f"{rank}.safetensors", vectors=True)
            report = {"model_calls": stats.model_calls}
        elif task.startswith("other "):
            report = {"failed": [failed(denoiser, options, rank, each) for each in OTHER[task]]}
        elif task == "refused":  # process 1 has a damaged file to resume from; then too few levels for its steps
            (folder / "damaged.part-1-of-2.safetensors").write_bytes(b"no statistics")
            said = [text_of_error(fs.measure, denoiser, (4,), checkpoint=folder / "damaged.safetensors", **options)]
            said.append(text_of_error(fs.fit, denoiser, (4,), 4 + 20 * rank, **options))
            said += refused(denoiser, options, rank, folder)
            report = {"failed": said}
        elif task in ("fit", "fit fails", "fit dies"):
            schedule = fs.fit(denoiser, (4,), 4, model_calls=400, **options)
            report = {"sigmas": schedule.sigmas.tolist(), "error": schedule.measured_error}
        else:
            fs.measure(denoiser, (4,), **options)
            report = {}
    except BaseException as error:
        partial = getattr(error, "partial", None)
        report = {
            "failed": str(error),
            "kind": type(error).__name__,
            "finished": None if partial is None else partial.samples,
        }
    (folder / f"{task}-{rank}.json").write_text(json.dumps({**report, "calls": calls}))


def main(folder, tasks):
    """Do the tasks one after the other, in folders and but for two in groups of their own: none finds what is left."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends the others when one has died
    torch.distributed.init_process_group("gloo")
    for task in tasks:
        whole = task in ("measure", "pipeline")  # as most people do it
        group = torch.distributed.group.WORLD if whole else torch.distributed.new_group()
        run(task, folder / task, group)
    os._exit(0)  # a group that has lost a process does not end in order


main(Path(sys.argv[1]), sys.argv[2:])
