"""Check the nodes in a real ComfyUI, on the CPU: ``python check.py --comfyui DIR``.

Run it by a Python that has ComfyUI's requirements and fastsched. It writes small networks with random weights, starts
the server on loopback with a folder of its own (nothing is written to ``DIR``), and

* finds every node in the server's list;
* fits, saves, loads, inspects and samples each kind of model through graphs; the images must be those of
  `fastsched.sample` on the bare network, to 1e-4;
* restarts the server and fits again, which must take no model calls;
* checks what must be refused, and interrupts a fit;
* compares the samples of every solver with those of ComfyUI's sampler, and writes the tables (``--docs``).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
#: Largest relative difference of ComfyUI's images and ours.
SAME_IMAGES = 1e-4
HEAD = (
    "| model | sampler of the node | SAMPLER | fitted | from its file |",
    "| --- | --- | --- | --- | --- |",
)
SEED, STEPS, SIZE, BATCH = 5, 6, 8, 2
ADDED = ("lora", "patch", "hint", "network", "control")
NODES = (
    "FastschedFit",
    "FastschedFitGuider",
    "FastschedLoad",
    "FastschedSave",
    "FastschedInspect",
    "FastschedStepsNeeded",
)


@dataclass(frozen=True)
class Case:
    """One kind of model and a solver.

    Attributes:
        kind: The network.
        prediction: As in `checking.networks.denoiser`.
        solver: A choice of the node.
        cfg: The scale of guidance.
        patch: A node that changes the model, and its inputs.
        lora: The strength of a LoRA.
        control: The strength of a ControlNet.
        guider: Whether to fit through ComfyUI's node CFGGuider.
        decoupled: Whether the model may be asked at other sigmas than the states'.
    """

    kind: str
    prediction: str
    solver: str
    cfg: float = 2.0
    patch: tuple[str, dict[str, Any]] | None = None
    lora: float = 0.0
    control: float = 0.0
    guider: bool = False
    decoupled: bool = False


CASES = {
    "eps": Case("unet", "epsilon", "dpmpp_2m"),
    "eps, with a LoRA, our own solver": Case("unet", "epsilon", "dpmpp_3m", lora=0.7),
    "eps, with a ControlNet": Case("unet", "epsilon", "euler", control=0.5),
    "eps, fitted solver": Case("unet", "epsilon", "fitted", cfg=1.0),
    "eps, decoupled levels": Case("unet", "epsilon", "euler", decoupled=True),
    "v, zero terminal SNR, our own solver": Case(
        "unet", "v", "unipc", patch=("ModelSamplingDiscrete", {"sampling": "v_prediction", "zsnr": True})
    ),
    "v, EDM noise": Case(
        "unet",
        "edm",
        "heun",
        patch=("ModelSamplingContinuousEDM", {"sampling": "v_prediction", "sigma_max": 120.0, "sigma_min": 0.002}),
    ),
    "flow": Case("mmdit", "flow", "euler"),
    "flow, of a guider": Case("mmdit", "flow", "ipndm_2", cfg=3.0, guider=True),
    "flow, our own solver": Case("mmdit", "flow", "dpmpp_2m", cfg=1.0),
    "flow, video": Case("wan", "flow", "unipc", cfg=1.5),
    "flow, fitted solver": Case("mmdit", "flow", "fitted"),
    "flow, decoupled levels": Case("mmdit", "flow", "dpmpp_2m", decoupled=True),
}


def graph(case: Case, name: str, *, fit: dict[str, Any] | None = None) -> dict[str, Any]:
    """The graph that fits, saves, inspects, finds the steps needed, and samples."""
    from checking.networks import WIDTHS

    width, pooled = WIDTHS[case.kind]
    condition = lambda seed: ("CheckConditioning", {"seed": seed, "width": width, "pooled": pooled})
    pixels = 8 * SIZE
    size = {"width": pixels, "height": pixels, "batch_size": BATCH}
    nodes: dict[str, tuple[str, dict[str, Any]]] = {
        "load": ("UNETLoader", {"unet_name": f"{case.kind}.safetensors", "weight_dtype": "default"}),
        "positive": condition(1),
        "negative": condition(2),
        "latent": {
            "unet": ("EmptyLatentImage", size),
            "mmdit": ("EmptySD3LatentImage", size),
            "wan": ("EmptyHunyuanLatentVideo", {**size, "length": 5}),
        }[case.kind],
    }
    model: list[Any] = ["load", 0]
    if case.lora:
        given = {"model": model, "lora_name": "lora.safetensors", "strength_model": case.lora}
        nodes["lora"], model = ("LoraLoaderModelOnly", given), ["lora", 0]
    if case.patch is not None:
        nodes["patch"], model = (case.patch[0], {"model": model, **case.patch[1]}), ["patch", 0]
    both = {"model": model, "positive": ["positive", 0], "negative": ["negative", 0], "cfg": case.cfg}
    if case.control:
        nodes["hint"] = ("EmptyImage", {"width": pixels, "height": pixels, "batch_size": 1, "color": 0})
        nodes["network"] = ("ControlNetLoader", {"control_net_name": "controlnet.safetensors"})
        given = {"control_net": ["network", 0], "image": ["hint", 0], "strength": case.control}
        given |= {"positive": ["positive", 0], "negative": ["negative", 0], "start_percent": 0.0, "end_percent": 1.0}
        nodes["control"] = ("ControlNetApplyAdvanced", given)
        both |= {"positive": ["control", 0], "negative": ["control", 1]}
    settings = {"steps": STEPS, "sampler": case.solver, "seed": 0, "samples": BATCH, "tuning_calls": 120}
    settings |= {"latent": ["latent", 0], "decoupled": case.decoupled, **(fit or {})}
    nodes["fit"] = ("FastschedFit", {**both, **settings})
    if case.guider:
        nodes["guider"] = ("CFGGuider", both)
        nodes["fit"] = ("FastschedFitGuider", {"guider": ["guider", 0], **settings})
    nodes["save"] = ("FastschedSave", {"schedule": ["fit", 3], "name": name})
    nodes["inspect"] = ("FastschedInspect", {"schedule": ["fit", 3], "max_steps": 8})
    nodes["image"] = ("SaveImage", {"images": ["inspect", 0], "filename_prefix": name})
    needed = {"schedule": ["fit", 3], "as_good_as": "karras", "of_steps": 5}
    nodes["needed"] = ("FastschedStepsNeeded", needed)
    nodes["dump"] = ("CheckDump", {"text": ["fit", 2], "sigmas": ["fit", 0]})
    nodes["dump needed"] = ("CheckDump", {"text": ["needed", 1], "number": ["needed", 0]})
    return {**numbered(nodes), **sampled(both, ["fit", 0], ["fit", 1], name)}


def sampled(both: dict[str, Any], sigmas: list[Any], sampler: list[Any], name: str) -> dict[str, Any]:
    """The nodes that sample by SIGMAS and SAMPLER."""
    given = {"add_noise": True, "noise_seed": SEED, "sampler": sampler, "sigmas": sigmas, "latent_image": ["latent", 0]}
    return numbered(
        {
            "sample": ("SamplerCustom", {**both, **given}),
            "keep": ("SaveLatent", {"samples": ["sample", 0], "filename_prefix": f"latents/{name}"}),
        }
    )


def numbered(nodes: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Nodes as the server's interface takes them."""
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


