"""Names in the tables of the quality benchmark, and their definitions."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple


class Method(NamedTuple):
    """A way of choosing a schedule."""

    title: str  #: its name in tables
    meaning: str  #: one line of description


DENOISERS = {
    "mixture_64": "Gaussian mixture in closed form, 5 modes on sheets of rank 12, d = 64; sigma 80 to 0.002",
    "mixture_768": "Gaussian mixture in closed form, 3 modes on sheets of rank 48, d = 768; sigma 80 to 0.002",
    "digits": "scikit-learn's digits, 8 x 8 (d = 64), an MLP with EDM preconditioning; sigma 80 to 0.002",
    "digits_vp": "scikit-learn's digits, an MLP that predicts noise under DDPM's 1,000 timesteps; sigma 157 to 0.01",
    "patches": "colour patches of photographs, 3 x 16 x 16 (d = 768), a convolutional EDM network; sigma 80 to 0.002",
    "flow": "a ring of six modes in the plane (d = 2), a flow-matching MLP; time 1 to 0.002",
}

ZERO = ", sigma_min replaced by 0"

_CURVES = {
    "karras_7": ("karras", "Karras et al. 2022, rho = 7, from sigma_max to sigma_min, then 0"),
    "karras_3": ("karras, rho 3", "the same with rho = 3"),
    "exponential": ("exponential", "even in log sigma, from sigma_max to sigma_min, then 0"),
    "kl_optimal": ("kl_optimal", "even in arctan(sigma / c), c the data's standard deviation (Align Your Steps)"),
    "karras_7_time": ("karras in time", "karras in the time of flow matching instead of sigma"),
    "exponential_time": ("exponential in time", "exponential in the time of flow matching instead of sigma"),
}

#: Every method, by its name in the results; fastsched's own come first.
METHODS: dict[str, Method] = {
    "fit": Method(
        "fs.fit",
        "from 8 noises (16 for the fitted solver in the plane): measured, chosen, corrected by runs of the sampler",
    ),
    "fit_decoupled": Method(
        "fs.fit, decoupled", "the same with decoupled=True: the level that D is computed for is tuned too; not for heun"
    ),
    "fit_100": Method("fs.fit in 100 calls", "the same with 100 model calls in all, the measurement included"),
    "optimal_schedule": Method("fs.optimal_schedule", "from the measurement of 8 noises alone, one for all cells"),
    "optimal_schedule_unpolished": Method("fs.optimal_schedule, polish=False", "the same without the final descent"),
    "paper": Method("paper", "Williams et al. 2024, corrector-optimised, Algorithm 1, 64 samples"),
    "gits": Method("GITS", "Chen et al. 2024, as its authors set it: metric dev, teacher ipndm, 256 samples"),
    "gits_tuned": Method("GITS, tuned", "the best of 16 settings of GITS for the cell, chosen on 64 other noises"),
    "dmn": Method("DMN", "Xue et al. 2024, by its authors' procedure, errors taken as sigma / alpha; no calls"),
    "dmn_shipped": Method("DMN, as shipped", "the same, errors taken as sigma^2 / alpha as in its authors' program"),
    "oss": Method("OSS", "Pei et al. 2025, greedy search along 200 Euler steps, median over 16 samples"),
    **{name: Method(*text) for name, text in _CURVES.items()},
    **{f"{name}_to_zero": Method(text[0] + ZERO, "") for name, text in _CURVES.items()},
    "linear": Method("linear", "even in sigma, or in time for flow matching"),
    "flow_shift_3": Method("flow shift 3", "Stable Diffusion 3: time t moved to 3 t / (1 + 2 t)"),
    "native": Method("native", "the time steps of the network's own repository"),
    "limit": Method("limit of nodes", "coordinate descent of the nodes on the sampler's own error, about 10^5 calls"),
}

INTRODUCTION = """\
A *cell* is a denoiser, a solver and a number of model calls: {cells} cells of {seeds} seeds each. The error of a sample
is its squared distance to the converged sample of the same noise, on 64 noises per seed that no method saw. *Typical*
is the geometric mean over samples, *mean* the arithmetic one, *Frechet* the squared Frechet distance between the two
sets of samples. Seeds of a cell are averaged by a geometric mean, and so are ratios over cells: below 1 is better.
*Nodes* are the noise levels of a schedule."""

HEADLINE_COLUMNS = """\
*error*: the error that is compared. *best other method*: the ratio to the least error of any method that is not ours in
the cell. *karras*: the ratio to karras. *limit*: the ratio to the limit of nodes, in the 24 cells where it was
computed. *cells above 1.05*: in how many cells the error is more than 5% above that of the best other method."""

STANDINGS_COLUMNS = """\
*typical*, *mean*, *Frechet*: the ratio to karras in these errors. *best in cells*: in how many cells its typical error
is the least of all. *spread*: the standard deviation over seeds of the logarithm of its typical error. *calls*: the
most model calls that choosing one schedule took; a batch of B samples counts as B calls. A measurement that serves
several schedules is included. *seconds*: the most CPU seconds that choosing one schedule took."""

BREAKDOWN_COLUMNS = """\
Ratios of typical errors to the least of any method that is not ours (*best other method*), and to karras."""

TRUE_LIMIT = """\
The limit is gradient descent through the network on the nodes and all weights of a linear multistep sampler, on 128
noises. No schedule can reach it with a solver whose weights are fixed. Errors are on the noises of seed 0. *best of
ours* is the least error of our methods over all solvers, and *ratio* is its error over the limit."""

FITTED_SOLVER = """\
The fitted solver is a linear multistep solver whose weights are chosen with the nodes. Its errors are divided by those
of stock solvers with as many model calls: the best `fs.fit` of any solver; `fs.fit` of dpmpp_2m; and the best other
method with any solver. *worst cell* and *cells above 1.05* are of the first ratio."""

LOST_COLUMNS = """\
*where it tuned*: the typical error of `fs.fit`'s schedule on the 8 noises that it ran the sampler on. *why*: "too few
noises" if this error is below the other method's, so the 8 noises were not representative; "search" otherwise, so the
search stopped too early. *ratio*: the error of `fs.fit` over the other method's."""


def meanings(names: Collection[str]) -> list[list[str]]:
    """Titles and meanings of these methods."""
    found = [[method.title, method.meaning] for name, method in METHODS.items() if name in names and method.meaning]
    if any(name.endswith("_to_zero") for name in names):
        found.append([f"...{ZERO}", "the same curve with one node more, of which 0 replaces the last, at sigma_min"])
    return found


def title(method: str) -> str:
    """The name of a method in tables."""
    return METHODS[method].title if method in METHODS else method
