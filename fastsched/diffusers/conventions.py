"""What a scheduler of diffusers means: its noise process, what its network predicts, and the state it steps.

A pipeline's loop is the same for all of them::

    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(output, t, x).prev_sample

but ``x`` is a variance-exploding state for some classes and the process's own for others, ``t`` an index, a flow time
times 1000 or ``log(sigma) / 4``, and ``output`` one of five predictions. `describe` reads all that off a scheduler.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastsched.denoisers.denoiser import Denoiser
from fastsched.denoisers.noise import FlowMatching, NoiseProcess, VarianceExploding, VariancePreserving

#: Classes that step ``z = x / alpha`` and scale it down to ``x`` for the network.
SCALED_VP = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
)
#: Classes that step ``x`` itself and name levels by whole timesteps.
PLAIN_VP = (
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "SASolverScheduler",
    "PNDMScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
)
FLOW = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "FlowMapEulerDiscreteScheduler",
    "LTXEulerAncestralRFScheduler",
)
EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
#: Classes whose timesteps are the angle ``2/pi atan(s)`` of ``alpha = cos``, ``sigma = sin`` (Dance Diffusion).
ANGLE = ("IPNDMScheduler",)
KNOWN = SCALED_VP + PLAIN_VP + FLOW + EDM + ANGLE

#: Classes that ask the network a second time halfway in ``log s``, and call that a timestep too.
MIDPOINT = ("KDPM2DiscreteScheduler", "DPMSolverSDEScheduler")

#: Below so many steps, some classes of third order take the last step but one by second order.
FEW_STEPS = 15

#: Classes that are one of our solvers whatever their settings.
SAME_SOLVER = {
    "ddim": (
        "EulerDiscreteScheduler",
        "EDMEulerScheduler",
        "DDIMScheduler",
        "DDIMParallelScheduler",
        "CogVideoXDDIMScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "FlowMapEulerDiscreteScheduler",
    ),
    "heun": ("HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
    "dpm_2": ("KDPM2DiscreteScheduler",),
    "lms": ("LMSDiscreteScheduler",),
    "ipndm": ("IPNDMScheduler",),
}

#: diffusers' ``prediction_type`` in the words of `fastsched.Denoiser`.
PREDICTIONS = {
    "epsilon": "epsilon",
    "v_prediction": "v",
    "sample": "x0",
    "original_sample": "x0",
    "flow_prediction": "velocity",
}


@dataclass(frozen=True)
class Convention:
    """How a scheduler and its network speak.

    Attributes:
        denoiser: The noise process and prediction; its network is the pipeline, and cannot be called.
        sign: What the network's output is multiplied by to be ``R`` (-1 for EDM networks that predict ``v``).
        scaled: Whether the state between steps is ``z = x / alpha`` (the process's own ``x`` otherwise).
        train_steps: Timesteps of the model; flow times are multiplied by it.
        integer: Whether the class names levels by whole timesteps.
        learned_variance: Whether the network's output holds a variance after the prediction, to be dropped.
        angle: Whether levels are named by ``2/pi atan(s)``.
    """

    denoiser: Denoiser
    sign: float = 1.0
    scaled: bool = False
    train_steps: int = 1000
    integer: bool = False
    learned_variance: bool = False
    angle: bool = False

    @property
    def process(self) -> NoiseProcess:
        """The noise process."""
        return self.denoiser.process

    def timesteps(self, s: Tensor) -> Tensor:
        """What names levels ``s`` to the network, fractional in between: float64, of the shape of ``s``."""
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
        """The levels ``s`` at which a network understands ``timesteps``: the inverse of `timesteps`, float64."""
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
        whole = torch.where(fraction < 0.5, trained[low], trained[low + 1])  # the last level may be infinite
        return torch.where((fraction == 0) | (fraction == 1), whole, mixed).exp()

    def input_scale(self, s: Tensor) -> Tensor:
        """What the network's input is, over ``x``: ``c_in = 1/sqrt(s^2 + sigma_data^2)`` for EDM networks, or 1."""
        if self.denoiser.prediction != "edm":
            return torch.ones_like(s)
        return (s.square() + self.denoiser.sigma_data**2).rsqrt()

    def raw_output(self, output: Tensor, channels: int) -> Tensor:
        """``R`` of a network's ``output`` for a state of ``channels`` channels."""
        if self.learned_variance and output.ndim > 1 and output.shape[1] == 2 * channels:
            output = output[:, :channels]
        return output if self.sign == 1.0 else self.sign * output


def describe(scheduler: Any) -> Convention:
    """How ``scheduler``, an object of a diffusers class, and its network speak.

    Raises:
        TypeError: If ``scheduler`` is none, but its pipeline or class.
        ValueError: If the class has a noise process, a prediction or a setting that fastsched does not know.
    """
    if isinstance(scheduler, type) or not (hasattr(scheduler, "config") and hasattr(scheduler, "step")):
        what = scheduler.__name__ if isinstance(scheduler, type) else type(scheduler).__name__
        raise TypeError(f"scheduler must be a scheduler of diffusers, as pipe.scheduler is, got {what}")
    names = {cls.__name__ for cls in type(scheduler).__mro__}
    if names.intersection(EDM):
        return _edm(scheduler)
    if names.intersection(ANGLE):
        return _angle(scheduler)
    known_vp = names.intersection(SCALED_VP + PLAIN_VP)
    if names.intersection(FLOW) or (known_vp and _setting(scheduler, "use_flow_sigmas", False)):
        return _flow(scheduler)
    if known_vp:
        if _setting(scheduler, "timestep_type", "discrete") == "continuous" and _prediction(scheduler) == "v":
            return _continuous_v(scheduler)
        return _variance_preserving(scheduler, scaled=bool(names.intersection(SCALED_VP)))
    raise ValueError(
        f"{type(scheduler).__name__} has a noise process or a way of stepping that fastsched does not know; "
        "schedules exist for DDPM-like, EDM and flow-matching schedulers (docs/schedulers.md lists them)"
    )


def check_pipe(pipe: Any) -> None:
    """Check that ``pipe`` is a pipeline with a scheduler.

    Raises:
        TypeError: If it is not.
    """
    if isinstance(pipe, type) or getattr(pipe, "scheduler", None) is None:
        what = f"the class {pipe.__name__}" if isinstance(pipe, type) else type(pipe).__name__
        raise TypeError(f"pipe must be a pipeline with a scheduler, got {what}")


def solver_of(scheduler: Any, steps: int | None = None) -> str | None:
    """Which of fastsched's solvers the class and settings of ``scheduler`` are; None if none of them.

    Proven for each class by running both (tests/test_diffusers_table.py). With few ``steps`` (or None) a class of third
    order may lower it in its last step but one, and is none.
    """
    names = {cls.__name__ for cls in type(scheduler).__mro__}
    config = scheduler.config
    lowered = bool(config.get("lower_order_final")) and (steps is None or steps < FEW_STEPS)
    if names & {"DPMSolverMultistepScheduler", "EDMDPMSolverMultistepScheduler"}:
        if config.algorithm_type != "dpmsolver++":
            return None
        if config.solver_order == 3:
            return None if lowered else "dpmpp_3m"
        if config.solver_order == 1:
            return "ddim"
        return "dpmpp_2m" if config.solver_type == "midpoint" else None
    if "DEISMultistepScheduler" in names:
        if config.solver_order == 1:
            return "ddim"
        if config.get("use_flow_sigmas") or (config.solver_order == 3 and lowered):
            return None
        return f"deis_{config.solver_order}"
    if "UniPCMultistepScheduler" in names:
        return _unipc_of(config)
    if names & {"FlowMatchEulerDiscreteScheduler"} and config.get("stochastic_sampling"):
        return None
    for solver, classes in SAME_SOLVER.items():
        if names.intersection(classes):
            return solver
    return None


def _unipc_of(config: Any) -> str | None:
    if not config.predict_x0 or config.disable_corrector or config.solver_p is not None:
        return None
    if config.solver_order == 1:
        return None  # its corrector is a predictor of second order
    if config.solver_order == 3 and config.lower_order_final:  # its last step but one is of second order
        return None
    variant = {"bh1": "unipc_bh1", "bh2": "unipc"}[config.solver_type]
    return {2: variant, 3: f"{variant}_3"}.get(config.solver_order)


def _pipeline_network(x: Tensor, condition: Tensor) -> Tensor:
    raise RuntimeError("this network is a pipeline's; it can be called by the pipeline's loop alone")


def _variance_preserving(scheduler: Any, *, scaled: bool) -> Convention:
    abar = scheduler.alphas_cumprod.double()
    process = VariancePreserving(abar, integer_timesteps=not scaled)  # type: ignore[arg-type]  # made a tuple
    prediction = _prediction(scheduler)
    if prediction == "velocity":
        raise ValueError("prediction_type 'flow_prediction' needs use_flow_sigmas=True in the scheduler's config")
    if prediction == "epsilon" and math.isinf(process.s_max):
        raise ValueError(
            f"{type(scheduler).__name__} has zero terminal SNR with prediction_type 'epsilon', which says nothing of "
            "the image there; the model was trained with 'v_prediction', or without rescale_betas_zero_snr"
        )
    return Convention(
        Denoiser(_pipeline_network, process, prediction),
        scaled=scaled,
        train_steps=len(abar),
        integer=not scaled,
        learned_variance=_setting(scheduler, "variance_type", None) in ("learned", "learned_range"),
    )


def _continuous_v(scheduler: Any) -> Convention:
    """Stable Video Diffusion: EDM's preconditioning with ``sigma_data = 1``, and ``v = -F``."""
    trained = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).double().sqrt()
    low, high = (_setting(scheduler, name, None) for name in ("sigma_min", "sigma_max"))
    process = VarianceExploding(float(trained[0]) if low is None else low, float(trained[-1]) if high is None else high)
    return Convention(Denoiser(_pipeline_network, process, "edm", 1.0), sign=-1.0, scaled=True)


