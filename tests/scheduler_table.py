"""The table of every scheduler of diffusers: ``python tests/scheduler_table.py`` writes docs/schedulers.md."""

import contextlib
import inspect
import logging
import pathlib
import warnings
from dataclasses import replace

import diffusers
import torch
from diffusers import schedulers as library

import fastsched as fs
from fastsched.denoisers.noise import FlowMatching, VariancePreserving
from fastsched.diffusers.applier import applied
from fastsched.diffusers.conventions import describe, solver_of, visited
from fastsched.diffusers.schedulers.exporter import declared_sigmas, plain_copy
from fastsched.diffusers.schedulers.probe import oracle_network, scales, states_of, timestep_slack, trace
from fastsched.sampling.solvers import SOLVERS

PATH = pathlib.Path(__file__).parents[1] / "docs" / "schedulers.md"
STEPS = 6
SAME = 1e-3
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}

#: Settings shown in addition to the defaults, if they change how a class samples.
VARIANTS = {
    "DPMSolverMultistepScheduler": [
        {"solver_order": 1},
        {"solver_order": 3},
        {"solver_order": 3, "lower_order_final": False},
        {"solver_type": "heun"},
        {"algorithm_type": "sde-dpmsolver++"},
    ],
    "FlowMatchEulerDiscreteScheduler": [{"shift": 3.0}, {"use_dynamic_shifting": True}, {"use_karras_sigmas": True}],
    "DEISMultistepScheduler": [
        {"solver_order": 1},
        {"solver_order": 3},
        {"solver_order": 3, "lower_order_final": False},
    ],
    "UniPCMultistepScheduler": [
        {"solver_type": "bh1"},
        {"solver_order": 1},
        {"solver_order": 3},
        {"solver_order": 3, "solver_type": "bh1"},
        {"solver_order": 3, "lower_order_final": False},
        {"solver_order": 3, "lower_order_final": False, "solver_type": "bh1"},
    ],
    "PNDMScheduler": [{"skip_prk_steps": True, "set_alpha_to_one": True}],
    "EDMEulerScheduler": [{"sigma_schedule": "exponential"}],
    "EDMDPMSolverMultistepScheduler": [{"solver_order": 3, "lower_order_final": False}],
}
for _name in (
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
):
    VARIANTS.setdefault(_name, []).append(FLOW)

HEADER = f"""# Schedulers of diffusers

Which schedulers can use a schedule, how, and how exactly. `python tests/scheduler_table.py` writes this file: it runs
every class of diffusers {diffusers.__version__} on a schedule with fractional timesteps. A test fails when the file is
out of date.

* **takes**: the lists that `set_timesteps` accepts.
* **export**: whether `fastsched.diffusers.export(schedule, scheduler).arguments` are call arguments that make the class
  use the schedule: *exact* (every sigma within 1e-5, relative), *rounded* to integer timesteps (exact for schedules at
  integer timesteps, which `fastsched.diffusers.measure` chooses for these classes), or no.
* **apply**: the same for `fastsched.diffusers.apply(schedule, pipe)`, and how: by the class's own *arguments*, with
  its tables *assigned*, or its stride *stepped*.
* **solver**: the solver of fastsched that the class is equal to under an applied schedule. It is found by running the
  class and every solver of fastsched on a mixture of Gaussians from the same noise (they agree to 1e-3; two names if
  two solvers do); "adds noise" if the class is stochastic, "own" if no solver agrees. Classes that `apply` refuses ran
  on their own timesteps. "not run": the class's noise process or prediction is not supported, and an error says so.

The solvers of fastsched take the last step, to sigma 0, by `z = D`, as most of these classes do.
`LMSDiscreteScheduler`, `IPNDMScheduler` and, from 15 steps on, `DEISMultistepScheduler` would extrapolate there;
`apply` makes their last step one of first order. `DEISMultistepScheduler`, `SASolverScheduler` and
`UniPCMultistepScheduler` of type bh1 are not finite at sigma 0 and end at 1e-6 of the last positive sigma; with flow
sigmas the first two start at 0.999, not 1 (*rounded*).

What the classes do that are "own" or cannot use a schedule, according to their source:

* third-order `DPMSolverMultistepScheduler` and `DEISMultistepScheduler` use second order in the last step but one
  below 15 steps (the solvers named lowered); from 15 steps on, or with `lower_order_final=False`, they are dpmpp_3m
  and deis_3; `UniPCMultistepScheduler` of third order does so with any number of steps;
* `DPMSolverMultistepScheduler` with `solver_type="heun"` weights the difference of two outputs differently from 2M;
* `UniPCMultistepScheduler` of first order corrects each Euler step with the next output;
* `DPMSolverSinglestepScheduler` uses every second level of the schedule as the stage of a step;
* `DEISMultistepScheduler` with flow sigmas interpolates the noise in `log s` and integrates over `s = t / (1 - t)`,
  where fastsched's deis solvers do so over `t`;
* `KDPM2AncestralDiscreteScheduler` steps by four tables of its own, of which `apply` sets only one;
* `PNDMScheduler` first takes Runge-Kutta steps, or calls its network twice (`skip_prk_steps`), and steps in equal
  strides of integer timesteps, so it can use no other schedule.

| scheduler | takes | export | apply | solver |
|---|---|---|---|---|
"""


