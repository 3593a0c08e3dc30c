"""Pipelines with exact denoisers, and small ones of every family with random weights; nothing is downloaded."""

import inspect

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    ControlNetModel,
    DDIMPipeline,
    DDPMPipeline,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    LTXConditionPipeline,
    LTXVideoTransformer3DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionLatentUpscalePipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from scheduler_table import exact_denoise

from fastsched.diffusers.conventions import describe
from fastsched.diffusers.schedulers.probe import oracle_network

SHAPE = (2, 2, 2)


class OracleUNet(ModelMixin, ConfigMixin):
    """A module with a UNet's interface that is the exact denoiser of mixtures of Gaussians.

    The first mixture is the unconditional one. The second, if any, is used where the embeddings are 1.
    """

    @register_to_config
    def __init__(self, in_channels: int = SHAPE[0], sample_size: int = SHAPE[1], time_cond_proj_dim: int | None = None):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))  # gives the module a device and a dtype

    def answer_for(self, scheduler, *oracles):
        self.convention = describe(scheduler)
        self.networks = [oracle_network(self.convention, exact_denoise(oracle)) for oracle in oracles]
        return self

    def forward(self, sample, timestep, encoder_hidden_states=None, return_dict=True, **_):
        s = self.convention.levels(torch.as_tensor(timestep).reshape(-1)[:1])
        outputs = [network(sample, s) for network in self.networks]
        output = outputs[0]
        if len(outputs) > 1:
            conditional = encoder_hidden_states.flatten(1).amax(1) > 0.5
            output = torch.where(conditional.reshape(-1, 1, 1, 1), outputs[1], outputs[0])
        return (output,) if not return_dict else UNetOutput(output)


class UNetOutput(tuple):
    """The part of a model's output that pipelines use."""

    def __new__(cls, sample):
        return super().__new__(cls, (sample,))

    @property
    def sample(self):
        return self[0]


class OraclePipeline(DiffusionPipeline):
    """The bare loop of diffusers' pipelines; arguments after ``output_type`` imitate unusual pipelines.

    Attributes:
        prompts: The prompts of all calls.
        draws: The random conditionings of all calls.
    """

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.prompts = []
        self.draws = []

    @torch.no_grad()
    def __call__(
        self,
        prompt=None,
        num_inference_steps=50,
        images=2,
        sigmas=None,
        timesteps=None,
        mu=None,
        output_type="pil",
        on_step=None,
        change_latents=None,
        repeat_steps=1,
        start_scale=1.0,
        step_arguments=None,
        generator=None,
        conditioning=0.0,
    ):
        self.prompts.append(prompt)
        condition = conditioning * torch.randn(SHAPE, generator=generator)
        self.draws.append(condition)
        shifting = {} if mu is None else {"mu": mu}
        timesteps, _ = retrieve_timesteps(self.scheduler, num_inference_steps, "cpu", timesteps, sigmas, **shifting)
        latents = start_scale * torch.randn(images, *SHAPE, dtype=self.unet.dtype)
        if hasattr(self.scheduler, "init_noise_sigma"):
            latents = latents * self.scheduler.init_noise_sigma
        for i, t in enumerate(timesteps):
            scaled = latents
            if "scale_model_input" in dir(self.scheduler):
                scaled = self.scheduler.scale_model_input(latents, t)
            output = self.unet(scaled, t.expand(images), return_dict=False)[0] + condition
            if on_step is not None:
                output = on_step(i, output)
            for _ in range(repeat_steps):
                latents = self.scheduler.step(output, t, latents, **(step_arguments or {}), return_dict=False)[0]
            if change_latents is not None:
                latents = change_latents(latents)
        return latents


def oracle_pipeline(scheduler, *oracles, dtype=torch.float32):
    return OraclePipeline(OracleUNet().to(dtype).answer_for(scheduler, *oracles), scheduler)


#: Sizes shared by the small autoencoders and UNets.
BLOCKS = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}


def small_unet():
    return UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        **BLOCKS,
    )


def small_vae():
    types = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(in_channels=3, out_channels=3, latent_channels=4, sample_size=16, **types, **BLOCKS)


def small_conditional_unet(**config):
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        **BLOCKS,
        **config,
    )