def loaded(case: Case, name: str, file: str) -> dict[str, Any]:
    """The graph that samples by a schedule from a file."""
    whole = graph(case, name)
    both = {key: whole["sample"]["inputs"][key] for key in ("model", "positive", "negative", "cfg")}
    kept = {key: whole[key] for key in ("load", "positive", "negative", "latent", *ADDED) if key in whole}
    more = {
        "read": ("FastschedLoad", {"file": file, "model": both["model"]}),
        "dump": ("CheckDump", {"text": ["read", 2], "sigmas": ["read", 0]}),
    }
    return {**kept, **numbered(more), **sampled(both, ["read", 0], ["read", 1], name)}


def comfyui_sigmas(schedule: Any) -> Any:
    """The sigmas of the states as ComfyUI holds them."""
    return replace(schedule, network_sigmas=None, decoupled=None).to_comfyui().sigmas.double()


def latent_of(outputs: dict[str, Any], base: Path) -> Any:
    """The latents that a graph saved."""
    from safetensors.torch import load_file

    (file,) = outputs["keep"]["latents"]
    return load_file(base / "output" / file["subfolder"] / file["filename"])["latent_tensor"]


def expected(case: Case, schedule: Any) -> Any:
    """Samples of `fastsched.sample` from the bare network, in the units of LATENT."""
    import comfy.latent_formats
    import comfy.model_sampling
    import torch
    from checking.networks import denoiser, guided

    import fastsched as fs

    if case.prediction == "edm":
        table = torch.tensor([0.002, 120.0])
    else:
        table = comfy.model_sampling.ModelSamplingDiscrete(zsnr=case.prediction == "v").sigmas
    shown = replace(schedule, sigmas=comfyui_sigmas(schedule))
    torch.manual_seed(SEED)
    shape = {"unet": (4,), "mmdit": (16,), "wan": (16, 2)}[case.kind]
    noise = torch.randn(BATCH, *shape, SIZE, SIZE)
    first = float(shown.sigmas[0])
    if case.kind == "unet":  # at its largest sigma ComfyUI starts from noise of variance 1 + sigma^2
        noise = noise * (1 + first**-2) ** 0.5
    answer = guided(case.kind, case.cfg, case.lora, case.control)
    found = fs.sample(denoiser(answer, table, case.prediction), shown, noise=noise)
    formats = comfy.latent_formats
    return {"unet": formats.SD15, "mmdit": formats.SD3, "wan": formats.Wan21}[case.kind]().process_out(found)


