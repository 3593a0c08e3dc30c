"""What `fastsched.fit` gains from decoupled levels at equal model calls.

    python -m benchmarks.quality.decoupled
    python -m benchmarks.quality.decoupled --models cifar-grey mnist-flow --weights FOLDER

All fits have the same total of model calls. Errors are on 64 noises that no fit has seen. The seeds differ from
those of the other benchmarks. Rows go to ``results/decoupled.csv``.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import torch

import fastsched as fs
from benchmarks.common import append, environment
from benchmarks.quality.choosing import Chosen
from benchmarks.quality.cost_curve import model_of
from benchmarks.quality.models import MODELS, Model
from benchmarks.quality.run import SAMPLES, result
from fastsched.measurement.converged_samples import Reference
from fastsched.sampling.solvers import FITTED

KEY = ("denoiser", "solver", "calls", "seed", "model_calls", "decoupled")
#: Added to the seed of a fit to give the seed of the noises on which it is judged.
JUDGED = 5000


def rows_of(
    name: str, model: Model, reference: Reference, solver: str, calls: int, total: int, seed: int
) -> Iterator[dict[str, object]]:
    """Errors of the fits without decoupled levels, and with those of the timestep and of the denoiser."""
    for decoupled in (False, "timestep", "denoiser"):
        options = {"model_calls": total, "seed": seed, "decoupled": decoupled, "progress": False}
        schedule = fs.fit(model.denoiser, model.shape, calls, solver, **options)
        place = {"denoiser": name, "solver": solver, "calls": calls, "seed": seed, "model_calls": total}
        found = result(model, solver, Chosen(schedule, predicted=schedule.measured_error), reference)
        errors = {"typical_error": "typical_error", "mean_error": "mean_error", "measured_error": "predicted"}
        yield {**place, "decoupled": decoupled, **{name: found[of] for name, of in errors.items()}}


def main() -> None:
    """Run the requested cells and append their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--weights", type=Path, default=None, help="others' networks: a folder with zoo.py in it")
    parser.add_argument("--solvers", nargs="+", default=["ddim", "dpmpp_2m", "unipc", FITTED])
    parser.add_argument("--calls", nargs="+", type=int, default=[5, 8])
    parser.add_argument("--seeds", nargs="+", type=int, default=[900, 901])
    parser.add_argument("--model-calls", nargs="+", type=int, default=[800])
    args = parser.parse_args()
    torch.set_num_threads(1)
    commit = environment()["commit"]
    for name, seed in itertools.product(args.models, args.seeds):
        model = model_of(name, None if name in MODELS else args.weights)
        reference = model.converged(SAMPLES, JUDGED + seed, steps=200, solver="dpmpp_3m")
        for place in itertools.product(args.solvers, args.calls, args.model_calls):
            for row in rows_of(name, model, reference, *place, seed):
                append("decoupled", [row | {"commit": commit}], KEY)
                print(*row.values(), flush=True)


if __name__ == "__main__":
    main()
