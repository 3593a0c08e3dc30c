"""EDM's preconditioning, and networks that come wrapped in it or in another one."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastsched import validate

#: Names under which wrappers keep their raw network: EDM and score SDEs, EDM2, k-diffusion.
INNER = ("model", "unet", "inner_model")
#: Names under which containers keep what they run: DataParallel and torch.compile.
CONTAINED = ("module", "_orig_mod")

#: Where a wrapper is compared with its raw network, in units of ``sigma_data``: no term of ``D`` is small there.
PROBE_LEVEL = 2.0
#: Largest relative difference of two ways to compute the same ``F``; half precision inside differs by 1e-3 or so.
SAME = 1e-2
#: Where a denoiser must return its input, in units of ``sigma_data``, and how nearly.
LOW_LEVEL, NEARLY = 4e-3, 0.1


def coefficients(s: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """``(c_skip, c_out)`` of ``D = c_skip z + c_out F`` (Karras et al. 2022, table 1)."""
    total = s.square() + sigma_data**2
    return sigma_data**2 / total, s * sigma_data * total.rsqrt()


def core_of(net: Any) -> Any:
    """The network inside containers and partial functions, which has the settings as attributes."""
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
    """Attributes of an object itself, a module's submodules among them; not those of its class."""
    own = dict(getattr(thing, "__dict__", {}))
    return {**own, **(own.get("_modules") or {})}


def labels_of(class_labels: object) -> Tensor:
    """Class labels of their own, [1 or B, label_dim]."""
    if not isinstance(class_labels, Tensor) or class_labels.ndim not in (1, 2) or class_labels.numel() == 0:
        raise TypeError(
            f"class_labels must be a tensor [label_dim] or [1, label_dim], got {validate.shown(class_labels)}"
        )
    return class_labels.detach().clone().reshape(-1, class_labels.shape[-1])


class WrappedEdmNetwork(nn.Module):
    """``F(c_in z, c_noise)`` from a network that keeps another one, which may or may not be ``F``.

    The first call finds out, on one sample, at most three calls:

    * the kept network is ``F`` if ``net(z, sigma) = c_skip z + c_out F`` (EDMPrecond, EDM2's Precond);
    * else ``net`` is a denoiser ``D(z, sigma)`` of another preconditioning (VPPrecond, VEPrecond, iDDPMPrecond, or
      labels that only ``net`` has) if it returns its input at a low level, and ``F = (D - c_skip z) / c_out``;
    * else ``net`` itself is ``F``.

    Args:
        net: What was given.
        inner: The network that it keeps.
        sigma_data: As in the preconditioning.
        class_labels: Passed on as ``class_labels``, [1 or B, label_dim].
    """

    def __init__(self, net: Any, inner: Any, sigma_data: float, class_labels: Tensor | None = None) -> None:
        super().__init__()
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
        x = (x.float() / size).to(x.dtype)  # of unit size, as the preconditioning makes it
        c_noise = torch.full((1,), PROBE_LEVEL * self.sigma_data, dtype=torch.float32, device=x.device).log() / 4
        # The kept network may want other arguments, or the wrapper may be none: either is an answer.
        with contextlib.suppress(Exception):
            one, other = self._inner_output(x, c_noise), self._from_denoiser(x, c_noise)
            if one.shape == other.shape and float((one - other).norm()) <= SAME * float(other.norm()):
                return self._inner_output
        low = torch.full((1,), LOW_LEVEL * self.sigma_data, dtype=torch.float32, device=x.device)
        z = self.sigma_data * x
        answer = self._denoised(z, low)
        of_z = isinstance(answer, Tensor) and answer.shape == z.shape
        if of_z and float((answer.float() - z.float()).norm()) <= NEARLY * float(z.float().norm()):
            return self._from_denoiser
        return self.net

    def _inner_output(self, x: Tensor, c_noise: Tensor) -> Tensor:
        arguments = self.net.keywords if isinstance(self.net, functools.partial) else {}
        try:
            return self.inner(x.clone(), c_noise.clone(), **{**arguments, **self._labels(x)})
        except TypeError:
            # NVIDIA's networks require class labels, None for none.
            return self.inner(x.clone(), c_noise.clone(), None)

    def _denoised(self, z: Tensor, s: Tensor) -> Tensor:
        return self.net(z.clone(), s.clone(), **self._labels(z))  # it may write into its input

    def _from_denoiser(self, x: Tensor, c_noise: Tensor) -> Tensor:
        s = (4 * c_noise).exp()
        wide = torch.promote_types(x.dtype, torch.float32)
        column = lambda values: values.to(wide).reshape(-1, *[1] * (x.ndim - 1))
        z = x.to(wide) * column((s.square() + self.sigma_data**2).sqrt())
        c_skip, c_out = coefficients(s, self.sigma_data)
        answer = self._denoised(z.to(x.dtype), s)
        if not isinstance(answer, Tensor):
            return answer  # refused as any other network's
        return (answer.to(wide) - column(c_skip) * z) / column(c_out)

    def _labels(self, x: Tensor) -> dict[str, Tensor]:
        if self.class_labels is None:
            return {}
        return {"class_labels": self.class_labels.to(x.device).expand(len(x), -1)}
