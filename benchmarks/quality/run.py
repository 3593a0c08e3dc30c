"""The quality benchmark: schedules for six denoisers, seven solvers and 4 to 20 model calls, run and compared.

    python -m benchmarks.quality.run            # all, one to two hours on two cores
    python -m benchmarks.quality.run --quick    # some, half a minute

For each denoiser and seed, it computes converged samples from noises that no method sees, and then samples of every
schedule from the same noises. The seed changes these noises and every measurement. Rows are written to
``benchmarks/results/quality.csv`` at once and are not computed again, so an interrupted run can be continued;
``--redo`` names methods to run again. Afterwards run ``python -m benchmarks.quality.summary``.

Only fastsched's methods choose schedules for the fitted solver, because its weights belong to a schedule.

heun makes ``2 n - 1`` model calls in n steps: 7 of 8 calls, 9 of 10 and so on. 6 calls would repeat the row of 5.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import fastsched as fs
from benchmarks.common import RESULTS, Row, append, environment, read
from benchmarks.quality.choosing import Choosers, Chosen
from benchmarks.quality.limit import limit_schedules
from benchmarks.quality.models import MODELS, Model
from fastsched.comparison import row_of
from fastsched.measurement.converged_samples import Reference
from fastsched.sampling.fitted import chosen_solver
from fastsched.sampling.solvers import FITTED

SOLVERS = ("ddim", "heun", "dpmpp_2m", "dpmpp_3m", "ipndm", "unipc", FITTED)
CALLS = (4, 5, 6, 8, 10, 14, 20)
SEEDS = (0, 1, 2, 3, 4)
#: Noises for each seed.
SAMPLES = 64
#: Columns that identify a row.
KEY = ("denoiser", "solver", "calls", "seed", "method")
#: The converged run. Its own error is far below that of any schedule, because its solver is of third order.
REFERENCE = {"steps": 400, "solver": "dpmpp_3m"}

Cell = tuple[str, int]


@dataclass(frozen=True)
class Unit:
    """A denoiser and a seed, the work of one process at a time."""

    model: str  #: the denoiser's name
    seed: int  #: seed of noises and measurements
    cells: tuple[Cell, ...]  #: solvers and model calls
    samples: int  #: number of noises
    methods: tuple[str, ...]  #: methods to run; all if empty
    done: frozenset[tuple[str, int, str]]  #: rows that exist already, as (solver, calls, method)
    commit: str  #: commit of the code, which is stored in the rows


def steps_within(solver: str, calls: int) -> int:
    """The most steps of ``solver`` that take no more than ``calls`` model calls."""
    return (calls + 1) // 2 if chosen_solver(solver).stage is not None else calls


def cells(solvers: Sequence[str], calls: Sequence[int]) -> tuple[Cell, ...]:
    """Solvers and model calls; if several give a solver the same number of steps, only the fewest calls."""
    found: dict[tuple[str, int], Cell] = {}
    for solver in solvers:
        for count in sorted(calls):
            found.setdefault((solver, steps_within(solver, count)), (solver, count))
    return tuple(found.values())


def rows_of(unit: Unit) -> list[Row]:
    """Run the missing rows of a unit."""
    model = MODELS[unit.model]()
    choosers = Choosers(model, unit.seed)
    reference = model.converged(unit.samples, unit.seed, **REFERENCE)
    rows = []
    for solver, calls in unit.cells:
        steps = steps_within(solver, calls)
        limits = {name: lambda s=s: Chosen(s) for name, s in limit_schedules(unit.model, solver, calls).items()}
        for method, choose in {**choosers.choose(solver, steps), **limits}.items():
            if (solver, calls, method) in unit.done or (unit.methods and method not in unit.methods):
                continue
            chosen = choose()
            place = {"denoiser": unit.model, "solver": solver, "calls": calls, "seed": unit.seed, "method": method}
            rows.append({**place, **result(model, solver, chosen, reference), "commit": unit.commit})
    return rows


def result(model: Model, solver: str, chosen: Chosen, reference: Reference) -> Row:
    """Sample with a schedule and measure its errors, as `fastsched.compare` does."""
    ends = fs.sample(model.denoiser, chosen.sigmas, solver, reference.noise)
    calls = chosen_solver(solver).model_calls(chosen.steps)
    errors = row_of("", solver, chosen.steps, calls, ends, reference)
    values = {
        "typical_error": errors.typical_error,
        "mean_error": errors.mean_error,
        "frechet": errors.frechet,
        "sliced_wasserstein": fs.metrics.sliced_wasserstein(ends, reference.ends, projections=64),
        "choosing_seconds": chosen.seconds,
        "predicted": chosen.predicted,
    }
    return {
        "steps": chosen.steps,
        "model_calls": calls,
        "choosing_calls": chosen.model_calls,
        **{name: "" if value is None else f"{value:.4g}" for name, value in values.items()},
    }


def planned(args: argparse.Namespace, rows: Sequence[Row]) -> list[Unit]:
    """The units to run: all denoisers of one seed before the next seed."""
    grid = cells(args.solvers, args.calls)
    done: dict[tuple[str, str], set[tuple[str, int, str]]] = {}
    for row in rows:
        done.setdefault((row["denoiser"], row["seed"]), set()).add((row["solver"], int(row["calls"]), row["method"]))
    commit = environment()["commit"]
    return [
        Unit(name, seed, grid, args.samples, tuple(args.methods), frozenset(done.get((name, str(seed)), ())), commit)
        for seed in args.seeds
        for name in args.models
    ]


def finished(units: Sequence[Unit], workers: int) -> Iterator[list[Row]]:
    """The rows of each unit, as soon as it is done."""
    if workers == 1:
        torch.set_num_threads(1)
        yield from map(rows_of, units)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for future in as_completed([pool.submit(rows_of, unit) for unit in units]):
            yield future.result()


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="in half a minute: fewer cells, noises and seeds")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--solvers", nargs="*", default=None, choices=SOLVERS)
    parser.add_argument("--calls", nargs="*", type=int, default=None)
    parser.add_argument("--seeds", nargs="*", type=int, default=None)
    parser.add_argument("--samples", type=int, default=None, help="noises a seed")
    parser.add_argument("--workers", type=int, default=2, help="processes with one thread each")
    parser.add_argument("--methods", nargs="*", default=[], metavar="method", help="run only these")
    parser.add_argument("--redo", nargs="*", default=[], metavar="method", help="methods whose rows to run again")
    parser.add_argument("--output", type=Path, default=None, help="the CSV; results/quality.csv, or quality_quick.csv")
    args = parser.parse_args(argv)
    full = {"solvers": SOLVERS, "calls": CALLS, "seeds": SEEDS, "samples": SAMPLES, "output": RESULTS / "quality.csv"}
    quick = {"solvers": ("ddim", "dpmpp_2m"), "calls": (5, 10), "seeds": (0,), "samples": 32}
    quick |= {"output": RESULTS / "quality_quick.csv"}
    for name, value in (quick if args.quick else full).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    units = planned(args, [row for row in read(args.output) if row["method"] not in args.redo])
    for rows in tqdm(finished(units, args.workers), total=len(units), desc="quality", unit="unit"):
        append(args.output, rows, KEY)
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
