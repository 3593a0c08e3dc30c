"""Profiles of full-size pipelines with random weights: ``python -m benchmarks.profiles sd15 flux-1b``."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from benchmarks.common import append, environment
from benchmarks.pipelines import PIPELINES
from fastsched.profiling import Profile, profile

KEY = ("device", "threads", "torch", "commit", "case")


def profiled(name: str, device: str, steps: int, trace: str | None = None) -> Profile:
    """The profile of one of `PIPELINES` in bfloat16."""
    pipe, call = PIPELINES[name](device, torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    return profile(pipe, steps=steps, trace=trace, **call)


def row(name: str, found: Profile) -> dict[str, Any]:
    """A row of results."""
    kinds = dict(zip(("own", "fitted", "measuring"), found.steps, strict=True))
    steps = {
        f"{kind}_{field}": round(getattr(each, field), 5)
        for kind, each in kinds.items()
        for field in ("p50_ms", "p95_ms", "network", "scheduler")
    }
    waits = {f"{kind}_waits": each.synchronisations for kind, each in kinds.items()}
    fields = ("parameters", "dtype", "gram_ms", "weights_gb", "peak_gb", "measuring_gb", "predicted_gb", "own_share")
    rest = {field: getattr(found, field) for field in fields}
    rest = {field: round(value, 5) if isinstance(value, float) else value for field, value in rest.items()}
    share = {"gram_share_of_copy": round(found.gram_bandwidth / found.copy_bandwidth, 3)}
    minutes = {"minutes": json.dumps({key: round(value, 2) for key, value in found.minutes.items()})}
    return {"case": name} | rest | share | steps | waits | minutes


def main() -> None:
    """Profile, print, append to the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", choices=PIPELINES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--trace", help="a file for a trace of torch.profiler, of the last pipeline")
    parser.add_argument("--dry-run", action="store_true", help="print only")
    options = parser.parse_args()
    for name in options.names:
        found = profiled(name, options.device, options.steps, options.trace)
        print(name, found, sep="\n", flush=True)
        if not options.dry_run:
            append("profile", [row(name, found) | environment(options.device)], KEY)


if __name__ == "__main__":
    main()