def _edm(scheduler: Any) -> Convention:
    config = scheduler.config
    process = VarianceExploding(config.sigma_min, config.sigma_max)
    prediction = _prediction(scheduler)
    if prediction not in ("epsilon", "v"):
        raise ValueError(f"prediction_type {config.prediction_type!r} is not one of an EDM network's")
    denoiser = Denoiser(_pipeline_network, process, "edm", config.sigma_data)
    return Convention(denoiser, sign=-1.0 if prediction == "v" else 1.0, scaled=True)


def _flow(scheduler: Any) -> Convention:
    if _setting(scheduler, "invert_sigmas", False):
        raise ValueError("invert_sigmas=True (Mochi) turns flow time around, which fastsched does not know")
    prediction = _prediction(scheduler) if _setting(scheduler, "use_flow_sigmas", False) else "velocity"
    if prediction != "velocity":
        raise ValueError(f"a flow scheduler with prediction_type {scheduler.config.prediction_type!r} is not known")
    steps = int(scheduler.config.num_train_timesteps)
    shift = float(_setting(scheduler, "flow_shift", 1.0))
    lowest = scheduler.__dict__.get("sigma_min") or shift / (steps + shift - 1)
    return Convention(Denoiser(_pipeline_network, FlowMatching(float(lowest), 1.0), "velocity"), train_steps=steps)


