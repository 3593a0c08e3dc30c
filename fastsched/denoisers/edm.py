"""EDM's preconditioning, and wrappers that apply this or another preconditioning to a raw network."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastsched import validate

#: Attributes in which wrappers keep their raw network: EDM and score SDEs, EDM2, k-diffusion.
INNER = ("model", "unet", "inner_model")
#: Attributes in which containers keep the module that they run: DataParallel and torch.compile.
CONTAINED = ("module", "_orig_mod")

#: A wrapper and its raw network are compared at this level, in units of ``sigma_data``: no term of ``D`` is small here.
PROBE_LEVEL = 2.0
#: Largest relative difference of two computations of the same ``F``; half precision in a network causes about 1e-3.
SAME_RTOL = 1e-2
#: At this level, in units of ``sigma_data``, a denoiser must return its input within this relative error.
LOW_LEVEL, IDENTITY_RTOL = 4e-3, 0.1


def coefficients(s: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """``(c_skip, c_out)`` of ``D = c_skip z + c_out F`` (Karras et al. 2022, table 1)."""
    total = s.square() + sigma_data**2
    return sigma_data**2 / total, s * sigma_data * total.rsqrt()


def core_of(net: Any) -> Any:
    """The network inside containers and partial functions; its attributes hold the settings."""
    while True:
        inside = [net.func] if isinstance(net, functools.partial) else []
        inside += [each for name in CONTAINED if callable(each := vars_of(net).get(name))]
        if not inside:
            return net
        net = inside[0]


def inner_of(core: Any) -> Any | None:
    """The raw network that a wrapper keeps, None if it keeps none."""
    found = (vars_of(core).get(name) for name in INNER)
    return next((each for each in found if callable(each)), None)


def vars_of(thing: Any) -> dict[str, Any]:
    """The attributes of an object itself, including a module's submodules, without those of its class."""
    own = dict(getattr(thing, "__dict__", {}))
    return {**own, **(own.get("_modules") or {})}


def labels_of(class_labels: object, core: Any = None) -> Tensor:
    """A copy of the class labels, [1, label_dim], checked against the ``label_dim`` of the network ``core``."""
    if not (
        isinstance(class_labels, Tensor)
        and class_labels.ndim in (1, 2)
        and class_labels.numel() == class_labels.shape[-1] > 0
    ):
        raise TypeError(
            "class_labels must be a tensor [label_dim] or [1, label_dim], such as torch.eye(label_dim)[0] for the "
            f"first class, got {validate.shown(class_labels)}"
        )
    wanted = getattr(core, "label_dim", None)
    if isinstance(wanted, int) and class_labels.shape[-1] != wanted >= 0:
        hint = f"its first class is torch.eye({wanted})[0]" if wanted else "it is not class-conditional: leave them out"
        raise ValueError(
            f"class_labels must have the network's label_dim, {wanted} entries, got shape {tuple(class_labels.shape)}; "
            f"{hint}"
        )
    return class_labels.detach().clone().reshape(1, -1)


def warn_of_no_class(net: Any, inner: Any, core: Any) -> None:
    """Warn if a class-conditional wrapper is given no class, and its network was not trained without one."""
    bound = net.keywords if isinstance(net, functools.partial) else {}
    classes, dropout = getattr(core, "label_dim", 0), getattr(inner, "label_dropout", 0)
    if isinstance(classes, int) and classes > 0 and not dropout and "class_labels" not in bound:
        validate.warn(
            f"the network is class-conditional (label_dim={classes}) and is given no class, for which it was not "
            f"trained (label_dropout={dropout}): pass class_labels, such as torch.eye({classes})[0]"
        )


class WrappedEdmNetwork(nn.Module):
    """``F(c_in z, c_noise)`` from a network that keeps another network as an attribute.

    The first call finds out how to compute ``F``, with at most three network calls on one sample:

    * If ``net(z, sigma) = c_skip z + c_out inner``, the inner network is ``F`` (EDMPrecond, EDM2's Precond).
    * Otherwise, if ``net`` returns its input at a low level, it is a denoiser ``D(z, sigma)`` of another
      preconditioning (VPPrecond, VEPrecond, iDDPMPrecond), or one whose labels only ``net`` takes. Then
      ``F = (D - c_skip z) / c_out``.
    * Otherwise ``net`` itself is ``F``.

    ``inner`` is the network that ``net`` keeps, and ``class_labels`` [1, label_dim] is given to both.
    """

    def __init__(self, net: Any, inner: Any, sigma_data: float, class_labels: Tensor | None = None) -> None:
        super().__init__()
        self.training = False  # the mode is that of ``net``
        self.net, self.inner, self.sigma_data = net, inner, sigma_data
        self.class_labels = class_labels
        self._raw: Callable[[Tensor, Tensor], Tensor] | None = None

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """``F``, shaped as ``x``."""
        if self._raw is None:
            self._raw = self._identified(x[:1])
        return self._raw(x, c_noise)

    @torch.no_grad()
    def _identified(self, x: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        size = x.float().square().mean().sqrt().clamp_min(1e-6)
        x = (x.float() / size).to(x.dtype)  # of unit size, like an input scaled by c_in
        c_noise = torch.full((1,), PROBE_LEVEL * self.sigma_data, dtype=torch.float32, device=x.device).log() / 4
        # An error only rules this case out: the inner network takes other arguments, or ``net`` is no wrapper.
        with contextlib.suppress(Exception):
            one, other = self._inner_output(x, c_noise), self._from_denoiser(x, c_noise)
            if one.shape == other.shape and float((one - other).norm()) <= SAME_RTOL * float(other.norm()):
                return self._inner_output
        low = torch.full((1,), LOW_LEVEL * self.sigma_data, dtype=torch.float32, device=x.device)
        z = self.sigma_data * x
        answer = self._denoised(z, low)
        of_z = isinstance(answer, Tensor) and answer.shape == z.shape
        if of_z and float((answer.float() - z.float()).norm()) <= IDENTITY_RTOL * float(z.float().norm()):
            return self._from_denoiser
        return self.net

    def _inner_output(self, x: Tensor, c_noise: Tensor) -> Tensor:
        bound = self.net.keywords if isinstance(self.net, functools.partial) else {}
        arguments = {**bound, **self._labels(x)}
        try:
            return self.inner(x.clone(), c_noise.clone(), **arguments)
        except TypeError:
            if arguments:  # some only ``net`` takes; without the others, such as class labels, the output is another
                raise
            # NVIDIA's networks require the argument for class labels, None if there are none.
            return self.inner(x.clone(), c_noise.clone(), None)

    def _denoised(self, z: Tensor, s: Tensor) -> Tensor:
        return self.net(z.clone(), s.clone(), **self._labels(z))  # the network may write into its input

    def _from_denoiser(self, x: Tensor, c_noise: Tensor) -> Tensor:
        s = (4 * c_noise).exp()
        wide = torch.promote_types(x.dtype, torch.float32)
        column = lambda values: values.to(wide).reshape(-1, *[1] * (x.ndim - 1))
        z = x.to(wide) * column((s.square() + self.sigma_data**2).sqrt())
        c_skip, c_out = coefficients(s, self.sigma_data)
        answer = self._denoised(z.to(x.dtype), s)
        if not isinstance(answer, Tensor):
            return answer  # `checked_output` rejects it, as for any other network
        return (answer.to(wide) - column(c_skip) * z) / column(c_out)

    def _labels(self, x: Tensor) -> dict[str, Tensor]:
        if self.class_labels is None:
            return {}
        return {"class_labels": self.class_labels.to(x.device).expand(len(x), -1)}
