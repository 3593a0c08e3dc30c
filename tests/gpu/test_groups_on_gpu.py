"""Two processes of an NCCL group give what one process gives, on as many cards as there are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastsched as fs

if not (torch.cuda.is_available() and torch.distributed.is_nccl_available()):
    pytest.skip("needs a CUDA device and NCCL", allow_module_level=True)

WORKER = Path(__file__).with_name("nccl_worker.py")


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nccl")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join([str(WORKER.parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, str(WORKER), str(folder)],
        capture_output=True,
        text=True,
        timeout=150,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def network(z, s):
    s = s.view(-1, 1) if s.ndim else s
    variances = torch.linspace(0.1, 1.0, 16, device=z.device) ** 2
    return z * variances / (variances + s * s)


def test_measuring_and_fitting_are_those_of_one_process(reports):
    folder, found = reports
    denoiser = fs.Denoiser.from_denoiser(network, 0.02, 20.0)
    options = {"levels": 12, "samples": 5, "device": "cuda", "progress": False, "batch_size": 1}
    whole = fs.measure(denoiser, (16,), keep_increments=True, **options)
    schedule = fs.fit(denoiser, (16,), 4, model_calls=400, **options)
    for rank, report in enumerate(found):
        stats = fs.PathStatistics.load(folder / f"{rank}.safetensors")
        torch.testing.assert_close(stats.vector_gram, whole.vector_gram, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(stats.increments.cpu(), whole.increments.cpu(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.tensor(report["sigmas"]).double(), schedule.sigmas, rtol=1e-4, atol=0)
    assert sum(report["measured"] for report in found) == whole.model_calls
    assert max(report["measured"] for report in found) < 0.7 * whole.model_calls


def test_an_online_schedule_sums_what_all_observed(reports):
    online = fs.AdaptiveSchedule(fs.baselines.karras(9, 0.02, 20.0)[:-1])
    online.observe(1.0 + torch.arange(8))
    online.update()
    for report in reports[1]:
        torch.testing.assert_close(torch.tensor(report["grid"]).double(), online.s)
