"""The conventions of a diffusers scheduler: noise process, prediction, and the state that it steps.

A pipeline's loop is the same for all of them::

    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(output, t, x).prev_sample

but ``x`` is a variance-exploding state for some classes and the process's own for others, ``t`` an index, a flow time
times 1000 or ``log(sigma) / 4``, and ``output`` one of five predictions. `describe` reads these off a scheduler.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
from torch import Tensor

from fastsched import validate
from fastsched.denoisers.denoiser import Denoiser
from fastsched.denoisers.noise import FlowMatching, NoiseProcess, VarianceExploding, VariancePreserving
from fastsched.sampling.solvers import FITTED

#: The known classes, each with its family and the solver of fastsched that it equals with any settings, if any.
#: Families: ``scaled`` steps ``z = x / alpha`` and scales it down to ``x`` for the network; ``vp`` steps ``x`` itself
#: and uses integer timesteps; ``angle`` has the timesteps ``2/pi atan(s)`` of ``alpha = cos``, ``sigma = sin`` (Dance
#: Diffusion).
SCHEDULERS: dict[str, tuple[str, str | None]] = {
    "EulerDiscreteScheduler": ("scaled", "ddim"),
    "EulerAncestralDiscreteScheduler": ("scaled", None),
    "HeunDiscreteScheduler": ("scaled", "heun"),
    "LMSDiscreteScheduler": ("scaled", "lms"),
    "KDPM2DiscreteScheduler": ("scaled", "dpm_2"),
    "KDPM2AncestralDiscreteScheduler": ("scaled", None),
    "DPMSolverSDEScheduler": ("scaled", None),
    "DDIMScheduler": ("vp", "ddim"),
    "DDIMParallelScheduler": ("vp", "ddim"),
    "DDPMScheduler": ("vp", None),
    "DDPMParallelScheduler": ("vp", None),
    "DPMSolverMultistepScheduler": ("vp", None),
    "DPMSolverSinglestepScheduler": ("vp", None),
    "DEISMultistepScheduler": ("vp", None),
    "UniPCMultistepScheduler": ("vp", None),
    "SASolverScheduler": ("vp", None),
    "PNDMScheduler": ("vp", None),
    "LCMScheduler": ("vp", None),
    "TCDScheduler": ("vp", None),
    "CogVideoXDDIMScheduler": ("vp", "ddim"),
    "CogVideoXDPMScheduler": ("vp", None),
    "FlowMatchEulerDiscreteScheduler": ("flow", "ddim"),
    "FlowMatchHeunDiscreteScheduler": ("flow", "heun"),
    "FlowMatchLCMScheduler": ("flow", None),
    "FlowMapEulerDiscreteScheduler": ("flow", "ddim"),
    "LTXEulerAncestralRFScheduler": ("flow", None),
    "EDMEulerScheduler": ("edm", "ddim"),
    "EDMDPMSolverMultistepScheduler": ("edm", None),
    "IPNDMScheduler": ("angle", "ipndm"),
}

#: Classes whose second network call is at the midpoint in ``log s``, which they list as a timestep too.
MIDPOINT = ("KDPM2DiscreteScheduler", "DPMSolverSDEScheduler")

#: Below this many steps, some classes of third order use second order in the last step but one.
FEW_STEPS = 15

#: Training timesteps of most models.
TRAIN_STEPS = 1000

#: diffusers' ``prediction_type`` to the names used by `fastsched.Denoiser`.
PREDICTIONS = {
    "epsilon": "epsilon",
    "v_prediction": "v",
    "sample": "x0",
    "original_sample": "x0",
    "flow_prediction": "velocity",
}


@dataclass(frozen=True)
class Convention:
    """The conventions shared by a scheduler and its network."""

    #: The noise process and prediction. Its network is the pipeline's, and cannot be called.
    denoiser: Denoiser
    sign: float = 1.0  #: factor that turns the network's output into ``R`` (-1 for EDM networks that predict ``v``)
    scaled: bool = False  #: whether the state between steps is ``z = x / alpha`` (the process's own ``x`` otherwise)
    train_steps: int = TRAIN_STEPS  #: training timesteps of the model; flow times are multiplied by it
    #: Whether the network's output holds a variance after the prediction, which is dropped.
    learned_variance: bool = False
    angle: bool = False  #: whether timesteps are ``2/pi atan(s)``

    @property
    def process(self) -> NoiseProcess:
        """The noise process."""
        return self.denoiser.process

    @property
    def scales_input(self) -> bool:
        """Whether the network's input differs from the state between steps."""
        return self.scaled or self.denoiser.prediction == "edm"

    def timesteps(self, s: Tensor) -> Tensor:
        """The network's timesteps at levels ``s``, fractional between trained ones: float64, of the shape of ``s``."""
        if self.angle:
            return 2 / math.pi * s.atan()
        if isinstance(self.process, VarianceExploding):
            return s.log() / 4
        if isinstance(self.process, VariancePreserving):
            return replace(self.process, integer_timesteps=False).timestep(s)
        timesteps = self.process.timestep(s)
        assert timesteps is not None  # only variance-exploding networks are given sigma
        return timesteps * self.train_steps if isinstance(self.process, FlowMatching) else timesteps

    def levels(self, timesteps: Tensor) -> Tensor:
        """The levels ``s`` of ``timesteps``: the inverse of `timesteps`, float64."""
        t = timesteps.detach().to("cpu", torch.float64)
        if self.angle:
            return (math.pi / 2 * t).tan()
        if isinstance(self.process, VarianceExploding):
            return (4 * t).exp()
        if isinstance(self.process, FlowMatching):
            return t / self.train_steps / (1 - t / self.train_steps)
        assert isinstance(self.process, VariancePreserving)
        trained = self.process.trained_levels.log()
        low = t.floor().long().clamp(0, len(trained) - 2)
        fraction = t - low
        mixed = torch.lerp(trained[low], trained[low + 1], fraction)
        exact = torch.where(fraction < 0.5, trained[low], trained[low + 1])  # the last level may be infinite
        return torch.where((fraction == 0) | (fraction == 1), exact, mixed).exp()

    def input_scale(self, s: Tensor) -> Tensor:
        """Factor from ``x`` to the network's input: ``c_in = 1/sqrt(s^2 + sigma_data^2)`` for EDM networks, or 1."""
        if self.denoiser.prediction != "edm":
            return torch.ones_like(s)
        return (s.square() + self.denoiser.sigma_data**2).rsqrt()

    def raw_output(self, output: Tensor, channels: int) -> Tensor:
        """``R`` from a network's ``output`` for a state of ``channels`` channels."""
        if self.learned_variance and output.ndim > 1 and output.shape[1] == 2 * channels:
            output = output[:, :channels]
        return output if self.sign == 1.0 else self.sign * output


