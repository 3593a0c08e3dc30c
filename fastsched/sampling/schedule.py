"""A schedule: the sigmas, what they are for, and what error to expect."""

from __future__ import annotations

import importlib
import math
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastsched import validate
from fastsched.denoisers.denoiser import Denoiser
from fastsched.denoisers.noise import NoiseProcess
from fastsched.sampling import display
from fastsched.sampling.fitted import checked_weights
from fastsched.sampling.origin import Origin
from fastsched.sampling.read_only import ReadOnlyTensors
from fastsched.sampling.schedule_files import FORMAT, VERSION, read_entries, write_entries
from fastsched.sampling.solvers import FITTED, STOCHASTIC_SOLVERS, get_solver, solver_name

#: What decoupled levels can be levels of (`Schedule.decoupled`).
DECOUPLED = ("denoiser", "timestep")

#: The value to which ComfyUI sets the last ``alphas_cumprod`` of models of zero terminal SNR.
COMFYUI_LAST_ALPHA_BAR = 4.8973451890853435e-08
#: Timesteps above this belong to no model; a file that holds one is damaged.
LARGEST_TIMESTEP = 1e6


class ComfyUISigmas(NamedTuple):
    """One schedule, for a text field and for a ``SIGMAS`` socket."""

    text: str  #: for the node ManualSigmas: "14.6146, 3.2, 0.0", plain decimals
    sigmas: Tensor  #: [steps + 1] float32 on the CPU, descending, the last 0


