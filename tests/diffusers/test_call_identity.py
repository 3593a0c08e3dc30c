"""A measurement of another call or of other weights of a pipeline is not taken for this one's."""

import threading

import pytest
import torch

import fastsched as fs

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers
import numpy as np
import pipelines

from fastsched.diffusers.attributes import in_one_thread
from fastsched.diffusers.pipelines.call_identity import call_identity

OPTIONS = {"levels": 8, "samples": 2, "keep_increments": True, "progress": False}


def pipeline():
    torch.manual_seed(0)
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    pipe, call, _ = pipelines.stable_diffusion(scheduler)
    pipe.set_progress_bar_config(disable=True)
    call.pop("guidance_scale", None)
    return pipe, call


def other_weights(pipe):
    for weight in pipe.unet.parameters():
        weight.data.mul_(1.3)
    return pipe


def test_a_checkpoint_of_another_call_is_refused(tmp_path):
    pipe, call = pipeline()
    file = tmp_path / "part.safetensors"
    stats = fs.diffusers.measure(pipe, **call, **OPTIONS, guidance_scale=5.0, checkpoint=file)
    again = fs.diffusers.measure(pipe, **call, **OPTIONS, guidance_scale=5.0, checkpoint=file)
    assert torch.equal(again.gram, stats.gram)
    embeddings = {name: value + 1 if isinstance(value, torch.Tensor) else value for name, value in call.items()}
    for changed in ({**call, "guidance_scale": 1.0}, {**embeddings, "guidance_scale": 5.0}):
        with pytest.raises(ValueError, match=r"part\.safetensors must be of this pipeline called with the same"):
            fs.diffusers.measure(pipe, **changed, **OPTIONS, checkpoint=file)
    with pytest.raises(ValueError, match=r"part\.safetensors must be of the same weights and adapters"):
        fs.diffusers.measure(other_weights(pipe), **call, **OPTIONS, guidance_scale=5.0, checkpoint=file)
    with pytest.raises(ValueError, match=r"part\.safetensors must be of weights in the same dtype"):
        fs.diffusers.measure(pipe.to(torch.bfloat16), **call, **OPTIONS, guidance_scale=5.0, checkpoint=file)


def test_statistics_of_another_call_are_refused():
    pipe, call = pipeline()
    stats = fs.diffusers.measure(pipe, **call, **OPTIONS)
    runs = {"model_calls": 40, "progress": False}
    assert fs.diffusers.fit(pipe, 3, stats=stats, **call, **runs).steps == 3
    with pytest.raises(ValueError, match="stats must be of this pipeline called with the same prompts and arguments"):
        fs.diffusers.fit(pipe, 3, stats=stats, **call, **runs, guidance_scale=9.0)
    with pytest.raises(ValueError, match="stats must be of the same weights and adapters"):
        fs.diffusers.fit(other_weights(pipe), 3, stats=stats, **call, **runs)


def test_what_counts_as_another_call():
    """Defaults count as given; what looks on, draws or decodes does not count, nor do weights in another dtype."""
    pipe, call = pipeline()
    known = call_identity(pipe, (), call)
    assert call_identity(pipe, (), {**call, "guidance_scale": 7.5}) == known
    assert call_identity(pipe, (), {**call, "callback_on_step_end": print}) == known
    assert call_identity(pipe, (), {**call, "generator": torch.Generator()}) == known
    assert call_identity(pipe, (), {**call, "guidance_rescale": 0.5}) != known
    assert call_identity(pipe, ("a cat",), call) != call_identity(pipe, ("a dog",), call)
    assert call_identity(pipe, (), {**call, "prompt": "a cat"}) == call_identity(pipe, ("a cat",), call)
    pipe.vae.to(torch.float16)
    assert call_identity(pipe, (), call) == known


def test_what_does_not_change_the_steps_does_not_count():
    """Numbers count by value, tensors as rounded to bfloat16; a measurement's noise is its own."""
    pipe, call = pipeline()
    call |= {"guidance_scale": 5.0}
    known = call_identity(pipe, (), call)
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    same = (
        *({"guidance_scale": kind(5)} for kind in (int, np.float64, np.float32, np.int64)),
        {"height": side, "width": side},
        {"latents": torch.randn(2, 4, 8, 8)},
    )
    for changed in same:
        assert call_identity(pipe, (), call | changed) == known
    assert call_identity(pipe, (), call | {"height": 2 * side}) != known
    pipe.text_encoder, pipe.image_encoder = torch.nn.Linear(3, 3), torch.nn.Linear(2, 2)  # not asked: all is encoded
    assert call_identity(pipe, (), call) == known
    for given in ({"negative_prompt": "ugly"}, {"ip_adapter_image": torch.zeros(1, 3, 8, 8)}):
        assert call_identity(pipe, (), call | given).split("-")[-1] != known.split("-")[-1]
    pipe.text_encoder = pipe.image_encoder = None
    rounded = {name: value.bfloat16() if isinstance(value, torch.Tensor) else value for name, value in call.items()}
    assert call_identity(pipe.to(torch.bfloat16), (), rounded).split("-")[:3] == known.split("-")[:3]


