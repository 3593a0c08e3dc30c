"""Small networks with random weights that ComfyUI takes for Stable Diffusion 1.5 and 3 and Wan, and their denoisers.

The denoisers call the bare networks, without ComfyUI's guider, patcher, samplers or ControlNet classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import fastsched as fs

UNET: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [1],
    "channel_mult": [1],
    "transformer_depth": [1],
    "transformer_depth_output": [1, 1],
    "transformer_depth_middle": -1,
    "use_spatial_transformer": True,
    "use_checkpoint": False,
    "legacy": False,
    "context_dim": 768,
    "num_heads": 8,
    "num_head_channels": -1,
    "use_linear_in_transformer": False,
}
MMDIT: dict[str, Any] = {
    "input_size": None,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "depth": 2,
    "adm_in_channels": 64,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 128}},
    "pos_embed_max_size": 16,
    "num_patches": 256,
    "pos_embed_scaling_factor": None,
}
WAN: dict[str, Any] = {
    "model_type": "t2v",
    "in_dim": 16,
    "dim": 128,
    "ffn_dim": 256,
    "out_dim": 16,
    "num_heads": 1,
    "num_layers": 1,
}
#: Widths of the conditions: of the tokens, and of the pooled condition.
WIDTHS = {"unet": (768, 64), "mmdit": (64, 64), "wan": (4096, 64)}
#: The rank of the LoRA, and the layer that it changes.
RANK, LORA_LAYER = 4, "input_blocks.1.1.transformer_blocks.0.attn2.to_q"


def network(kind: str) -> torch.nn.Module:
    """Make ``"unet"``, ``"mmdit"``, ``"wan"`` or ``"controlnet"``, float32, with the same weights at every call."""
    import comfy.ops
    from comfy.cldm.cldm import ControlNet
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.ldm.wan.model import WanModel

    control = {key: value for key, value in UNET.items() if not key.startswith(("out_", "transformer_depth_output"))}
    maker, config = {
        "unet": (UNetModel, UNET),
        "mmdit": (OpenAISignatureMMDITWrapper, MMDIT),
        "wan": (WanModel, WAN),
        "controlnet": (ControlNet, {**control, "hint_channels": 3}),
    }[kind]
    made = maker(**config, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            inputs = parameter[0].numel() if parameter.ndim > 1 else 1
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(drawn / inputs**0.5)
            else:  # scales of norms stay near 1
                parameter.copy_(0.1 * drawn + (1.0 if name.endswith("weight") else 0.0))
        for name, buffer in made.named_buffers():
            if buffer.is_floating_point() and "pos_embed" in name:
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return made.eval()


def lora() -> dict[str, Tensor]:
    """A LoRA on one layer of the UNet, as ComfyUI names it."""
    generator = torch.Generator().manual_seed(1)
    name = "diffusion_model." + LORA_LAYER
    return {
        f"{name}.lora_up.weight": torch.randn(320, RANK, generator=generator),
        f"{name}.lora_down.weight": torch.randn(RANK, 320, generator=generator),
        f"{name}.alpha": torch.tensor(float(RANK)),
    }


def write(models: Path) -> None:
    """Write the networks and the LoRA where ComfyUI looks for them."""
    for kind in ("unet", "mmdit", "wan", "controlnet"):
        folder = models / ("controlnet" if kind == "controlnet" else "diffusion_models")
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.contiguous().clone() for name, tensor in network(kind).state_dict().items()}
        save_file(weights, folder / f"{kind}.safetensors")
    (models / "loras").mkdir(parents=True, exist_ok=True)
    save_file(lora(), models / "loras" / "lora.safetensors")


def conditions(kind: str, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens [1, 7, width] and the pooled condition [1, width]."""
    width, pooled = WIDTHS[kind]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 7, width, generator=generator), torch.randn(1, pooled, generator=generator)


def guided(kind: str, cfg: float, lora_strength: float = 0.0, control_strength: float = 0.0) -> Any:
    """``fn(x, t) -> R``: the network's own output under guidance; the ControlNet is shown a black image."""
    made, control = network(kind), network("controlnet") if control_strength else None
    if lora_strength:
        factors = lora()
        up, down = (next(v for k, v in factors.items() if f"lora_{end}" in k) for end in ("up", "down"))
        layer = made.get_submodule(LORA_LAYER)
        with torch.no_grad():
            layer.weight += lora_strength * up @ down

    def answer(x: Tensor, t: Tensor) -> Tensor:
        found = []
        for seed in (1, 2):
            tokens, pooled = conditions(kind, seed)
            options: dict[str, Any] = {"y": pooled.expand(len(x), -1)} if kind == "mmdit" else {}
            context = tokens.expand(len(x), -1, -1)
            with torch.no_grad():
                if control is not None:
                    black = torch.zeros(len(x), 3, 8 * x.shape[2], 8 * x.shape[3])
                    parts = control(x.float(), black, t.float(), context)
                    options["control"] = {key: [control_strength * part for part in parts[key]] for key in parts}
                found.append(made(x.float(), t.float(), context=context, **options))
        return found[1] + cfg * (found[0] - found[1])

    return answer


def denoiser(answer: Any, table: Tensor, prediction: str) -> fs.Denoiser:
    """The network as `fastsched` reads it.

    Args:
        answer: The function that `guided` returns.
        table: ComfyUI's trained sigmas, [T].
        prediction: ``"epsilon"``, ``"v"``, ``"edm"`` or ``"flow"``.
    """
    if prediction == "flow":
        return fs.Denoiser.from_velocity(lambda x, t: answer(x, 1000 * t))
    if prediction == "edm":  # ComfyUI's ContinuousEDM with v: D = x / (s^2 + 1) - s v / sqrt(s^2 + 1)

        def clean(z: Tensor, s: Tensor) -> Tensor:
            wide = s.reshape(-1, 1, 1, 1).to(z)
            root = (wide**2 + 1).sqrt()
            return z / root**2 - wide / root * answer(z / root, 0.25 * s.log()).to(z)

        return fs.Denoiser.from_denoiser(clean, float(table[0]), float(table[-1]))
    abar = (1 / (1 + table.double().square())).tolist()
    make = fs.Denoiser.from_v if prediction == "v" else fs.Denoiser.from_epsilon
    return make(answer, abar, integer_timesteps=True)
