"""Full-size pipelines with random weights, to measure time and memory."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch


def stable_diffusion(device: str, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """A UNet of Stable Diffusion 1.5's size, 0.86 billion parameters, with guidance."""
    diffusers: Any = importlib.import_module("diffusers")  # its type annotations do not allow None for parts
    with torch.device(device):
        unet = diffusers.UNet2DConditionModel(
            sample_size=64, in_channels=4, out_channels=4, cross_attention_dim=768, attention_head_dim=8
        )
        vae = diffusers.AutoencoderKL(latent_channels=4, norm_num_groups=8, block_out_channels=(8,))
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=unet.eval(),
        scheduler=diffusers.DPMSolverMultistepScheduler(beta_start=0.00085, beta_end=0.012, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(device, dtype)
    embeds = {name: torch.randn(1, 77, 768).to(device, dtype) for name in ("prompt_embeds", "negative_prompt_embeds")}
    size = 32 if device == "cpu" else 64  # of the latents: this VAE has one block, and does not scale
    return pipe, {**embeds, "height": size, "width": size}


def flux(double: int, single: int) -> Callable[[str, torch.dtype], tuple[Any, dict[str, Any]]]:
    """A transformer of FLUX's width with ``double`` and ``single`` blocks of its two kinds."""

    def made(device: str, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
        diffusers: Any = importlib.import_module("diffusers")
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                transformer = diffusers.FluxTransformer2DModel(num_layers=double, num_single_layers=single)
                vae = diffusers.AutoencoderKL(latent_channels=16, norm_num_groups=8, block_out_channels=(8,))
        finally:
            torch.set_default_dtype(before)
        pipe = diffusers.FluxPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=vae,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=transformer.eval(),
        ).to(device, dtype)
        tokens, size = (32, 16) if device == "cpu" else (512, 128)
        embeds = {"prompt_embeds": (1, tokens, 4096), "pooled_prompt_embeds": (1, 768)}
        call: dict[str, Any] = {name: torch.randn(shape).to(device, dtype) for name, shape in embeds.items()}
        return pipe, {**call, "height": size, "width": size, "guidance_scale": 3.5}

    return made


#: Functions that make a pipeline and the arguments of its call, by name.
PIPELINES: dict[str, Callable[[str, torch.dtype], tuple[Any, dict[str, Any]]]] = {
    "sd15": stable_diffusion,
    "flux-1b": flux(2, 4),
    "flux-10b": flux(16, 32),
}