def uneven_schedule(convention, steps=STEPS):
    """Uneven levels of the process; only the first is at an integer timestep."""
    uneven = torch.tensor([1.0, 0.84563, 0.50026, 0.21043, 0.06072, 0.00983], dtype=torch.float64)
    places = torch.linspace(0, STEPS - 1, steps, dtype=torch.float64)
    low = places.long().clamp(max=STEPS - 2)
    fractions = torch.lerp(uneven[low], uneven[low + 1], places - low)
    process = convention.process
    if isinstance(process, VariancePreserving):
        top = convention.timesteps(torch.tensor([process.s_max], dtype=torch.float64))
        s = convention.levels(top * fractions)
    else:
        s = process.levels(200)[(200 * (1 - fractions)).long()]
    sigmas = process.sampler_sigma(torch.cat([s, s.new_zeros(1)]))
    return fs.Schedule(sigmas, "ddim", process.kind)


def exact_denoise(oracle):
    """``D(y, s)`` of ``oracle``, also at infinite ``s``."""

    def denoise(y, s):
        level = s.reshape(-1)[:1].clamp(max=1e6)
        return oracle.denoise(y.flatten(1) * level, level).reshape(y.shape)

    return denoise


def exact_denoiser(convention, oracle):
    """``oracle`` as a Denoiser of the scheduler's process, for `fs.sample`."""
    denoise, process = exact_denoise(oracle), convention.process
    if isinstance(process, VariancePreserving):
        process = replace(process, integer_timesteps=False)

    def network(x, condition):
        s = condition[:1].double()
        if isinstance(process, FlowMatching):
            s = s / (1 - s)
        elif isinstance(process, VariancePreserving):
            s = replace(convention, angle=False).levels(s)
        return denoise(x / process.sigma(s), s)

    return fs.Denoiser(network, process, "x0")


def run_scheduler(scheduler, convention, oracle, sigmas, noise):
    """The scheduler's last state from ``noise``; the network is the oracle at the levels of ``sigmas``."""
    levels = convention.process.level(visited(scheduler, sigmas)[:-1])
    expected, network = convention.timesteps(levels), oracle_network(convention, exact_denoise(oracle))

    def at_level(x, t):
        given = torch.as_tensor(t, dtype=torch.float64)
        nearest = (expected - given).abs().argmin()
        near = (expected[nearest] - given).abs() <= timestep_slack(convention)
        return network(x, levels[nearest] if near else convention.levels(given))

    scale = scales(convention, levels[:1])[1].float()
    return list(states_of(scheduler, at_level, scale * noise))[-1]