@dataclass(frozen=True, eq=False)
class Schedule(ReadOnlyTensors):
    """The noise levels of one sampling run.

    It does not change: its tensors are copied when they are read. Two schedules are equal (``==``) if samplers use them
    alike, whatever their errors and origins. ``dataclasses.replace`` keeps the errors and the origin: give None in
    their place where other sigmas are not merely rounded.

    Attributes:
        sigmas: Sampler sigmas [steps + 1], float64, strictly descending, the last 0: k-diffusion's convention.
            For flow models they are times within (0, 1].
        solver: The solver that the sigmas were chosen for, deterministic or stochastic.
        noise: The kind of noise process: ``"ve"``, ``"vp"`` or ``"flow"``.
        timesteps: The network's timestep at each sigma but the last, [steps] float64; None for models that are
            given sigma.
        predicted_error: Predicted ``E ||x0 - x0_converged||^2`` from the same noise, summed over a sample's elements.
        measured_error: The same, measured by running the sampler in `fastsched.audition` or `fastsched.fit`: the power
            mean over their samples. The schedule was tuned on these, so the error of new noises is usually larger.
        weights: The fitted solver's (`fastsched.sampling.fitted`), [steps, steps] float64; None for stock solvers.
        network_sigmas: With decoupled levels, the sigma that the network is given at each step, [steps] float64; None
            if it is that of the state. `timesteps` are those of these sigmas.
        origin: What it was chosen for, and how; None if it is not known.
        decoupled: What ``network_sigmas`` are levels of: ``"denoiser"`` if ``D(z; s)`` is computed for them, as by
            ``model(z, sigma)`` of k-diffusion; ``"timestep"`` if the network gets their timesteps, and ``D`` is
            computed from its output at the state's level, as by schedulers of diffusers. None without them.
    """

    sigmas: Tensor
    solver: str
    noise: str = "ve"
    timesteps: Tensor | None = None
    predicted_error: float | None = None
    measured_error: float | None = None
    weights: Tensor | None = None
    origin: Origin | None = None
    network_sigmas: Tensor | None = None
    decoupled: str | None = None

    def __post_init__(self) -> None:
        sigmas = validate.descending_sigmas("sigmas", self.sigmas, to_zero=True)
        object.__setattr__(self, "sigmas", sigmas)
        object.__setattr__(self, "solver", solver_name(self.solver))
        validate.choice("noise", self.noise, ("ve", "vp", "flow"))
        if self.noise == "flow" and float(sigmas[0]) > 1:
            raise ValueError(f"sigmas of a flow model are times within [0, 1], got {float(sigmas[0]):g}")
        if self.origin is not None:
            validate.instance("origin", self.origin, Origin, "fastsched.measure and fit fill it in")
        for name in ("predicted_error", "measured_error"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _squared_error(name, getattr(self, name)))
        if (self.weights is not None) != (self.solver == FITTED):
            wanted = "given" if self.solver == FITTED else "None"
            raise ValueError(f"weights must be {wanted} for the solver {self.solver!r}")
        if self.weights is not None:
            object.__setattr__(self, "weights", checked_weights(self.weights, len(sigmas) - 1))
        if self.decoupled is not None:
            validate.choice("decoupled", self.decoupled, DECOUPLED)
        if self.network_sigmas is None:
            object.__setattr__(self, "decoupled", None)
        else:
            check_decoupled(self.solver)
            object.__setattr__(self, "decoupled", self.decoupled or "timestep")  # as in files of earlier versions
            levels = _network_sigmas(self.network_sigmas, len(sigmas) - 1, self.noise)
            if self.decoupled == "denoiser" and bool(levels[0].isinf() != sigmas[0].isinf()):
                raise ValueError("network_sigmas and sigmas must both start at pure noise, or neither may")
            object.__setattr__(self, "network_sigmas", levels)
        if self.timesteps is not None:
            object.__setattr__(self, "timesteps", _timesteps(self.timesteps, len(sigmas) - 1, self.noise))

    @classmethod
    def from_levels(
        cls,
        process: NoiseProcess,
        s: Tensor,
        solver: str,
        predicted_error: float | None = None,
        weights: Tensor | None = None,
        origin: Origin | None = None,
        network_levels: Tensor | None = None,
        decoupled: str | None = None,
    ) -> Schedule:
        """A schedule at the noise levels ``s`` [steps + 1] of ``process``, the last of which is 0.

        ``network_levels`` are the levels [steps] that the network is given, if not those of the states; for
        ``decoupled`` see the class.
        """
        return cls(
            sigmas=process.sampler_sigma(s),
            solver=solver,
            noise=process.kind,
            timesteps=process.timestep(s[:-1] if network_levels is None else network_levels),
            network_sigmas=None if network_levels is None else process.sampler_sigma(network_levels),
            decoupled=decoupled,
            predicted_error=predicted_error,
            weights=weights,
            origin=origin,
        )

    @property
    def steps(self) -> int:
        """The number of steps; the last one ends at sigma 0."""
        return len(vars(self)["sigmas"]) - 1  # without a copy, as samplers ask for it in every step

    @property
    def model_calls(self) -> int:
        """Network evaluations a sample."""
        if self.solver in (*STOCHASTIC_SOLVERS, FITTED):
            return self.steps
        return get_solver(self.solver).model_calls(self.steps)

    @property
    def end_sigma(self) -> float:
        """The last sigma at which the network is called, where the step to 0 starts."""
        return float(self.sigmas[-2])

    def __repr__(self) -> str:
        parts = [f"{self.solver}, {self.steps} steps, {self.noise}: [{_brief(self.sigmas)}]"]
        if self.network_sigmas is not None:
            parts.append(f"network told [{_brief(self.network_sigmas)}] ({self.decoupled})")
        if self.weights is not None:
            parts.append(f"weights={_brief_weights(self.weights)}")
        for name in ("predicted_error", "measured_error"):
            if getattr(self, name) is not None:
                parts.append(f"{name}={getattr(self, name):.4g}")
        if self.origin is not None:
            parts.append(f"of {self.origin}")
        return f"Schedule({', '.join(parts)})"

    def __eq__(self, other: object) -> bool:
        return self._used() == other._used() if isinstance(other, Schedule) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.solver, self.noise, *self.sigmas.tolist()))

    def _used(self) -> tuple[Any, ...]:
        """The fields that a sampler uses, as plain values."""
        tensors = (self.sigmas, self.timesteps, self.weights, self.network_sigmas)
        lists = (None if tensor is None else tensor.tolist() for tensor in tensors)
        return self.solver, self.noise, self.decoupled, *lists

    def _repr_html_(self) -> str:
        rows = {
            "sigmas": _brief(self.sigmas),
            "network told": None if self.network_sigmas is None else _brief(self.network_sigmas),
            "weights": None if self.weights is None else _brief_weights(self.weights),
            "predicted error": display.brief(self.predicted_error),
            "measured error": display.brief(self.measured_error),
            "of": self.origin,
        }
        title = f"Schedule: {self.solver}, {self.steps} steps, {self.noise}"
        return display.table(title, rows) + display.node_line(self.sigmas.tolist(), self.noise == "flow")

    def plot(self, stats: Any = None) -> Any:
        """A matplotlib figure of the noise levels, over the cost density of ``stats`` if given.

        Raises:
            ImportError: If matplotlib is missing.
        """
        name = f"{self.solver}, {self.steps} steps"
        return display.figure("plot_schedules", {name: self}, stats=stats)

    def to_diffusers(self, scheduler: Any, *, mu: float | None = None) -> dict[str, Any]:
        """Deprecated: use ``fastsched.diffusers.export(schedule, scheduler, mu=mu).arguments``."""
        validate.warn(
            "Schedule.to_diffusers is now fastsched.diffusers.export(schedule, scheduler).arguments",
            DeprecationWarning,
        )
        # Imported here by name, because sampling must not depend on diffusers, a higher layer.
        return importlib.import_module("fastsched.diffusers").export(self, scheduler, mu=mu).arguments

    def to_comfyui(self) -> ComfyUISigmas:
        """The sigmas for ComfyUI: ``.text`` in plain decimals, ``.sigmas`` [steps + 1] float32.

        Flow times are already shifted and stay unchanged. An infinite first sigma becomes 4518.76, ComfyUI's own value
        for models of zero terminal SNR. The text uses no exponents, because ComfyUI's ManualSigmas misreads them
        ("2e-3"), and as few digits as give the same float32 values.

        Raises:
            ValueError: If the first sigma is infinite and the noise process is not variance-preserving, two sigmas are
                equal as float32, or the levels are decoupled.
        """
        self.check_coupled("ComfyUI")
        sigmas = self.sigmas.to(torch.float32)
        if self.noise == "vp":
            sigmas[sigmas == torch.inf] = math.sqrt(1 / COMFYUI_LAST_ALPHA_BAR - 1)
        if not bool(torch.isfinite(sigmas).all()):
            raise ValueError(
                f"sigmas of a {self.noise!r} schedule must be finite in ComfyUI, got {self.sigmas.tolist()}"
            )
        if not bool((sigmas[1:] < sigmas[:-1]).all()):
            raise ValueError(f"sigmas must differ as float32, which ComfyUI holds, got {self.sigmas.tolist()}")
        text = ", ".join(np.format_float_positional(np.float32(value), trim="0") for value in sigmas.tolist())
        return ComfyUISigmas(text, sigmas)

    def check_coupled(self, who: str, instead: str = "") -> None:
        """ValueError if levels are decoupled, for a program ``who`` that tells the network the sigma of the state."""
        if self.network_sigmas is not None:
            what = f"schedule has decoupled levels (network_sigmas), which {who} cannot use"
            raise ValueError(f"{what}; {instead}fit one with decoupled=False")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON with plain decimals; an existing file is replaced only when the new one is complete.

        Raises:
            ValueError: If the file holds statistics or the runs of a fit, which no schedule replaces.
        """
        validate.arguments(locals())
        # The lowest version that has all entries, so that older releases can read the file.
        version = 1 if self.weights is None else 2
        if self.decoupled is not None:
            version = 3 if self.decoupled == "timestep" else VERSION
        entries: dict[str, Any] = {"format": FORMAT, "version": version, "solver": self.solver, "noise": self.noise}
        for name in ("sigmas", "timesteps", "network_sigmas", "weights", "predicted_error", "measured_error"):
            value = getattr(self, name)
            entries[name] = value.tolist() if isinstance(value, Tensor) else value
        entries["decoupled"] = None if self.decoupled == "timestep" else self.decoupled
        entries["origin"] = None if self.origin is None else self.origin.to_dict()
        write_entries(path, {name: value for name, value in entries.items() if value is not None})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Schedule:
        """Read a file written by `save`.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is truncated or was changed, is not a schedule, or comes from a newer version.
        """
        validate.arguments(locals())
        entries = read_entries(path)
        try:
            return cls(**entries)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)} does not hold a valid schedule: {error}") from None


def _squared_error(name: str, value: float) -> float:
    error = validate.real(name, value)
    if not 0 <= error < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {error!r}")
    return error


def decoupling(name: str, value: object) -> str | None:
    """What levels to decouple: None for False, ``"denoiser"`` for True; TypeError or ValueError for the rest."""
    if isinstance(value, str):
        return validate.choice(name, value, DECOUPLED)
    return "denoiser" if validate.flag(name, value) else None


validate.CHECKS["decoupled"] = decoupling


def check_decoupled(solver: str) -> None:
    """ValueError if a solver cannot have decoupled levels: it adds noise, or calls the network twice per step."""
    if solver in STOCHASTIC_SOLVERS or (solver != FITTED and get_solver(solver).stage is not None):
        raise ValueError(
            f"solver must be deterministic with one call a step for decoupled levels (network_sigmas), got {solver!r}"
        )


def _network_sigmas(values: Tensor, steps: int, noise: str) -> Tensor:
    """Check sigmas that the network is given, one for each step."""
    found = _one_a_step("network_sigmas", values, steps)
    if not bool((found > 0).all()) or not bool((found.diff() < 0).all()):
        raise ValueError(f"network_sigmas must descend and be positive, got {validate.shown(found.tolist())}")
    if noise == "flow" and float(found[0]) > 1:
        raise ValueError(f"network_sigmas of a flow model are times within (0, 1], got {float(found[0]):g}")
    return found


def _one_a_step(name: str, values: Tensor, steps: int) -> Tensor:
    found = validate.float64(name, values)
    if found.shape != (steps,):
        raise ValueError(
            f"{name} must have one value for each sigma but the last, [{steps}], got shape {tuple(found.shape)}"
        )
    return found


def _timesteps(values: Tensor, steps: int, noise: str) -> Tensor:
    """Check timesteps, which descend; those of a flow may ascend, if its network's time is 1 at the data.

    Those of a variance-preserving network may repeat: levels outside its range share its first or last timestep.
    """
    timesteps = _one_a_step("timesteps", values, steps)
    if not bool(((timesteps >= 0) & (timesteps <= LARGEST_TIMESTEP)).all()):
        shown = validate.shown(timesteps.tolist())
        raise ValueError(f"timesteps must be within [0, {LARGEST_TIMESTEP:g}], got {shown}")
    change = timesteps.diff()
    descends = change <= 0 if noise == "vp" else change < 0
    if not bool(descends.all()) and not (noise == "flow" and bool((change > 0).all())):
        raise ValueError(f"timesteps must descend, as sigmas do, got {validate.shown(timesteps.tolist())}")
    return timesteps


def is_schedule(name: str, value: object) -> Schedule:
    """TypeError unless the argument is a `Schedule`."""
    return validate.instance(name, value, Schedule, "fastsched.optimal_schedule and others return one")


def check_sigmas(name: str, run: object, *, to_zero: bool = False) -> Tensor:
    """The sampler sigmas of ``run``, itself sigmas or a `Schedule`; errors as of `validate.descending_sigmas`."""
    if hasattr(run, "sigmas") and not hasattr(run, "solver"):  # the sigmas of statistics are those of a measurement
        raise TypeError(
            f"{name} must be sigmas or a Schedule, which fastsched.optimal_schedule makes of statistics, got "
            f"{type(run).__name__}"
        )
    return validate.descending_sigmas(name, getattr(run, "sigmas", run), to_zero=to_zero)


def check_kind(name: str, value: object, process: NoiseProcess) -> None:
    """ValueError if ``value`` is a `Schedule` in flow times and the process is no flow, or the reverse.

    A flow accepts all sigmas within [0, 1]: they may be flow times although ``noise`` was left at its default.
    """
    if not isinstance(value, Schedule):
        return
    sigmas_for_flow = process.kind == "flow" and value.noise != "flow" and float(value.sigmas[0]) > 1
    if sigmas_for_flow or (value.noise == "flow" and process.kind != "flow"):
        raise ValueError(
            f"{name} must be for the noise process of this model, {process.kind!r}, got a schedule for a "
            f"{value.noise!r} one (Schedule(noise=...))"
        )


def check_start(name: str, run: object, denoiser: Denoiser) -> None:
    """ValueError if ``run``, sigmas or a `Schedule`, starts from pure noise and the denoiser has no finite ``D`` there.

    Variance-exploding states are infinite there, and so is a clean sample computed from a prediction of the noise.
    """
    sigmas = check_sigmas(name, run)[:1]
    if bool(sigmas.isfinite()) or type(denoiser).denoise is not Denoiser.denoise:  # a subclass may know D there
        return
    level = denoiser.process.level(sigmas)
    asked = denoiser.process.timestep(level)
    needed = [denoiser.process.sigma(level), *denoiser.coefficients(level), *([] if asked is None else [asked])]
    if not all(bool(torch.as_tensor(value).isfinite().all()) for value in needed):
        raise ValueError(
            f"{name} must start at a finite sigma, got inf: this model's prediction of {denoiser.prediction} with its "
            f"{denoiser.process.kind!r} noise process gives no clean sample from pure noise; start at its highest level"
        )


def check_run(name: str, run: object, denoiser: Denoiser, process: NoiseProcess | None = None) -> None:
    """`check_kind`, for ``process`` or else the denoiser's, and `check_start`."""
    check_kind(name, run, process or denoiser.process)
    check_start(name, run, denoiser)


def _brief(values: Tensor) -> str:
    return ", ".join(f"{value:.4g}" for value in values.tolist())


def _brief_weights(weights: Tensor) -> str:
    """Up to 8 rows without the zeros above the diagonal, as ``[1 | -0.5 1.5 | ...]``; else shape and range."""
    if len(weights) > 8:
        return f"[{len(weights)}, {len(weights)}] from {float(weights.min()):.3g} to {float(weights.max()):.3g}"
    rows = [" ".join(f"{value:.3g}" for value in row[: n + 1]) for n, row in enumerate(weights.tolist())]
    return "[" + " | ".join(rows) + "]"
