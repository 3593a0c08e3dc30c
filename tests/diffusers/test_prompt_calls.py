"""Pipelines are called as seldom as batching allows, encode their prompts once, and lose no finished sample."""

import itertools

import pytest
import torch

import fastsched as fs

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers
import pipelines
from pipelines import SHAPE, OracleUNet

from fastsched.diffusers.pipelines.prompt_calls import PromptCalls, prompts_encoded_once
from fastsched.measurement import memory

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PROMPTS = ["a cat", "a city at night", "a bowl of fruit", "rain"]


class TextPipeline(pipelines.OraclePipeline):
    """Takes one prompt or a list; counts calls and encodings.

    Attributes:
        batches: Images of each call.
        encoded: Prompts of each encoding.
        fails_above: The largest batch that fits into memory.
        interrupt: The call that is interrupted, and its step.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.batches, self.encoded, self.fails_above, self.interrupt = [], [], 100, None

    def encode_prompt(self, prompt, device=None, negative_prompt=None):
        prompts = [prompt] if isinstance(prompt, str) else prompt
        assert negative_prompt is None or len(negative_prompt) == len(prompts)
        self.encoded.append(tuple(prompts))
        return torch.tensor([[float(len(each))] for each in prompts])

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        num_inference_steps: int = 50,
        generator: object = None,
        guidance_scale: float = 1.0,
        latents: torch.Tensor | None = None,
        num_waveforms_per_prompt: int = 1,
    ):
        embeddings = self.encode_prompt(prompt, device=self.device, negative_prompt=negative_prompt)
        assert len(embeddings) == 1 or not embeddings.isnan().any()
        kept = embeddings.repeat_interleave(num_waveforms_per_prompt, 0)
        assert not isinstance(generator, list) or len(generator) == len(kept)
        assert latents is None or len(latents) == len(kept)
        embeddings.mul_(float("nan"))  # a pipeline may write into what it got
        self.batches.append(len(kept))
        if len(kept) > self.fails_above:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.scheduler.set_timesteps(num_inference_steps)
        x = diffusers.utils.torch_utils.randn_tensor((len(kept), *SHAPE), generator=generator) * getattr(
            self.scheduler, "init_noise_sigma", 1.0
        )
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            if self.interrupt == (len(self.batches), i):
                raise KeyboardInterrupt
            output = self.unet(
                getattr(self.scheduler, "scale_model_input", lambda x, t: x)(x, t), t.expand(len(x)), return_dict=False
            )[0]
            x = self.scheduler.step(output, t, x, return_dict=False)[0]
        return (x,)


def text_pipeline(seed=0):
    scheduler = diffusers.DPMSolverMultistepScheduler(**SD)
    oracle = fs.oracles.GaussianMixture.random(8, 3, seed=seed)
    return TextPipeline(OracleUNet().answer_for(scheduler, oracle), scheduler)


def measure(pipe, **options):
    return fs.diffusers.measure(pipe, **{"levels": 12, "prompts": PROMPTS, "progress": False, **options})


def same(one, other):
    assert torch.equal(one.seeds, other.seeds)
    torch.testing.assert_close(one.vector_gram, other.vector_gram, rtol=1e-4, atol=1e-4)


def test_a_fit_calls_the_pipeline_once_a_run_and_encodes_once():
    pipe = text_pipeline()
    schedule = fs.diffusers.fit(pipe, 8, prompts=PROMPTS, negative_prompt="ugly", progress=False)
    assert set(pipe.batches) == {4}
    assert pipe.encoded == [tuple(PROMPTS)]
    assert "encode_prompt" not in vars(pipe)
    # one call to measure; what is left of 800 model calls are 11 runs of four samples, nine calls each
    assert len(pipe.batches) <= 1 + (800 - 384) // (4 * 9)
    assert schedule.measured_error is not None
    few = text_pipeline()
    fs.diffusers.fit(few, 8, levels=24, samples=4, prompts=PROMPTS, model_calls=4 * 46 + 11 * 4 * 9, progress=False)
    assert len(few.batches) <= 12


def test_prompts_take_turns_whatever_the_calls():
    stats = [measure(text_pipeline(), prompts_per_call=size) for size in (None, 1, 3)]
    for other in stats[1:]:
        same(stats[0], other)
    for size, calls in ((None, [tuple(PROMPTS)]), (1, [(each,) for each in PROMPTS])):
        pipe = text_pipeline()
        measure(pipe, prompts_per_call=size)
        assert pipe.encoded == calls
    pipe = text_pipeline()
    measure(pipe, samples=6, prompts=PROMPTS[:2])
    assert pipe.encoded == [tuple(PROMPTS[:2] * 3)]
    with pytest.raises(ValueError, match="prompts_per_call must be at least 1"):
        measure(pipe, prompts_per_call=0)


@pytest.mark.parametrize("arguments", [{"latents": torch.zeros(1, *SHAPE)}, {"generator": [torch.Generator()]}])
def test_arguments_for_one_batch_are_not_given_to_a_larger_one(arguments):
    calls = PromptCalls.of(text_pipeline(), PROMPTS, arguments, None)
    assert calls.arguments(1, 4, arguments)["prompt"] == PROMPTS[1]
    assert PromptCalls.of(pipelines.oracle_pipeline(diffusers.DDIMScheduler()), PROMPTS, {}, None).size == 0


def test_arguments_of_as_many_entries_as_prompts_are_dealt_out():
    """Embeddings, generators and latents go with their prompts, and with each prompt's samples."""
    generators = [torch.Generator().manual_seed(n) for n in range(4)]
    rows = torch.arange(4.0)[:, None] * torch.ones(1, 3)
    given = {"generator": generators, "negative_prompt_embeds": rows, "latents": rows, "image": rows}
    asked = PromptCalls.of(text_pipeline(), PROMPTS, given | {"image": None}, 2).arguments(3, 4, given)
    assert asked["prompt"] == [PROMPTS[3], PROMPTS[0]]
    assert asked["generator"] == [generators[3], generators[0]]
    assert asked["negative_prompt_embeds"].tolist() == asked["latents"].tolist() == [[3.0] * 3, [0.0] * 3]
    assert asked["image"] is rows  # may be one prompt's
    alone = PromptCalls.of(text_pipeline(), PROMPTS, given, 2)
    assert alone.size == 0
    asked = alone.arguments(3, 4, given)
    assert asked["prompt"] == PROMPTS[3]
    assert asked["negative_prompt_embeds"].tolist() == [[3.0] * 3]
    two = {"num_waveforms_per_prompt": 2, "generator": [*generators, *generators], "latents": torch.zeros(8, *SHAPE)}
    asked = PromptCalls.of(text_pipeline(), PROMPTS, two, 1).arguments(6, 4, two)
    assert asked["prompt"] == [PROMPTS[3]]
    assert asked["generator"] == generators[2:]
    assert len(asked["latents"]) == 2
    whole = measure(text_pipeline())
    for size in (None, 1):
        given = {"generator": generators, "latents": torch.zeros(4, *SHAPE), "prompts_per_call": size}
        same(measure(text_pipeline(), **given), whole)
    one = {"prompts": None, "prompt": PROMPTS, "generator": generators}  # the pipeline's own list is not dealt
    same(measure(text_pipeline(), **one), whole)


