"""Warnings about networks that are sampled or estimated: wrong and random ones, and those that mix samples."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from fastsched import validate
from fastsched.denoisers.denoiser import Denoiser
from fastsched.denoisers.network_state import checked_training, unchanged_buffers, warned_of_randomness
from fastsched.measurement.checks.calls import ANYWAY
from fastsched.measurement.checks.network import check_network, fingerprint
from fastsched.measurement.fingerprints import same_network


@contextlib.contextmanager
def warned_of_faults(
    denoiser: Denoiser,
    shape: tuple[int, ...],
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    what: str = "sampling",
    harm: str = "errors are mostly distances between random samples",
    result: str = "each error is",
) -> Iterator[Tensor | None]:
    """Warn, once, if the network is no denoiser, or if it is random, changes or mixes samples in batches of this size.

    Gives the network's fingerprint, None if it is not known. At most five calls (`check_network`); and one at the end,
    of two samples if ``batch`` is not 1, and one more if its answer differs. For the message, ``what`` is done here,
    ``harm`` if the network is random, and ``result`` is the beginning of what is wrong of the result.
    """
    again = lambda beside: _fingerprint(denoiser, shape, device, dtype, beside)
    known = _checked(denoiser, shape, device, dtype)
    with warned_of_randomness(device, what, harm) as drawn:
        yield known
    if drawn or same_network(known, again(min(batch - 1, 1)), dtype):
        return
    if batch > 1 and same_network(known, again(0), dtype):
        validate.warn(
            "the network gives different outputs for a sample alone and for the same sample in a batch: it mixes the "
            f"samples of a batch (statistics over the batch?), so {result} another with another batch_size"
        )
        return
    validate.warn(
        f"the network gives different outputs for the same input before and after {what}, so {result} that of "
        "different networks: it keeps a state between its calls (a cache, a counter?), or is random at times"
    )


def _checked(denoiser: Denoiser, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """The network's fingerprint; with a warning if the network fails the checks of a measurement."""
    network, finding = denoiser.network, ""
    with contextlib.suppress(Exception), unchanged_buffers(network), checked_training(network, device):
        try:
            return check_network(denoiser, shape, device, dtype, denoiser.levels(3)).fingerprint
        except ValueError as error:
            finding = str(error)
    if ANYWAY in finding:
        fault = finding.replace(ANYWAY, "")
        validate.warn(f"the network seems to be no denoiser of its noise process, so results are meaningless: {fault}")
    return _fingerprint(denoiser, shape, device, dtype, 0)


def _fingerprint(
    denoiser: Denoiser, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, beside: int
) -> Tensor | None:
    # Compiled networks may take batches of one size alone; what else is wrong, the run says.
    network = denoiser.network
    with contextlib.suppress(Exception), unchanged_buffers(network), checked_training(network, device):
        return fingerprint(denoiser, shape, device, dtype, beside)
    return None
