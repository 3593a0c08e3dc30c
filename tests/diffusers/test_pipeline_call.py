"""One call of a pipeline: how it ends, which arguments it may have, and what it makes of its latents."""

import numpy as np
import pytest
import torch

import fastsched as fs

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers
import pipelines
from pipelines import SHAPE, OraclePipeline, OracleUNet, oracle_pipeline

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def mixture(seed=0):
    return fs.oracles.GaussianMixture.random(8, 3, seed=seed)


def with_output_types(which, early):
    """A pipeline with these output types alone, which it checks before or after its steps."""

    class Particular(OraclePipeline):
        @torch.no_grad()
        def __call__(self, num_inference_steps=50, output_type="np", prompt=None):
            self.types.append(output_type)
            if early and output_type not in which:
                raise ValueError(f"output_type must be one of {which}")
            latents = super().__call__(prompt, num_inference_steps)
            if output_type not in which:
                raise ValueError(f"output_type must be one of {which}")
            return latents

    scheduler = diffusers.EulerDiscreteScheduler(**SD)
    pipe = Particular(OracleUNet().answer_for(scheduler, mixture()), scheduler)
    pipe.types = []
    return pipe


@pytest.mark.parametrize("early", [True, False])
def test_a_pipeline_that_cannot_leave_its_latents_is_measured_and_fitted(early):
    pipe = with_output_types(("np", "pt"), early)
    settings = {"levels": 8, "samples": 2, "progress": False}
    stats = fs.diffusers.measure(pipe, **settings)
    assert pipe.types == (["latent", "np"] if early else ["latent"])
    plain = oracle_pipeline(diffusers.EulerDiscreteScheduler(**SD), mixture())
    assert torch.equal(stats.gram, fs.diffusers.measure(plain, **settings).gram)
    found, expected = (fs.diffusers.fit(each, 4, model_calls=100, **settings) for each in (pipe, plain))
    assert torch.equal(found.sigmas, expected.sigmas)
    assert found.measured_error == expected.measured_error


class Caching(OraclePipeline):
    """Fills a cache in its first step, as Qwen-Image 2.1, unless it is told not to."""

    @torch.no_grad()
    def __call__(self, num_inference_steps=50, output_type="latent", use_kv_cache=True):
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(2, *SHAPE) * getattr(self.scheduler, "init_noise_sigma", 1.0)
        for i, t in enumerate(self.scheduler.timesteps):
            mode = ("cached" if i else "extract") if use_kv_cache else None
            given = self.scheduler.scale_model_input(latents, t)
            options = {"img_ids": torch.zeros(4 if mode == "extract" else 2), "kv_cache_mode": mode}
            latents = self.scheduler.step(self.unet(given, t, **options)[0], t, latents).prev_sample
        return latents


def test_a_pipeline_is_measured_and_fitted_without_a_cache_that_its_first_step_fills():
    scheduler = diffusers.EulerDiscreteScheduler(**SD)
    pipe = Caching(OracleUNet().answer_for(scheduler, mixture()), scheduler)
    stats = fs.diffusers.measure(pipe, levels=8, samples=2)
    assert torch.equal(
        stats.gram, fs.diffusers.measure(oracle_pipeline(scheduler, mixture()), levels=8, samples=2).gram
    )
    assert fs.diffusers.fit(pipe, 4, stats=stats, model_calls=16).measured_error is not None
    with pytest.raises(ValueError, match=r"kv_cache_mode was different.*a cache"):
        fs.diffusers.measure(pipe, levels=8, samples=2, use_kv_cache=True)


class NeedingCache(OraclePipeline):
    """Cannot do without its cache, as AnyFlow's frames in turn."""

    @torch.no_grad()
    def __call__(self, num_inference_steps=50, use_kv_cache=True):
        _answer, _cache = (0, {}) if use_kv_cache else (0,)
        return super().__call__(num_inference_steps=num_inference_steps)


def test_a_pipeline_that_needs_its_cache_is_measured_with_it():
    scheduler = diffusers.EulerDiscreteScheduler(**SD)
    pipe = NeedingCache(OracleUNet().answer_for(scheduler, mixture()), scheduler)
    plain = oracle_pipeline(scheduler, mixture())
    assert torch.equal(*(fs.diffusers.measure(each, levels=8, samples=2).gram for each in (pipe, plain)))


class OwnList(OraclePipeline):
    """Has a list of sigmas of its own, as Qwen-Image 2.1 may have in its config."""

    def __call__(self, num_inference_steps=50, steps=8, output_type="latent"):
        return super().__call__(sigmas=torch.linspace(1, 0.1, steps).tolist())