def test_each_prompt_makes_its_samples_also_after_a_resumption(tmp_path):
    """Samples 2 and 3 are of the second prompt, whichever were made before, and in whatever call."""
    options = {"samples": 8, "prompts_per_call": 1, "num_waveforms_per_prompt": 2}
    path, pipe = tmp_path / "part.safetensors", text_pipeline()
    pipe.interrupt = (2, 5)
    with pytest.raises(KeyboardInterrupt):
        measure(pipe, **options, checkpoint=path)
    pipe.interrupt, pipe.encoded = None, []
    measure(pipe, **options, checkpoint=path)
    assert pipe.encoded == [(prompt,) for prompt in PROMPTS[1:]]
    begun = {"num_waveforms_per_prompt": 2, "prompts_per_call": 4}
    pipe = text_pipeline()
    stats = measure(pipe, samples=range(3, 8), **begun)
    assert stats.samples == 5
    assert pipe.encoded == [(PROMPTS[1],), tuple(PROMPTS[2:])]
    pipe.encoded = []
    fs.diffusers.fit(pipe, 4, stats=stats, prompts=PROMPTS, model_calls=400, progress=False, **begun)
    assert {(PROMPTS[1],), tuple(PROMPTS[2:])} <= set(pipe.encoded)


def test_a_prompt_that_makes_several_samples_is_alone_in_its_call():
    """Beside others many pipelines mistake its attention mask: they repeat masks in turn, and embeddings in place."""
    pipe = text_pipeline()
    stats = measure(pipe, num_waveforms_per_prompt=2)
    assert pipe.encoded == [(prompt,) for prompt in PROMPTS]
    assert pipe.batches == [2] * 4
    fs.diffusers.fit(pipe, 4, stats=stats, prompts=PROMPTS, model_calls=40, num_waveforms_per_prompt=2, progress=False)
    assert set(pipe.batches) == {2}


