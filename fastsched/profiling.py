"""Cost of a pipeline's or a denoiser's steps, fastsched's own share, and when measuring and fitting pay off."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastsched import ops, validate
from fastsched.denoisers.denoiser import Denoiser
from fastsched.denoisers.network_modules import modules_of
from fastsched.fitting.budget import TOTAL, measuring_calls
from fastsched.measurement.batches import attach_finished
from fastsched.measurement.checks.network import CHECK_CALLS
from fastsched.measurement.converged_samples import level_count
from fastsched.measurement.deviated_paths import asked_levels
from fastsched.measurement.measuring import measure
from fastsched.measurement.memory import WORKING
from fastsched.measurement.timeline import TimedRun, Timeline, device_of, synchronisations
from fastsched.sampling.files import absolute_file, check_writable, write_whole
from fastsched.sampling.origin import network_name
from fastsched.sampling.random_streams import noise_of
from fastsched.sampling.sampler import sample
from fastsched.sampling.solvers import FITTED
from fastsched.selection.starts import even_schedule

#: Default numbers of levels and, for a denoiser, of samples of a measurement.
LEVELS, DENOISER_SAMPLES = 48, 8

#: Number of vectors from one measured path: its increments, and the responses of two deviated paths.
VECTORS = LEVELS - 1 + 2 * len(asked_levels(LEVELS))

#: Largest number of elements per vector in the timed Gram matrix: 0.4 GB of vectors, as the model may leave little.
GRAM_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class StepTimes:
    """Times of a step.

    Attributes:
        name: A description of the run.
        p50_ms: The median.
        p95_ms: The 95th percentile.
        network: Fraction of the time in the network.
        scheduler: Fraction in the scheduler's step. For a measurement: all work of fastsched on 48 levels.
        rest: Fraction in all else: guidance, the pipeline's loop.
        synchronisations: How often the host waits for the GPU in a scheduler's step, median over steps. For a denoiser:
            the mean over steps, including waits in its network. None without a GPU.
    """

    name: str
    p50_ms: float
    p95_ms: float
    network: float
    scheduler: float
    rest: float
    synchronisations: float | None = None

    @classmethod
    def of(cls, name: str, run: TimedRun, steps: int | None = None) -> StepTimes:
        """From a run; its first step is a warm-up, and is left out if there are others.

        Fractions are those of this run; with the ``steps`` of a whole measurement, of its last two steps and
        ``steps - 2`` times the median of the earlier ones.
        """
        used = run.steps[1:] if len(run.steps) > 1 else run.steps
        waits = None if run.synchronisations is None else float(np.median(run.synchronisations))
        totals = np.array([sum(step.values()) for step in used])
        sums = dict.fromkeys((owner for step in used for owner in step), 0.0)
        for owner in sums:
            spent = [step.get(owner, 0.0) for step in used]
            if steps is None:
                sums[owner] = sum(spent)
            else:
                sums[owner] = (steps - 2) * float(np.median(spent[:-2] or [0.0])) + sum(spent[-2:])
        part = lambda owner: sums.get(owner, 0.0) / max(sum(sums.values()), 1e-12)
        p50, p95 = (float(np.percentile(totals, p)) * 1e3 for p in (50, 95))
        return cls(name, p50, p95, part("network"), part("scheduler"), part("rest"), waits)


@dataclass(frozen=True)
class Profile:
    """Result of `profile`. ``str`` of it is a page; `to_json` has the same numbers.

    Attributes:
        model: Class of the pipeline or network.
        parameters: How many the networks have that a step calls.
        dtype: What they compute in.
        device: Where they run.
        modes: Which of compiled, cached, offloaded, quantised were found.
        steps: Times of a step: with the own scheduler, with a fitted one, while measuring.
        fixed_seconds: Time of a call outside of its steps, such as encoding prompts; images are not decoded.
        gram_ms: Time of the Gram matrix of a measurement.
        gram_bandwidth: Bytes per second of the Gram matrix.
        copy_bandwidth: Bytes per second of a plain copy, reads and writes together.
        weights_gb: Size of the networks' weights.
        peak_gb: Peak of the device's memory in sampling; on the CPU, of the process's memory.
        measuring_gb: The same while measuring on few levels.
        predicted_gb: Memory that a measurement of one path on 48 levels adds.
        calls: Network evaluations of ``"measure"`` and ``"fit"``.
        minutes: Time of these evaluations in minutes.
        image_seconds: Time of a sample, by number of steps.
        own_steps: Steps that the pipeline takes by default; 50 for a `Denoiser`, which has no default.
    """

    model: str
    parameters: int
    dtype: str
    device: str
    modes: tuple[str, ...]
    steps: tuple[StepTimes, ...]
    fixed_seconds: float
    gram_ms: float
    gram_bandwidth: float
    copy_bandwidth: float
    weights_gb: float
    peak_gb: float
    measuring_gb: float
    predicted_gb: float
    calls: dict[str, int]
    minutes: dict[str, float]
    image_seconds: dict[int, float]
    own_steps: int

    @property
    def own_share(self) -> float:
        """The largest fraction of a step that is fastsched's own, sampling with a fitted schedule or measuring."""
        return max(each.scheduler for each in self.steps[1:])

    def pays_after(self, name: str, steps: int = 8) -> float:
        """How many samples of ``steps`` steps, instead of `own_steps`, save the minutes of ``name``."""
        saved = self.image_seconds[self.own_steps] - self.image_seconds[steps]
        return 60 * self.minutes[name] / saved if saved > 0 else float("inf")

    def to_json(self) -> str:
        """All numbers as JSON."""
        found = dataclasses.asdict(self) | {"own_share": self.own_share}
        images = {name: self.pays_after(name) for name in self.minutes}
        found["pays_after_images"] = {name: count if np.isfinite(count) else None for name, count in images.items()}
        return json.dumps(found, indent=2)

    def __str__(self) -> str:
        return "\n".join(_page(self))


