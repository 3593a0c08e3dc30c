"""Measure in batches, and keep every finished one."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsched import validate
from fastsched.denoisers.network_state import unchanged_buffers, warned_of_randomness
from fastsched.measurement.checks.calls import CheckCalls
from fastsched.measurement.checks.increments import ELEMENTS, check_increments
from fastsched.measurement.checks.network import check_network, fingerprint
from fastsched.measurement.checks.path import path_checked
from fastsched.measurement.fingerprints import same_network
from fastsched.measurement.memory import need, out_of_memory_message, paths_at_once, with_store
from fastsched.measurement.path_following import Measurement, measurement_steps
from fastsched.measurement.statistics import PathStatistics, merged, with_vectors
from fastsched.measurement.statistics_checks import VECTORS
from fastsched.measurement.statistics_files import check_process
from fastsched.sampling.files import absolute_file, check_writable, runs_beside
from fastsched.sampling.origin import network_name, origin_now
from fastsched.sampling.progress import Progress, progress_bar

#: Texts in RuntimeErrors by which PyTorch's allocators report that memory ran out.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass(frozen=True)
class Batches:
    """How a measurement is made."""

    shape: tuple[int, ...]  #: the shape of one sample
    seeds: Tensor  #: the seeds of all paths, [B]
    size: int  #: paths followed at once, at most
    #: Whether the caller chose ``size``; if not, fewer paths are followed at once where memory is short.
    chosen: bool = False
    checks: bool = True  #: whether to check the network by a few calls first (`measurement.checks.network`)
    file: str | os.PathLike[str] | None = None  #: where every finished batch is saved; None keeps them only in memory
    progress: Progress = True  #: as in `fastsched.measure`
    #: As in `fastsched.measurement.memory.need`, if the paths are one process's share of a group's.
    gathered: tuple[int, int] = (0, 1)
    identified: bool = False  #: whether to ask for the network's fingerprint where there are no checks

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        seeds: Tensor,
        batch_size: int | None,
        file: str | os.PathLike[str] | None,
        **others: Any,
    ) -> Batches:
        """Batches of ``batch_size`` paths; when None, of as many as fit, or of one if there is a file."""
        usual = len(seeds) if file is None else 1
        size = usual if batch_size is None else validate.positive_int("batch_size", batch_size)
        return cls(shape, seeds, size, batch_size is not None, file=absolute_file(file), **others)

    def lacking(self, found: PathStatistics | None) -> Tensor:
        """The seeds of the paths that ``found`` does not hold, [n]."""
        return self.seeds if found is None else self.seeds[~torch.isin(self.seeds, found.seeds)]


@torch.no_grad()
def measured(run: Measurement, batches: Batches, found: PathStatistics | None = None) -> PathStatistics:
    """Measure the paths that ``found`` lacks, and merge them with it.

    An exception carries the paths that were finished before it as ``error.partial``.

    Raises:
        ValueError: If the network fails the checks, or is not the one that ``found`` was measured on.
        MemoryError: If memory runs out; the message says what to lower.
    """
    if batches.file is not None:
        check_writable(batches.file, "statistics")
        check_process(run.denoiser.process, run.s)
    seeds = batches.lacking(found)
    run, batches = _within_memory(run, batches, len(seeds))
    whole = found
    random = warned_of_randomness(run.device, "the measurement", "schedules are worse")
    try:
        with (
            unchanged_buffers(run.denoiser.network),
            random if batches.checks else contextlib.nullcontext(),
            progress_bar(run.calls * len(seeds), batches.progress, "measuring") as advance,
        ):
            for whole in _batch_by_batch(run, batches, found, seeds, advance):
                if batches.file is not None:
                    whole.save(batches.file, vectors=run.keep_vectors)
        assert whole is not None  # there is at least one seed, measured now or before
        return whole
    except BaseException as error:  # also a warning that is an error, at the very end
        attach_finished(error, whole)
        if is_out_of_memory(error):
            paths = min(batches.size, len(batches.seeds))
            advice = MemoryError(out_of_memory_message(run, paths, len(seeds), math.prod(batches.shape)))
            attach_finished(advice, whole)
            raise advice from error
        raise


def _batch_by_batch(
    run: Measurement, batches: Batches, found: PathStatistics | None, seeds: Tensor, advance: Callable[[int], object]
) -> Iterator[PathStatistics]:
    """After each batch of ``seeds``, yield the statistics of all paths so far, ``found`` included."""
    network_id, calls = _identified(run, batches, found, seeds)
    known = found is not None and found.fingerprint is not None
    origin = origin_now(network_name(run.denoiser.network), network_id, dtype=str(run.dtype))
    whole, kept = _with_room(run, batches, found, len(seeds))  # after the first checks, which take memory too
    parts = seeds.split(batches.size) if len(seeds) else ()
    for n, part_seeds in enumerate(parts):
        done = 0 if whole is None else whole.samples
        out = None if kept is None else kept[done : done + len(part_seeds)]
        steps = measurement_steps(run, part_seeds, batches.shape, advance, out)
        if calls is not None and n == 0:
            part = run.drive(path_checked(steps, calls, run.s))
            check_increments(calls, part)
        else:
            part = run.drive(steps)
        spent = 0 if calls is None else _spent(calls, known, n == len(parts) - 1)
        part = replace(part, fingerprint=network_id, model_calls=part.model_calls + spent, origin=origin)
        whole = part if whole is None else merged(whole, part)
        yield whole
    if whole is not None and calls is not None and not calls.constant:
        _warn_of_no_data(whole, calls.range[0])


def attach_finished(error: BaseException, finished: object) -> None:
    """Attach what is finished to an error as ``error.partial``, so that a handler can save it."""
    with contextlib.suppress(Exception):  # a few classes take no attributes
        error.partial = finished  # type: ignore[attr-defined]  # no class of errors declares it


def _warn_of_no_data(stats: PathStatistics, low: float) -> None:
    """Warn if no denoised sample changed along its path, or all vary by less than the ``low``est level of the process.

    The checks warn earlier if all outputs are equal.
    """
    if not bool(stats.gram.any()):
        validate.warn(
            "the denoised samples did not change from level to level, so schedules are meaningless: does the network "
            "use the noise level, and is its output not rounded?"
        )
    elif float(stats.s[-1]) <= low and stats.data_std < low and stats.ends.numel() >= ELEMENTS:
        validate.warn(
            f"the denoised samples vary by {stats.data_std:.3g}, less than the noise that is left at the lowest level, "
            f"{low:.3g}, so they are means of data, not data: is this level (sigma_min) in the unit of the data?"
        )


def resumed(
    file: str | os.PathLike[str] | None, run: Measurement, batches: Batches, samples: int = 0
) -> PathStatistics | None:
    """What a file holds of a measurement that is to have ``samples`` at the end; None if there is no file.

    ValueError if it was measured with other settings, or no samples must be added.
    """
    if file is None or not os.path.exists(file):
        return None
    found, different = PathStatistics.load(file), None
    own, dtype = run.denoiser.process, None if found.origin is None else found.origin.dtype
    if found.process.to_dict() != own.to_dict():
        different = "another noise process"
    elif not torch.equal(found.s, run.s):
        different = f"other levels ({found.levels} of them)"
    elif found.shape != batches.shape:
        different = f"shape {found.shape}"
    elif dtype not in (None, str(run.dtype)):
        different = f"dtype {dtype}"
    elif found.deviated != run.deviated:
        different = "responses" if found.deviated else "no responses"
    elif not bool(torch.isin(found.seeds, batches.seeds).all()):
        fewer = bool(torch.isin(batches.seeds, found.seeds).all())
        different = f"more than {len(batches.seeds)} samples" if fewer else "another seed or other samples"
    elif run.keep_vectors and found.increments is None:
        different = "increments not kept"
    if different:
        raise ValueError(
            f"{Path(file)} was measured with {different}; resume it with the same settings, or name another file"
        )
    if found.samples < samples:
        _check_more_samples(file, found, samples, run.keep_vectors)
    return found if found.process == own else replace(found, process=own)  # of a class that files do not keep


def _check_more_samples(file: str | os.PathLike[str], found: PathStatistics, samples: int, vectors: bool) -> None:
    """ValueError if more ``samples`` must not be added to what was ``found`` in a file.

    A fit's runs beside it (`runs_beside`) could not be used then. Nor could a fit use the measurement without
    increments, which would be dropped without ``vectors``.
    """
    folder, runs = os.path.split(os.path.abspath(runs_beside(file)))
    if any(name == runs or name.startswith(f"{runs}.") for name in os.listdir(folder)):
        raise ValueError(
            f"{runs_beside(file)} holds runs of another call, with {found.samples} samples, not {samples} (or the "
            "measurement beside it is not whole); go on with the same arguments, remove it, or name another file"
        )
    if found.increments is not None and not vectors:
        raise ValueError(
            f"{Path(file)} was measured with keep_increments=True, and this call would drop the increments; resume it "
            "with the same settings, or name another file"
        )


def finished_part(error: KeyboardInterrupt, file: str | os.PathLike[str] | None, group: Any) -> PathStatistics:
    """The paths that were finished before an interrupt.

    Raises the interrupt again if there are none, if a file has them, or in a group, whose other processes continue.
    """
    partial = None if file is not None or group is not None else getattr(error, "partial", None)
    if partial is None:
        raise error
    return partial


def interrupted_measurement(
    error: KeyboardInterrupt, file: str | os.PathLike[str] | None, group: Any
) -> PathStatistics:
    """`finished_part`, with a warning."""
    partial = finished_part(error, file, group)
    validate.warn(
        f"interrupted: these statistics hold the {partial.samples} paths that were finished "
        "(measure(checkpoint=PATH) keeps them in a file and resumes from there)",
    )
    return partial


def _identified(
    run: Measurement, batches: Batches, found: PathStatistics | None, seeds: Tensor
) -> tuple[Tensor | None, CheckCalls | None]:
    """The network's fingerprint, and the calls of the checks; None for what was not requested.

    ValueError if the network is another one than that of ``found``.
    """
    network_id, calls = None, None
    where = (run.denoiser, batches.shape, run.device, run.dtype)
    if batches.checks and len(seeds):
        batch = min(batches.size, len(seeds))
        calls = check_network(*where, run.s, int(seeds[batch - 1]), batch)
        network_id = calls.fingerprint
    elif batches.identified or (found is not None and found.fingerprint is not None):
        network_id = fingerprint(*where)  # not counted, so that as many calls are left for a fit's runs
    elif batches.file is not None:  # for the next call, which resumes from it
        with contextlib.suppress(Exception):  # some networks take no single sample; what else is wrong, the paths show
            one, other = fingerprint(*where), fingerprint(*where)
            network_id = one if same_network(one, other, run.dtype) else None  # random outputs identify nothing
    if found is not None and not same_network(found.fingerprint, network_id, run.dtype):
        raise ValueError(
            "the network is another one than that of the earlier measurement: it gives different outputs for the "
            "same input. Measure it into another file"
        )
    if found is not None and found.fingerprint is not None:
        network_id = found.fingerprint  # in 16 bits, that of another device may differ by more than `merge` allows
    return network_id, calls


def _spent(calls: CheckCalls, known: bool, last: bool) -> int:
    """Calls that the checks spent since the previous batch, including the last check, which is made if ``last``.

    If the network is ``known``, an earlier measurement has counted the first checks already: a resumed fit must have as
    many calls left for its runs as one that was not interrupted.
    """
    if known:
        calls.model_calls = 0
    if last:
        calls.check_last()
    spent, calls.model_calls = calls.model_calls, 0
    return spent


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


def _within_memory(run: Measurement, batches: Batches, samples: int) -> tuple[Measurement, Batches]:
    """Choose where vectors are kept, and how many paths are followed at once; MemoryError if nothing fits."""
    if samples == 0:
        return run, batches
    elements, saved = math.prod(batches.shape), batches.file is not None
    most = min(batches.size, samples)
    run = with_store(run, most, elements)
    wanted = lambda paths: need(run, paths, samples, elements, saved=saved, gathered=batches.gathered)
    size = paths_at_once(run, most, wanted, samples, elements, chosen=batches.chosen)
    return run, batches if size == most else replace(batches, size=size)


def _with_room(
    run: Measurement, batches: Batches, found: PathStatistics | None, samples: int
) -> tuple[PathStatistics | None, Tensor | None]:
    """Allocate memory for all samples' vectors, [B, V, d]; return ``found`` with its vectors there, and the memory."""
    if not run.keep_vectors or samples == 0:
        return found, None
    before = 0 if found is None else found.samples
    kept = torch.zeros(before + samples, run.vectors, math.prod(batches.shape), dtype=torch.float32, device="cpu")
    if found is None:
        return None, kept
    moved = with_vectors(found, kept[:before])
    for name in VECTORS:
        if getattr(moved, name) is not None:
            getattr(moved, name).copy_(getattr(found, name))
    return moved, kept