def matching_solvers(target, convention, sigmas):
    """The solvers of fastsched whose samples along ``sigmas`` from the same noise agree to 1e-3."""
    oracle = fs.oracles.GaussianMixture.random(4, 3, seed=0, spread=0.25, std=0.1)  # within the [-1, 1] of clip_sample
    noise = torch.randn(16, 4, 1, 1, generator=torch.Generator().manual_seed(0))
    ends = run_scheduler(target, convention, oracle, sigmas, noise)
    matching = []
    for name in SOLVERS:
        ours = fs.sample(exact_denoiser(convention, oracle), sigmas, name, noise.double())
        if float((ends - ours).norm() / ours.norm()) < SAME:
            matching.append(name)
    return matching


def own_run(scheduler, convention):
    """The table's last column for a class that can use no schedule, from a run on its own timesteps."""
    target = plain_copy(scheduler)
    target.set_timesteps(STEPS)
    sigmas = declared_sigmas(target).unique().flip(0)
    levels = convention.process.level(sigmas[:-1])
    try:
        if not trace(target, levels[0], levels, convention.timesteps(levels)).deterministic:
            return "adds noise"
    except TypeError:
        return "not run: its step takes other arguments"
    target.set_timesteps(STEPS)
    return ", ".join(matching_solvers(target, convention, sigmas)) or "own"


def why_not(error):
    """A short form of the reason in an error's message."""
    text = str(error)
    if "has no sigmas" in text:
        return "has no sigmas to set"
    return "does not follow its sigmas"


def row(name, config):
    """One line of the table; if the class runs, also the solver that `solver_of` names and the matching solvers."""
    label = f"`{name}`" + (f" ({', '.join(f'{k}={v!r}' for k, v in config.items())})" if config else "")
    cls = getattr(library, name)
    if "dummy" in cls.__module__:
        return f"| {label} | not run: needs torchsde | | | |", None
    takes = "none"
    if hasattr(cls, "set_timesteps"):
        accepted = inspect.signature(cls.set_timesteps).parameters
        takes = ", ".join(f"`{key}`" for key in ("sigmas", "timesteps") if key in accepted) or "none"
    try:
        scheduler = cls(**config)
        convention = describe(scheduler)
    except (ValueError, TypeError):
        return f"| {label} | {takes} | no | no | not run |", None
    schedule = uneven_schedule(convention)
    given = "no"
    with contextlib.suppress(ValueError):
        proof = fs.diffusers.export(schedule, scheduler, mu=1.0 if config.get("use_dynamic_shifting") else None)
        given = "exact" if proof.exact else "rounded"
    try:
        target, proof = applied(schedule, scheduler)
    except ValueError as error:
        return f"| {label} | {takes} | {given} | no: {why_not(error)} | {own_run(scheduler, convention)} |", None
    target.set_timesteps(STEPS)
    put = f"{'exact' if proof.exact else 'rounded'}, {proof.way}"
    matching = matching_solvers(target, convention, proof.sigmas) if proof.deterministic else []
    solver = ", ".join(matching) or ("own" if proof.deterministic else "adds noise")
    return f"| {label} | {takes} | {given} | {put} | {solver} |", (solver_of(scheduler), matching)


def rows():
    """Every scheduler that the library exports, with the variants above."""
    names = sorted(name for name in dir(library) if name.endswith("Scheduler"))
    return {(name, str(config)): row(name, config) for name in names for config in ({}, *VARIANTS.get(name, []))}


def quietly():
    """Silence the library's warnings about unusual timesteps."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def table():
    """The document."""
    with warnings.catch_warnings():
        quietly()
        return HEADER + "\n".join(line for line, _ in rows().values()) + "\n"


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(table(), encoding="utf-8")