@pytest.mark.parametrize(("levels", "steps"), [(24, 8), (9, 8), (torch.linspace(3, 0.1, 12), 8), (24, 5)])
def test_a_pipeline_that_makes_another_number_of_steps_is_refused(levels, steps):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = OwnList(OracleUNet().answer_for(scheduler, mixture()), scheduler)
    with pytest.raises(ValueError, match=f"{steps}( steps where it is called with|: ).*a list of its own"):
        fs.diffusers.measure(pipe, levels=levels, samples=2, steps=steps)
    assert fs.diffusers.measure(pipe, levels=4, samples=2, steps=8).levels == 4


class GuidanceOfEachStep(OraclePipeline):
    """Has a list with an entry for each of 48 steps as a default, as Ideogram 4."""

    def __call__(self, num_inference_steps=48, guidance_scale=None, guidance_schedule=(7.0,) * 48, output_type="pil"):
        if guidance_schedule is not None and len(guidance_schedule) != num_inference_steps:
            raise ValueError("`guidance_schedule` must have length `num_inference_steps`")
        return super().__call__(num_inference_steps=num_inference_steps)


def test_a_list_for_each_step_is_refused_with_what_would_do():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = GuidanceOfEachStep(OracleUNet().answer_for(scheduler, mixture()), scheduler)
    with pytest.raises(ValueError, match=r"than the 16 that are needed here \(`guid.*guidance_schedule=None\)"):
        fs.diffusers.measure(pipe, levels=8, samples=2)
    constant = {"guidance_scale": 7.0, "guidance_schedule": None}
    assert fs.diffusers.fit(pipe, 4, levels=8, samples=2, model_calls=80, **constant).measured_error is not None


class AsBefore(OraclePipeline):
    """Asks for as many steps as its scheduler has made before, as LEDITS++ to edit an image that it has inverted."""

    def __call__(self, num_inference_steps=50, output_type="latent"):
        return super().__call__(num_inference_steps=len(self.scheduler.timesteps))


def test_a_pipeline_that_goes_on_from_an_earlier_call_is_refused():
    scheduler = diffusers.DDIMScheduler(**SD, clip_sample=False)
    scheduler.set_timesteps(16)
    pipe = AsBefore(OracleUNet().answer_for(scheduler, mixture()), scheduler)
    with pytest.raises(ValueError, match=r"the steps of an earlier call, .*measure the text-to-image pipeline"):
        fs.diffusers.measure(pipe, levels=8, samples=2)


def test_an_output_type_that_was_asked_for_is_not_changed():
    pipe = with_output_types(("np", "pt"), early=True)
    with pytest.raises(ValueError, match="output_type must be one of"):
        fs.diffusers.measure(pipe, levels=8, samples=2, output_type="pil")
    assert pipe.types == ["pil"]


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (pipelines.stable_diffusion, {"eta": torch.tensor(0.5)}, "eta must be 0, because it adds noise"),
        (pipelines.stable_diffusion_xl, {"denoising_end": 0.8}, "denoising_end must be left out, .* got 0.8"),
        (pipelines.stable_diffusion_xl, {"denoising_end": np.float32(0.5)}, "denoising_end must be left out"),
    ],
)
def test_arguments_that_change_the_steps_are_refused_by_name(build, arguments, message):
    pipe, call, _ = build(diffusers.DDIMScheduler(clip_sample=False, **SD))
    for function in (fs.diffusers.measure, lambda pipe, **call: fs.diffusers.fit(pipe, 4, **call)):
        with pytest.raises(ValueError, match=message):
            function(pipe, **call, **arguments)


def test_an_error_before_the_last_step_is_raised():
    def fail(i, output):
        if i == 15:
            raise ValueError("no more")
        return output

    pipe = oracle_pipeline(diffusers.EulerDiscreteScheduler(**SD), mixture())
    with pytest.raises(ValueError, match="no more"):
        fs.diffusers.measure(pipe, levels=8, samples=2, on_step=fail)


def test_a_callback_that_needs_what_a_measurement_lacks_is_told_so():
    pipe = oracle_pipeline(diffusers.EulerDiscreteScheduler(**SD), mixture())
    with pytest.raises(ValueError, match=r"or its callback, needs .*'step_index'\); leave the callback out"):
        fs.diffusers.measure(pipe, levels=8, samples=2, on_step=lambda i, output: output * pipe.scheduler.step_index)


class Singing(OraclePipeline):
    """Takes a list of lyrics with a list of prompts, as ACE-Step."""

    def __call__(self, prompt: str | list[str] = "", lyrics: str | list[str] = "", num_inference_steps=50):
        texts = [[each] if isinstance(each, str) else each for each in (prompt, lyrics)]
        assert all(texts[1][n] is not None for n in range(len(texts[0])))
        return super().__call__(prompt, num_inference_steps, images=len(texts[0]))