def test_where_memory_runs_out_fewer_prompts_are_given_in_a_call():
    whole, pipe = measure(text_pipeline()), text_pipeline()
    pipe.fails_above = 1
    with pytest.warns(UserWarning, match="memory ran out: the pipeline is called with") as caught:
        same(measure(pipe), whole)
    assert [str(each.message)[-20:] for each in caught] == ["(prompts_per_call=2)", "(prompts_per_call=1)"]
    assert pipe.batches == [4, 2, 1, 1, 1, 1]
    pipe.fails_above = 0
    with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning, match="memory ran out"):
        measure(pipe)


def test_memory_that_is_predicted_not_to_suffice_is_not_asked_for(monkeypatch):
    """Fewer prompts a call are measured where they fit; where none do, the error comes before the measurement."""
    monkeypatch.setattr(memory, "free_bytes", lambda device: 40_000)  # an image takes 15,500
    with pytest.warns(UserWarning, match="memory ran out") as caught:
        measure(text_pipeline())
    assert [str(each.message)[-20:] for each in caught] == ["(prompts_per_call=2)"]
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10_000)
    pipe = text_pipeline()
    with (
        pytest.raises(
            MemoryError, match=r"not enough memory: measuring 1 images .* lower prompts_per_call or the images"
        ),
        pytest.warns(UserWarning, match="memory ran out"),
    ):
        measure(pipe)


def test_encodings_that_hold_tensors_are_made_each_time():
    pipe = text_pipeline()
    with prompts_encoded_once(pipe), prompts_encoded_once(pipe):
        for _ in range(2):
            pipe.encode_prompt("a", device=pipe.device)
            pipe.encode_prompt("a", device=torch.zeros(1))
    assert len(pipe.encoded) == 3


def test_negative_prompts_go_with_their_prompts():
    """As a list they are dealt out with the prompts, whatever a call takes."""
    ugly = [f"ugly {prompt}" for prompt in PROMPTS]
    calls = PromptCalls.of(text_pipeline(), PROMPTS, {}, 2)
    asked = calls.arguments(3, 4, {"negative_prompt": ugly, "guidance_scale": 2.0})
    assert asked == {
        "prompt": [PROMPTS[3], PROMPTS[0]],
        "negative_prompt": [ugly[3], ugly[0]],
        "guidance_scale": 2.0,
    }
    whole = measure(text_pipeline(), samples=6, negative_prompt=ugly)
    assert whole.samples == 6


