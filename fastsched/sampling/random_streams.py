"""Random numbers: each sample has its own streams, the same on every device and in every batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastsched import validate

#: The bit of a ``seed`` that is flipped for latents beside the measured ones, so that their noise is independent.
BESIDE = 2**30


def sample_seeds(seed: int, samples: int | range) -> Tensor:
    """The seeds of a measurement's paths, [samples] int64: different ones for every ``seed`` within [0, 2^31)."""
    which = samples if isinstance(samples, range) else range(samples)
    return validate.seed("seed", seed) * 2**32 + torch.arange(which.start, which.stop, dtype=torch.int64, device="cpu")


def sample_number(seed: Tensor) -> int:
    """The index of a sample in its measurement, from its seed (`sample_seeds`)."""
    return int(seed) % 2**32


def noise_of(seeds: Tensor, shape: Sequence[int]) -> Tensor:
    """The standard normal noise that each path starts from, [B, *shape] float32, on the CPU."""
    return normal([stream(seed, 0) for seed in seeds.tolist()], shape)


def normal(streams: Sequence[np.random.Generator], shape: Sequence[int]) -> Tensor:
    """Standard normal noise, one sample from each stream, [B, *shape] float32, on the CPU."""
    return torch.from_numpy(np.stack([each.standard_normal(tuple(shape), dtype=np.float32) for each in streams]))


def stream(seed: int, which: int) -> np.random.Generator:
    """One of a sample's two random streams: 0 for its starting noise, 1 for all later random numbers."""
    # Philox takes the whole seed as its key; torch's CPU generator would use only the low 32 bits.
    return np.random.Generator(np.random.Philox(key=2 * seed + which))