def describe(scheduler: Any) -> Convention:
    """The conventions of ``scheduler``, an object of a diffusers class, and of its network.

    Raises:
        TypeError: If ``scheduler`` is not a scheduler object, such as a pipeline or a class.
        ValueError: If the class has a noise process, a prediction or a setting that fastsched does not support.
    """
    if isinstance(scheduler, type) or not (hasattr(scheduler, "config") and hasattr(scheduler, "step")):
        what = scheduler.__name__ if isinstance(scheduler, type) else type(scheduler).__name__
        raise TypeError(f"scheduler must be a scheduler of diffusers, as pipe.scheduler is, got {what}")
    if "FittedScheduler" in class_names(scheduler):  # compared by name: its module imports this one
        return scheduler.convention
    family, _ = _known(scheduler)
    if family is None:
        raise ValueError(
            f"{type(scheduler).__name__} has a noise process or a way of stepping that fastsched does not support; "
            "DDPM-like, EDM and flow-matching schedulers are supported (docs/schedulers.md lists them)"
        )
    if family in ("edm", "angle"):
        return _edm(scheduler) if family == "edm" else _angle(scheduler)
    if family == "flow" or scheduler.config.get("use_flow_sigmas"):
        return _flow(scheduler)
    if scheduler.config.get("timestep_type", "discrete") == "continuous" and _prediction(scheduler) == "v":
        return _continuous_v(scheduler)
    return _variance_preserving(scheduler, scaled=family == "scaled")


def class_names(scheduler: Any) -> set[str]:
    """The names of a scheduler's class and of those it derives from: a subclass is treated as its base."""
    return {cls.__name__ for cls in type(scheduler).__mro__}