def test_an_interrupt_hands_back_what_was_finished_and_a_checkpoint_goes_on(tmp_path):
    whole = measure(text_pipeline(), prompts_per_call=1, keep_increments=True)
    pipe = text_pipeline()
    pipe.interrupt = (3, 5)
    with pytest.warns(UserWarning, match="hold the 2 paths that were finished"):
        partial = measure(pipe, prompts_per_call=1)
    assert torch.equal(partial.vector_gram, whole.vector_gram[:2])
    path, pipe = tmp_path / "part.safetensors", text_pipeline()
    pipe.interrupt = (3, 5)
    options = {"prompts_per_call": 1, "keep_increments": True, "checkpoint": path}
    with pytest.raises(KeyboardInterrupt):
        measure(pipe, **options)
    pipe.interrupt = None
    found = measure(pipe, **options)
    assert len(pipe.batches) == 3 + 2
    for name in ("vector_gram", "ends", "increments", "responses"):
        assert torch.equal(getattr(found, name), getattr(whole, name))
    assert torch.equal(measure(pipe, **options).seeds, whole.seeds)
    assert len(pipe.batches) == 5
    with pytest.raises(ValueError, match=r"measured with other levels \(12 of them\)"):
        measure(pipe, **{**options, "levels": 13})
    with pytest.raises(ValueError, match="another seed"):
        measure(pipe, **options, seed=1)
    fitted = fs.diffusers.fit(pipe, 4, levels=12, prompts=PROMPTS, checkpoint=path, model_calls=160, progress=False)
    assert fitted.steps == 4
    assert pipe.batches[5:] == [4] * len(pipe.batches[5:])  # only runs of schedules
    assert len(pipe.batches) > 5


@pytest.mark.parametrize(("call", "message"), [(3, "for the 2 paths that were finished"), (11, "best of the")])
def test_an_interrupted_fit_hands_back_a_schedule(call, message, tmp_path, monkeypatch):
    """In the third of the four calls that measure, and in a later one that runs a schedule."""
    options = {"levels": 8, "samples": 4, "prompts": PROMPTS, "model_calls": 200, "prompts_per_call": 1}
    pipe = text_pipeline()
    pipe.interrupt, warned = (call, 2), []
    monkeypatch.setattr(fs.validate, "warn", warned.append)
    assert fs.diffusers.fit(pipe, 4, **options).steps == 4
    assert [message in each for each in warned] == [True]
    for interrupt, where in ((1, None), (call, tmp_path / "fit.safetensors")):
        pipe = text_pipeline()
        pipe.interrupt = (interrupt, 2)
        with pytest.raises(KeyboardInterrupt):
            fs.diffusers.fit(pipe, 4, checkpoint=where, **options)


@pytest.mark.parametrize(("count", "asked", "levels"), [(16, None, 24), (16, 800, 14), (6, None, 32)])
def test_a_fit_with_many_prompts_uses_all_of_them(count, asked, levels, monkeypatch):
    pipe, prompts = text_pipeline(), [f"prompt {n}" for n in range(count)]
    warned, steps = [], []
    monkeypatch.setattr(fs.validate, "warn", warned.append)
    schedule = fs.diffusers.fit(
        pipe, 4, prompts=prompts, model_calls=asked, progress=lambda done, total: steps.append((done, total))
    )
    assert pipe.encoded == [tuple(prompts)]
    assert set(pipe.batches) == {count}
    assert steps[0] == (count, 2 * levels * count)
    limit = asked or max(800, 100 * count)
    assert count * (2 * levels + 5 * (len(pipe.batches) - 1)) <= limit
    assert len(pipe.batches) > 2
    assert schedule.measured_error is not None
    assert warned == (
        []
        if limit == 800
        else [
            "every prompt is measured, so this fit takes up to 1,600 model calls instead of 800 (16 samples at least); "
            "pass fewer prompts, or set model_calls"
        ]
    )


