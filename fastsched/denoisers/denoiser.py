"""A denoiser: a network, what it predicts, and the noise process it was trained on.

Every parameterisation is affine in the network's raw output ``R``: ``D(x; s) = a * x + c * R``. The code keeps
``(a, c)`` and ``R`` separate as long as possible. Differences of ``R`` between close levels are exact, but
differences of a rounded ``D`` are mostly rounding noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from fastsched import validate
from fastsched.denoisers import edm
from fastsched.denoisers.batch_levels import on_device, per_sample, sample_levels
from fastsched.denoisers.network_errors import checked_call
from fastsched.denoisers.noise import (
    ContinuousVP,
    FlowMatching,
    NoiseProcess,
    VarianceExploding,
    VariancePreserving,
)

Network = Callable[[Tensor, Tensor], Tensor]

#: ``(a, c)`` from alpha and sigma, as in the table of `Denoiser.coefficients`.
_COEFFICIENTS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "x0": lambda alpha, sigma: (torch.zeros_like(sigma), torch.ones_like(sigma)),
    "epsilon": lambda alpha, sigma: (1 / alpha, -sigma / alpha),
    "v": lambda alpha, sigma: (alpha, -sigma),
    "velocity": lambda alpha, sigma: (torch.ones_like(sigma), -sigma),
    "reverse_velocity": lambda alpha, sigma: (torch.ones_like(sigma), sigma),
    "score": lambda alpha, sigma: (1 / alpha, sigma.square() / alpha),
}
#: The quantities that a network may predict.
PREDICTIONS = (*_COEFFICIENTS, "edm")


@dataclass(frozen=True)
class Denoiser:
    """A network with everything needed to read its output as ``E[x0 | x]``.

    Build one with `from_denoiser`, `from_edm`, `from_epsilon`, `from_v`, `from_velocity`,
    `from_score` or `from_vp_score`.

    Attributes:
        network: ``fn(x, condition) -> R``; ``condition`` has shape [B].
        process: The noise process, which defines the levels and the scaling of ``x``.
        prediction: The quantity ``R`` that the network predicts, one of `PREDICTIONS`.
        sigma_data: Standard deviation of the data in EDM's preconditioning; used only by ``"edm"``.
    """

    network: Network = field(repr=False)  # a module's own repr takes pages
    process: NoiseProcess
    prediction: str
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        validate.function("network", self.network)
        validate.instance("process", self.process, NoiseProcess, "of fastsched.denoisers.noise")
        validate.choice("prediction", self.prediction, PREDICTIONS)
        validate.positive("sigma_data", self.sigma_data)

    @classmethod
    def from_denoiser(cls, fn: Network, sigma_min: float, sigma_max: float) -> Denoiser:
        """From ``fn(z, sigma) -> x0`` of a variance-exploding model, ``sigma`` of shape [B] (k-diffusion).

        Raises:
            ValueError: Unless ``0 < sigma_min < sigma_max``.
        """
        validate.arguments(locals())
        return cls(fn, VarianceExploding(sigma_min, sigma_max), "x0")

    @classmethod
    def from_edm(
        cls,
        net: Network,
        *,
        sigma_data: float | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        class_labels: Tensor | None = None,
    ) -> Denoiser:
        """From an EDM network ``F(c_in * z, c_noise)``: raw, or wrapped with its preconditioning.

        ``c_in = 1/sqrt(s^2 + sigma_data^2)``, ``c_noise = ln(s)/4``, ``D = c_skip z + c_out F``. A wrapper around
        another network (EDM's ``EDMPrecond``, EDM2's ``Precond``, k-diffusion's wrappers) is unwrapped if the first
        call shows that ``net(z, sigma)`` is this ``D``. NVIDIA's other wrappers (``VPPrecond``, ``VEPrecond``,
        ``iDDPMPrecond``) are called as they are (`fastsched.denoisers.edm.WrappedEdmNetwork`).

        Args:
            net: The network; may be in ``DataParallel``, ``torch.compile`` or ``functools.partial``.
            sigma_data: Standard deviation of the data. If it or one of the next two arguments is None, the value comes
                from the network's attribute of the same name, or else from EDM: 0.5, 0.002 and 80.
            sigma_min: The lowest level.
            sigma_max: The highest level.
            class_labels: Labels of a class-conditional wrapper, [label_dim] or [1, label_dim], for all samples. Without
                them it is given no class, with a warning unless it was trained so (``label_dropout``).

        Raises:
            ValueError: If ``sigma_data`` is not positive, unless ``0 < sigma_min < sigma_max``, or if labels are given
                for a network that is not a wrapper, or not as many as its ``label_dim``.

        Source: Karras et al. 2022, table 1.
        """
        validate.arguments(
            locals(),
            class_labels=validate.anything,
            **dict.fromkeys(("sigma_data", "sigma_min", "sigma_max"), validate.optional(validate.positive)),
        )
        core = edm.core_of(net)

        def setting(name: str, given: float | None, default: float) -> float:
            if given is not None:
                return float(given)
            found = getattr(core, name, None)  # EDMPrecond has 0 and inf where it has no limit
            try:
                number = float(found)  # type: ignore[arg-type]  # None among others
            except (TypeError, ValueError, RuntimeError):  # not a setting: a method, text, a vector
                return default
            return number if number and math.isfinite(number) else default

        data = setting("sigma_data", sigma_data, 0.5)
        low, high = setting("sigma_min", sigma_min, 0.002), setting("sigma_max", sigma_max, 80.0)
        inner = edm.inner_of(core)
        if inner is not None:
            labels = None if class_labels is None else edm.labels_of(class_labels, core)
            if labels is None:
                edm.warn_of_no_class(net, inner, core)
            net = edm.WrappedEdmNetwork(net, inner, data, labels)
        elif class_labels is not None:
            raise ValueError("class_labels must be None for a raw network; pass a function that adds them itself")
        return cls(net, VarianceExploding(low, high), "edm", data)

    @classmethod
    def from_epsilon(
        cls, fn: Network, alphas_cumprod: Tensor | Sequence[float], *, integer_timesteps: bool = False
    ) -> Denoiser:
        """From ``fn(x, t) -> eps`` of a discrete variance-preserving model (DDPM, Stable Diffusion).

        Args:
            fn: The network; ``t`` has shape [B], float32 and possibly fractional, or int64 with
                ``integer_timesteps``.
            alphas_cumprod: ``abar_t``, shape [T].
            integer_timesteps: Whether the network accepts only integer timesteps; the grid is then limited to them.

        Raises:
            ValueError: If ``alphas_cumprod`` does not descend within (0, 1).
        """
        validate.arguments(locals(), alphas_cumprod=validate.anything)
        process = VariancePreserving(alphas_cumprod, integer_timesteps)  # type: ignore[arg-type]  # made a tuple
        if math.isinf(process.s_max):
            raise ValueError(
                "alphas_cumprod ends in 0 (zero terminal SNR), where an epsilon prediction does not determine x0; "
                "use from_v, or leave the last entry out"
            )
        return cls(fn, process, "epsilon")

    @classmethod
    def from_v(
        cls, fn: Network, alphas_cumprod: Tensor | Sequence[float], *, integer_timesteps: bool = False
    ) -> Denoiser:
        """From ``fn(x, t) -> v = alpha * eps - sigma * x0``; arguments and errors as in `from_epsilon`.

        The last of ``alphas_cumprod`` may be 0 here (zero terminal SNR).

        Source: Salimans & Ho 2022 (arXiv 2202.00512).
        """
        validate.arguments(locals(), alphas_cumprod=validate.anything)
        process = VariancePreserving(alphas_cumprod, integer_timesteps)  # type: ignore[arg-type]  # made a tuple
        return cls(fn, process, "v")

    @classmethod
    def from_velocity(
        cls, fn: Network, *, t_min: float = 2e-3, t_max: float = 1.0, data_at: int = 0, sign: int = 1
    ) -> Denoiser:
        """From ``fn(x, t) -> sign * dx/dt`` of a flow-matching model, ``t`` of shape [B].

        =========  ========================  ================  ============================================
        data_at    state                     dx/dt             used by
        =========  ========================  ================  ============================================
        0          ``(1 - t) x0 + t eps``    ``eps - x0``      Stable Diffusion 3, Flux, Wan
        1          ``t x0 + (1 - t) eps``    ``x0 - eps``      Lipman et al. 2022, torchcfm, Lumina
        =========  ========================  ================  ============================================

        Args:
            fn: The network.
            t_min: The smallest noise weight (``t`` or ``1 - t``) at which the network is called.
            t_max: The largest noise weight; 1 is pure noise.
            data_at: The network's time at which there is no noise, 0 or 1.
            sign: 1 if the network predicts ``dx/dt`` in its own time, -1 if the negative of it.

        Raises:
            ValueError: Unless ``0 < t_min < t_max <= 1``, ``data_at`` is 0 or 1, and ``sign`` is 1 or -1.
        """
        validate.arguments(
            locals(), t_min=validate.real, t_max=validate.real, data_at=validate.anything, sign=validate.anything
        )
        if not isinstance(sign, int) or sign not in (1, -1):
            raise ValueError(f"sign must be 1 (the network predicts dx/dt) or -1, got {validate.shown(sign)}")
        process = FlowMatching(t_min, t_max, data_at)
        towards_noise = sign == (1 if data_at == 0 else -1)
        return cls(fn, process, "velocity" if towards_noise else "reverse_velocity")

    @classmethod
    def from_score(cls, fn: Network, sigma_min: float, sigma_max: float) -> Denoiser:
        """From ``fn(z, sigma) -> grad log p_sigma(z)`` of a variance-exploding model.

        Raises:
            ValueError: Unless ``0 < sigma_min < sigma_max``.
        """
        validate.arguments(locals())
        return cls(fn, VarianceExploding(sigma_min, sigma_max), "score")

    @classmethod
    def from_vp_score(
        cls,
        fn: Network,
        *,
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        t_min: float = 1e-3,
        t_max: float = 1.0,
        sub_vp: bool = False,
    ) -> Denoiser:
        """From ``fn(x, t) -> grad log p_t(x)`` of a continuous VP or sub-VP SDE, ``t`` within ``[t_min, t_max]``.

        ``x = alpha x0 + sigma eps`` with ``alpha = exp(-t^2 (beta_max - beta_min) / 4 - t beta_min / 2)``, and
        ``sigma^2 = 1 - alpha^2`` (VP) or ``sigma = 1 - alpha^2`` (sub-VP).

        Raises:
            ValueError: Unless ``0 < beta_min < beta_max`` and ``0 < t_min < t_max``.

        Source: Song et al. 2021 (arXiv 2011.13456), section 3.4 and appendix C.
        """
        validate.arguments(locals(), t_min=validate.real, t_max=validate.real)
        return cls(fn, ContinuousVP(beta_min, beta_max, t_min, t_max, sub_vp), "score")

    def levels(self, n: int) -> Tensor:
        """A grid of ``n`` levels ``s``, noisiest first, uniform in ``lambda``; float64 [n]."""
        return self.process.levels(n)

    def coefficients(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """``(a, c)`` with ``D = a x + c R`` at float64 levels ``s``, each of the shape of ``s``.

        ================  ==============  ====================
        prediction        a               c
        ================  ==============  ====================
        x0                0               1
        epsilon           1/alpha         -sigma/alpha
        v                 alpha           -sigma
        velocity          1               -sigma
        reverse_velocity  1               sigma
        score             1/alpha         sigma^2/alpha
        edm               c_skip          c_out
        ================  ==============  ====================
        """
        if self.prediction == "edm":
            return edm.coefficients(s, self.sigma_data)
        return _COEFFICIENTS[self.prediction](self.process.alpha(s), self.process.sigma(s))

    def raw_output(self, x: Tensor, s: Tensor | float, *, dtype: torch.dtype | None = None) -> Tensor:
        """Call the network once: ``R`` at state ``x`` and level ``s``.

        The network may write into its arguments, and may return the same buffer at every call: it is given copies, and
        its output is copied.

        Args:
            x: States, [B, *shape]; for ``"edm"`` the scaling ``c_in`` is applied here.
            s: One level, or one per sample [B].
            dtype: The dtype that the network computes in; the dtype of ``x`` when None.

        Returns:
            ``R``, [B, *shape], on the device of ``x``, in the dtype the network returns.

        Raises:
            TypeError: If the network does not return a floating-point tensor.
            ValueError: If the output's shape is not that of ``x``, or the network fails for its device, dtype, shape
                or arguments; the message says what may be wrong.
            RuntimeError: If the network raises StopIteration.
        """
        if dtype is not None:
            validate.floating_dtype("dtype", dtype)
        return self._output(_floating("x", x), s, dtype).clone()

    def borrowed_output(
        self,
        x: Tensor,
        s: Tensor | float,
        *,
        dtype: torch.dtype | None = None,
        timestep_level: Tensor | float | None = None,
    ) -> Tensor:
        """Like `raw_output`, without the copy of the output: the result may change at the next network call."""
        if type(self).raw_output is not Denoiser.raw_output:  # overridden by a subclass
            other = {} if timestep_level is None else {"timestep_level": timestep_level}
            return self.raw_output(x, s, dtype=dtype, **other)
        return self._output(x, s, dtype, timestep_level)

    def _output(
        self, x: Tensor, s: Tensor | float, dtype: torch.dtype | None, timestep_level: Tensor | float | None = None
    ) -> Tensor:
        levels = sample_levels(s, x)
        asked = levels if timestep_level is None else sample_levels(timestep_level, x)
        network_input = x
        if self.prediction == "edm":
            scale = (levels.square() + self.sigma_data**2).rsqrt()
            network_input = x * per_sample(scale, x)
            condition = asked.log() / 4
        else:
            timestep = self.process.timestep(asked)
            condition = asked if timestep is None else timestep
        # The condition stays float32 in half precision: bfloat16 would merge neighbouring levels.
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        condition = on_device(condition.to(torch.int64 if self.process.integer_timesteps else wide), x)
        ask = partial(self.network, network_input.to(dtype or x.dtype, copy=network_input is x), condition)
        return checked_call(ask, x, condition, dtype or x.dtype).to(x.device)

    def denoise(
        self,
        y: Tensor,
        s: Tensor | float,
        *,
        dtype: torch.dtype | None = None,
        timestep_level: Tensor | float | None = None,
        denoiser_level: Tensor | float | None = None,
    ) -> Tensor:
        """``D`` from the normalised state ``y = x / sigma``, finite at every level, pure noise included.

        Args:
            y: [B, *shape], float32 or float64.
            s: One level, or one per sample [B].
            dtype: The dtype that the network computes in; the dtype of ``y`` when None.
            timestep_level: The level whose timestep the network is given; ``s`` when None. ``D`` is computed from the
                output with the coefficients at ``s`` in both cases.
            denoiser_level: The level of ``D``; ``s`` when None. The state does not change: it is the sampler's,
                ``tau y`` with ``tau`` the sampler sigma at ``s``, so this is ``model(x, sigma)`` of k-diffusion with
                another sigma.

        Returns:
            ``E[x0 | x]``, [B, *shape], in the dtype of ``y``.
        """
        if denoiser_level is not None:
            ratio = self.process.sigma_ratio(sample_levels(s, y), sample_levels(denoiser_level, y))
            return self.denoise(y * per_sample(ratio, y), denoiser_level, dtype=dtype)
        levels = sample_levels(s, y)
        a, c = self.coefficients(levels)
        x = y * per_sample(self.process.sigma(levels), y)
        output = self.borrowed_output(x, levels, dtype=dtype, timestep_level=timestep_level).to(y.dtype)
        scaled, factor = per_sample(a, y) * x, per_sample(c, y)
        return scaled + factor * output if isinstance(factor, Tensor) else scaled.add(output, alpha=factor)

    def __call__(self, z: Tensor, s: Tensor | float) -> Tensor:
        """``D(z; s)`` at the variance-exploding state ``z = x / alpha``: what k-diffusion calls the model.

        Args:
            z: [B, *shape].
            s: One finite level, or one per sample [B].
        """
        levels = sample_levels(s, _floating("z", z))
        if not bool((levels.isfinite() & (levels > 0)).all()):
            raise ValueError(f"s must be positive and finite, got {validate.shown(s)}")
        return self.denoise(z / per_sample(levels, z), levels)

    @property
    def device(self) -> torch.device:
        """Where the network's parameters live; the CPU if it has none."""
        return next((each.device for each in self._parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The floating type of the network's parameters, float32 if it has none; 8 bits are a form of storage only."""
        return self.dtype_beside(torch.float32)

    def dtype_beside(self, other: torch.dtype) -> torch.dtype:
        """`dtype`, but ``other`` if the network has no parameters."""
        kinds = (each.dtype for each in self._parameters())
        return next((kind for kind in kinds if kind.is_floating_point and kind.itemsize > 1), other)

    def _parameters(self) -> Iterator[Tensor]:
        """The network's parameters, but those that are offloaded."""
        every = self.network.parameters() if isinstance(self.network, torch.nn.Module) else ()
        return (each for each in every if not each.is_meta)


def _floating(name: str, value: object) -> Tensor:
    """Return ``value``, a floating-point tensor, with its gradient and wherever it is."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {validate.shown(value)}")
    if value.ndim == 0:
        raise ValueError(f"{name} must be [B, *shape], got a tensor of no dimension")
    return value


def is_denoiser(name: str, value: object) -> Denoiser:
    """TypeError unless the argument is a `Denoiser`."""
    return validate.instance(name, value, Denoiser, "made by Denoiser.from_epsilon and others")


validate.CHECKS["denoiser"] = is_denoiser


def placement(
    denoiser: Denoiser, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> tuple[torch.device, torch.dtype]:
    """The device and dtype to run a denoiser's network in; those of the network's parameters when None."""
    is_denoiser("denoiser", denoiser)
    return (
        denoiser.device if device is None else validate.device("device", device),
        denoiser.dtype if dtype is None else validate.floating_dtype("dtype", dtype),
    )