def difference(found: Any, wanted: Any) -> float:
    """Largest difference over the root mean square."""
    return float((found - wanted).abs().max() / wanted.square().mean().sqrt())


def said(outputs: dict[str, Any], node: str = "dump") -> dict[str, Any]:
    """The values that a node CheckDump received."""
    return json.loads(outputs[node]["said"][0])


def check_cases(server: Any, base: Path, report: list[str]) -> None:
    """Fit and sample every kind of model, from the fit and from its file."""
    import fastsched as fs

    for number, (title, case) in enumerate(CASES.items()):
        name = f"case{number}"
        outputs = server.run(graph(case, name))
        told, file = said(outputs), outputs["save"]["text"][0]
        schedule = fs.Schedule.load(base / "output" / "fastsched" / file.removesuffix(" [output]"))
        assert (schedule.decoupled is not None) == case.decoupled, f"decoupled levels: {schedule.decoupled}"
        assert comfyui_sigmas(schedule).tolist() == told["sigmas"], "the file has other sigmas than SIGMAS"
        wanted = expected(case, schedule)
        one = difference(latent_of(outputs, base), wanted)
        again = server.run(loaded(case, name + "file", file))
        assert said(again)["sigmas"] == told["sigmas"], "Load Schedule gives other sigmas"
        other = difference(latent_of(again, base), wanted)
        needed = said(outputs, "dump needed")
        print(f"{title}: {told['text']}\n    {needed['text']}\n    file: {said(again)['text']}")
        print(f"    images differ from fastsched.sample by {one:.1e}, from the file by {other:.1e}")
        assert max(one, other) < SAME_IMAGES, title
        how = told["text"].rsplit("SAMPLER is ", 1)[1]
        report.append(f"| {title} | {case.solver} | {how} | {one:.0e} | {other:.0e} |")


def check_second_run(server: Any, report: list[str]) -> None:
    """Check that all fits are remembered after a restart."""
    for number, (title, case) in enumerate(CASES.items()):
        start = time.monotonic()
        text = said(server.run(graph(case, f"case{number}")))["text"]
        assert "remembered, no model calls" in text, f"{title}: {text}"
        print(f"{title}: remembered after a restart ({time.monotonic() - start:.1f} s)")
    report.append(f"After a restart of the server all {len(CASES)} fits were remembered: no model calls.")


def failure(server: Any, whole: dict[str, Any]) -> str:
    """The server's error for a graph; empty if the graph succeeds."""
    try:
        server.run(whole)
    except RuntimeError as error:
        return str(error)
    return ""