def test_a_pipelines_runs_are_kept(tmp_path):
    path, pipe = tmp_path / "fit.safetensors", text_pipeline()
    options = {"levels": 12, "samples": 4, "prompts": PROMPTS, "model_calls": 300, "progress": False}
    whole = fs.diffusers.fit(pipe, 4, checkpoint=path, **options)
    first = len(pipe.batches)
    assert first > 4  # a measurement, candidates, and tuning
    again = fs.diffusers.fit(pipe, 4, checkpoint=path, **options)
    assert len(pipe.batches) == first  # nothing was run again
    assert torch.equal(again.sigmas, whole.sigmas)
    assert again.measured_error == whole.measured_error
    with pytest.raises(ValueError, match="model_calls"):
        fs.diffusers.fit(pipe, 4, checkpoint=path, **{**options, "model_calls": 280})
    with pytest.raises(ValueError, match="with 4 samples, not 6"):  # which would leave the runs without a measurement
        fs.diffusers.fit(pipe, 4, checkpoint=path, **{**options, "samples": 6})
    assert len(pipe.batches) == first


def test_ranges_of_samples_merge_to_the_whole():
    whole = measure(text_pipeline(), samples=6)
    parts = [measure(text_pipeline(), samples=which, prompts_per_call=2) for which in (range(3), range(3, 6))]
    assert [part.samples for part in parts] == [3, 3]
    same(parts[0].merge(parts[1]), whole)


def test_one_bar_over_all_calls(capsys):
    pipe = text_pipeline()
    measure(pipe, prompts_per_call=1, progress=True)
    shown = capsys.readouterr().err
    assert "measuring: 100%" in shown
    assert f"{4 * 24}/{4 * 24}" in shown  # 24 steps a call
    assert not hasattr(pipe, "_progress_bar_config")
    pipe.set_progress_bar_config(desc="own")
    measure(pipe, prompts_per_call=1, progress=True)
    assert "own" not in capsys.readouterr().err
    assert pipe._progress_bar_config == {"desc": "own"}
    assert [len(list(group)) for _, group in itertools.groupby(pipe.batches)] == [8]


def test_a_function_hears_the_steps_of_all_calls(capsys):
    heard = []
    measure(text_pipeline(), prompts_per_call=1, progress=lambda done, total: heard.append((done, total)))
    assert [done for done, _ in heard] == list(range(1, 4 * 24 + 1))
    assert {total for _, total in heard} == {4 * 24}
    assert capsys.readouterr().err == ""  # nor the pipeline's own bar


@pytest.mark.parametrize("asked", [2, 4, range(3, 6)])
def test_a_checkpoint_of_other_samples_is_not_taken_for_the_first_ones(asked, tmp_path):
    file = tmp_path / "checkpoint.safetensors"
    measure(text_pipeline(), samples=range(4, 6), prompts=PROMPTS[:2], checkpoint=file)
    with pytest.raises(ValueError, match="holds other samples than the first 2 of this measurement"):
        measure(text_pipeline(), samples=asked, prompts=PROMPTS[:2], checkpoint=file)
    again = text_pipeline()
    assert measure(again, samples=range(4, 6), prompts=PROMPTS[:2], checkpoint=file).samples == 2
    assert not again.batches


def test_a_fit_counts_a_sample_for_each_prompt_among_its_calls():
    pipe = text_pipeline()
    with pytest.raises(ValueError, match="measuring takes 80 model calls and model_calls allows 79 in all"):
        fs.diffusers.fit(pipe, 3, prompts=PROMPTS, levels=10, samples=2, model_calls=79)
    assert pipe.batches == []
    schedule = fs.diffusers.fit(pipe, 3, prompts=PROMPTS, levels=10, samples=2, model_calls=120)
    assert 80 < schedule.origin.model_calls <= 120
    assert fs.diffusers.fit(pipe, 3, prompts=PROMPTS, levels=10, samples=2, model_calls=79, audition=False).steps == 3
