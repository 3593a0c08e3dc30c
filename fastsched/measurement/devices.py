"""Distribute paths over the processes of a ``torch.distributed`` group.

Each process follows a part of the paths, and all get the whole. Only the processes of the given group share the work:
those that run one network together (tensor, context or pipeline parallelism) belong to different groups, and follow the
same paths. A process that has finished its paths waits for the others, so the group's timeout (10 minutes with NCCL if
none was set) must be longer than one path takes.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastsched import validate
from fastsched.measurement.batches import Batches, attach_finished, measured, resumed
from fastsched.measurement.deviated_paths import query_count
from fastsched.measurement.fingerprints import same_network
from fastsched.measurement.memory import PIECE
from fastsched.measurement.path_following import Measurement
from fastsched.measurement.statistics import PathStatistics, with_vectors

Result = TypeVar("Result")


def rank_and_size(group: Any) -> tuple[int, int]:
    """This process's rank within ``group``, in which it must be, and how many there are; (0, 1) without a group."""
    if group is None:
        return 0, 1
    rank = torch.distributed.get_rank(group)
    if rank < 0:
        raise ValueError("group must be one that this process belongs to")
    return rank, torch.distributed.get_world_size(group)


def share(items: Tensor | range, group: Any) -> Tensor:
    """This process's part of ``items``, which are divided in order, as evenly as possible."""
    rank, size = rank_and_size(group)
    values = torch.arange(items.start, items.stop, device="cpu") if isinstance(items, range) else items
    return values.tensor_split(size)[rank]


def measured_in_group(
    run: Measurement, batches: Batches, found: PathStatistics | None, group: Any, *, vectors: str = "all"
) -> PathStatistics:
    """Like `measured`, with the paths distributed over ``group``; every process gets the same statistics.

    With a file, each process saves its part in its own file beside it, from which it can resume, and the first process
    saves the whole. ``found`` must be the same in all processes. If increments and responses are kept, those of all
    samples go to ``"all"`` processes, or only to the ``"first"``.

    Raises:
        ValueError: If the processes were given different arguments, checkpoints or networks.
        RuntimeError: If another process failed; ``error.partial`` holds what all others had finished.
    """
    rank, size = rank_and_size(group)
    if size == 1:
        return measured(run, batches, found)
    given = {"levels": run.s.tolist(), "samples and seed": batches.seeds.tolist(), "shape": batches.shape}
    given |= {"responses": len(run.deviated), "keep_increments": run.keep_vectors, "dtype": str(run.dtype)}
    given |= {"noise process": run.denoiser.process.to_dict()}
    check_alike({**given, "checkpoint": None if found is None else found.seeds.tolist()}, group)
    received = len(batches.seeds) if vectors == "all" or rank == 0 else 0
    asks = {"checks": batches.checks and rank == 0, "identified": batches.checks}
    own = replace(batches, seeds=share(batches.lacking(found), group), gathered=(received, size), **asks)
    if batches.file is not None:
        own = replace(own, file=part_file(batches.file, rank, size))
    measure = lambda: measured(run, own, resumed(own.file, run, own))
    parts = parts_of_group(measure if len(own.seeds) else None, group, vectors if run.keep_vectors else "none")
    parts = of_one_network(([] if found is None else [found]) + parts, run.dtype)
    return whole_of(parts, batches.file, group, vectors=run.keep_vectors)


def of_one_network(parts: Sequence[PathStatistics], dtype: torch.dtype) -> list[PathStatistics]:
    """The ``parts``, with the fingerprint of the first of them: devices round differently.

    ValueError if they were measured on different networks.
    """
    fingerprint = next((part.fingerprint for part in parts if part.fingerprint is not None), None)
    if not all(same_network(fingerprint, part.fingerprint, dtype) for part in parts):
        raise ValueError(
            "the network must be the same in all processes of the group, but those of some give different outputs for "
            "the same input; load the same weights in all of them"
        )
    return [replace(part, fingerprint=fingerprint) for part in parts]


def whole_of(
    parts: Sequence[PathStatistics], file: str | os.PathLike[str] | None, group: Any, *, vectors: bool
) -> PathStatistics:
    """The ``parts`` of all processes, merged; the first process saves them in place of the parts beside the file."""
    whole, (rank, size) = reduce(PathStatistics.merge, parts), rank_and_size(group)
    if file is not None and rank == 0:
        whole.save(file, vectors=vectors)
        for each in range(size):
            part_file(file, each, size).unlink(missing_ok=True)
    return whole


def part_file(file: str | os.PathLike[str], rank: int, size: int) -> Path:
    """The file of one process's part, beside that of the whole."""
    path = Path(file)
    return path.with_name(f"{path.stem}.part-{rank}-of-{size}{path.suffix}")


def gathered_by_all(value: Any, group: Any) -> list[Any]:
    """Gather ``value`` of each process in all of them; RuntimeError if a process has ended."""
    found: list[Any] = [None] * rank_and_size(group)[1]
    torch.distributed.all_gather_object(found, value, group=group)
    return found


def check_alike(given: Mapping[str, Any], group: Any) -> None:
    """Raise ValueError in all processes of a group unless all were given the same arguments.

    Otherwise their parts would belong to different computations. ``given`` is by the names of arguments.
    """
    if rank_and_size(group)[1] == 1:
        return
    first, *others = gathered_by_all(dict(given), group)
    for rank, other in enumerate(others, 1):
        different = [name for name in {**first, **other} if other.get(name) != first.get(name)]
        if different:
            raise ValueError(
                f"{' and '.join(different)} must be the same in all processes of the group, but those of process "
                f"{rank} are not those of process 0"
            )


