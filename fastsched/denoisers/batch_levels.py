"""Noise levels of a batch of samples: one for all, or one for each."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsched import validate


def sample_levels(s: Tensor | float, x: Tensor) -> Tensor:
    """Levels [1] of all samples of ``x``, or one for each [B]; TypeError or ValueError if ``s`` is neither.

    They are float64 on the CPU, because Apple's GPUs have no float64.
    """
    if isinstance(s, Tensor):
        values = s.cpu().double()
    elif isinstance(s, float):
        values = torch.tensor(s, dtype=torch.float64, device="cpu")
    else:
        values = validate.float64("s", s)
    if values.numel() not in (1, len(x)):
        shape = tuple(values.shape)
        raise ValueError(f"s must be one level, or one for each of {len(x)} samples, got a tensor of shape {shape}")
    return values.reshape(1) if values.numel() == 1 else values.flatten()


def on_device(values: Tensor, x: Tensor) -> Tensor:
    """[1] or [B] values as a new tensor [B] on the device of ``x``.

    One value is written there by a kernel: a copy from the CPU would wait for all work before it. A value that a
    gradient is taken of stays what it is.
    """
    if values.requires_grad:
        return values.to(x.device).expand(len(x))
    if len(values) == 1:
        return x.new_full((len(x),), values.item(), dtype=values.dtype)
    return values.to(x.device, copy=True)


def per_sample(values: Tensor, like: Tensor) -> Tensor | float:
    """[B] values shaped to broadcast over ``like`` [B, *shape], in its dtype; one value as a number."""
    if len(values) == 1 and not values.requires_grad:
        return values.item()
    return on_device(values.to(like.dtype), like).reshape(-1, *[1] * (like.ndim - 1))