_CHECKS: dict[str, validate.Check] = {
    **dict.fromkeys(("model", "call_kwargs"), validate.anything),
    "shape": validate.optional(validate.CHECKS["shape"]),
    "steps": partial(validate.positive_int, minimum=3),
    "trace": validate.optional(validate.path),
}


def profile(
    model: Any,
    shape: Sequence[int] | None = None,
    *,
    steps: int = 8,
    trace: str | os.PathLike[str] | None = None,
    **call_kwargs: Any,
) -> Profile:
    """Run a few real steps, and report where their time goes and what measuring and fitting would cost.

    Runs ``steps`` steps with the present scheduler, ``steps`` with a fitted schedule, and a measurement of one call on
    four levels (on a GPU, sixteen). The pipeline is left unchanged.

    Args:
        model: A pipeline of diffusers, or a `Denoiser`.
        shape: The shape of one sample; for a `Denoiser` only.
        steps: Steps of each run, at least 3.
        trace: A file for a trace of ``torch.profiler`` (JSON, for Perfetto or chrome://tracing).
        **call_kwargs: Arguments of the pipeline's call: ``prompt``, ``guidance_scale``, ``height``, ...

    Raises:
        TypeError: If ``model`` is neither.
        ValueError: If an argument is out of range, or the pipeline cannot be measured.
        OSError: If the trace cannot be written; the result is ``error.partial``.
    """
    validate.arguments(locals(), **_CHECKS)
    trace = absolute_file(trace)
    if trace is not None:
        check_writable(trace)  # PyTorch only logs that it cannot write
    if isinstance(model, Denoiser):
        if shape is None:
            raise ValueError("shape must be given with a Denoiser: the shape of one sample, without the batch")
        if call_kwargs:
            raise TypeError(f"{', '.join(call_kwargs)}: only the call of a pipeline takes these")
        most = level_count(model.process, steps)
        if steps > most:
            raise ValueError(f"steps must be at most {most}, the network's number of timesteps, got {steps}")
        runs: Any = _DenoiserRuns(model, tuple(shape))
    elif hasattr(model, "scheduler"):
        if shape is not None:
            raise ValueError("shape is for a Denoiser; a pipeline's latents follow from its height and width")
        from fastsched.diffusers.pipelines.timing import PipelineRuns

        runs = PipelineRuns(model, call_kwargs)
    else:
        raise TypeError(f"model must be a pipeline of diffusers or a fastsched.Denoiser, got {type(model).__name__}")
    recorder = contextlib.nullcontext() if trace is None else torch.profiler.profile()
    with torch.no_grad(), recorder as recorded:
        found = _profile(runs, steps)
    if trace is not None and recorded is not None:
        try:
            _write_trace(recorded, trace)
        except OSError as error:
            attach_finished(error, found)
            raise
    return found