def check_refusals(server: Any, base: Path, report: list[str]) -> None:
    """Check that step-dependent models, invalid schedules and files elsewhere are refused; and interrupt a fit."""
    from checking.server import error_of

    case = CASES["flow"]
    for kind, inputs, word in (
        ("CheckForgetful", {}, "two answers"),
        ("EasyCache", {"reuse_threshold": 0.2, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}, "cache"),
    ):
        patched = graph(Case("mmdit", "flow", "euler", patch=(kind, inputs)), "refused")
        told = failure(server, patched)
        assert word in told, f"{kind}: {told}"
        print(f"{kind}: {told}")
    inputs = base / "input"
    os.mkfifo(inputs / "pipe.json")
    (inputs / "broken.json").write_text("{")
    shutil.copy(base / "server.log", base / "elsewhere.json")
    for file in ("pipe.json", "broken.json", "../elsewhere.json", "/etc/passwd", "missing.json"):
        start = time.monotonic()
        reply = server.queue(loaded(case, "refused", file))
        assert "prompt_id" not in reply, file
        assert reply["node_errors"]["read"]["errors"], reply
        assert time.monotonic() - start < 5, f"{file} took long"
        print(f"{file}: {reply['node_errors']['read']['errors'][0]['details']}")
    reply = server.queue(graph(case, "interrupted", fit={"seed": 9, "samples": 16, "tuning_calls": 5000}))
    time.sleep(4)
    server.post("/interrupt", {})
    assert error_of(server.wait(reply["prompt_id"], 30)) == "interrupted"
    print("interrupted a fit")
    report.append(
        "Refused: a patch that remembers, EasyCache, a pipe, a broken file, files elsewhere. Interrupt: stopped."
    )


def import_nodes() -> None:
    """The nodes' package as ``nodes_package``: ComfyUI names it after its folder."""
    spec = importlib.util.spec_from_file_location("nodes_package", HERE / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules["nodes_package"] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)


def main() -> None:
    """Run all checks."""
    parser = argparse.ArgumentParser(description="Check the nodes in a real ComfyUI, on the CPU.")
    parser.add_argument("--comfyui", type=Path, required=True, help="A checkout of ComfyUI.")
    parser.add_argument("--docs", type=Path, help="A page in which the results are written between its marks.")
    parser.add_argument("--keep", type=Path, help="Keep the server's folder here.")
    arguments = parser.parse_args()
    comfyui = arguments.comfyui.resolve()
    sys.path[:0] = [str(HERE), str(comfyui)]
    from comfy.cli_args import args  # ComfyUI reads no command line unless it is asked to

    args.cpu = True
    import_nodes()
    from checking import tables
    from checking.networks import write
    from checking.server import Server

    base = arguments.keep or Path(tempfile.mkdtemp(prefix="fastsched-comfyui-"))
    for folder in ("custom_nodes", "input", "output", "user", "temp", "models"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    hidden = shutil.ignore_patterns("check.py", "checking", "__pycache__")
    shutil.copytree(HERE, base / "custom_nodes" / "fastsched", ignore=hidden, dirs_exist_ok=True)
    shutil.copy(HERE / "checking" / "helper_nodes.py", base / "custom_nodes" / "check_helpers.py")
    write(base / "models")
    runs: list[str] = []
    facts: list[str] = []
    try:
        with Server(comfyui, base) as server:
            print(f"ComfyUI {server.version} on 127.0.0.1:{server.port}")
            listed = server.get("/object_info")
            assert all(listed[name]["category"] == "sampling/fastsched" for name in NODES), "nodes are not listed"
            check_cases(server, base, runs)
            assert server.progress, "no progress was shown"
            facts.append(f"Progress messages: {len(server.progress)}.")
            check_refusals(server, base, facts)
            version = server.version
        with Server(comfyui, base) as server:
            check_second_run(server, facts)
        rows = tables.rows()
        kinds = tables.kinds()
        print("\n".join([*rows, *kinds]))
        if arguments.docs is not None:
            import torch

            where = f"ComfyUI {version}, Python {platform.python_version()}, PyTorch {torch.__version__}, on the CPU"
            tables.write(
                arguments.docs, {"run": [f"{where}.", "", *HEAD, *runs, "", *facts], "table": rows, "kinds": kinds}
            )
    finally:
        if arguments.keep is None:
            shutil.rmtree(base, ignore_errors=True)
    print("all checks passed")


if __name__ == "__main__":
    main()