def own_scheduler(scheduler: Any) -> Any:
    """``scheduler``, or if it is a `FittedScheduler`, the pipeline's own scheduler, which it replaces."""
    return scheduler.own_scheduler() if "FittedScheduler" in class_names(scheduler) else scheduler


def warn_of_overrides(scheduler: Any) -> None:
    """Warn if a class outside diffusers changes what the network is given or how its outputs are read.

    A measurement does that itself, by the conventions of the class of diffusers that it derives from.
    """
    base = _known_class(scheduler)
    for name in ("scale_model_input", "convert_model_output"):
        if base is not None and getattr(type(scheduler), name, None) is not getattr(base, name, None):
            validate.warn(
                f"{type(scheduler).__name__} has its own {name}, but is measured as {base.__name__}: if that method "
                "changes what the network is given or how its outputs are read, do the same in the network instead",
            )


def class_and_settings(scheduler: Any) -> tuple[str, dict[str, Any]]:
    """The name of a scheduler's diffusers class, and its present settings in a form that JSON can hold."""
    known = next(base for base in type(scheduler).__mro__ if hasattr(diffusers, base.__name__))
    settings = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    return known.__name__, {key: each.tolist() if hasattr(each, "tolist") else each for key, each in settings.items()}


def check_pipe(pipe: Any) -> None:
    """Check that ``pipe`` is a pipeline with a scheduler of its own.

    Raises:
        TypeError: If it is not.
        ValueError: If it only calls other pipelines that it holds, each with a scheduler: a combined pipeline.
    """
    if isinstance(pipe, type) or getattr(pipe, "scheduler", None) is None:
        what = f"the class {pipe.__name__}" if isinstance(pipe, type) else type(pipe).__name__
        unloaded = hasattr(pipe, "scheduler") and hasattr(pipe, "load_components")
        hint = ", whose scheduler is not loaded; call pipe.load_components() or update_components()" if unloaded else ""
        held = {} if isinstance(pipe, type) else getattr(pipe, "__dict__", {})
        others = [f"pipe.{name}" for name, each in held.items() if "scheduler" in name and hasattr(each, "step")]
        hint += f", but {' and '.join(others)}: only a loop that steps pipe.scheduler can be used" if others else ""
        raise TypeError(f"pipe must be a pipeline with a scheduler, got {what}{hint}")
    place = inspect.getattr_static(pipe, "scheduler", None)
    if place is None or (isinstance(place, property) and place.fset is None):
        inner = [f"pipe.{name}" for name in holders_of(pipe.scheduler, pipe)]
        raise TypeError(
            f"pipe must hold its scheduler itself, but {type(pipe).__name__} hands on that of another object; pass "
            f"the pipeline that it wraps{', ' if inner else ''}{' or '.join(inner)}"
        )
    own = _networks(pipe)
    held = {name: value for name, value in vars(pipe).items() if hasattr(value, "scheduler")}
    parts = [f"pipe.{name}" for name, value in held.items() if callable(value) and set() < _networks(value) <= own]
    if parts:
        raise ValueError(
            f"pipe must step its latents itself: {type(pipe).__name__} calls pipelines that have schedulers of their "
            f"own; pass the one that is meant, {' or '.join(parts)}"
        )


def holders_of(scheduler: Any, pipe: Any) -> list[str]:
    """The attributes of ``pipe``, such as pipelines, that hold ``scheduler`` too."""
    return [name for name, value in vars(pipe).items() if getattr(value, "scheduler", None) is scheduler]


def _networks(pipe: Any) -> set[int]:
    return {id(value) for value in vars(pipe).values() if isinstance(value, torch.nn.Module)}


