"""Measure in batches, and keep every finished one."""

from __future__ import annotations

import contextlib
import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fastsched.measurement.fingerprints import same_network
from fastsched.measurement.network_checks import check_network, fingerprint
from fastsched.measurement.network_state import unchanged_buffers
from fastsched.measurement.path_following import Measurement, measurement_steps
from fastsched.measurement.statistics import PathStatistics
from fastsched.sampling.files import check_writable
from fastsched.sampling.progress import progress_bar

#: What PyTorch's allocators say when they fail without an error class of their own.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass(frozen=True)
class Batches:
    """How a measurement is made.

    Attributes:
        shape: The shape of one sample.
        seeds: The seeds of all paths, [B].
        size: Paths followed at once.
        checks: Whether to ask the network a few questions first (`measurement.network_checks`).
        file: Where every finished batch is saved; None keeps them only in memory.
        progress: Whether to show a progress bar.
    """

    shape: tuple[int, ...]
    seeds: Tensor
    size: int
    checks: bool = True
    file: str | os.PathLike[str] | None = None
    progress: bool = True


@torch.no_grad()
def measured(run: Measurement, batches: Batches, found: PathStatistics | None = None) -> PathStatistics:
    """Measure the paths that ``found`` lacks, and join them to it.

    What is interrupted by an exception has it carry the finished paths as ``error.partial``.

    Raises:
        ValueError: If the network fails the checks, or is not the one that ``found`` was measured on.
        MemoryError: If memory runs out; the message says what to lower.
    """
    if batches.file is not None:
        check_writable(batches.file)
    seeds = batches.seeds if found is None else batches.seeds[~torch.isin(batches.seeds, found.seeds)]
    whole = found
    with (
        unchanged_buffers(run.denoiser.network),
        progress_bar(run.calls * len(seeds), batches.progress, "measuring") as advance,
    ):
        try:
            mark, spent = _identified(run, batches, found, len(seeds) > 0)
            for part_seeds in seeds.split(batches.size):
                if not len(part_seeds):
                    break
                part = run.drive(measurement_steps(run, part_seeds, batches.shape, advance))
                part = replace(part, fingerprint=mark, model_calls=part.model_calls + spent)
                whole, spent = part if whole is None else whole.merge(part), 0
                if batches.file is not None:
                    whole.save(batches.file, vectors=run.keep_vectors)
        except BaseException as error:
            with contextlib.suppress(Exception):  # a few classes take no attributes
                error.partial = whole  # type: ignore[attr-defined]  # a handler may save them
            if _is_out_of_memory(error):
                raise _explained(run, batches) from error
            raise
    assert whole is not None  # there is at least one seed, measured now or before
    return whole


def resumed(file: str | os.PathLike[str], run: Measurement, batches: Batches) -> PathStatistics | None:
    """What a file holds of a measurement; None if there is no file.

    Raises:
        ValueError: If it was measured with other settings.
    """
    if not os.path.exists(file):
        return None
    found, different = PathStatistics.load(file), None
    if found.process != run.denoiser.process:
        different = "another noise process"
    elif not torch.equal(found.s, run.s):
        different = f"other levels ({found.levels} of them)"
    elif found.shape != batches.shape:
        different = f"shape {found.shape}"
    elif found.deviated != run.deviated:
        different = "responses" if found.deviated else "no responses"
    elif not bool(torch.isin(found.seeds, batches.seeds).all()):
        different = f"another seed or more than {len(batches.seeds)} samples"
    elif run.keep_vectors and found.increments is None:
        different = "increments not kept"
    if different:
        raise ValueError(
            f"{Path(file)} was measured with {different}; resume it with the same settings, or name another file"
        )
    return found


def finished_part(error: KeyboardInterrupt) -> PathStatistics:
    """The paths that were finished before an interrupt, with a warning; the interrupt again if there are none."""
    partial = getattr(error, "partial", None)
    if partial is None:
        raise error
    warnings.warn(
        f"interrupted: these statistics hold the {partial.samples} paths that were finished "
        "(measure(checkpoint=PATH) keeps them in a file and goes on from there)",
        stacklevel=3,
    )
    return partial


def _identified(
    run: Measurement, batches: Batches, found: PathStatistics | None, needed: bool
) -> tuple[Tensor | None, int]:
    """The network's fingerprint if it is known, and the calls spent; refuses another network than that of ``found``."""
    mark, spent = None, 0
    where = (run.denoiser, batches.shape, run.device, run.dtype)
    if batches.checks and needed:
        asked = check_network(*where)
        mark, spent = asked.fingerprint, asked.model_calls
    elif found is not None and found.fingerprint is not None:
        mark, spent = fingerprint(*where), 1
    if found is not None and not same_network(found.fingerprint, mark, run.dtype):
        raise ValueError(
            "the network is another one than that of the earlier measurement: it answers the same question "
            "differently. Measure it afresh, into another file"
        )
    return mark, spent


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


def _explained(run: Measurement, batches: Batches) -> MemoryError:
    paths, levels = min(batches.size, len(batches.seeds)), len(run.s)
    size = 3 * levels * paths * 4 * float(torch.tensor(batches.shape).prod()) / 1e9
    return MemoryError(
        f"out of memory: {paths} paths at once over {levels} levels hold about {size:.2g} GB beside the network; lower "
        f"batch_size (now {batches.size}), then levels, or measure in 16 bits (dtype=torch.bfloat16)"
    )