def assembled(kind, **components):
    """A pipeline of these components; all other components of its class, such as text encoders, are None."""
    wanted = [name for name, each in inspect.signature(kind).parameters.items() if each.default is each.empty]
    return kind(**dict.fromkeys(wanted) | components)


def random_embeddings(**shapes):
    """Embeddings of these shapes, and of negative prompts."""
    found = {name: torch.randn(shape) for name, shape in shapes.items()}
    return found | {f"negative_{name}": torch.randn(shape) for name, shape in shapes.items()}


def unconditional(scheduler):
    """DDIMPipeline for DDIMScheduler, DDPMPipeline for others; the latter does not call scale_model_input."""
    cls = DDIMPipeline if type(scheduler).__name__ == "DDIMScheduler" else DDPMPipeline
    pipe = cls(small_unet(), scheduler)
    pipe.scheduler = scheduler
    return pipe, {"batch_size": 2}, {"output_type": "np"}


def stable_diffusion(scheduler):
    scheduler.register_to_config(steps_offset=1)  # as the pipeline would, with a warning
    parts = {"vae": small_vae(), "unet": small_conditional_unet(), "scheduler": scheduler}
    pipe = assembled(StableDiffusionPipeline, **parts, requires_safety_checker=False)
    return pipe, {**random_embeddings(prompt_embeds=(2, 4, 16)), "guidance_scale": 5.0}, {"output_type": "np"}


def stable_diffusion_xl(scheduler):
    unet = small_conditional_unet(
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=8 * 6 + 16
    )
    parts = {"vae": small_vae(), "unet": unet, "scheduler": scheduler}
    pipe = assembled(StableDiffusionXLPipeline, **parts, add_watermarker=False)
    embeddings = random_embeddings(prompt_embeds=(2, 4, 16), pooled_prompt_embeds=(2, 16))
    return pipe, {**embeddings, "guidance_scale": 5.0}, {"output_type": "np"}


def stable_diffusion_3(scheduler):
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=16,
    )
    pipe = assembled(StableDiffusion3Pipeline, transformer=transformer, scheduler=scheduler, vae=small_vae())
    embeddings = random_embeddings(prompt_embeds=(2, 4, 16), pooled_prompt_embeds=(2, 16))
    return pipe, {**embeddings, "guidance_scale": 5.0, "height": 16, "width": 16}, {"output_type": "latent"}


def flux(scheduler):
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    pipe = assembled(FluxPipeline, scheduler=scheduler, vae=small_vae(), transformer=transformer)
    call = {"prompt_embeds": torch.randn(2, 4, 16), "pooled_prompt_embeds": torch.randn(2, 16)}
    return pipe, {**call, "height": 16, "width": 16}, {"output_type": "latent"}


def controlled(scheduler):
    """Stable Diffusion with a ControlNet."""
    unet = small_conditional_unet()
    parts = {"vae": small_vae(), "unet": unet, "scheduler": scheduler}
    parts["controlnet"] = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8))
    pipe = assembled(StableDiffusionControlNetPipeline, **parts, requires_safety_checker=False)
    call = {**random_embeddings(prompt_embeds=(2, 4, 16)), "image": torch.rand(2, 3, 16, 16), "guidance_scale": 5.0}
    return pipe, call, {"output_type": "np"}


def wan(scheduler, in_channels=16):
    """A video pipeline, which calls its network twice a step for guidance."""
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=in_channels,
        out_channels=16,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=1,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    pipe = assembled(WanPipeline, vae=vae, scheduler=scheduler, transformer=transformer)
    call = {**random_embeddings(prompt_embeds=(1, 4, 16)), "height": 16, "width": 16, "num_frames": 5}
    return pipe, {**call, "guidance_scale": 3.0}, {"output_type": "latent"}


def wan_of_two_experts(scheduler, boundary_ratio):
    """Wan with a second network for times below ``boundary_ratio``, as in Wan 2.2."""
    pipe, call, ending = wan(scheduler)
    other = wan(scheduler)[0].transformer
    parts = {"vae": pipe.vae, "scheduler": scheduler, "transformer": pipe.transformer, "transformer_2": other}
    return assembled(WanPipeline, **parts, boundary_ratio=boundary_ratio), call, ending