def solver_of(scheduler: Any, steps: int | None = None) -> str | None:
    """The solver of fastsched that ``scheduler`` equals with its present settings; None if there is none.

    tests/diffusers/test_table.py compares the two for every class. With fewer than 15 ``steps`` (or None) a class of
    third order may use second order in its last step but one. For a `FittedScheduler` the scheduler it replaced counts.
    """
    scheduler = own_scheduler(scheduler)
    names = class_names(scheduler)
    config = scheduler.config
    lowered = bool(config.get("lower_order_final")) and (steps is None or steps < FEW_STEPS)
    if names & {"DPMSolverMultistepScheduler", "EDMDPMSolverMultistepScheduler"}:
        if config.algorithm_type != "dpmsolver++":
            return None
        if config.solver_order == 3:
            return "dpmpp_3m_lowered" if lowered else "dpmpp_3m"
        if config.solver_order == 1:
            return "ddim"
        return "dpmpp_2m" if config.solver_type == "midpoint" else None
    if "DEISMultistepScheduler" in names:
        if config.solver_order == 1:
            return "ddim"
        if config.get("use_flow_sigmas"):
            return None
        return "deis_3_lowered" if config.solver_order == 3 and lowered else f"deis_{config.solver_order}"
    if "UniPCMultistepScheduler" in names:
        return _unipc_of(config)
    if "FlowMatchEulerDiscreteScheduler" in names and config.get("stochastic_sampling"):
        return None
    return _known(scheduler)[1]


def other_solver(scheduler: Any, solver: str, steps: int) -> str | None:
    """The solver that ``scheduler`` equals if that is not ``solver``; None if it is, or if there is none."""
    own = solver_of(scheduler, steps)
    return None if own is None or solver in (own, own.removesuffix("_lowered"), FITTED) else own


def _known(scheduler: Any) -> tuple[str | None, str | None]:
    """The entry in `SCHEDULERS` of a scheduler's class or of its nearest base class."""
    known = _known_class(scheduler)
    return (None, None) if known is None else SCHEDULERS[known.__name__]


def _known_class(scheduler: Any) -> type | None:
    """A scheduler's class or its nearest base class, of those in `SCHEDULERS`; None if there is none."""
    return next((cls for cls in type(scheduler).__mro__ if cls.__name__ in SCHEDULERS), None)


def _unipc_of(config: Any) -> str | None:
    if not config.predict_x0 or config.disable_corrector or config.solver_p is not None:
        return None
    if config.solver_order == 1:
        return None  # its corrector is a predictor of second order
    variant = {"bh1": "unipc_bh1", "bh2": "unipc"}[config.solver_type]
    third = f"{variant}_3_lowered" if config.lower_order_final else f"{variant}_3"  # at any number of steps
    return {2: variant, 3: third}.get(config.solver_order)


def _pipeline_network(x: Tensor, condition: Tensor) -> Tensor:
    raise RuntimeError("only the pipeline's own loop can call this network")


def _variance_preserving(scheduler: Any, *, scaled: bool) -> Convention:
    abar = scheduler.alphas_cumprod.double()
    if scheduler.config.get("rescale_betas_zero_snr") and bool(abar[-1] >= abar[-2]):
        raise ValueError(
            f"{type(scheduler).__name__} with rescale_betas_zero_snr=True puts 2^-24 for 0 at the last timestep, which "
            f"with beta_schedule={scheduler.config.beta_schedule!r}, beta_start={scheduler.config.beta_start:g} and "
            f"beta_end={scheduler.config.beta_end:g} is more than at the one before, so its levels do not descend; use "
            "a class that keeps the 0 (pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)), or set "
            "rescale_betas_zero_snr=False if the model was trained without it"
        )
    process = VariancePreserving(abar, integer_timesteps=not scaled)  # type: ignore[arg-type]  # __post_init__ makes it a tuple
    prediction = _prediction(scheduler)
    if prediction == "velocity":
        raise ValueError("prediction_type 'flow_prediction' needs use_flow_sigmas=True in the scheduler's config")
    if prediction == "epsilon" and math.isinf(process.s_max):
        raise ValueError(
            f"{type(scheduler).__name__} has zero terminal SNR with prediction_type 'epsilon', which tells nothing "
            "about the image at pure noise; set prediction_type='v_prediction', or rescale_betas_zero_snr=False"
        )
    return Convention(
        Denoiser(_pipeline_network, process, prediction),
        scaled=scaled,
        train_steps=len(abar),
        learned_variance=scheduler.config.get("variance_type") in ("learned", "learned_range"),
    )


