"""Schedules for networks that others trained.

    python -m benchmarks.pretrained.run --weights FOLDER

`benchmarks.pretrained.networks` describes FOLDER. For each network, it computes converged samples from noises that no
method sees, and then samples of every method from the same noises. Rows are written to
``benchmarks/results/pretrained.csv`` at once and are not computed again; ``--redo`` names methods to run again.
``python -m benchmarks.pretrained.summary`` makes tables of them.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.common import RESULTS, Row, append, environment, read
from benchmarks.pretrained.networks import Network, builders, find_zoo
from benchmarks.quality.choosing import Choosers, Chosen, Effort
from benchmarks.quality.run import KEY, result
from fastsched.sampling.solvers import FITTED

#: Networks that are run if no names are given; if the folder has none of them, all of its networks are run.
NETWORKS = ("cifar-grey", "mnist-flow", "flower-flow")
SOLVERS = ("ddim", "dpmpp_2m", "unipc")
PATH = RESULTS / "pretrained.csv"

#: All methods, by their names in `ways`.
METHODS = (
    "native",
    "karras_7",
    "karras_7_to_zero",
    "exponential",
    "exponential_to_zero",
    "paper",
    "gits",
    "gits_tuned",
    "dmn",
    "dmn_shipped",
    "oss",
    "optimal_schedule",
    "fit",
    "fit_decoupled",
    "fit_100",
)
#: Methods that also choose schedules for the fitted solver.
FITTED_METHODS = ("optimal_schedule", "fit", "fit_decoupled", "fit_100")
#: Methods that are run only for the fitted solver.
FITTED_ONLY = ("fit_100",)

USUAL_EFFORT = Effort(paper=64, gits=256, tuning=16, optimal_steps=8, most_steps=12)


@dataclass(frozen=True)
class Plan:
    """How a network is judged."""

    calls: tuple[int, ...] = (5, 8, 12)  #: numbers of model calls, the same as steps
    samples: int = 64  #: number of noises
    #: Arguments of `fs.converged_reference` for the converged run.
    reference: dict[str, Any] = field(default_factory=dict)
    effort: Effort = USUAL_EFFORT  #: noises of the other methods
    left_out: tuple[str, ...] = ()  #: methods that would take too long


#: Networks whose call takes more than this many seconds for one sample are judged by `LARGE`.
SLOW = 0.05

#: Plan for slow networks: fewer noises, and a converged run of 80 steps of a third-order solver.
LARGE = Plan(
    calls=(5, 8),
    samples=16,
    reference={"steps": 80, "solver": "unipc_3", "batch_size": 4},
    effort=Effort(paper=2, gits=4),
    left_out=("gits_tuned", "oss"),
)


def plan_of(network: Network) -> Plan:
    """`LARGE` for a network that takes longer than `SLOW`, else the usual plan."""
    x, s = torch.zeros(1, *network.shape), network.denoiser.process.s_max
    seconds = []
    for _ in range(3):  # the first call also pays for one-time set-up
        start = time.perf_counter()
        network.denoiser.denoise(x, s)
        seconds.append(time.perf_counter() - start)
    return LARGE if min(seconds) > SLOW else Plan()


def missing(
    name: str, plan: Plan, seed: int, methods: Sequence[str], done: Collection[tuple[str, ...]]
) -> list[tuple[str, int, str]]:
    """Solver, calls and method of the rows that are missing."""
    run = [method for method in methods if method not in plan.left_out]
    fitted = itertools.product([FITTED], plan.calls, [method for method in run if method in FITTED_METHODS])
    stock = itertools.product(SOLVERS, plan.calls, [method for method in run if method not in FITTED_ONLY])
    wanted = itertools.chain(stock, fitted)
    return [found for found in wanted if (name, found[0], str(found[1]), str(seed), found[2]) not in done]


def ways(network: Network, choosers: Choosers, solver: str, calls: int) -> dict[str, Callable[[], Chosen]]:
    """Functions that choose ``calls`` steps for ``solver``, by method."""
    return {
        "native": lambda: Chosen(network.native(calls)),
        "fit_100": lambda: choosers.fit_within(100, solver, calls),
        **choosers.choose(solver, calls),
    }


def rows_of(
    name: str, network: Network, plan: Plan, seed: int, wanted: Sequence[tuple[str, int, str]]
) -> Iterator[Row]:
    """Run ``wanted`` solvers, calls and methods for one network and seed."""
    if not wanted:
        return
    choosers = Choosers(network, seed, plan.effort)
    reference = network.converged(plan.samples, seed, **plan.reference)
    for solver, calls, method in tqdm(wanted, desc=name, unit="row"):
        found = result(network, solver, ways(network, choosers, solver, calls)[method](), reference)
        yield {"denoiser": name, "solver": solver, "calls": calls, "seed": seed, "method": method, **found}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="folder with zoo.py in it or beside it")
    parser.add_argument("--zoo", type=Path, default=None, help="another file that defines ZOO")
    parser.add_argument("--networks", nargs="*", default=None, metavar="name", help=f"default: {' '.join(NETWORKS)}")
    parser.add_argument(
        "--large", nargs="*", default=[], metavar="name", help="networks judged as slow ones: 16 noises, 5 and 8 calls"
    )
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS, help="run only these")
    parser.add_argument("--redo", nargs="*", default=[], choices=METHODS, help="methods whose rows to run again")
    parser.add_argument("--output", type=Path, default=PATH, help="the CSV")
    return parser.parse_args(argv)


def asked_for(args: argparse.Namespace, available: Sequence[str]) -> list[str]:
    """Names of the networks to judge; ValueError if the zoo lacks one."""
    usual = [name for name in NETWORKS if name in available] or list(available)
    named = args.networks if args.networks is not None else [] if args.large else usual
    unknown = sorted({*named, *args.large} - set(available))
    if unknown:
        raise ValueError(f"networks must be among {', '.join(available)}, got {', '.join(unknown)}")
    return list(dict.fromkeys([*named, *args.large]))


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    torch.set_num_threads(1)
    zoo = builders(args.zoo or find_zoo(args.weights))
    done = {tuple(row[name] for name in KEY) for row in read(args.output) if row["method"] not in args.redo}
    commit = environment()["commit"]
    for name in asked_for(args, list(zoo)):
        network = zoo[name]()
        plan = LARGE if name in args.large else plan_of(network)
        for seed in args.seeds:
            for row in rows_of(name, network, plan, seed, missing(name, plan, seed, args.methods, done)):
                append(args.output, [row | {"commit": commit}], KEY)
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
