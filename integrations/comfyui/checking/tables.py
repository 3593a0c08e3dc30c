"""Compare our solvers with ComfyUI's samplers numerically, and write the results into a page."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

import fastsched as fs
from fastsched.sampling.random_streams import sample_seeds, stream
from fastsched.sampling.solvers import STOCHASTIC_SOLVERS, solver_name

#: Samplers count as the same below this largest difference over the root mean square, in float64.
SAME = 1e-6
#: Samplers of ComfyUI that users may take for our solver, by solver, in addition to those that are equal.
LOOK_ALIKE = {
    "dpmpp_2m": [("dpmpp_2m", {})],
    "dpmpp_2s": [("dpmpp_2s_ancestral", {"eta": 0.0})],
    "dpmpp_3m": [("dpmpp_3m_sde", {"eta": 0.0})],
    "deis_2": [("deis", {"max_order": 2})],
    "deis_3": [("deis", {"max_order": 3})],
    "unipc": [("uni_pc_bh2", {})],
    "unipc_3": [("uni_pc_bh2", {})],
    "unipc_bh1": [("uni_pc", {})],
    "unipc_bh1_3": [("uni_pc", {})],
}


class _Sampling:
    """The attributes of a model that ComfyUI's samplers look up."""

    def __init__(self, flow: bool) -> None:
        import comfy.model_sampling as known

        kinds = (known.ModelSamplingDiscreteFlow, known.CONST) if flow else (known.ModelSamplingDiscrete, known.EPS)
        self.model_sampling = type("Sampling", kinds, {})()
        self.inner_model = self
        self.model_patcher = self

    def get_model_object(self, name: str) -> Any:
        """An attribute, as ModelPatcher returns it."""
        return getattr(self, name)


def difference(solver: str, name: str, options: dict[str, Any], flow: bool) -> float:
    """Largest difference of the samples over their root mean square, 8 steps; stochastic ones are given our noise."""
    import comfy.samplers

    oracle = fs.oracles.GaussianMixture.random(6, 4, seed=0)
    noise = torch.randn(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if flow:
        sigmas = torch.tensor([1.0, 0.95, 0.87, 0.74, 0.58, 0.4, 0.22, 0.08, 0.0], dtype=torch.float64)
    else:
        sigmas = torch.tensor([14.6, 8.1, 4.4, 2.3, 1.2, 0.6, 0.25, 0.08, 0.0], dtype=torch.float64)

    def denoised(x: torch.Tensor, sigma: torch.Tensor, **_: Any) -> torch.Tensor:
        t = sigma.reshape(-1)[:1].double()
        if not flow:
            return oracle.denoise(x, t).to(x)
        s = (t / (1 - t)).clamp(max=1e6)
        return oracle.denoise(x / t * s, s).to(x)

    class Model:
        inner_model = _Sampling(flow)
        __call__ = staticmethod(denoised)

    if flow:
        process = fs.Denoiser.from_velocity(lambda x, t: (x - denoised(x, t)) / t.reshape(-1, 1).double())
    else:
        process = fs.Denoiser.from_denoiser(denoised, 0.02, 20.0)
    ours = fs.sample(process, sigmas, solver, noise)
    sampler = comfy.samplers.sampler_object(name) if not options else comfy.samplers.ksampler(name, options)
    # ComfyUI's UniPC makes float32 tensors of its own.
    wide = torch.float32 if name.startswith("uni_pc") else torch.float64
    start, levels = (noise * sigmas[0]).to(wide), sigmas.to(wide)
    given = {**sampler.extra_options}
    if solver in STOCHASTIC_SOLVERS:
        streams = [stream(seed, 1) for seed in sample_seeds(0, len(noise)).tolist()]
        given["noise_sampler"] = lambda *_: torch.from_numpy(
            np.stack([each.standard_normal(noise.shape[1:], dtype=np.float32) for each in streams])
        ).double()
    theirs = sampler.sampler_function(Model(), start, levels, extra_args={}, disable=True, **given)
    return float((theirs - ours).abs().max() / ours.square().mean().sqrt())


def rows() -> list[str]:
    """Lines of the table: a solver, ComfyUI's nearest sampler, and how far it is for sigmas and for flow times.

    Raises:
        AssertionError: If a sampler that the nodes use in place of our solver differs from it.
    """
    from nodes_package.samplers import CHOICES, same_sampler

    found = [
        "| sampler of the node | nearest in ComfyUI | sigmas | flow times | SAMPLER is |",
        "| --- | --- | --- | --- | --- |",
    ]
    for choice in (*CHOICES, *STOCHASTIC_SOLVERS):
        if choice == "fitted":
            found.append("| fitted | none | | | our own |")
            continue
        solver, cells, used = solver_name(choice), [], []
        nearest = [same_sampler(solver, "ve")] if same_sampler(solver, "ve") else LOOK_ALIKE.get(solver, [])
        name, options = nearest[0] or ("", {})
        for flow in (False, True):
            distance = difference(solver, name, options, flow)
            theirs = same_sampler(solver, "flow" if flow else "ve") is not None
            assert not theirs or distance < SAME, (solver, name, flow, distance)
            cells.append(f"{distance:.0e}")
            used.append("ComfyUI's" if theirs else "our own")
        shown = ", ".join([name, *(f"{key}={value}" for key, value in options.items())])
        which = used[0] if used[0] == used[1] else f"{used[0]}; {used[1]} for flow times"
        found.append(f"| {choice} | {shown} | {cells[0]} | {cells[1]} | {which} |")
    return found


def kinds() -> list[str]:
    """Lines of the table of ComfyUI's kinds of models, with the noise process that is found for each."""
    import comfy.model_base
    from nodes_package import measuring

    found = ["| kind in ComfyUI | noise process | range of sigmas | timesteps |", "| --- | --- | --- | --- |"]
    settings = SimpleNamespace(sampling_settings={})
    for kind in comfy.model_base.ModelType:
        try:
            sampling = comfy.model_base.model_sampling(settings, kind)
            process = measuring.process_of(sampling)
        except ValueError as error:
            found.append(f"| {kind.name} | refused: {error} | | |")
            continue
        ends = process.sampler_sigma(torch.tensor([process.s_min, process.s_max], dtype=torch.float64)).tolist()
        steps = "rounded" if getattr(process, "integer_timesteps", False) else "any"
        found.append(f"| {kind.name} | {type(process).__name__} | {ends[0]:.4g} to {ends[1]:.5g} | {steps} |")
    return found


def write(page: Path, parts: dict[str, list[str]]) -> None:
    """Put lines between the marks of the page, by name."""
    text = page.read_text(encoding="utf-8")
    for name, lines in parts.items():
        first, last = f"<!-- {name}: written by check.py -->", f"<!-- end of {name} -->"
        before, rest = text.split(first)
        _, after = rest.split(last)
        text = before + first + "\n" + "\n".join(lines) + "\n" + last + after
    page.write_text(text, encoding="utf-8")