def _continuous_v(scheduler: Any) -> Convention:
    """Stable Video Diffusion: EDM's preconditioning with ``sigma_data = 1``, and ``v = -F``."""
    trained = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).double().sqrt()
    low, high = (scheduler.config.get(name) for name in ("sigma_min", "sigma_max"))
    process = VarianceExploding(float(trained[0]) if low is None else low, float(trained[-1]) if high is None else high)
    return Convention(Denoiser(_pipeline_network, process, "edm", 1.0), sign=-1.0, scaled=True)


def _edm(scheduler: Any) -> Convention:
    config = scheduler.config
    process = VarianceExploding(config.sigma_min, config.sigma_max)
    prediction = _prediction(scheduler)
    if prediction not in ("epsilon", "v"):
        raise ValueError(f"prediction_type must be 'epsilon' or 'v_prediction' for EDM, got {config.prediction_type!r}")
    denoiser = Denoiser(_pipeline_network, process, "edm", config.sigma_data)
    return Convention(denoiser, sign=-1.0 if prediction == "v" else 1.0, scaled=True)


def _flow(scheduler: Any) -> Convention:
    steps = int(scheduler.config.num_train_timesteps)
    if scheduler.config.get("invert_sigmas"):
        raise ValueError(
            "invert_sigmas=True (Mochi, OmniGen) steps from 0 to 1, which is not supported; measure its network, "
            f"fastsched.Denoiser.from_velocity(lambda x, t: network(x, t * {steps}), data_at=1), by fastsched.measure, "
            "and pass sigmas=schedule.sigmas[:-1].tolist() where the call takes them and the scheduler's shift is 1"
        )
    prediction = _prediction(scheduler) if scheduler.config.get("use_flow_sigmas") else "velocity"
    if prediction != "velocity":
        kind = scheduler.config.prediction_type
        raise ValueError(f"prediction_type must be 'flow_prediction' with use_flow_sigmas=True, got {kind!r}")
    shift = float(scheduler.config.get("flow_shift", 1.0))
    lowest = scheduler.__dict__.get("sigma_min") or shift / (steps + shift - 1)
    if steps == 1:  # the network takes the flow time itself (ACE-Step, Stable Audio 3); training is as in other models
        shift = float(scheduler.config.get("flow_shift") or scheduler.config.get("shift") or 1.0)
        lowest = shift / (TRAIN_STEPS + shift - 1)
    return Convention(Denoiser(_pipeline_network, FlowMatching(float(lowest), 1.0), "velocity"), train_steps=steps)


def _angle(scheduler: Any) -> Convention:
    """Dance Diffusion: continuous angles, within the range that float32 resolves in the class."""
    angles = torch.arange(1, 991, dtype=torch.float64, device="cpu") * (math.pi / 2000)
    process = VariancePreserving(angles.cos().square())  # type: ignore[arg-type]  # __post_init__ makes it a tuple
    return Convention(Denoiser(_pipeline_network, process, "v"), train_steps=1, angle=True)


def visited(scheduler: Any, sigmas: Tensor) -> Tensor:
    """The sampler sigmas at which the network is called along ``sigmas`` [n + 1], midpoints included."""
    if not class_names(scheduler).intersection(MIDPOINT):
        return sigmas
    inner = sigmas[:-1]
    middles = (inner[:-1] * inner[1:]).sqrt()
    return torch.cat([torch.stack([inner[:-1], middles], 1).flatten(), sigmas[-2:]])


def _prediction(scheduler: Any) -> str:
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind not in PREDICTIONS:
        raise ValueError(f"prediction_type must be one of {', '.join(map(repr, PREDICTIONS))}, got {kind!r}")
    return PREDICTIONS[kind]


def class_of(config: dict[str, Any]) -> str:
    """The class of a ``config``: from its class name if it was loaded, from its entries if it was made in memory."""
    if "_class_name" in config:
        return config["_class_name"]
    entries = {key for key in config if not key.startswith("_")}
    for name in SCHEDULERS:
        accepted = set(inspect.signature(getattr(diffusers, name).__init__).parameters) - {"self", "kwargs"}
        if accepted == entries:
            return name
    raise ValueError(
        "config does not name its class, and its entries are not those of a supported scheduler; use "
        "CalibrationScheduler.from_scheduler(pipe.scheduler)"
    )