def _angle(scheduler: Any) -> Convention:
    """Dance Diffusion: continuous angles, of which those where the class's float32 tells signal from noise."""
    angles = torch.arange(1, 991, dtype=torch.float64) * (math.pi / 2000)
    process = VariancePreserving(angles.cos().square())  # type: ignore[arg-type]  # made a tuple
    return Convention(Denoiser(_pipeline_network, process, "v"), train_steps=1, angle=True)


def visited(scheduler: Any, sigmas: Tensor) -> Tensor:
    """The sampler sigmas that the states pass on the way along ``sigmas`` [n + 1]: stages with a timestep, too."""
    if not {cls.__name__ for cls in type(scheduler).__mro__}.intersection(MIDPOINT):
        return sigmas
    inner = sigmas[:-1]
    middles = (inner[:-1] * inner[1:]).sqrt()
    return torch.cat([torch.stack([inner[:-1], middles], 1).flatten(), sigmas[-2:]])


def _prediction(scheduler: Any) -> str:
    kind = _setting(scheduler, "prediction_type", "epsilon")
    if kind not in PREDICTIONS:
        raise ValueError(f"prediction_type {kind!r} is not one of {', '.join(map(repr, PREDICTIONS))}")
    return PREDICTIONS[kind]


def _setting(scheduler: Any, name: str, default: Any) -> Any:
    """An entry of the scheduler's config, which may lack it."""
    return scheduler.config.get(name, default)