def _write_trace(recorded: torch.profiler.profile, path: str | os.PathLike[str]) -> None:
    """Write the trace; OSError if PyTorch cannot, which it only logs."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(file))
        if not file.exists():
            raise OSError(f"PyTorch could not write its trace to {folder}; is the disk full?")
        write_whole(path, file.read_bytes())


def steps_run(model: Any, steps: int) -> int:
    """About how many steps `profile` runs, those of its measurement included."""
    return 2 * steps + measuring_calls(_levels_for(device_of(model)), 1)


def _levels_for(device: torch.device) -> int:
    """The number of levels of the measurement that `profile` runs."""
    return 16 if device.type == "cuda" else 4


def _profile(runs: Any, steps: int) -> Profile:
    with _peak(runs.device) as peak:
        own = runs.sampling(steps)
    fitted = runs.sampling_fitted(steps)
    with _peak(runs.device) as measuring_peak:
        measuring = runs.measuring(levels=_levels_for(runs.device))
    times = (
        StepTimes.of("the scheduler that is there", own),
        StepTimes.of("a fitted schedule", fitted),
        StepTimes.of("measuring", measuring, measuring_calls(LEVELS, 1)),
    )
    elements = runs.elements
    gram_seconds, gram_bytes = _timed_gram(min(elements, GRAM_ELEMENTS), runs.device)
    step = times[0].p50_ms / 1e3
    # From the second run: the first one compiles and allocates within its first step.
    fixed = max(fitted.seconds - len(fitted.steps) * times[1].p50_ms / 1e3, 0.0)
    calls = {"measure": runs.measuring_calls(LEVELS), "fit": TOTAL}
    numbers = sorted({4, 8, 20, runs.own_steps})
    parameters = [each for module in runs.networks for each in module.parameters()]
    return Profile(
        model=runs.name,
        parameters=sum(each.numel() for each in parameters),
        dtype=", ".join(sorted({str(each.dtype).removeprefix("torch.") for each in parameters})) or "unknown",
        device=torch.cuda.get_device_name(runs.device) if runs.device.type == "cuda" else str(runs.device),
        modes=tuple(dict.fromkeys(mode for module in runs.networks for mode in modes_of(module))),
        steps=times,
        fixed_seconds=fixed,
        gram_ms=gram_seconds * 1e3 * elements / min(elements, GRAM_ELEMENTS),
        gram_bandwidth=gram_bytes / gram_seconds,
        copy_bandwidth=_copy_bandwidth(runs.device),
        weights_gb=sum(each.numel() * each.element_size() for each in parameters) / 1e9,
        peak_gb=peak[0] / 1e9,
        measuring_gb=measuring_peak[0] / 1e9,
        predicted_gb=(VECTORS + WORKING) * elements * 4 / 1e9,
        calls=calls,
        minutes={name: count / runs.batch * step / 60 for name, count in calls.items()},
        image_seconds={number: fixed + number * step for number in numbers},
        own_steps=runs.own_steps,
    )


class _DenoiserRuns:
    """Runs of a denoiser without a pipeline; time outside of the network counts as the scheduler's."""

    own_steps, batch = 50, 1

    def __init__(self, denoiser: Denoiser, shape: tuple[int, ...]) -> None:
        self.denoiser, self.shape, self.elements = denoiser, shape, int(np.prod(shape))
        self.networks = modules_of(denoiser.network)[:1]
        module = replace(denoiser, network=self.networks[0]) if self.networks else denoiser  # that a function may hold
        self.name, self.device, self.dtype = network_name(module.network), module.device, module.dtype

    def measuring_calls(self, levels: int) -> int:
        return measuring_calls(levels, DENOISER_SAMPLES) + CHECK_CALLS

    def sampling(self, steps: int, solver: str = "dpmpp_2m") -> TimedRun:
        schedule = even_schedule(self.denoiser.process, steps, solver)
        noise = noise_of(torch.tensor([0], device="cpu"), self.shape).to(self.device)
        return self._timed(lambda denoiser: sample(denoiser, schedule, solver, noise, dtype=self.dtype))

    def sampling_fitted(self, steps: int) -> TimedRun:
        return self.sampling(steps, FITTED)

    def measuring(self, levels: int) -> TimedRun:
        given = {"levels": levels, "samples": 1, "device": self.device, "dtype": self.dtype}
        return self._timed(lambda denoiser: measure(denoiser, self.shape, **given, checks=False, progress=False))

    def _timed(self, run: Any) -> TimedRun:
        timeline = Timeline(self.device, "scheduler")
        timed = replace(self.denoiser, network=timeline.owned("network", self.denoiser.network))
        with synchronisations(self.device) as waits:
            run(timed)
        found = timeline.run("network", None)
        return found if waits is None else replace(found, synchronisations=[len(waits) / max(len(found.steps), 1)])