def wan_from_image(scheduler, **config):
    """Wan from an image, which is given beside the latents (36 channels) or replaces their first frame (16)."""
    channels = 16 if config.get("expand_timesteps") else 36
    pipe, call, ending = wan(scheduler, channels)
    made = WanImageToVideoPipeline(None, None, pipe.vae, scheduler, transformer=pipe.transformer, **config)
    return made, {**call, "image": torch.rand(1, 3, 16, 16)}, ending


def cogvideox(scheduler):
    """A video pipeline whose guidance can depend on step and number of steps (``use_dynamic_cfg``)."""
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=16,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        max_text_seq_length=16,
    )
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    pipe = CogVideoXPipeline(None, None, vae, transformer, scheduler)
    embeddings = random_embeddings(prompt_embeds=(1, 16, 16))
    return pipe, {**embeddings, "height": 16, "width": 16, "num_frames": 8}, {"output_type": "latent"}


def cogview4(scheduler):
    """A pipeline that gives its scheduler timesteps apart from the sigmas, which are shifted."""
    transformer = CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=16,
        condition_dim=8,
        pos_embed_max_size=8,
        rope_axes_dim=(8, 8),
    )
    pipe = CogView4Pipeline(None, None, None, transformer, scheduler)
    embeddings = random_embeddings(prompt_embeds=(1, 4, 16))
    return pipe, {**embeddings, "height": 64, "width": 64}, {"output_type": "latent"}


def ltx_conditioned(scheduler):
    """A video pipeline that gives ``step`` a timestep for each token, and the negative of its output."""
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=16,
    )
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        patch_size=1,
    )
    pipe = LTXConditionPipeline(scheduler, vae, None, None, transformer)
    call = {"prompt_embeds": torch.randn(1, 4, 16), "prompt_attention_mask": torch.ones(1, 4), "guidance_scale": 1.0}
    return pipe, {**call, "height": 64, "width": 64, "num_frames": 9}, {"output_type": "latent"}


def dit(scheduler):
    """A class-conditional pipeline; with guidance it concatenates a copy of its latents."""
    transformer = DiTTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    pipe = DiTPipeline(transformer.eval(), small_vae(), scheduler)
    return pipe, {"class_labels": [3, 7]}, {"output_type": "np"}


def latent_consistency():
    """A pipeline that takes two values from ``step``."""
    parts = {"vae": small_vae(), "unet": small_conditional_unet(time_cond_proj_dim=8), "scheduler": LCMScheduler()}
    pipe = assembled(LatentConsistencyModelPipeline, **parts, requires_safety_checker=False)
    return pipe, {"prompt_embeds": torch.randn(1, 4, 16)}, {"output_type": "np"}


def inpainting(scheduler, channels=9):
    """Inpainting by Stable Diffusion XL; its network gets the mask (9 channels) or does not (4)."""
    pipe, call, ending = stable_diffusion_xl(scheduler)
    pipe.unet.conv_in = torch.nn.Conv2d(channels, 8, 3, padding=1)
    pipe.unet.register_to_config(in_channels=channels)
    parts = {"vae": pipe.vae, "unet": pipe.unet, "scheduler": scheduler}
    made = assembled(StableDiffusionXLInpaintPipeline, **parts, add_watermarker=False)
    mask = torch.ones(1, 1, 16, 16)
    mask[:, :, :4, :4] = 0
    return made, {**call, "image": torch.rand(1, 3, 16, 16), "mask_image": mask, "height": 16, "width": 16}, ending


def latent_upscaler(scheduler):
    """A pipeline that preconditions its network itself, by the scale of the scheduler's states."""
    unet = small_conditional_unet(time_cond_proj_dim=2 * 64 + 16)
    unet.conv_in, unet.conv_out = torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.Conv2d(8, 5, 3, padding=1)
    unet.register_to_config(in_channels=8, out_channels=5)
    pipe = assembled(StableDiffusionLatentUpscalePipeline, vae=small_vae(), unet=unet, scheduler=scheduler)
    embeddings = random_embeddings(prompt_embeds=(2, 4, 16), pooled_prompt_embeds=(2, 16))
    return pipe, {**embeddings, "image": torch.randn(2, 4, 4, 4), "guidance_scale": 1.0}, {"output_type": "latent"}
