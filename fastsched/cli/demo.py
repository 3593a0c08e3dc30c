"""``fastsched demo``: schedules for a denoiser of handwritten digits, a table of their errors, and a figure."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastsched import baselines, validate
from fastsched.cli.shell import save_figure
from fastsched.comparison import Comparison, compare
from fastsched.denoisers.denoiser import Denoiser
from fastsched.denoisers.digits import DigitsNetwork, digits_denoiser
from fastsched.measurement.converged_samples import Reference, converged_reference
from fastsched.measurement.measuring import measure
from fastsched.measurement.statistics import PathStatistics
from fastsched.sampling.display import aligned
from fastsched.sampling.files import check_writable
from fastsched.sampling.progress import progress_bar
from fastsched.sampling.sampler import sample
from fastsched.sampling.schedule import Schedule
from fastsched.selection.optimal import optimal_schedule
from fastsched.selection.score_optimal import score_optimal_schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHAPE = DigitsNetwork.shape
SOLVERS = ("ddim", "dpmpp_2m")
STEPS = (6, 8, 10)
LEVELS, PATHS = 48, 4  # 383 model calls
OURS, PAPER = "fastsched", "score-optimal (paper)"
AS_USED = ("karras (rho 7)", "exponential")
REPLACED = "sigma_min replaced by 0"
GRID, GRID_COLUMNS = 18, 6  # images of each schedule in the figure


@dataclass(frozen=True)
class Demo:
    """Results of the demonstration."""

    stats: PathStatistics  #: the measurement
    schedules: Mapping[str, Mapping[int, Mapping[str, Schedule]]]  #: by solver, then number of steps, then name
    comparisons: Mapping[str, Mapping[int, Comparison]]  #: by solver, then number of steps
    reference: Reference  #: the converged samples of all comparisons


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[None]:
    """Create the folder; it is removed again if the work within the block fails before a file is in it."""
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        check_writable(folder / "demo.png")
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # it is not empty
            for each in new:
                each.rmdir()
        raise


def run_demo(
    output: str | os.PathLike[str],
    *,
    samples: int = 1024,
    solvers: Sequence[str] = SOLVERS,
    steps: Sequence[int] = STEPS,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> Demo:
    """Measure the digits denoiser, select schedules, compare them with common schedules, and draw a figure.

    The figure and the schedules go to the folder ``output``, which is created if it is missing. Errors are over
    ``samples`` noises. ``say`` is called with each line of text.
    """
    samples = validate.positive_int("samples", samples, minimum=2)
    folder, denoiser = Path(output), digits_denoiser()
    with _new_folder(folder):
        demo = _run(denoiser, samples, solvers, steps, progress, say)
        figure = draw(demo, denoiser)
        # Before printing, which ends the command if a reader such as head closed the pipe.
        save_figure(figure, folder / "demo.png")
        for solver, runs in demo.schedules.items():
            for n, named in runs.items():
                named[OURS].save(folder / f"{solver}-{n}.json")
    for solver in solvers:
        say("\n" + table(solver, demo.comparisons[solver]))
    reference = demo.reference
    say("\n" + LEGEND.format(samples=samples, solver=reference.solver, steps=reference.steps))
    say(f"\nwrote {folder / 'demo.png'} and the schedules, {folder}{os.sep}SOLVER-STEPS.json")
    return demo


def _run(
    denoiser: Denoiser,
    samples: int,
    solvers: Sequence[str],
    steps: Sequence[int],
    progress: bool,
    say: Callable[[str], None],
) -> Demo:
    """Measure, select and compare; arguments are those of `run_demo`."""
    stats = measure(denoiser, SHAPE, levels=LEVELS, samples=PATHS, progress=progress)
    say(f"measured {stats.levels} levels on {stats.samples} paths: {stats.model_calls} model calls")
    reference = converged_reference(denoiser, SHAPE, samples=samples, progress=progress)
    paper = {n: score_optimal_schedule(denoiser, n, shape=SHAPE, samples=PATHS, progress=False) for n in steps}
    schedules = {solver: {n: _candidates(denoiser, stats, solver, paper[n]) for n in steps} for solver in solvers}
    comparisons: dict[str, dict[int, Comparison]] = {solver: {} for solver in solvers}
    with progress_bar(len(solvers) * len(steps), progress, "comparing", "table") as advance:
        for solver, runs in schedules.items():
            for n, named in runs.items():
                comparisons[solver][n] = compare(denoiser, named, reference=reference, progress=False)
                advance(1)
    return Demo(stats, schedules, comparisons, reference)


LEGEND = (
    "typical (mean ± standard error) squared distance to the converged sample from the same noise, {samples} noises;\n"
    "typical = geometric mean over samples; converged = {solver}, {steps} steps. Smaller is better.\n"
    'karras and exponential end at sigma_min, then 0; "sigma_min replaced by 0": one more node, the last moved to 0.'
)


def table(solver: str, comparisons: Mapping[int, Comparison]) -> str:
    """One solver's errors: one row per schedule, one column per number of model calls, sorted by the first column."""
    first = next(iter(comparisons.values()))
    header = [solver, *(f"{comparison.rows[0].model_calls} calls" for comparison in comparisons.values())]
    rows = [header]
    for name in (row.name for row in first.ranked):
        cells = [comparison[name] for comparison in comparisons.values()]
        rows.append([name, *(f"{r.typical_error:.3f} ({r.mean_error:.3f} ± {r.standard_error:.3f})" for r in cells)])
    return aligned(rows, left=1)


def _candidates(denoiser: Denoiser, stats: PathStatistics, solver: str, paper: Schedule) -> dict[str, Schedule]:
    """Our schedule, the paper's, and common schedules that keep their last node or replace it by 0."""
    n, low, high = paper.steps, denoiser.process.s_min, denoiser.process.s_max
    karras, exponential = AS_USED
    used = {
        karras: baselines.karras(n, low, high),
        exponential: baselines.exponential(n, low, high),
        f"{karras}, {REPLACED}": baselines.karras(n, low, high, spare_last=True),
        f"{exponential}, {REPLACED}": baselines.exponential(n, low, high, spare_last=True),
    }
    return {
        OURS: optimal_schedule(stats, n, solver),
        **{name: Schedule(sigmas, solver) for name, sigmas in used.items()},
        PAPER: Schedule(paper.sigmas, solver),
    }


def draw(demo: Demo, denoiser: Denoiser) -> Figure:
    """Draw samples of the last solver at the fewest steps, its schedules under the cost density, and the errors."""
    from fastsched.plot import plot_overview

    solver = list(demo.schedules)[-1]
    n = min(demo.schedules[solver])
    comparison, reference = demo.comparisons[solver][n], demo.reference
    shown = {name: demo.schedules[solver][n][name] for name in (OURS, *AS_USED, PAPER)}
    samples = {
        f"{name}\ntypical error {comparison[name].typical_error:.2g}": sample(
            denoiser, shown[name], noise=reference.noise[:GRID]
        )
        for name in (OURS, *AS_USED)
    }
    return plot_overview(
        samples,
        reference.ends[:GRID],
        shown,
        demo.stats,
        list(demo.comparisons[solver].values()),
        title=f"Digits from the same noise in {n} model calls of {solver}",
        columns=GRID_COLUMNS,
    )