def prepare_together(prepare: Callable[[], Result], group: Any) -> Result:
    """``prepare()``, for work before the first exchange of a group: if it fails in one process, it fails in all.

    Otherwise the others would wait for the one that failed. This one raises its own error, the others a RuntimeError.
    """
    if rank_and_size(group)[1] == 1:
        return prepare()
    result, failure = attempted(prepare)
    error = joint_failure(gathered_by_all(described(failure), group), failure)
    if error is not None:
        raise error
    return result


def check_together(given: Mapping[str, Any], **checks: validate.Check) -> None:
    """`validate.arguments` for a function with a ``group``: what is wrong in one process is an error in all."""
    validate.arguments({"group": given["group"]})
    prepare_together(partial(validate.arguments, given, **checks), given["group"])


def broadcast_by_first(value: Any, group: Any) -> Any:
    """Broadcast ``value`` of the first process to all of them."""
    holder = [value]
    torch.distributed.broadcast_object_list(holder, src=torch.distributed.get_global_rank(group, 0), group=group)
    return holder[0]


def gathered_by_first(value: Any, group: Any) -> list[Any] | None:
    """Gather ``value`` of each process in the first one; None in the others."""
    rank, size = rank_and_size(group)
    found: list[Any] | None = [None] * size if rank == 0 else None
    torch.distributed.gather_object(value, found, dst=torch.distributed.get_global_rank(group, 0), group=group)
    return found


def attempted(work: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """The result of ``work()``, or the error that it raised: other processes must be told, or they would wait."""
    try:
        return work(), None
    except Exception as error:
        return None, error


def joint_failure(texts: Sequence[str | None], own: Exception | None) -> Exception | None:
    """The error to raise if a process failed: this one's ``own``, else one with those of all; None without errors."""
    found = [f"process {rank} of the group failed: {text}" for rank, text in enumerate(texts) if text is not None]
    return own if own is not None or not found else RuntimeError("; ".join(found))


def described(error: BaseException | None) -> str | None:
    """An error's class and message; None without an error."""
    return None if error is None else f"{type(error).__name__}: {error}"


def parts_of_group(measure: Callable[[], PathStatistics] | None, group: Any, vectors: str) -> list[PathStatistics]:
    """The parts that the processes of a group measured, in order, in each of them.

    ``measure`` is None in a process that has no part. ``vectors`` says which processes get increments and responses:
    ``"all"``, ``"first"`` or ``"none"``.

    Raises:
        RuntimeError: If another process failed; ``error.partial`` holds what all others had finished.
    """
    part, failure = (None, None) if measure is None else attempted(measure)
    if failure is not None:
        part = getattr(failure, "partial", None)
    light = None if part is None else with_vectors(part, None)
    try:
        found = gathered_by_all((light, described(failure)), group)
    except Exception as error:
        attach_finished(error, part)  # another process has ended
        raise
    parts = [each for each, _ in found if each is not None]
    error = joint_failure([text for _, text in found], failure)
    if error is not None:
        attach_finished(error, reduce(PathStatistics.merge, parts) if parts else None)
        raise error
    if vectors == "none":
        return parts
    return _with_vectors([each for each, _ in found], part, group, everywhere=vectors == "all")


def _with_vectors(
    parts: Sequence[PathStatistics | None], own: PathStatistics | None, group: Any, *, everywhere: bool
) -> list[PathStatistics]:
    """The ``parts`` that are not None, with all increments and responses in one tensor, which `merge` need not copy."""
    known = [each for each in parts if each is not None]
    counts = [0 if each is None else each.samples for each in parts]
    whole = _gathered_vectors(known[0], own, counts, group, everywhere=everywhere) if known else None
    if whole is None:
        return known
    own_vectors = whole.split([each.samples for each in known])
    return [with_vectors(each, vectors) for each, vectors in zip(known, own_vectors, strict=True)]


def _gathered_vectors(
    like: PathStatistics, own: PathStatistics | None, counts: Sequence[int], group: Any, *, everywhere: bool
) -> Tensor | None:
    """Increments and responses of the samples of all processes, [B, V, d]; None in a process that gets none.

    The processes have ``counts`` samples, each as many vectors as those of ``like``; this one has those of ``own``.
    Vectors are sent in pieces, because pickling whole parts took eight times their size.
    """
    rows, elements = query_count(like.levels, like.deviated) - 1, like.dimension
    starts, step = [0, *itertools.accumulate(counts)], max(1, PIECE // elements)
    here = everywhere or rank_and_size(group)[0] == 0
    whole = torch.empty(sum(counts), rows, elements, dtype=torch.float32, device="cpu") if here else None
    for sample, first in itertools.product(range(max(counts)), range(0, rows, step)):
        piece = None
        if own is not None and sample < own.samples:
            kept = (each[sample] for each in (own.increments, own.responses) if each is not None)
            piece = torch.stack([*itertools.chain(*kept)][first : first + step])
        found = gathered_by_all(piece, group) if everywhere else gathered_by_first(piece, group)
        for start, each in zip(starts, found or (), strict=False):
            if whole is not None and each is not None:
                whole[start + sample, first : first + step] = each
    return whole