@pytest.mark.parametrize("family", ["stable_diffusion", "flux"])
def test_fused_projections_are_the_same_network(family):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler() if family == "flux" else pipeline()[0].scheduler
    pipe, call, _ = getattr(pipelines, family)(scheduler)
    network = pipe.transformer if family == "flux" else pipe.unet
    known, count = call_identity(pipe, (), call), len([*network.parameters()])
    network.fuse_qkv_projections()
    assert len([*network.parameters()]) > count
    assert call_identity(pipe, (), call) == known
    network.unfuse_qkv_projections()
    assert call_identity(pipe, (), call) == known


def test_what_a_library_notes_at_a_network_s_first_call_does_not_count():
    """As transformers notes on a text encoder that its hooks are set up."""
    pipe, call = pipeline()
    pipe.unet.register_forward_pre_hook(lambda network, _: setattr(network, "_capturing_set_up", True))
    assert fs.diffusers.fit(pipe, 3, levels=8, samples=2, model_calls=60, progress=False, **call).steps == 3
    del pipe.unet._capturing_set_up
    stats = fs.diffusers.measure(pipe, **call, **OPTIONS)
    assert fs.diffusers.fit(pipe, 3, stats=stats, **call, model_calls=40, progress=False).steps == 3


def test_the_guidance_of_numpy_is_told():
    pipe, call = pipeline()
    stats = fs.diffusers.measure(pipe, **call, **OPTIONS, guidance_scale=np.float32(5.0))
    assert stats.origin.guidance == 5.0


def test_latents_of_another_shape_are_not_those_of_a_checkpoint(tmp_path):
    pipe, call = pipeline()
    file = tmp_path / "part.safetensors"
    fs.diffusers.measure(pipe, **call, **OPTIONS, checkpoint=file)
    with pytest.raises(ValueError, match=r"latents must be of the shape \[4, 8, 8\] of the samples in .* \[4, 8, 16\]"):
        fs.diffusers.measure(pipe, **call, **OPTIONS, checkpoint=file, latents=torch.randn(2, 4, 8, 16))


def test_another_prediction_or_noise_process_is_refused(tmp_path):
    pipe, call = pipeline()
    file = tmp_path / "part.safetensors"
    stats = fs.diffusers.measure(pipe, **call, **OPTIONS, checkpoint=file)
    own, fitted = pipe.scheduler, {"stats": stats, "audition": False, "progress": False, **call}
    pipe.scheduler = type(own).from_config(own.config, prediction_type="v_prediction")
    with pytest.raises(ValueError, match="stats must be of the prediction that the pipeline's scheduler is set to"):
        fs.diffusers.fit(pipe, 3, **fitted)
    with pytest.raises(ValueError, match=r"part\.safetensors must be of the prediction"):
        fs.diffusers.measure(pipe, **call, **OPTIONS, checkpoint=file)
    for other in ({"beta_schedule": "linear"}, {"beta_schedule": "squaredcos_cap_v2"}, {"beta_end": 0.0125}):
        pipe.scheduler = type(own).from_config(own.config, **other)
        with pytest.raises(ValueError, match="stats are of another noise process than this model's: with other timest"):
            fs.diffusers.fit(pipe, 3, **fitted)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(own.config)  # of fractional timesteps
    assert fs.diffusers.fit(pipe, 3, **fitted).steps == 3


def test_other_settings_of_networks_are_refused(tmp_path):
    """FreeU, scales and choice of adapters; not what saves memory."""
    pipe, call = pipeline()
    file = tmp_path / "part.safetensors"
    stats = fs.diffusers.measure(pipe, **call, **OPTIONS, checkpoint=file)
    pipe.unet.enable_gradient_checkpointing()
    pipe.unet.eval()
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    with pytest.raises(
        ValueError, match=r"part\.safetensors must be of the same settings of the pipeline and its networks"
    ):
        fs.diffusers.measure(pipe, **call, **OPTIONS, checkpoint=file)
    with pytest.raises(ValueError, match="stats must be of the same settings"):
        fs.diffusers.fit(pipe, 3, stats=stats, **call, progress=False)
    pipe.disable_freeu()
    known = call_identity(pipe, (), call)
    assert known == stats.origin.fingerprint
    layer = next(part for part in pipe.unet.modules() if isinstance(part, torch.nn.Linear))
    for key, values in (("scaling", [{"a": 1.0}, {"a": 0.5}]), ("_active_adapter", [["a"], ["b"]])):
        found = set()
        for value in values:
            setattr(layer, key, value)
            found.add(call_identity(pipe, (), call))
        assert len(found | {known}) == 3