def test_a_call_that_fails_with_several_prompts_is_told_to_take_one():
    scheduler = diffusers.EulerDiscreteScheduler(**SD)
    pipe = Singing(OracleUNet().answer_for(scheduler, mixture()), scheduler)
    settings = {"levels": 8, "samples": 2, "prompts": ["techno", "jazz"]}
    with pytest.raises(ValueError, match=r"with 2 prompts \(list index out of range\).*prompts_per_call=1"):
        fs.diffusers.measure(pipe, **settings)
    assert fs.diffusers.measure(pipe, **settings, prompts_per_call=1).samples == 2


@pytest.mark.parametrize("given", [{"prompts": ["a", "b"]}, {"prompt": "a"}, {"negative_prompt": "a"}])
def test_a_text_beside_its_embeddings_is_refused_without_their_numbers(given):
    pipe, call, _ = pipelines.stable_diffusion(diffusers.EulerDiscreteScheduler())
    name = next(iter(given)).replace("prompts", "prompt")
    with pytest.raises(ValueError, match=f"takes {name}.* or {name}_embeds, not both") as caught:
        fs.diffusers.measure(pipe, levels=4, samples=2, progress=False, **call, **given)
    assert "tensor" not in str(caught.value)


def test_latents_of_fewer_samples_than_the_prompts_are_refused_by_name():
    """FLUX takes them: the state becomes that of all prompts at the first step."""
    pipe, call, _ = pipelines.flux(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    own = {"levels": 8, "samples": 2, "keep_increments": True, "progress": False}
    stats = fs.diffusers.measure(pipe, **call, **own)
    call["latents"] = torch.randn(1, *stats.shape)
    message = "an output for 2 samples, but latents of 1: pass latents for all prompts"
    with pytest.raises(ValueError, match=message):
        fs.diffusers.measure(pipe, **call, **own)
    with pytest.raises(ValueError, match=message):
        fs.diffusers.fit(pipe, 3, stats=stats, **call, progress=False)


@pytest.mark.parametrize("latents", [torch.randn(3, 4, 8, 8), torch.randn(2, 4, 8, 8).double(), [[0.0]]])
def test_latents_that_a_pipeline_cannot_use_are_named(latents):
    pipe, call, _ = pipelines.stable_diffusion(diffusers.EulerDiscreteScheduler())
    with pytest.raises(ValueError, match=r"failed before its first step with latents .*Leave latents out"):
        fs.diffusers.measure(pipe, levels=4, samples=2, progress=False, latents=latents, **call)


def test_memory_that_runs_out_is_not_put_down_to_the_latents():
    pipe, call, _ = pipelines.stable_diffusion(diffusers.EulerDiscreteScheduler())

    def run_out(*_):
        raise torch.OutOfMemoryError("no memory is left")

    pipe.unet.register_forward_pre_hook(run_out)
    with pytest.raises(torch.OutOfMemoryError):
        fs.diffusers.measure(pipe, levels=4, samples=2, progress=False, latents=torch.randn(2, 4, 8, 8), **call)


def test_an_empty_prompt_is_a_prompt():
    pipe = oracle_pipeline(diffusers.EulerDiscreteScheduler(**SD), mixture())
    assert fs.diffusers.measure(pipe, levels=8, samples=2, prompts="").samples == 2
    assert set(pipe.prompts) == {""}
    with pytest.raises(ValueError, match="prompts must hold at least one prompt"):
        fs.diffusers.measure(pipe, levels=8, samples=2, prompts=[])


def test_a_misspelt_argument_of_a_call_that_takes_any_is_refused():
    torch.manual_seed(0)
    pipe, call, _ = pipelines.stable_diffusion(diffusers.EulerDiscreteScheduler(**SD))
    calls = []
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(TypeError, match="has no argument 'guidance'; did you mean 'guidance_scale'"):
        fs.diffusers.measure(pipe, levels=8, samples=2, guidance=3, **call)
    assert not calls
    settings = {"levels": 8, "samples": 2, "progress": False}
    with pytest.warns(UserWarning, match="has no argument 'colour' and may ignore it; it has prompt"):
        fs.diffusers.measure(pipe, colour="red", **settings, **call)
    with pytest.warns(FutureWarning, match="callback_steps"):  # of diffusers, which knows it, and none of fastsched
        fs.diffusers.measure(pipe, callback_steps=1, **settings, **call)


def modular_pipeline():
    """A modular pipeline of one block within another, whose class takes any argument."""
    modular = diffusers.modular_pipelines
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()

    class Loop(modular.ModularPipelineBlocks):
        """The loop of all pipelines."""

        progress_bar = modular.LoopSequentialPipelineBlocks.progress_bar

        @property
        def expected_components(self):
            kinds = {"unet": OracleUNet, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler}
            return [modular.ComponentSpec(name, kind) for name, kind in kinds.items()]

        @property
        def inputs(self):
            defaults = {"prompt": None, "height": 8, "num_inference_steps": 6, "strength": 0.3, "output_type": "pil"}
            return [modular.InputParam(name, default=default) for name, default in defaults.items()]

        @torch.no_grad()
        def __call__(self, components, state):
            given = self.get_block_state(state)
            calls.append((given.strength, given.output_type))
            components.scheduler.set_timesteps(given.num_inference_steps)
            latents = torch.randn(2, *SHAPE)
            for t in self.progress_bar(components.scheduler.timesteps):
                output = components.unet(latents, t, return_dict=False)[0]
                latents = components.scheduler.step(output, t, latents, return_dict=False)[0]
            return components, state

    calls = []
    pipe = modular.SequentialPipelineBlocks.from_blocks_dict({"denoise": Loop}).init_pipeline()
    pipe.update_components(unet=OracleUNet().answer_for(scheduler, mixture()), scheduler=scheduler)
    return pipe, calls


def test_the_arguments_of_a_modular_pipeline_are_those_of_its_blocks(recwarn):
    pipe, calls = modular_pipeline()
    settings = {"levels": 8, "samples": 2, "progress": False}
    stats = fs.diffusers.measure(pipe, height=8, prompts=["a", "b"], **settings)
    assert not [str(each.message) for each in recwarn if "has no argument" in str(each.message)]
    assert set(calls) == {(1.0, "latent")}
    for name, hint in (("hight", "did you mean 'height'"), ("guidance_scale", "it has .*prompt, height")):
        with pytest.raises(TypeError, match=f"ModularPipeline has no argument '{name}'; {hint}"):
            fs.diffusers.measure(pipe, **{name: 3}, **settings)
    schedule = fs.diffusers.fit(
        pipe, 3, stats=stats, prompts=["a", "b"], model_calls=20, progress=False
    )  # 8 is the default
    assert schedule.steps == 3


def test_one_bar_in_place_of_those_of_the_blocks_of_a_modular_pipeline(capsys):
    pipe, calls = modular_pipeline()
    loop = pipe._blocks.sub_blocks["denoise"]
    loop._progress_bar_config = {"desc": "own"}
    fs.diffusers.measure(pipe, levels=8, samples=4)
    shown = capsys.readouterr().err
    assert len(calls) == 2
    assert "measuring: 100%" in shown
    assert "own" not in shown
    assert loop._progress_bar_config == {"desc": "own"}


def test_a_modular_pipeline_that_is_not_loaded_says_how():
    pipe, _ = modular_pipeline()
    pipe.update_components(scheduler=None)
    with pytest.raises(TypeError, match=r"whose scheduler is not loaded; call pipe\.load_components\(\)"):
        fs.diffusers.measure(pipe, levels=8, samples=2, progress=False)


def test_a_modular_pipeline_is_profiled():
    pipe, _ = modular_pipeline()
    assert fs.profile(pipe, steps=3).own_steps == 6


def test_a_pipeline_without_a_default_number_of_steps_is_profiled():
    class Eight(OraclePipeline):
        @torch.no_grad()
        def __call__(self, num_inference_steps=None):
            return super().__call__(num_inference_steps=num_inference_steps or 8)

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = Eight(OracleUNet().answer_for(scheduler, mixture()), scheduler)
    state = torch.get_rng_state()
    assert fs.profile(pipe, steps=3).own_steps == 8
    assert torch.equal(torch.get_rng_state(), state)


class Passing(diffusers.StableDiffusionPipeline):
    """A pipeline of the user's own, which passes on what it is called with."""

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


def test_a_call_that_passes_on_its_arguments_has_those_of_the_call_that_it_overrides(recwarn):
    pipe, call, _ = pipelines.stable_diffusion(diffusers.EulerDiscreteScheduler())
    made = Passing(**pipe.components, requires_safety_checker=False)
    decoded = []
    made.vae.decode = lambda *_, **__: decoded.append(1)
    found = [fs.diffusers.measure(each, levels=4, samples=2, **call) for each in (pipe, made)]
    assert torch.equal(found[0].gram, found[1].gram)
    assert not decoded
    assert not [each for each in recwarn if "has no argument" in str(each.message)]
    with pytest.raises(TypeError, match="no argument 'guidance_scal'; did you mean 'guidance_scale'"):
        fs.diffusers.measure(made, levels=4, samples=2, guidance_scal=3.0, **call)


@pytest.mark.parametrize("after", [0, 3])
def test_stop_iteration_is_named(after):
    """Raised in a generator, as the loop of a program may be, it would end the loop as if its data had ended."""
    pipe, items = oracle_pipeline(diffusers.EulerDiscreteScheduler(**SD), mixture()), iter(range(after))
    pipe.unet.register_forward_hook(lambda *_: [next(items), None][1])
    with pytest.raises(RuntimeError, match="the pipeline raised StopIteration"):
        fs.diffusers.measure(pipe, levels=8, samples=2, progress=False)
