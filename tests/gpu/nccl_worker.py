"""One of the processes of `test_groups_on_gpu`: measures, fits and observes in an NCCL group; writes what it found.

Two processes share a card where there is one only: NCCL refuses that within a host, so each says it is a host.
"""

import json
import os
import sys
from pathlib import Path

RANK = int(os.environ["RANK"])
os.environ.setdefault("NCCL_HOSTID", f"host-{RANK}")
os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")

import torch  # noqa: E402 - NCCL reads its settings when it begins

import fastsched as fs  # noqa: E402 - as above


def observed(group):
    """An online schedule's grid, after each process has observed other intervals."""
    online = fs.AdaptiveSchedule(fs.baselines.karras(9, 0.02, 20.0)[:-1], group=group)
    places = torch.arange(RANK, 8, 2, device="cuda")
    online.observe(1.0 + places, places)
    online.update()
    return online.s.tolist()


def main(folder: Path) -> None:
    """Run in a group of NCCL."""
    torch.cuda.set_device(RANK % torch.cuda.device_count())
    torch.distributed.init_process_group("nccl")
    group, calls = torch.distributed.group.WORLD, 0

    def network(z, s):
        nonlocal calls
        calls += len(z)
        s = s.view(-1, 1) if s.ndim else s
        variances = torch.linspace(0.1, 1.0, 16, device=z.device) ** 2
        return z * variances / (variances + s * s)

    denoiser = fs.Denoiser.from_denoiser(network, 0.02, 20.0)
    options = {"levels": 12, "samples": 5, "device": "cuda", "progress": False, "group": group, "batch_size": 1}
    stats = fs.measure(denoiser, (16,), keep_increments=True, **options)
    stats.save(folder / f"{RANK}.safetensors", vectors=True)
    measured = calls
    schedule = fs.fit(denoiser, (16,), 4, model_calls=400, **options)
    report = {"measured": measured, "sigmas": schedule.sigmas.tolist(), "grid": observed(group)}
    (folder / f"{RANK}.json").write_text(json.dumps(report))
    torch.distributed.destroy_process_group()


main(Path(sys.argv[1]))
