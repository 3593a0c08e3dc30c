"""Adapters are part of what is measured: LoRA and IP-adapter on a random Stable Diffusion, up to its samples."""

import pytest
import torch

import fastsched as fs

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers
import pipelines

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEVELS, STEPS = 10, 4


@pytest.fixture
def pipe_and_call():
    torch.manual_seed(0)
    pipe, call, _ = pipelines.stable_diffusion(diffusers.DPMSolverMultistepScheduler(**SD))
    pipe.set_progress_bar_config(disable=True)
    return pipe, call


def measured_and_used(pipe, call):
    """The pipeline's statistics; its fitted schedule is applied and sampled with in between."""
    scheduler = pipe.scheduler
    stats = fs.diffusers.measure(pipe, levels=LEVELS, samples=2, **call)
    schedule = fs.diffusers.fit(pipe, STEPS, stats=stats, **call)
    assert schedule.measured_error is not None
    assert fs.diffusers.apply(schedule, pipe).exact
    images = pipe(**call, output_type="np").images
    assert len(images) == 2
    pipe.scheduler = scheduler
    return stats


def differ(stats, others):
    """Whether two measurements are of different networks; a repeated one is equal."""
    return float((stats.gram - others.gram).norm() / others.gram.norm()) > 1e-3


def load_random_ip_adapter(unet, size=8, tokens=4):
    """An IP-adapter of random weights, as `pipe.load_ip_adapter` builds it from a file; embeddings are [.., size]."""
    width = unet.config.cross_attention_dim
    projection = torch.nn.ModuleDict({"proj": torch.nn.Linear(size, tokens * width), "norm": torch.nn.LayerNorm(width)})
    crossing = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    weights = {}
    for n, name in enumerate(crossing):
        inner = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for part in ("to_k_ip", "to_v_ip"):
            weights[f"{2 * n + 1}.{part}.weight"] = torch.randn(inner, width)
    unet._load_ip_adapter_weights([{"image_proj": projection.state_dict(), "ip_adapter": weights}])


def test_an_ip_adapter_is_measured_with_its_pipeline(pipe_and_call):
    pipe, call = pipe_and_call
    without = measured_and_used(pipe, call)
    load_random_ip_adapter(pipe.unet)
    embeddings = [torch.randn(4, 1, 8)]  # of no image and of one, for each of the two prompts
    stats = measured_and_used(pipe, {**call, "ip_adapter_image_embeds": embeddings})
    assert differ(stats, without)
    pipe.set_ip_adapter_scale(0.0)
    off = fs.diffusers.measure(pipe, levels=LEVELS, samples=2, **call, ip_adapter_image_embeds=embeddings)
    assert not differ(off, without)


def test_a_lora_is_measured_with_its_pipeline(pipe_and_call):
    peft = pytest.importorskip("peft", reason="diffusers loads LoRA by peft, which is in no extra of fastsched")
    pipe, call = pipe_and_call
    without = measured_and_used(pipe, call)
    lora = peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    pipe.unet.add_adapter(lora)
    assert differ(measured_and_used(pipe, call), without)
    pipe.disable_lora()
    assert not differ(fs.diffusers.measure(pipe, levels=LEVELS, samples=2, **call), without)


@pytest.mark.parametrize("steps", [2, 12])
def test_a_t2i_adapter_in_a_window_of_steps_is_refused_by_name(steps):
    """The UNet empties the list of the adapter's features that it is given."""
    torch.manual_seed(0)
    base, call, _ = pipelines.stable_diffusion_xl(diffusers.EulerDiscreteScheduler(**SD))
    adapter = diffusers.T2IAdapter(3, [8, 16, 16, 16], 1, downscale_factor=4, adapter_type="full_adapter_xl")
    parts = {"vae": base.vae, "unet": base.unet, "scheduler": base.scheduler, "adapter": adapter}
    pipe = pipelines.assembled(diffusers.StableDiffusionXLAdapterPipeline, **parts)
    pipe.set_progress_bar_config(disable=True)
    call = {**call, "image": torch.rand(2, 3, 16, 16), "height": 16, "width": 16}
    assert fs.diffusers.measure(pipe, levels=12, samples=2, **call).samples == 2
    call["adapter_conditioning_factor"] = (steps + 0.5) / 24
    with pytest.raises(ValueError, match=r"unet\.down_intrablock_additional_residuals\.0 was different"):
        fs.diffusers.measure(pipe, levels=12, samples=2, **call)