class Adapted(torch.nn.Module):
    """A layer with adapters, as those of PEFT."""

    def __init__(self, base_layer, *names):
        super().__init__()
        self.base_layer = base_layer
        torch.manual_seed(1)
        self.lora_A = torch.nn.ModuleDict({name: torch.nn.Linear(base_layer.in_features, 2) for name in names})
        self.scaling = dict.fromkeys(names, 1.0)
        self._active_adapter = [*names]
        self._disable_adapters, self.merged = False, False

    active_adapters = property(lambda self: self._active_adapter)
    disable_adapters = property(lambda self: self._disable_adapters)


def test_only_adapters_in_use_count():
    pipe, call = pipeline()
    attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    plain, layer = call_identity(pipe, (), call), attention.to_q

    def identity(*names, **settings):
        attention.to_q = Adapted(layer, *names)
        for name, value in settings.items():
            setattr(attention.to_q, name, value)
        return call_identity(pipe, (), call)

    known = identity("a")
    assert len({plain, known, identity("b"), identity("a", "b"), identity("a", scaling={"a": 0.5})}) == 5
    assert identity("a", "b", _active_adapter=["a"]) == known
    assert identity("a", "b", scaling={"a": 1.0, "b": 0.0}) == known
    off = {"_disable_adapters": True}, {"merged": True}, {"_active_adapter": []}, {"scaling": {"a": 0.0}}
    assert {identity("a", **each) for each in off} == {plain}
    pipe.unet.lora_scale = 1.0  # left by `fuse_lora`
    assert identity("a") == known


def test_another_guider_of_a_modular_pipeline_is_another_setting():
    pipe, call = pipeline()
    guider = diffusers.ClassifierFreeGuidance
    pipe.guider = guider(guidance_scale=5.0)
    known = call_identity(pipe, (), call)
    pipe.guider = guider(guidance_scale=5.0)
    assert call_identity(pipe, (), call) == known
    pipe.guider.guidance_scale = 12.0
    other = call_identity(pipe, (), call)
    pipe.guider = guider(guidance_scale=5.0)
    pipe.guider.disable()
    assert len({known, other, call_identity(pipe, (), call)}) == 3
    skip = diffusers.hooks.LayerSkipConfig
    layers = []
    for n in range(2):
        pipe.guider = diffusers.SkipLayerGuidance(skip_layer_config=skip(indices=[n], fqn="blocks"))
        layers.append(call_identity(pipe, (), call))
    assert layers[0] != layers[1]


def test_one_thread_at_a_time():
    pipe, call = pipeline()
    found = []

    def measure():
        try:
            fs.diffusers.measure(pipe, **call, **OPTIONS)
        except RuntimeError as error:
            found.append(str(error))

    with in_one_thread(pipe):
        other = threading.Thread(target=measure)
        other.start()
        other.join()
        assert fs.diffusers.measure(pipe, **call, **OPTIONS).samples == 2  # this thread may
    assert found == ["pipe is being measured or fitted in another thread; wait until that has ended"]
    measure()
    assert len(found) == 1


def test_a_solver_that_the_scheduler_does_not_use_is_warned_of():
    pipe, call = pipeline()
    stats = fs.diffusers.measure(pipe, **call, **OPTIONS)
    with pytest.warns(UserWarning, match="samples as ddim, and the schedule is chosen for dpmpp_2m"):
        fs.diffusers.fit(pipe, 3, solver="dpmpp_2m", stats=stats, audition=False, **call)


def test_a_network_that_is_compiled_as_a_module_is_the_same_one():
    pipe, call = pipeline()
    plain, network = call_identity(pipe, [], call), pipe.unet
    stats = fs.diffusers.measure(pipe, **call, **OPTIONS)
    pipe.unet = torch.compile(network, backend="eager")
    assert call_identity(pipe, [], call) == plain
    assert torch.equal(fs.diffusers.measure(pipe, **call, **OPTIONS).gram, stats.gram)
    assert fs.diffusers.fit(pipe, 3, stats=stats, **call, model_calls=40, progress=False).steps == 3


def test_weights_on_disk_between_calls_are_no_other_weights(tmp_path):
    pipe, call = pipeline()
    stats = fs.diffusers.measure(pipe, **call, **OPTIONS)
    cpu = torch.device("cpu")
    pipe.unet.enable_group_offload(
        onload_device=cpu, offload_device=cpu, offload_type="leaf_level", offload_to_disk_path=str(tmp_path)
    )
    for each in pipe.unet.parameters():
        each.data.fill_(torch.nan)  # they are loaded at each call
    offloaded = fs.diffusers.measure(pipe, **call, **OPTIONS)
    assert torch.equal(offloaded.gram, stats.gram)
    for known in (stats, offloaded):
        assert fs.diffusers.fit(pipe, 3, stats=known, **call, model_calls=40, progress=False).steps == 3
