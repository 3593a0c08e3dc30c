"""A measurement of another call or of other weights of a pipeline is not taken for this one's."""

import threading

import pytest
import torch

import fastsched as fs

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers
import pipelines

from fastsched.diffusers.attributes import in_one_thread
from fastsched.diffusers.call_identity import call_identity

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
