"""A GPU's verdict in one command: ``make accept-gpu``, or ``python -m benchmarks.accept_gpu``.

Uses the installed Python and needs no network. Runs the kernels' tests, the tests that need a GPU, speed benchmarks of
the ops, and profiles of pipelines of one and ten billion parameters with random weights. Rows go to
``benchmarks/results``; the last lines are the verdict. Without a GPU, ``--device cpu`` runs the same steps on smaller
inputs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks import profiles
from benchmarks.common import append, copy_bandwidth, environment, table
from benchmarks.speed import hutchinson, level_gram, measured_gram

KEY = ("device", "torch", "triton", "commit", "check")

#: The longest that one step of the acceptance may take, in seconds.
LIMIT = 240

#: GPU memory in GiB from which on the pipeline of ten billion parameters (bfloat16) is profiled.
LARGE = 40


@dataclass(frozen=True)
class Verdict:
    """A check: what was found, what was expected, and whether they agree."""

    check: str
    found: str
    wanted: str
    passed: bool

    def row(self) -> dict[str, str]:
        """A row of results."""
        return {
            "check": self.check,
            "found": self.found,
            "wanted": self.wanted,
            "verdict": "passed" if self.passed else "FAILED",
        }


def tests(name: str, folders: list[str], jobs: int) -> Verdict:
    """Run a part of the test suite in ``jobs`` processes."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    command += [*folders, "--ignore=tests/kernels/test_kernel_compile.py"]  # compiles for all GPUs; needs none
    if jobs > 1:
        command += ["--numprocesses", str(jobs)]
    paths = os.pathsep.join(filter(None, ["tests", ".", os.environ.get("PYTHONPATH", "")]))
    settings = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "2"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT, env=settings)
    except subprocess.TimeoutExpired:
        return Verdict(name, f"not done in {LIMIT} s", "all pass", False)
    lines = [line for line in done.stdout.splitlines() if line.strip()] or [done.stderr[-200:]]
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            print(line, flush=True)
    return Verdict(name, lines[-1].strip("= "), "all pass", done.returncode == 0)


def speed(device: str, repeats: int) -> Iterator[Verdict]:
    """Run the speed benchmarks, append their rows, and compare each with other implementations."""
    bandwidth = copy_bandwidth() if device == "cuda" else None
    for case in measured_gram.cases(device):
        rows = measured_gram.compare(case, device, device == "cuda", bandwidth, repeats, "wall")
        append("measured_gram", rows, measured_gram.KEY)
        yield from faster(f"Gram of a measurement: {case}", rows, device)
    for dtype in (torch.float32, torch.bfloat16):
        d = 1 << (22 if device == "cuda" else 14)
        case = level_gram.Case(48, 4, d, "levels", dtype, apart=1e-2)
        rows = level_gram.compare(case, device, device == "cuda", bandwidth, repeats, "wall")
        append("level_gram", rows, level_gram.KEY)
        yield from faster(str(case), rows, device)
        rows = hutchinson.compare((48, 4, d), dtype, device, device == "cuda", repeats, "wall")
        append("hutchinson", rows, hutchinson.KEY)
        yield from faster(f"hutchinson {dtype}", rows, device)


def faster(name: str, rows: list[dict], device: str) -> Iterator[Verdict]:
    """Compare ours, the first row, with the faster of `torch.compile` and eager PyTorch; a CPU always passes."""
    ours = rows[0]
    others = [row for row in rows if row["variant"].startswith(("torch.compile", "eager"))]
    best = min(others, key=lambda row: row["p50_ms"])
    times, share = best["p50_ms"] / ours["p50_ms"], ours.get("share_of_copy_bandwidth")
    found = f"{times:.2f} times {best['variant']}" + (f", {share:.0%} of a copy's bandwidth" if share else "")
    if device == "cuda":
        yield Verdict(name, found, "at least as fast", times >= 1.0)
    else:
        yield Verdict(name, found, "not judged on a CPU", True)


def profiled(device: str) -> Iterator[Verdict]:
    """Profile large pipelines: fastsched's own share of a step, and how often a step waits for the GPU."""
    names = ["flux-1b"]
    if device == "cuda" and torch.cuda.get_device_properties(0).total_memory > LARGE << 30:
        names.append("flux-10b")
    for name in names:
        found = profiles.profiled(name, device, steps=8 if device == "cuda" else 3)
        print(name, found, sep="\n", flush=True)
        append("profile", [profiles.row(name, found) | environment(device)], profiles.KEY)
        yield Verdict(f"own share, {name}", f"{found.own_share:.2%} of a step", "at most 2%", found.own_share <= 0.02)
        for each in found.steps[1:]:
            waits = each.synchronisations
            if waits is not None:
                yield Verdict(f"waits, {name}, {each.name}", f"{waits:.1f} a step", "none", waits == 0)


def verdicts(options: argparse.Namespace) -> Iterator[Verdict]:
    """All checks, in order."""
    jobs = max(1, min(14, (os.cpu_count() or 1) - 2))
    yield tests("tests of kernels and ops", ["tests/kernels", "tests/ops"], jobs)
    if options.device == "cuda":
        yield tests("tests on the GPU", ["tests/gpu"], min(jobs, 6))
    if options.tests_only:
        return
    yield from speed(options.device, options.repeats)
    yield from profiled(options.device)


def main() -> None:
    """Run all steps, print the verdicts as they come and as a table, and exit with 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tests-only", action="store_true")
    options = parser.parse_args()
    start, where, found = time.perf_counter(), environment(options.device), []
    print(where, flush=True)
    for verdict in verdicts(options):
        found.append(verdict)
        print(f"[{time.perf_counter() - start:4.0f} s] {verdict.row()}", flush=True)
    rows = [verdict.row() for verdict in found]
    append("accept_gpu", [row | where for row in rows], KEY)
    print(table(rows, ("verdict", "check", "found", "wanted")))
    failed = sum(not verdict.passed for verdict in found)
    print(f"{len(found) - failed} of {len(found)} checks passed in {time.perf_counter() - start:.0f} s")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