def modes_of(module: nn.Module) -> list[str]:
    """The detectable ways in which a network is run: compiled, cached, offloaded, quantised."""
    flag = lambda name: getattr(module, name, None)
    signs = {
        "compiled": hasattr(module, "_orig_mod") or flag("_compiled_call_impl") is not None,
        "cached": flag("is_cache_enabled") is True or flag("_is_cached") is True,
        "offloaded": any(hasattr(each, "_hf_hook") for each in module.modules()),
        "quantised": flag("is_quantized") is True or flag("quantization_config") is not None,
    }
    return [mode for mode, found in signs.items() if found]


@contextlib.contextmanager
def _peak(device: torch.device) -> Iterator[list[int]]:
    """Peak memory in bytes: of a GPU within the block, or on the CPU of the process since its start."""
    found = [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield found
    if device.type == "cuda":
        found[0] = torch.cuda.max_memory_allocated(device)
    else:
        with contextlib.suppress(ImportError):  # Windows has no module resource
            import resource

            size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            found[0] = size if sys.platform == "darwin" else size * 1024


def _seconds(function: Any, device: torch.device, repeats: int = 3) -> float:
    """The median time of a call, after a warm-up call."""
    function()
    timeline = Timeline(device)
    for _ in range(repeats):
        with timeline.within("timed"):
            function()
    return float(np.median([step["timed"] for step in timeline.steps("timed")]))


def _timed_gram(elements: int, device: torch.device) -> tuple[float, int]:
    """Seconds and bytes of the Gram matrix of a measured path."""
    vectors = torch.ones(1, VECTORS, elements, dtype=torch.float32, device=device)
    return _seconds(lambda: ops.vector_gram(vectors), device), vectors.nbytes


def _copy_bandwidth(device: torch.device) -> float:
    source = torch.empty(1 << (28 if device.type == "cuda" else 27), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _seconds(lambda: target.copy_(source), device, repeats=5)


def _page(found: Profile) -> Iterator[str]:
    modes = ", ".join(found.modes) or "plain"
    size = f"{_amount(found.parameters)} parameters, {found.dtype}, " if found.parameters else ""  # none in a function
    yield f"{found.model}: {size}on {found.device}, {modes}"
    yield ""
    yield f"{'a step of':28} {'p50 ms':>9} {'p95 ms':>9} {'network':>8} {'scheduler':>10} {'rest':>7} {'waits':>6}"
    for each in found.steps:
        waits = "-" if each.synchronisations is None else f"{each.synchronisations:.1f}"
        parts = f"{each.network:8.1%} {each.scheduler:10.2%} {each.rest:7.1%}"
        yield f"{each.name:28} {each.p50_ms:9.2f} {each.p95_ms:9.2f} {parts} {waits:>6}"
    outside = f"outside of steps {found.fixed_seconds:.2f} s"
    yield f"fastsched's own share is at most {found.own_share:.2%} of a step; {outside}"
    yield ""
    seen = f"peak {found.peak_gb:.3g} GB, and {found.measuring_gb:.3g} GB while measuring on few levels"
    yield f"weights {found.weights_gb:.3g} GB, {seen}"
    yield f"measuring on {LEVELS} levels adds {found.predicted_gb:.3g} GB a path"
    rate, speed = found.gram_bandwidth / max(found.copy_bandwidth, 1.0), found.gram_bandwidth / 1e9
    shown = f"{speed:.0f}" if speed >= 10 else f"{speed:.2g}"
    yield f"its Gram matrix: {found.gram_ms:.2f} ms, {shown} GB/s, {rate:.0%} of a copy's rate"
    yield ""
    for name, minutes in found.minutes.items():
        pays = found.pays_after(name)
        saved = f"saved by 8 steps instead of {found.own_steps} in {pays:,.0f} samples" if np.isfinite(pays) else ""
        time = f"{minutes:8.1f} min" if minutes >= 1 else f"{minutes * 60:8.1f} s  "
        yield f"{name:8} {found.calls[name]:6,} calls {time}   {saved}".rstrip()
    yield "optimal_schedule  no calls, a few seconds at most"
    times = ", ".join(f"{steps} steps {seconds:.2f} s" for steps, seconds in found.image_seconds.items())
    yield f"a sample: {times} ({found.own_steps} by default)"


def _amount(number: int) -> str:
    """A number of parameters in billions, millions or thousands."""
    for size, name in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{name}"
    return str(number)
